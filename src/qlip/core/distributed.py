"""The only file that calls torch.distributed: start, stop, rank, and the collectives that losses and metrics need.

Every collective returns its result and works in a single process too, where it is the identity. `mean_over_ranks`
and `gather_with_grad` are differentiable: summing the loss gradients of all ranks gives the gradient of the
joined batch times the number of ranks, so an engine that averages gradients (DDP, FSDP) recovers it exactly.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
from torch import Tensor


def start(*, device_type: str) -> None:
    """Join the process group that torchrun's variables describe; nothing to do in a single process."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group(backend="nccl" if device_type == "cuda" else "gloo")


def stop() -> None:
    """Leave the process group if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number among all, 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together, 1 when alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def mean_over_ranks(x: Tensor) -> Tensor:
    """Differentiable mean of `x` over all ranks (same shape everywhere)."""
    if world_size() == 1:
        return x
    return dist_nn.all_reduce(x) / world_size()


def gather_with_grad(x: Tensor) -> Tensor:
    """Join (b, ...) of every rank to (world_size * b, ...) in rank order; the gradient reaches every rank."""
    if world_size() == 1:
        return x
    return torch.cat(dist_nn.all_gather(x.contiguous()))


def any_rank(flag: bool, *, device: torch.device) -> bool:
    """True on every rank when the flag is true on any, so that all ranks take the same decision."""
    if world_size() == 1:
        return flag
    value = torch.tensor(float(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())
