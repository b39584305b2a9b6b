"""Optimizers, parameter groups and the learning-rate schedule (QLIP Table 8).

Rates are per part of the model, decay only where a matrix is a matrix: not on tensors of at most one dimension,
position tables, CLS, codebooks or the temperature. That is EVA-CLIP's rule, whose public recipe shares QLIP's rates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from qlip.core.errors import UserError, nearest_name
from qlip.engine.interfaces import OptimizerConfig

OPTIMIZERS = ("adamw", "lamb")
NEVER_DECAYED = ("position_embedding", "class_embedding", "logit_scale", "_codebook")


def learning_rate(name: str, config: OptimizerConfig) -> float:
    """Peak rate of a parameter: that of the longest prefix in `part_lrs`, else `lr`."""
    matching = [prefix for prefix in config.part_lrs if name.startswith(prefix)]
    return config.part_lrs[max(matching, key=len)] if matching else config.lr


def has_decay(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies to a parameter."""
    return parameter.ndim > 1 and not any(part in name for part in NEVER_DECAYED)


def parameter_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> list[dict]:
    """Groups of equal rate and decay; each remembers its peak rate as `peak_lr`.

    Raises `UserError` for a `part_lrs` prefix that matches no parameter: a typo would silently train at `lr`.
    """
    named = list(named_parameters)
    for prefix in config.part_lrs:
        if not any(name.startswith(prefix) for name, _ in named):
            raise UserError(f"part_lrs: no trained parameter starts with {prefix!r}; see `qlip train RECIPE --help`")
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        decay = config.weight_decay if has_decay(name, parameter) else 0.0
        groups.setdefault((learning_rate(name, config), decay), []).append(parameter)
    return [
        {"params": parameters, "lr": lr, "peak_lr": lr, "weight_decay": decay}
        for (lr, decay), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig
) -> torch.optim.Optimizer:
    """The optimizer of one phase. Raises `UserError` for an unknown name."""
    groups = parameter_groups(named_parameters, config)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=True)
    if config.name == "lamb":
        from timm.optim import Lamb  # seconds to import; clips the global gradient norm to 1.0 by itself (NVIDIA LAMB)

        return Lamb(groups, betas=config.betas, eps=config.eps)
    raise UserError(f"optimizer {config.name!r} is unknown: {nearest_name(config.name, OPTIMIZERS)}")


def schedule_factor(step: int, *, warmup_steps: int, total_steps: int, final_share: float = 0.0) -> float:
    """Share of the peak rate at a step: linear ``(step + 1) / warmup``, then cosine to `final_share` at the end."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Scale every group's peak rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
