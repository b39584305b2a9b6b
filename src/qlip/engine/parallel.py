"""Where and how a run computes: device, autocast, activation checkpointing, compiled blocks, sharding, EMA copies.

Everything is applied in place to `Task.modules()`, so tasks do not change, in this order: device, activation
checkpointing, EMA copy, compile, shard. Both kinds of data parallelism are FSDP2 (`fully_shard`): `fsdp` spreads
weights, gradients and optimizer state over all ranks; `ddp` is its mesh that only replicates, so gradients are averaged
while the backward pass runs, and modules that are called several times per step or differentiated twice (the
discriminator under R1) need no exception.
"""

from __future__ import annotations

import os
import warnings
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import PreTrainedModel

from qlip.core.distributed import launched_processes, replicating_mesh, sharding_mesh
from qlip.core.errors import UserError
from qlip.nn.blocks import BlockStack

ParallelKind = Literal["auto", "none", "ddp", "fsdp"]


def pick_device(name: str) -> torch.device:
    """`auto` takes the GPU when there is one, of several processes each its own.

    Raises `UserError` for a device this machine has not.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda:") and launched_processes() > 1:
        raise UserError(f"device {name!r} would be every process's: take cuda, which gives each its own")
    if name == "cuda" and launched_processes() > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"device {name!r} is not usable here; `qlip doctor` says what this machine has") from None
    return device


def pick_parallel(kind: ParallelKind) -> ParallelKind:
    """`auto` is `ddp` under torchrun and `none` without. Raises `UserError` for `none` with several processes."""
    if launched_processes() == 1:
        return "none"
    if kind == "none":
        raise UserError(
            f"trainer.parallel is none, but torchrun started {launched_processes()} processes: "
            "take ddp or fsdp, or start one process"
        )
    return "ddp" if kind == "auto" else kind


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


def make_scalars_vectors(modules: nn.Module) -> None:
    """Give parameters without dimensions the shape (1,), as sharding asks; `Trainer.whole_model` turns them back."""
    for module in modules.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 0:
                vector = nn.Parameter(parameter.detach().reshape(1), requires_grad=parameter.requires_grad)
                setattr(module, name, vector)


def block_stacks(module: nn.Module) -> list[BlockStack | PreTrainedModel]:
    """Modules that hold transformer blocks as `layers`: our towers' and those of transformers' language models."""
    return [
        part
        for part in module.modules()
        if isinstance(part, BlockStack | PreTrainedModel) and isinstance(getattr(part, "layers", None), nn.ModuleList)
    ]


def _blocks_of(stack: BlockStack | PreTrainedModel) -> nn.ModuleList:
    blocks = stack.layers
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def set_activation_checkpointing(modules: nn.Module, *, enabled: bool) -> None:
    """Recompute the activations of every block in the backward pass, or keep them."""
    for stack in block_stacks(modules):
        if isinstance(stack, BlockStack):
            stack.gradient_checkpointing = enabled
        elif enabled:  # the old name warns where there is a new one
            getattr(stack, "activation_checkpointing_enable", stack.gradient_checkpointing_enable)()


def compile_blocks(modules: nn.Module, *, backend: str = "inductor") -> None:
    """Compile every transformer block in place: one graph for all blocks of a tower, compiled within a minute.

    Their backward passes keep what they have saved, since gradients of single losses may be taken before the whole one.
    """
    torch._functorch.config.donated_buffer = False
    for stack in block_stacks(modules):
        for block in _blocks_of(stack):
            if not getattr(block, "keep_eager", False):
                block.compile(backend=backend)


def shard(module: nn.Module, kind: ParallelKind, device: torch.device) -> None:
    """Make the parameters those of all ranks, in place; `none` changes nothing.

    Every transformer block is gathered when it is needed. What is outside of blocks stays gathered through a phase, so
    that it may be called several times, by other ways than the module's `forward`, and differentiated twice, or a
    partial gradient be taken before the whole one; `settle` ends that.
    """
    if kind == "none" or not any(True for _ in module.parameters()):
        return
    # What a module returns is never written in place here, which is what FSDP2 warns about when it returns views.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = replicating_mesh(device.type) if kind == "ddp" else sharding_mesh(device.type)
    for stack in block_stacks(module):
        for block in _blocks_of(stack):
            fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh, reshard_after_forward=False)
    assert isinstance(module, FSDPModule)
    module.set_reshard_after_backward(False, recurse=False)


def settle(modules: nn.ModuleDict) -> None:
    """After a backward pass: parameters and gradients are this rank's shares again."""
    for module in modules.values():
        if isinstance(module, FSDPModule):
            module.reshard()


def exchange_gradients(modules: nn.ModuleDict, kind: ParallelKind, *, last: bool) -> None:
    """Before the backward pass of a micro-batch: replicas exchange gradients after the last one only.

    Sharded gradients are exchanged every time, or each rank would hold all of them.
    """
    for module in modules.values():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(last or kind == "fsdp")


def exponential_average(module: nn.Module, decay: float) -> AveragedModel:
    """A copy of the module whose weights follow by ``decay`` with every `update_average`. Copy before sharding."""
    return AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def update_average(average: nn.Module, module: nn.Module) -> None:
    """One step of an exponential average: ``average = decay * average + (1 - decay) * module``."""
    assert isinstance(average, AveragedModel)
    average.update_parameters(module)


def averaged_module(average: nn.Module) -> nn.Module:
    """The module that holds the averaged weights."""
    assert isinstance(average, AveragedModel)
    return average.module
