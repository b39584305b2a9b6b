"""From pictures to tensors: resize and crop with Pillow in uint8, normalise last, as QLIPProcessor does.

Shapes: `S` side of the square result; every tensor is (3, S, S) CLIP-normalised float32 (`core/pixels.py`).
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
}
ASPECT_RATIOS = (3 / 4, 4 / 3)  # width over height of random crops, torchvision's default
CROP_TRIES = 10  # torchvision's, then the centre


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> (3, h, w) CLIP-normalised float32."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))  # (h, w, 3)
    return from_uint8(pixels.permute(2, 0, 1)).contiguous()


def resize_and_crop(image: Image.Image, *, size: int, filter: str = "bicubic") -> Tensor:
    """Shortest side to `size`, then the centre square: CLIP's processing. RGB picture -> (3, S, S).

    Raises `UserError` for a filter other than bicubic, bilinear or lanczos.
    """
    if filter not in FILTERS:
        raise UserError(f"resize filter {filter!r} is unknown: {nearest_name(filter, FILTERS)}")
    width, height = image.size
    short = min(width, height)
    width, height = size * width // short, size * height // short
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), FILTERS[filter])
    return to_tensor(resized.crop((left, top, left + size, top + size)))


def random_resized_crop(
    image: Image.Image, *, size: int, scale: tuple[float, float] = (0.9, 1.0), random: Random
) -> Tensor:
    """A random crop of an area share in `scale` and an aspect ratio in 3/4..4/3, resized bicubically to (3, S, S).

    Drawn as torchvision's RandomResizedCrop draws, from `random` alone. The defaults are EVA-CLIP's.
    """
    box = random_box(*image.size, scale=scale, random=random)
    return to_tensor(image.crop(box).resize((size, size), Image.Resampling.BICUBIC))


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
