"""What is cut from every picture that is tokenized: its centre, both ways round, or ten crops (LlamaGen's choices)."""

from __future__ import annotations

from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import five_crop

from qlip.data.transforms import prepared_pixels

ViewChoice = Literal["centre", "flip", "ten-crop"]
FIVE = ("centre", "top left", "top right", "bottom left", "bottom right")
VIEWS: dict[ViewChoice, tuple[str, ...]] = {
    "centre": ("centre",),
    "flip": ("centre", "centre, mirrored"),
    "ten-crop": (*FIVE, *(f"{name}, mirrored" for name in FIVE)),
}
"""Names of the rows of a picture, in their order."""
TEN_CROP_SCALE = 1.1  # the crops are taken from a centre square of so many sides, as LlamaGen takes them


def resized_side(size: int, views: ViewChoice) -> int:
    """Side of the centre square that views of side `size` are cut from."""
    return int(size * TEN_CROP_SCALE) if views == "ten-crop" else size


def view_pixels(image: Image.Image, *, size: int, views: ViewChoice) -> Tensor:
    """RGB picture -> (v, 3, S, S) uint8, bicubic and antialiased (`prepared_pixels`), in the order of `VIEWS`."""
    square = prepared_pixels(image, size=resized_side(size, views))
    if views == "centre":
        return square[None]
    if views == "flip":
        return torch.stack([square, square.flip(-1)])
    *corners, centre = five_crop(square, [size, size])
    crops = torch.stack([centre, *corners])
    return torch.cat([crops, crops.flip(-1)])
