"""The only file with collectives: start, stop, rank, and what losses, metrics and checkpoints exchange between ranks.

Every collective returns its result and works in a single process too, where it is the identity. `mean_over_ranks`
and `gather_with_grad` are differentiable: summing the loss gradients of all ranks gives the gradient of the
joined batch times the number of ranks, so an engine that averages gradients (DDP, FSDP) recovers it exactly.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from qlip.core.errors import UserError

Result = TypeVar("Result")
LOST_PEER = ("onnection closed", "onnection reset", "onnection refused", "timed out", "aborted", "Broken pipe")


def launched_processes() -> int:
    """How many processes torchrun started, 1 without it; known before they have joined."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """This process's number among those that torchrun started; known before they have joined."""
    return int(os.environ.get("RANK", "0"))


def start(*, device_type: str) -> None:
    """Join the process group that torchrun's variables describe; nothing to do in a single process.

    On GPUs every process takes the one of its local rank; what lies on the CPU is exchanged through gloo.
    """
    if launched_processes() == 1 or dist.is_initialized():
        return
    backend = "gloo"
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts == "0" or os.environ.get("GROUP_WORLD_SIZE") != "1":
        dist.init_process_group(backend=backend)
        return
    # torchrun keeps one store over its restarts, so addresses of dead processes are still in it: read and write beside
    # them. On several machines the counts differ; there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives every start its own.
    store, own_rank, ranks = next(dist.rendezvous("env://"))
    dist.init_process_group(
        backend=backend, store=dist.PrefixStore(f"restart_{restarts}", store), rank=own_rank, world_size=ranks
    )


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
    total: Tensor = _SumOverRanks.apply(x)
    return total / world_size()


def gather_with_grad(x: Tensor) -> Tensor:
    """Join (b, ...) of every rank to (world_size * b, ...) in rank order; the gradient reaches every rank."""
    if world_size() == 1:
        return x
    gathered: Tensor = _Gathered.apply(x.contiguous())
    return gathered


class _SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over ranks; its gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _summed(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _summed(gradient)


class _Gathered(torch.autograd.Function):
    """The tensors of all ranks joined along dimension 0; a rank's gradient is the sum of what all ranks have for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        pieces = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(pieces, x)
        return torch.cat(pieces)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _summed(gradient)[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def _summed(x: Tensor) -> Tensor:
    total = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of `x` over all ranks (same shape everywhere), without a gradient."""
    return x if world_size() == 1 else _summed(x)


def any_rank(flag: bool, *, device: torch.device) -> bool:
    """True on every rank when the flag is true on any, so that all ranks take the same decision."""
    if world_size() == 1:
        return flag
    value = torch.tensor(float(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def gather_objects(value: Any) -> list[Any]:
    """The values of all ranks in rank order, on every rank; small Python objects only."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def on_first_rank(action: Callable[[], None]) -> None:
    """Run it on rank 0 while the others wait; a `UserError` there is raised on every rank."""
    problem = None
    if rank() == 0:
        try:
            action()
        except UserError as error:
            problem = str(error)
    problem = gather_objects(problem)[0]
    if problem is not None:
        raise UserError(problem)


def on_all_ranks(action: Callable[[], Result]) -> Result:
    """Run it on every rank; when it raises a `UserError` on any, every rank raises the first one's."""
    result, problem = None, None
    try:
        result = action()
    except UserError as error:
        problem = str(error)
    problems = gather_objects(problem)
    failed = [index for index, found in enumerate(problems) if found is not None]
    if failed:
        where = "" if len(failed) == len(problems) else f"rank {failed[0]}: "
        raise UserError(f"{where}{problems[failed[0]]}")
    return cast(Result, result)


def wait_for_all() -> None:
    """Go on when every rank has come here."""
    if world_size() > 1:
        dist.barrier()


def background_group() -> dist.ProcessGroup | None:
    """A process group of its own for exchanges in another thread; None when alone. All ranks must ask together."""
    return dist.new_group(backend="gloo") if world_size() > 1 else None


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether an exchange failed because another process has gone."""
    return any(sign in str(error) for sign in LOST_PEER) and (isinstance(error, dist.DistError) or "gloo" in str(error))


def replicating_mesh(device_type: str) -> DeviceMesh:
    """All ranks hold whole tensors: (ranks, 1)."""
    return init_device_mesh(device_type, (world_size(), 1), mesh_dim_names=("replicate", "shard"))


def sharding_mesh(device_type: str) -> DeviceMesh:
    """Every rank holds its share of each tensor: (ranks,)."""
    return init_device_mesh(device_type, (world_size(),), mesh_dim_names=("shard",))


def whole(x: Tensor) -> Tensor:
    """The whole of a tensor that may be spread over ranks, on every rank; all ranks must ask together."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def own_part(x: Tensor) -> Tensor:
    """This rank's share of a tensor that may be spread over ranks; it shares its memory."""
    return x.to_local() if isinstance(x, DTensor) else x
