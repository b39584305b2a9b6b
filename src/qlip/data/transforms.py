"""From pictures to tensors: resize and crop with Pillow in uint8, normalise last, as QLIPProcessor does.

Shapes: `S` side of the square result; every tensor is (3, S, S) CLIP-normalised float32 (`core/pixels.py`), except
that `prepared_pixels` stops before normalising: evaluations compare 8-bit pixels.
"""

from __future__ import annotations

import math
from random import Random

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qlip.core.errors import UserError, nearest_name
from qlip.core.pixels import from_uint8

FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "adm": Image.Resampling.BICUBIC,  # after halving, see `prepared_pixels`
}
CROPS = ("centre", "squash")
ASPECT_RATIOS = (3 / 4, 4 / 3)  # width over height of random crops, torchvision's default
CROP_TRIES = 10  # torchvision's, then the centre


def prepared_pixels(image: Image.Image, *, size: int, filter: str = "bicubic", crop: str = "centre") -> Tensor:
    """RGB picture -> (3, S, S) uint8: shortest side to `size` and the centre square, or `squash` both sides to it.

    All filters are Pillow's and antialiased. bicubic, bilinear and lanczos cut the longer side's length down to a whole
    number and are CLIP's processing. adm is the centre crop that generative models are scored with (openai's
    guided-diffusion): halved by box averages while the shortest side is at least 2 S, then bicubic, the longer side
    rounded to the nearest whole number (halves to even).

    Raises `UserError` for another filter or crop, and for adm squashed, which nobody has defined.
    """
    if filter not in FILTERS:
        raise UserError(f"resize filter {filter!r} is unknown: {nearest_name(filter, FILTERS)}")
    if crop not in CROPS:
        raise UserError(f"crop {crop!r} is unknown: {nearest_name(crop, CROPS)}")
    if crop == "squash":
        if filter == "adm":
            raise UserError("filter 'adm' is a centre crop: take crop 'centre', or filter 'bicubic' to squash")
        return _pixels(image.resize((size, size), FILTERS[filter]))
    if filter == "adm":
        while min(image.size) >= 2 * size:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = size / min(image.size)
        width, height = round(image.width * scale), round(image.height * scale)
    else:
        short = min(image.size)
        width, height = size * image.width // short, size * image.height // short
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), FILTERS[filter])
    return _pixels(resized.crop((left, top, left + size, top + size)))


def resize_and_crop(image: Image.Image, *, size: int, filter: str = "bicubic") -> Tensor:
    """`prepared_pixels` of the centre square, CLIP-normalised: RGB picture -> (3, S, S) float32. Raises as it does."""
    return from_uint8(prepared_pixels(image, size=size, filter=filter))


def random_resized_crop(
    image: Image.Image, *, size: int, scale: tuple[float, float] = (0.9, 1.0), random: Random
) -> Tensor:
    """A random crop of an area share in `scale` and an aspect ratio in 3/4..4/3, resized bicubically to (3, S, S).

    Drawn as torchvision's RandomResizedCrop draws, from `random` alone. The defaults are EVA-CLIP's.
    """
    return from_uint8(random_resized_pixels(image, size=size, scale=scale, random=random))


def random_resized_pixels(image: Image.Image, *, size: int, scale: tuple[float, float], random: Random) -> Tensor:
    """`random_resized_crop` before it is normalised: (3, S, S) uint8."""
    box = random_box(*image.size, scale=scale, random=random)
    return _pixels(image.crop(box).resize((size, size), Image.Resampling.BICUBIC))


def random_box(width: int, height: int, *, scale: tuple[float, float], random: Random) -> tuple[int, int, int, int]:
    """Left, top, right, bottom in pixels of a random crop; the largest centred one when ten draws do not fit."""
    log_ratios = [math.log(ratio) for ratio in ASPECT_RATIOS]
    for _ in range(CROP_TRIES):
        area = width * height * random.uniform(*scale)
        ratio = math.exp(random.uniform(*log_ratios))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = random.randint(0, height - h), random.randint(0, width - w)
            return left, top, left + w, top + h
    narrowest, widest = ASPECT_RATIOS
    w = min(width, max(1, round(height * widest)))
    h = min(height, max(1, round(width / narrowest)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _pixels(image: Image.Image) -> Tensor:
    """RGB picture -> (3, h, w) uint8."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))  # (h, w, 3)
    return pixels.permute(2, 0, 1).contiguous()
