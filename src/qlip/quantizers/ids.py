"""Bits <-> integer ids <-> sub-codes, exactly, with int64 shifts.

Order of the released QLIP code: bit 0 of L is the most significant, ``id = sum_i bit_i * 2**(L - 1 - i)``.
A float32 sum would round ids above 2^24: about 81 % of random 28-bit codes would get a wrong id.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_BITS = 62  # ids are int64 and stay non-negative


def _weights(num_bits: int, device: torch.device) -> Tensor:
    if not 1 <= num_bits <= MAX_BITS:
        raise ValueError(f"{num_bits} bits do not fit an int64 id: use 1 to {MAX_BITS}, or split into sub-codes")
    return torch.ones((), dtype=torch.int64, device=device) << torch.arange(num_bits - 1, -1, -1, device=device)


def bits_to_ids(bits: Tensor) -> Tensor:
    """(..., L) bool -> (...) int64 ids in [0, 2^L); bit 0 is the most significant. L is at most 62."""
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


def bits_to_subcodes(bits: Tensor, num_subcodes: int) -> Tensor:
    """(..., L) bool -> (..., num_subcodes) int64: sub-code j holds bits j*L/num_subcodes onwards, first bit on top."""
    num_bits = bits.shape[-1]
    if num_subcodes < 1 or num_bits % num_subcodes:
        raise ValueError(f"{num_subcodes} sub-codes do not divide {num_bits} bits")
    return bits_to_ids(bits.unflatten(-1, (num_subcodes, num_bits // num_subcodes)))


def subcodes_to_bits(subcodes: Tensor, num_bits: int) -> Tensor:
    """(..., k) int64 sub-codes -> (..., num_bits) bool, the inverse of `bits_to_subcodes`."""
    num_subcodes = subcodes.shape[-1]
    if num_bits % num_subcodes:
        raise ValueError(f"{num_subcodes} sub-codes do not divide {num_bits} bits")
    return ids_to_bits(subcodes, num_bits // num_subcodes).flatten(-2)
