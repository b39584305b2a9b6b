"""How a code is used: the entropy of every bit, balanced bits, distinct tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qlip.quantizers.bsq import binary_entropy


@dataclass(kw_only=True, slots=True)
class CodeUse:
    """What the tokens of a data set say of the code."""

    figures: dict[str, float]
    """`bit_entropy` (mean over bits, nats), `bit_entropy_max` ln 2, `balanced_bits` (share above 0.9 ln 2),
    `distinct_token_share`."""
    bit_share: list[float]
    """Share of ones of every bit."""
    bit_entropies: list[float]
    """Nats of every bit."""


def code_use(ids: Tensor, *, num_bits: int) -> CodeUse:
    """Token ids (pictures, n) int64 of a code with L = `num_bits`, bit i weighing 2^(L-1-i)."""
    tokens = ids.flatten()
    shares = torch.stack([((tokens >> (num_bits - 1 - i)) & 1).double().mean() for i in range(num_bits)])
    entropies = binary_entropy(shares)
    figures = {
        "bit_entropy": float(entropies.mean()),
        "bit_entropy_max": math.log(2),
        "balanced_bits": float((entropies > 0.9 * math.log(2)).double().mean()),
        "distinct_token_share": tokens.unique().numel() / len(tokens),
    }
    return CodeUse(figures=figures, bit_share=shares.tolist(), bit_entropies=entropies.tolist())
