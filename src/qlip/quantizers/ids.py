"""Bits <-> integer ids <-> sub-codes, exactly, with int64 shifts.

Order of the released QLIP code: bit 0 of L is the most significant, ``id = sum_i bit_i * 2**(L - 1 - i)``.
A float32 sum would round ids above 2^24: about 81 % of random 28-bit codes would get a wrong id.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MAX_BITS = 62  # ids are int64 and stay non-negative


def _weights(num_bits: int, device: torch.device) -> Tensor:
    if not 1 <= num_bits <= MAX_BITS:
        raise ValueError(f"{num_bits} bits do not fit an int64 id: use 1 to {MAX_BITS}, or split into sub-codes")
    return torch.ones((), dtype=torch.int64, device=device) << torch.arange(num_bits - 1, -1, -1, device=device)


def bits_to_ids(bits: Tensor) -> Tensor:
    """(..., L) bool -> (...) int64 ids in [0, 2^L); bit 0 is the most significant. L is at most 62.

    Raises `ValueError` for floats, which are code vectors rather than bits.
    """
    if bits.is_floating_point():
        raise ValueError(f"bits must be bool, got {bits.dtype}: these look like code vectors; compare them with 0")
    return (bits.to(torch.int64) * _weights(bits.shape[-1], bits.device)).sum(-1)


def ids_to_bits(ids: Tensor, num_bits: int) -> Tensor:
    """(...) int64 ids in [0, 2^num_bits) -> (..., num_bits) bool.

    Raises `ValueError` for ids of another dtype or outside the range, which would silently decode to other bits.
    """
    if ids.dtype != torch.int64:
        raise ValueError(f"ids must be int64, got {ids.dtype}: float ids above 2^24 have already lost bits")
    weights = _weights(num_bits, ids.device)
    if ids.numel() and (ids.min() < 0 or ids.max() >= 2**num_bits):
        raise ValueError(f"ids lie in [{ids.min()}, {ids.max()}], outside the {num_bits}-bit range [0, 2^{num_bits})")
    return (ids.unsqueeze(-1) & weights) != 0


def bits_to_subcodes(bits: Tensor, division: int | Sequence[int]) -> Tensor:
    """(..., L) bool -> (..., k) int64 sub-codes: consecutive bits, the first of each on top.

    `division` is their number k, which must divide L, or the bits of each, such as (10, 9, 9) of 28.
    """
    sizes = _sizes(division, bits.shape[-1])
    return torch.stack([bits_to_ids(part) for part in bits.split(sizes, dim=-1)], dim=-1)


def subcodes_to_bits(subcodes: Tensor, division: int | Sequence[int]) -> Tensor:
    """(..., k) int64 sub-codes -> (..., L) bool, the inverse of `bits_to_subcodes`.

    `division` is the number of bits L when all k sub-codes have as many, or the bits of each.
    Raises `ValueError` for sub-codes out of range.
    """
    count = subcodes.shape[-1]
    sizes = _sizes(count, division) if isinstance(division, int) else list(division)
    if len(sizes) != count:
        raise ValueError(f"there are {count} sub-codes, but a division into {len(sizes)}: {sizes}")
    return torch.cat([ids_to_bits(subcodes[..., j], size) for j, size in enumerate(sizes)], dim=-1)


def _sizes(division: int | Sequence[int], num_bits: int) -> list[int]:
    """Bits of each sub-code."""
    if isinstance(division, int):
        if division < 1 or num_bits % division:
            raise ValueError(f"{division} sub-codes do not divide {num_bits} bits: give the bits of each instead")
        return [num_bits // division] * division
    if sum(division) != num_bits or min(division) < 1:
        raise ValueError(f"sub-codes of {list(division)} bits do not make {num_bits} bits")
    return list(division)
