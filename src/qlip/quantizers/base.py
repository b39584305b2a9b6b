"""The contract every quantizer keeps: latents in, bits and their vectors out.

Shapes: `b` images, `n` tokens, `L` bits (`num_bits`), `d` latent width (`latent_dim`; `L` except for FSQ).
Codes stay bits. Integer ids are made with int64 shifts (`qlip.quantizers.ids`) only where a vocabulary needs them,
so that 2^28 never becomes a table or a float.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

MAX_GROUP_SIZE = 16  # a group of g bits has 2^g codes, which entropies enumerate and codebooks hold


@dataclass(kw_only=True, slots=True)
class Quantized:
    """What a quantizer returns for latents (b, n, d)."""

    z_q: Tensor
    """(b, n, d) code vectors, float32; the gradient passes straight through to the latents."""
    bits: Tensor
    """(b, n, L) bool."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """Scalar terms to be weighted by a task: `quantizer` in training, none in evaluation."""
    stats: dict[str, Tensor] = field(default_factory=dict)
    """Scalars to be logged, without gradient; none in evaluation."""
    average_code: Tensor | None = None
    """E[q], the mean soft code of this micro-batch on all ranks, with gradient, from a `JointQuantizer` in training.

    None in evaluation, and from quantizers whose losses stay means over micro-batches (fsq, lfq, vq).
    """


torch.export.register_dataclass(Quantized)  # models that return it can be exported


class Quantizer(Protocol):
    """A module whose `forward` quantizes and whose `decode` turns bits back into the same code vectors."""

    num_bits: int
    """Bits per token."""
    latent_dim: int
    """Width of the latents and of the code vectors."""

    def forward(self, z: Tensor) -> Quantized:
        """(b, n, d) latents -> `Quantized`."""

    def decode(self, bits: Tensor) -> Tensor:
        """(b, n, L) bool -> (b, n, d) float32 code vectors, bit for bit those of `forward`."""


class JointQuantizer(Quantizer, Protocol):
    """A quantizer whose loss holds the entropy of the mean soft code, which is no mean over micro-batches."""

    def joint_correction(self, average_codes: Tensor) -> Tensor:
        """(m, ...) the `average_code` of m micro-batches of equal size -> (), what their mean loss lacks.

        Added to the mean of the m micro-batches' `quantizer` losses it gives the loss of the joined batch.
        """


def straight_through(code: Tensor, z: Tensor) -> Tensor:
    """Forward: `code`, exactly; backward: identity to `z`. (The usual ``z + (code - z)`` rounds the code.)"""
    return code + (z - z.detach())


def digit_bits(digits: Tensor, num_bits: int) -> Tensor:
    """(...) int64 -> (..., num_bits) bool, most significant first: `ids_to_bits` for numbers made in this package.

    The range check of `ids_to_bits` waits for the GPU, breaks compiled graphs, and would stop a training whose latents
    are NaN with a complaint about ids.
    """
    shifts = torch.arange(num_bits - 1, -1, -1, device=digits.device)
    return (digits.unsqueeze(-1) >> shifts) & 1 == 1


def check_group_size(num_bits: int, group_size: int) -> None:
    """Raise `ValueError` when the group size does not divide the bits."""
    if group_size < 1 or num_bits % group_size:
        raise ValueError(f"group_size {group_size} must divide {num_bits} bits")


def check_num_codes(group_size: int) -> None:
    """Raise `ValueError` when a group has too many codes to be enumerated."""
    if group_size > MAX_GROUP_SIZE:
        raise ValueError(f"group_size {group_size} makes 2^{group_size} codes: use at most {MAX_GROUP_SIZE} bits")
