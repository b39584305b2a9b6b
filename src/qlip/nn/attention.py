"""Multi-head attention through scaled_dot_product_attention, and the 2-D rotary positions of EVA-02.

Shapes: `b` images, `n` tokens, `d` width, `H` heads, `h` = d / H. Rotary convention: interleaved pairs, first half of
the head for rows, second half for columns (EVA-02, arXiv 2303.11331; QLIP's towers use base grid 16).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

ROPE_BASE_GRID = 16
ROPE_THETA = 10_000.0


class Rotary(NamedTuple):
    """Angles of one grid, shared by every head and layer of a tower."""

    cos: Tensor
    """(n, h) float32."""
    sin: Tensor
    """(n, h) float32."""


def rotary_2d(grid_size: int, head_dim: int, *, device: torch.device) -> Rotary:
    """Angles for `grid_size` x `grid_size` patches in row-major order, computed in float32 at use (never stored).

    Row r has coordinate ``r / grid_size * 16``, so every grid spans the range the base grid was trained on.
    Raises `ValueError` unless four divides the head width.
    """
    if head_dim % 4:
        raise ValueError(f"2-D rotary positions need a head width divisible by 4, got {head_dim}")
    exponents = torch.arange(0, head_dim // 2, 2, dtype=torch.float32, device=device) / (head_dim // 2)
    frequencies = ROPE_THETA**-exponents  # (h/4,)
    coordinates = torch.arange(grid_size, dtype=torch.float32, device=device) / grid_size * ROPE_BASE_GRID
    angles = (coordinates[:, None] * frequencies).repeat_interleave(2, dim=-1)  # (grid, h/2), each angle twice
    rows = angles[:, None, :].expand(grid_size, grid_size, -1)
    columns = angles[None, :, :].expand(grid_size, grid_size, -1)
    table = rearrange(torch.cat([rows, columns], dim=-1), "r c h -> (r c) h")
    return Rotary(cos=table.cos(), sin=table.sin())


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn the last n tokens of x (b, H, m, h) by their angles (n, h); tokens before them (CLS) stay. float32 maths."""
    num_unrotated = x.shape[-2] - rotary.cos.shape[0]
    patches = x[..., num_unrotated:, :].float()
    even, odd = patches[..., 0::2], patches[..., 1::2]
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    rotated = (patches * rotary.cos + turned * rotary.sin).to(x.dtype)
    return torch.cat([x[..., :num_unrotated, :], rotated], dim=-2) if num_unrotated else rotated


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(h)) v for (b, H, n, h), without ever storing the (n, n) weights."""
    if q.device.type == "cpu":  # the CPU kernel's bf16 backward is several times slower than its float32 one
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=causal).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


class Attention(nn.Module):
    """Self-attention with optional rotation, optional inner LayerNorm (sub-LN) and optional causal mask."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        q_bias: bool = True,
        k_bias: bool = True,
        v_bias: bool = True,
        inner_norm_eps: float | None = None,
        causal: bool = False,
    ) -> None:
        """`inner_norm_eps` adds the LayerNorm between the heads and the output projection; None leaves it out."""
        super().__init__()
        self.num_heads = num_heads
        self.causal = causal
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=q_bias)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=k_bias)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=v_bias)
        self.inner_attn_ln = nn.Identity() if inner_norm_eps is None else nn.LayerNorm(hidden_size, eps=inner_norm_eps)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, rotary: Rotary | None = None) -> Tensor:
        """(b, n, d) -> (b, n, d)."""
        q, k, v = (
            rearrange(projection(x), "b n (H h) -> b H n h", H=self.num_heads)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        heads = attend(q, k, v, causal=self.causal)
        return self.out_proj(self.inner_attn_ln(rearrange(heads, "b H n h -> b n (H h)")))
