"""Image -> hidden states, and latents -> image: the parts around the blocks of QLIP's vision towers.

Shapes: `b` images, `n` = g*g patches in row-major order, `d` width, `p` patch size.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


class VisionEmbeddings(nn.Module):
    """Patches by convolution, a CLS vector at index 0, and a learned position for each of the n + 1 tokens."""

    def __init__(self, *, hidden_size: int, image_size: int, patch_size: int, num_channels: int) -> None:
        super().__init__()
        num_positions = (image_size // patch_size) ** 2 + 1
        self.class_embedding = nn.Parameter(torch.empty(hidden_size))
        self.patch_embedding = nn.Conv2d(num_channels, hidden_size, kernel_size=patch_size, stride=patch_size)
        self.position_embedding = nn.Embedding(num_positions, hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(b, 3, S, S) CLIP-normalised -> (b, 1 + n, d)."""
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        patches = rearrange(patches, "b d r c -> b (r c) d")
        cls_token = self.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        return torch.cat([cls_token, patches], dim=1) + self.position_embedding.weight


class BottleneckMlp(nn.Module):
    """One half of the bottleneck: ``c_proj(GELU(c_fc(x)))`` (QLIP Eq 5)."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(in_features, hidden_features)
        self.c_proj = nn.Linear(hidden_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, in_features) -> (b, n, out_features)."""
        return self.c_proj(F.gelu(self.c_fc(x)))


def unpatchify(patches: Tensor, *, patch_size: int, grid_size: int) -> Tensor:
    """(b, n, 3*p*p) with components in order (channel, row, column) -> (b, 3, S, S)."""
    return rearrange(
        patches, "b (r c) (ch ph pw) -> b ch (r ph) (c pw)", r=grid_size, c=grid_size, ph=patch_size, pw=patch_size
    )
