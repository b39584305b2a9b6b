"""What a user may hand over as a picture -> what CLIP's image processor takes: RGB pictures, or arrays of floats."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from qlip.core.images import ImageLimits, ImageRejected, array_to_rgb, check_size, open_image, upright_rgb

LIMITS = ImageLimits()
LAYOUTS = {"channels_first": (0,), "channels_last": (2,)}
"""Where the channels are, in transformers' words."""


def pictures_from(images: Any, *, layout: str | None = None) -> list[Image.Image | np.ndarray]:
    """One picture, a batch or any nesting of lists -> pictures as CLIP's image processor takes them.

    Raises `ImageRejected`, with its position as a note, and `ValueError` when there is no picture.
    """
    pictures = []
    for index, source in enumerate(_flat(images)):
        try:
            pictures.append(picture_from(source, layout=layout))
        except ImageRejected as error:
            error.add_note(f"images[{index}]")
            raise
    if not pictures:
        raise ValueError("images is an empty list; give at least one picture, or no images at all")
    return pictures


def _flat(images: Any) -> Iterator[Any]:
    batch = isinstance(images, Tensor | np.ndarray) and images.ndim == 4
    if batch or isinstance(images, list | tuple):
        for image in images:
            yield from _flat(image)
    else:
        yield images


def picture_from(source: Any, *, layout: str | None = None) -> Image.Image | np.ndarray:
    """A picture from outside -> RGB picture, or (3, h, w) array if it is a float array or tensor.

    Arrays and tensors are (h, w), (channels, h, w) or (h, w, channels); `layout` is "channels_first" or
    "channels_last", without it the axis of 3 or 4 is the channels, then that of 1, and where both fit numpy's are
    last and torch's first. Whole numbers become pictures (`array_to_rgb`); floats are left to CLIP's `do_rescale`.
    """
    if isinstance(source, Image.Image):
        return upright_rgb(source, limits=LIMITS)
    if isinstance(source, bytes | Path):
        return open_image(source, limits=LIMITS)
    if isinstance(source, str):
        if source.lower().startswith(("http://", "https://")):
            raise ImageRejected(f"not a file: {source}: nothing is downloaded; give a file")
        if len(source) > 4096:  # no path is longer: a picture as text
            raise ImageRejected(f"not a file: a string of {len(source)} characters; give a path or bytes")
        return open_image(Path(source), limits=LIMITS)
    if not isinstance(source, Tensor | np.ndarray):
        kind = type(source).__name__
        raise TypeError(f"a picture is a PIL image, a path, bytes, an array or a tensor, not {kind}")
    axis = _channel_axis(source, layout=layout)
    if isinstance(source, Tensor):
        source = source.detach().cpu()
        source = (source.float() if source.is_floating_point() else source).numpy()
    array = source[..., None] if axis is None else np.moveaxis(source, axis, -1)  # (h, w, channels)
    if np.issubdtype(array.dtype, np.integer) or array.dtype == bool:
        return array_to_rgb(array, limits=LIMITS)
    return _float_picture(array)


def _channel_axis(source: Tensor | np.ndarray, *, layout: str | None) -> int | None:
    """The axis of the channels, 0 or 2; None in a picture without."""
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"input_data_format must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    shape = tuple(source.shape)
    if len(shape) == 2:
        return None
    if len(shape) != 3:
        raise ImageRejected(f"not a picture: an array of shape {shape}")
    likely = (0, 2) if isinstance(source, Tensor) else (2, 0)
    axes = likely if layout is None else LAYOUTS[layout]
    for counts in ((3, 4), (1,)):
        for axis in axes:
            if shape[axis] in counts:
                return axis
    raise ImageRejected(f"no axis of 1, 3 or 4 channels: an array of shape {shape}")


def _float_picture(array: np.ndarray) -> np.ndarray:
    """(h, w, 1 or 3) floats -> (3, h, w), checked."""
    height, width, channels = array.shape
    check_size(width, height, limits=LIMITS)
    if not np.issubdtype(array.dtype, np.floating) or channels == 4:
        raise ImageRejected(f"{array.dtype} pixels with {channels} channels: give whole numbers from 0 to 255")
    if not np.isfinite(array).all():
        raise ImageRejected("pixels that are not finite")
    array = array.astype(np.float32) if array.dtype == np.float16 else array
    return np.moveaxis(np.broadcast_to(array, (height, width, 3)), -1, 0)


def has_unit_pixels(pictures: list[Image.Image | np.ndarray]) -> bool:
    """Whether one of them is a float array from 0 to 1 rather than to 255 (black may be either)."""
    return any(isinstance(picture, np.ndarray) and 0 < picture.max() <= 1 for picture in pictures)
