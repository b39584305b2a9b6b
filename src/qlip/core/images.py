"""The one way a picture from outside enters qlip: limits from the header first, then pixels, always RGB with 8 bits.

Encoded pictures (shards, folders, the command line) go through `open_image`, pictures that somebody else has opened
through `upright_rgb`, pixels without a file through `array_to_rgb`; the second does the work of all three.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageFile

from qlip.core.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")  # the others are rare, or start programs (EPS)
ORIENTATIONS = {  # EXIF value -> what turns the stored picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
EXIF_ORIENTATION = 0x0112
CHANNEL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclass(kw_only=True, slots=True)
class ImageLimits:
    """What is still a picture; beyond it is an accident or an attack, rejected before its pixels are decoded."""

    max_bytes: int = 50_000_000
    """Size of the encoded file."""
    max_pixels: int = 89_000_000
    """Width times height. Above 89 million Pillow itself takes a picture for a decompression bomb."""
    max_aspect_ratio: float = 50.0
    """Longer side over shorter side."""


class ImageRejected(ValueError):  # noqa: N818 - a verdict on the data, not a fault of the program
    """A picture that cannot be used. One line `kind` or `kind: detail`; ledgers count by kind."""


def open_image(source: bytes | Path, *, limits: ImageLimits) -> Image.Image:
    """Encoded picture -> upright RGB, 8 bits a channel, first frame, without metadata.

    Alpha is composited on white, 16-bit grey is scaled, EXIF orientation is applied once. Raises `ImageRejected`
    for anything broken, truncated or over the limits.
    """
    data = _read(source, limits)
    with _rejecting():
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.UnidentifiedImageError:
            raise ImageRejected(_unidentified(data)) from None
        with image:
            return upright_rgb(image, limits=limits)


def upright_rgb(image: Image.Image, *, limits: ImageLimits) -> Image.Image:
    """Opened picture of any mode -> upright RGB as `open_image` gives it; `image` keeps its pixels and metadata.

    Pillow opens lazily: the size is checked before a pixel is decoded. Of an animation the frame it stands at is
    taken, the first unless somebody has called `seek`. EXIF orientation is applied if the metadata still hold it,
    as after `convert` or `resize`, but not after `ImageOps.exif_transpose`.

    Raises `ImageRejected` as `open_image` does, and for PostScript that has not been drawn yet (a program would run).
    """
    check_size(*image.size, limits=limits)
    with _rejecting():
        if isinstance(image, ImageFile.ImageFile):
            _check_file(image)
        image.load()
        return _upright(_to_rgb(image), orientation=_orientation(image))


def array_to_rgb(pixels: np.ndarray, *, limits: ImageLimits) -> Image.Image:
    """Whole-number pixels (h, w, 1 or 3 or 4 channels) -> RGB as `upright_rgb` gives it.

    uint8 is taken as it is, wider types must hold 0..255, except that uint16 is scaled like a 16-bit PNG; booleans
    are black and white. Raises `ImageRejected` for other shapes and values, and over the limits.
    """
    height, width, channels = pixels.shape
    check_size(width, height, limits=limits)
    if channels not in CHANNEL_MODES:
        raise ImageRejected(f"{channels} channels: a picture has 1, 3 or 4")
    if pixels.dtype == np.uint16:
        pixels = scaled_to_8_bits(pixels)
    elif pixels.dtype == bool:
        pixels = pixels * np.uint8(255)
    elif pixels.min() < 0 or pixels.max() > 255:
        raise ImageRejected(f"{pixels.dtype} pixels from {pixels.min()} to {pixels.max()}: expected 0 to 255")
    pixels = np.ascontiguousarray(pixels, dtype=np.uint8)
    size, mode = (width, height), CHANNEL_MODES[channels]
    return upright_rgb(Image.frombytes(mode, size, pixels.tobytes()), limits=limits)


def check_size(width: int, height: int, *, limits: ImageLimits) -> None:
    """Raise `ImageRejected` for a picture without pixels, with too many, or too elongated."""
    if width < 1 or height < 1:
        raise ImageRejected(f"image without pixels: {width} x {height}")
    if width * height > limits.max_pixels:
        raise ImageRejected(f"too many pixels: {width} x {height}, limit {limits.max_pixels}")
    if max(width, height) > limits.max_aspect_ratio * min(width, height):
        raise ImageRejected(f"too elongated: {width} x {height}, limit {limits.max_aspect_ratio:g} to 1")


@contextmanager
def _rejecting() -> Iterator[None]:
    """Whatever Pillow raises on hostile bytes becomes `ImageRejected`, whatever it warns of is left unsaid."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damaged metadata around good pixels
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            yield
        except (ImageRejected, UserError):
            raise
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise ImageRejected("too many pixels: decompression bomb") from None
        except Exception as error:  # on hostile bytes Pillow's readers raise nearly every type
            raise ImageRejected(f"broken image: {' '.join(str(error).split()) or type(error).__name__}") from None


def _read(source: bytes | Path, limits: ImageLimits) -> bytes:
    try:
        if isinstance(source, Path) and not source.is_file():  # a pipe would be waited for
            raise ImageRejected(f"unreadable image file: {source}: no such file")
        num_bytes = source.stat().st_size if isinstance(source, Path) else len(source)
        if num_bytes > limits.max_bytes:
            raise ImageRejected(f"image file too large: {num_bytes} bytes, limit {limits.max_bytes}")
        return source.read_bytes() if isinstance(source, Path) else source
    except OSError as error:
        raise ImageRejected(f"unreadable image file: {error}") from None


def _check_file(image: ImageFile.ImageFile) -> None:
    """What can be said of a file before its pixels are decoded; nothing when they have been."""
    if not image.tile:
        return
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise UserError("Pillow passes half pictures as whole ones; set ImageFile.LOAD_TRUNCATED_IMAGES = False")
    if image.format == "EPS":
        raise ImageRejected("PostScript: drawing it would run a program")
    if image.fp is None:
        raise ImageRejected("broken image: its file was closed before it was read")
    if image.format == "PNG":
        _check_png(image.fp)


def _check_png(file: IO[bytes]) -> None:
    """Every chunk's checksum: Pillow skips those of the pixel chunks when it decodes."""
    position = file.tell()
    Image.open(file, formats=("PNG",)).verify()  # starts at the beginning, leaves the file open
    file.seek(position)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return Image.fromarray(scaled_to_8_bits(np.asarray(image))).convert("RGB")
    if image.mode == "F":
        raise ImageRejected("floating-point pixels: their white is unknown")
    if image.has_transparency_data:
        image = image.convert("RGBA")  # plain conversion to RGB shows what transparency hides
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def scaled_to_8_bits(values: np.ndarray) -> np.ndarray:
    """16-bit (or wider) pixels -> uint8, white at 65535 or at the brightest value of a wider range; never clipped."""
    values = values.astype(np.float64).clip(min=0)
    white = max(65535.0, values.max())
    return (values * (255 / white)).round().astype(np.uint8)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # damaged EXIF raises nearly every type; the pixels are good
        return 1


def _upright(image: Image.Image, *, orientation: int) -> Image.Image:
    if orientation in ORIENTATIONS:
        image = image.transpose(ORIENTATIONS[orientation])
    image.info = {}  # nobody may turn it a second time
    return image


def _unidentified(data: bytes) -> str:
    start = data[:512].lstrip().lower()
    if not data:
        return "not an image: zero bytes"
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        return "not an image: a web page"
    return "not an image: no known format"
