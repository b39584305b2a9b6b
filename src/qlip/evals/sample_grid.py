"""Samples during training: a few fixed pictures over what the model makes of them, as one picture."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from qlip.core import pixels
from qlip.models.qlip.modeling import QLIPModel

LINE_WIDTH = 2  # pixels of white between pictures
DIFFERENCE_GAIN = 4  # makes an error of a quarter of the range white


@torch.inference_mode()
def reconstruction_grid(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """(k, 3, h, w) CLIP-normalised pixels -> (3, H, W) uint8 on the CPU: one column per picture, three rows.

    Originals; reconstructions (clamped and rounded); four times their absolute difference, black where they agree.
    White lines of two pixels lie between pictures: H = 3 h + 4, W = k w + 2 (k - 1). The model is used as it is:
    in evaluation mode for pictures that depend on nothing else.
    """
    assert isinstance(model, QLIPModel)
    output = model(pixel_values.to(model.device))
    originals = pixels.to_uint8(pixel_values).cpu()
    reconstructions = pixels.to_uint8(output.reconstructions).cpu()
    differences = (originals.int() - reconstructions.int()).abs() * DIFFERENCE_GAIN
    rows = torch.stack([originals, reconstructions, differences.clamp(max=255).to(torch.uint8)])  # (3 rows, k, 3, h, w)
    framed = F.pad(rows, (0, LINE_WIDTH, 0, LINE_WIDTH), value=255)
    grid = rearrange(framed, "rows k c h w -> c (rows h) (k w)")
    return grid[:, :-LINE_WIDTH, :-LINE_WIDTH].contiguous()  # lines between pictures only


def save_grid(path: Path, grid: Tensor) -> None:
    """Write a (3, H, W) uint8 picture as PNG, whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    Image.fromarray(rearrange(grid, "c h w -> h w c").contiguous().numpy()).save(temporary, format="PNG", optimize=True)
    temporary.replace(path)
