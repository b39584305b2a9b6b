"""Image -> hidden states, and latents -> image: the parts around the blocks of QLIP's vision towers.

Shapes: `b` images, `n` = g*g patches in row-major order, `d` width, `p` patch size.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


class VisionEmbeddings(nn.Module):
    """Patches by convolution, a CLS vector at index 0, and a learned position for each of the n + 1 tokens."""

    def __init__(self, *, hidden_size: int, image_size: int, patch_size: int, num_channels: int) -> None:
        super().__init__()
        self.grid_size = image_size // patch_size
        self.class_embedding = nn.Parameter(torch.empty(hidden_size))
        self.patch_embedding = nn.Conv2d(num_channels, hidden_size, kernel_size=patch_size, stride=patch_size)
        self.position_embedding = nn.Embedding(1 + self.grid_size**2, hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(b, 3, r*p, c*p) CLIP-normalised -> (b, 1 + r*c, d); positions are interpolated to another grid."""
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        positions = self._positions((patches.shape[-2], patches.shape[-1]))
        patches = rearrange(patches, "b d r c -> b (r c) d")
        cls_token = self.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        return torch.cat([cls_token, patches], dim=1) + positions

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """(1 + r*c, d): CLS's row as it is, the others interpolated."""
        table = self.position_embedding(torch.arange(1 + self.grid_size**2, device=self.class_embedding.device))
        if grid == (self.grid_size, self.grid_size):
            return table
        return torch.cat([table[:1], resize_positions(table[1:], grid)])


class BottleneckMlp(nn.Module):
    """One half of the bottleneck: ``c_proj(GELU(c_fc(x)))`` (QLIP Eq 5)."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(in_features, hidden_features)
        self.c_proj = nn.Linear(hidden_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, in_features) -> (b, n, out_features)."""
        return self.c_proj(F.gelu(self.c_fc(x)))


def unpatchify(patches: Tensor, *, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """(b, r*c, 3*p*p) with components in order (channel, row, column) -> (b, 3, r*p, c*p)."""
    rows, columns = grid
    return rearrange(
        patches, "b (r c) (ch ph pw) -> b ch (r ph) (c pw)", r=rows, c=columns, ph=patch_size, pw=patch_size
    )


def resize_positions(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Learned positions of a square grid (n, d) -> those of `grid` (r*c, d), bicubic as EVA-CLIP does it."""
    side = math.isqrt(table.shape[0])
    assert side**2 == table.shape[0], f"{table.shape[0]} positions are no square grid"
    picture = rearrange(table.float(), "(r c) d -> 1 d r c", r=side)
    resized = F.interpolate(picture, size=grid, mode="bicubic", align_corners=False)
    return rearrange(resized, "1 d r c -> (r c) d").to(table.dtype)
