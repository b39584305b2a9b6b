"""The union of all quantizers: a kind and plain numbers in, a module that keeps `qlip.quantizers.base.Quantizer` out.

To add one, write its file, add its class to `AnyQuantizer`, its options to `OPTIONS` and its call to `build_quantizer`.
The contract tests then run over it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields

from qlip.core.errors import nearest_name
from qlip.quantizers.bsq import BinarySphericalQuantizer
from qlip.quantizers.others import FiniteScalarQuantizer, LookupFreeQuantizer, VectorQuantizer, level_widths

AnyQuantizer = BinarySphericalQuantizer | FiniteScalarQuantizer | LookupFreeQuantizer | VectorQuantizer

OPTIONS = {
    "bsq": {"group_size", "inv_temperature", "gamma_0", "gamma", "beta", "l2_norm", "unit_codes"},
    "fsq": {"fsq_levels"},
    "lfq": {"group_size", "inv_temperature", "gamma"},
    "vq": {"group_size"},
}
"""What each kind reads besides `num_bits`; the other fields of `QuantizerConfig` have no effect there."""

KINDS = tuple(OPTIONS)


@dataclass(kw_only=True, slots=True)
class QuantizerConfig:
    """Which quantizer, and its numbers; `OPTIONS` says which kind reads which."""

    kind: str = "bsq"
    """One of `KINDS`."""
    num_bits: int = 28
    """Bits per token; for fsq they must be those of its levels."""
    group_size: int = 1
    """Bits whose joint use the entropy sees (bsq, lfq), or that one codebook of 2^g vectors codes (vq); at most 16."""
    inv_temperature: float = 1.0
    """tau, sharpness of the soft code (bsq, lfq)."""
    gamma_0: float = 1.0
    """Weight of the entropy per sample (bsq)."""
    gamma: float = 1.0
    """Weight of the codebook's entropy (bsq, lfq)."""
    beta: float = 0.0
    """Weight of the squared distance between latents and codes (bsq)."""
    l2_norm: bool = True
    """Put latents on the unit sphere first (bsq)."""
    unit_codes: bool = True
    """Code vectors of norm 1 rather than entries of +-1 (bsq)."""
    fsq_levels: Sequence[int] = ()
    """Levels per latent dimension, such as [16] * 7 (fsq)."""


def fsq_num_bits(levels: Sequence[int]) -> int:
    """Bits per token of FSQ with these levels. Raises `ValueError` for levels that FSQ cannot have."""
    return sum(level_widths(levels))


def latent_width(kind: str, *, num_bits: int, fsq_levels: Sequence[int] = ()) -> int:
    """Width of the latents that quantizer `kind` takes, known without building it or its library."""
    return len(fsq_levels) if kind == "fsq" else num_bits


def build_quantizer(config: QuantizerConfig) -> AnyQuantizer:
    """The quantizer that `config` describes; warns of changed options that this kind does not read.

    Raises `ValueError` for an unknown kind or impossible sizes, `UserError` when its library is missing.
    """
    if config.kind not in KINDS:
        raise ValueError(f"quantizer {config.kind!r} is unknown: {nearest_name(config.kind, KINDS)}")
    _warn_of_unread_options(config)
    match config.kind:
        case "fsq":
            if fsq_num_bits(config.fsq_levels) != config.num_bits:
                bits = fsq_num_bits(config.fsq_levels)
                raise ValueError(f"fsq_levels {list(config.fsq_levels)} make {bits} bits: set num_bits to {bits}")
            return FiniteScalarQuantizer(config.fsq_levels)
        case "lfq":
            return LookupFreeQuantizer(
                config.num_bits,
                group_size=config.group_size,
                inv_temperature=config.inv_temperature,
                gamma=config.gamma,
            )
        case "vq":
            return VectorQuantizer(config.num_bits, group_size=config.group_size)
    return BinarySphericalQuantizer(
        config.num_bits,
        group_size=config.group_size,
        inv_temperature=config.inv_temperature,
        gamma_0=config.gamma_0,
        gamma=config.gamma,
        beta=config.beta,
        l2_norm=config.l2_norm,
        unit_codes=config.unit_codes,
    )


def _warn_of_unread_options(config: QuantizerConfig) -> None:
    read = OPTIONS[config.kind] | {"kind", "num_bits"}
    unread = [x.name for x in fields(config) if x.name not in read and getattr(config, x.name) != x.default]
    if unread:
        warnings.warn(f"{', '.join(unread)} has no effect with quantizer {config.kind}", stacklevel=3)
