"""The contract every quantizer keeps: latents in, bits and their vectors out.

Codes stay bits. Integer ids are made with int64 shifts (`qlip.quantizers.ids`) only where a vocabulary needs them,
so that 2^28 never becomes a table or a float.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor


@dataclass(kw_only=True, slots=True)
class Quantized:
    """What a quantizer returns for latents (b, n, L)."""

    z_q: Tensor
    """(b, n, L) code vectors; the gradient passes straight through to the latents."""
    bits: Tensor
    """(b, n, L) bool."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """Scalar terms to be weighted by a task."""
    stats: dict[str, Tensor] = field(default_factory=dict)
    """Scalars to be logged, without gradient."""


class Quantizer(Protocol):
    """A module whose `forward` quantizes and whose `decode` turns bits back into the same code vectors."""

    num_bits: int

    def forward(self, z: Tensor) -> Quantized:
        """(b, n, L) latents -> `Quantized`."""

    def decode(self, bits: Tensor) -> Tensor:
        """(b, n, L) bool -> (b, n, L) code vectors, bit for bit those of `forward`."""
