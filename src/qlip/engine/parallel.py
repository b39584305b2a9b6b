"""Where and in which precision a run computes: device, autocast, EMA copies.

The wrappers of DDP and FSDP belong here too; they are applied in place to `Task.modules()`, so tasks do not change.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from qlip.core.errors import UserError
from qlip.nn.blocks import BlockStack


def pick_device(name: str) -> torch.device:
    """`auto` takes the GPU when there is one. Raises `UserError` for a device this machine has not."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"device {name!r} is not usable here; `qlip doctor` says what this machine has") from None
    return device


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products are native: GPUs of compute capability 8 and up, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() != "DEFAULT" and _cpu_bf16()


def _cpu_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """The autocast of a run; `auto` is bf16 where it is native, float32 elsewhere. Master weights stay float32."""
    bf16 = precision == "bf16" or (precision == "auto" and has_fast_bf16(device))
    return torch.autocast(device_type=device.type, dtype=torch.bfloat16, enabled=bf16)


def refuse_several_processes() -> None:
    """One clear line instead of ranks that train apart. Multi-process training is not built yet."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("training on several processes is not built yet; start `qlip train` without torchrun")


def set_activation_checkpointing(modules: nn.Module, *, enabled: bool) -> None:
    """Recompute the activations of every block stack in the backward pass, or keep them."""
    for module in modules.modules():
        if isinstance(module, BlockStack):
            module.gradient_checkpointing = enabled


def exponential_average(module: nn.Module, decay: float) -> AveragedModel:
    """A copy of the module whose weights follow by ``decay`` with every `update_average`."""
    return AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def update_average(average: nn.Module, module: nn.Module) -> None:
    """One step of an exponential average: ``average = decay * average + (1 - decay) * module``."""
    assert isinstance(average, AveragedModel)
    average.update_parameters(module)


def averaged_module(average: nn.Module) -> nn.Module:
    """The module that holds the averaged weights."""
    assert isinstance(average, AveragedModel)
    return average.module
