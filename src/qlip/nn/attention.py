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

from qlip.core.precision import float32_region

ROPE_BASE_GRID = 16
ROPE_THETA = 10_000.0


class Rotary(NamedTuple):
    """Angles of one grid, shared by every head and layer of a tower."""

    cos: Tensor
    """(n, h) float32."""
    sin: Tensor
    """(n, h) float32."""
    signed_sin: Tensor
    """(n, h) float32, `sin` with the sign of R(x): minus in even places."""


def rotary_2d(grid: tuple[int, int], head_dim: int, *, device: torch.device, num_unrotated: int = 0) -> Rotary:
    """Angles for `grid` = (rows, columns) patches in row-major order, computed in float32 at use (never stored).

    Row r has coordinate ``r / rows * 16``, so every grid spans the range the base grid was trained on. The first
    `num_unrotated` rows of the table (CLS) turn by nothing. Raises `ValueError` unless four divides the head width.
    """
    if head_dim % 4:
        raise ValueError(f"2-D rotary positions need a head width divisible by 4, got {head_dim}")
    exponents = torch.arange(0, head_dim // 2, 2, dtype=torch.float32, device=device) / (head_dim // 2)
    frequencies = ROPE_THETA**-exponents  # (h/4,)
    rows, columns = (_angles(size, frequencies) for size in grid)
    table = torch.cat([rows[:, None, :].expand(*grid, -1), columns[None, :, :].expand(*grid, -1)], dim=-1).flatten(
        0, 1
    )  # (n, h)
    table = F.pad(table, (0, 0, num_unrotated, 0))
    sin = table.sin()
    signs = torch.arange(head_dim, device=device) % 2 * 2 - 1  # -1, 1, -1, 1, ...
    return Rotary(cos=table.cos(), sin=sin, signed_sin=sin * signs)


def _angles(size: int, frequencies: Tensor) -> Tensor:
    """(size, h/2): every coordinate of one axis times every frequency, each angle twice."""
    coordinates = torch.arange(size, dtype=torch.float32, device=frequencies.device) / size * ROPE_BASE_GRID
    return (coordinates[:, None] * frequencies).repeat_interleave(2, dim=-1)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn every token of x (b, H, n, h) by its angles (n, h), pair by pair: ``x cos + R(x) sin``, in float32.

    ``R(x)[2m] = -x[2m+1]`` and ``R(x)[2m+1] = x[2m]``; the table carries the sign, which saves a pass over x.
    """
    wide = x.float()
    swapped = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (wide * rotary.cos).addcmul_(swapped, rotary.signed_sin).to(x.dtype)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(h)) v for (b, H, n, h), without ever storing the (n, n) weights."""
    if q.device.type == "cpu":  # the CPU kernel's bf16 backward is several times slower than its float32 one
        with float32_region(q.device.type):
            heads = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=causal, dropout_p=dropout)
            return heads.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, dropout_p=dropout)


def eager_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, dropout: float = 0.0) -> Tensor:
    """The same written out, with the (b, H, n, n) weights in memory: for comparison, and to look at them."""
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return F.dropout(scores.softmax(-1), p=dropout).to(v.dtype) @ v


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
        dropout: float = 0.0,
    ) -> None:
        """`inner_norm_eps` adds the LayerNorm between the heads and the output projection; None leaves it out.

        `dropout` is the share of attention weights dropped in training.
        """
        super().__init__()
        self.num_heads = num_heads
        self.is_causal = causal  # this name and the next are read by transformers' attention functions
        self.num_key_value_groups = 1
        self.dropout = dropout
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=q_bias)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=k_bias)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=v_bias)
        self.inner_attn_ln = nn.Identity() if inner_norm_eps is None else nn.LayerNorm(hidden_size, eps=inner_norm_eps)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, rotary: Rotary | None = None, *, implementation: str = "sdpa") -> Tensor:
        """(b, n, d) -> (b, n, d). `implementation`: sdpa, eager, or any name that transformers' registry knows."""
        q, k, v = (
            rearrange(projection(x), "b n (H h) -> b H n h", H=self.num_heads)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rotary is not None:
            q = rotate(q, rotary)
            k = rotate(k, rotary)
        heads = rearrange(self._attend(q, k, v, implementation), "b H n h -> b n (H h)")
        return self.out_proj(self.inner_attn_ln(heads))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, implementation: str) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        if implementation == "sdpa":
            return sdpa_attention(q, k, v, causal=self.is_causal, dropout=dropout)
        if implementation == "eager":
            return eager_attention(q, k, v, causal=self.is_causal, dropout=dropout)
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # FlashAttention, or a user's own

        function = ALL_ATTENTION_FUNCTIONS[implementation]
        scaling = q.shape[-1] ** -0.5
        heads, _ = function(self, q, k, v, None, scaling=scaling, dropout=dropout, is_causal=self.is_causal)
        return heads.transpose(1, 2)  # theirs is (b, n, H, h)
