"""The gradients of one phase over the micro-batches of a step, in the memory of one micro-batch.

One micro-batch: its loss. Several of an ordinary task: the mean of their losses, exact for means over samples (in stage
2 codebook entropy, minibatch deviation and adaptive weight are per micro-batch). Several of a `JointTask` (contrastive,
codebook entropy of all samples): two passes, GradCache (arXiv 2101.06983).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from qlip.engine.interfaces import Batch, JointTask, Phase, Task


def total_loss(terms: dict[str, Tensor]) -> Tensor:
    """The sum of the weighted terms, those whose name ends in `_loss`. Scalar, float32 or float64.

    A phase without any has the loss 0 with nothing to differentiate.
    """
    losses = [_at_least_float32(value) for name, value in terms.items() if name.endswith("_loss")]
    return torch.stack(losses).sum() if losses else torch.zeros(())


def accumulate_gradients(
    task: Task,
    phase: Phase,
    batches: list[Batch],
    step: int,
    *,
    device: torch.device,
    precision: Callable[[], AbstractContextManager],
    before_backward: Callable[[bool], None],
) -> dict[str, Tensor]:
    """Add the gradient of the phase's loss on all micro-batches to `.grad`. Returns the detached terms.

    `precision()` is the autocast of forward passes; `before_backward(last)` is called before every backward pass that
    reaches parameters. Micro-batches must have equal sizes, as means of means are taken.
    """
    if len(batches) == 1:
        with precision():
            terms = task.loss(phase, to_device(batches[0], device), step)
        before_backward(True)
        total_loss(terms).backward()
        return {name: value.detach() for name, value in terms.items()}
    if isinstance(task, JointTask):
        return _in_two_passes(
            task, phase, batches, step, device=device, precision=precision, before_backward=before_backward
        )
    found = []
    for index, batch in enumerate(batches):
        with precision():
            terms = task.loss(phase, to_device(batch, device), step)
        before_backward(index == len(batches) - 1)
        (total_loss(terms) / len(batches)).backward()
        found.append({name: value.detach() for name, value in terms.items()})
    return _mean_of(found)


def _in_two_passes(
    task: JointTask,
    phase: Phase,
    batches: list[Batch],
    step: int,
    *,
    device: torch.device,
    precision: Callable[[], AbstractContextManager],
    before_backward: Callable[[bool], None],
) -> dict[str, Tensor]:
    """Features of all, the joint loss and its gradient in them, then every micro-batch again with that gradient."""
    cached = []
    with torch.random.fork_rng(devices=[]), torch.no_grad(), precision():  # the second pass draws the same numbers
        for batch in batches:
            cached.append(task.parts(phase, to_device(batch, device), step).features)
    sizes = {name: [len(features[name]) for features in cached] for name in cached[0]}
    joined = {name: torch.cat([features[name] for features in cached]).requires_grad_() for name in cached[0]}
    del cached
    with precision():
        joint_terms = task.joint_loss(phase, joined, step)
    joint_loss = total_loss(joint_terms)
    if joint_loss.requires_grad:  # a baseline may have no joint term
        joint_loss.backward()
    gradients = {name: feature.grad.split(sizes[name]) for name, feature in joined.items() if feature.grad is not None}
    found = []
    for index, batch in enumerate(batches):
        with precision():
            parts = task.parts(phase, to_device(batch, device), step)
        loss = total_loss(parts.terms) / len(batches)
        for name, pieces in gradients.items():
            loss = loss + (parts.features[name] * pieces[index]).sum()
        before_backward(index == len(batches) - 1)
        loss.backward()
        found.append({name: value.detach() for name, value in parts.terms.items()})
    return _mean_of(found) | {name: value.detach() for name, value in joint_terms.items()}


@contextmanager
def only_training(phase: Phase, modules: nn.ModuleDict) -> Iterator[None]:
    """Let no gradient reach a module that the phase does not train.

    Nothing is computed or kept for it; with sharding, which does not let gradients be turned off between steps, what
    was computed is dropped.
    """
    resting = [module for name, module in modules.items() if name not in phase.modules]
    turned_off = [
        parameter
        for module in resting
        if not isinstance(module, FSDPModule)
        for parameter in module.parameters()
        if parameter.requires_grad
    ]
    for parameter in turned_off:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in turned_off:
            parameter.requires_grad_(True)
        for module in resting:
            module.zero_grad(set_to_none=True)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on the device; copies from pinned memory do not wait."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _mean_of(found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each term over the micro-batches that have it."""
    names = dict.fromkeys(name for terms in found for name in terms)
    return {name: torch.stack([terms[name] for terms in found if name in terms]).mean(0) for name in names}


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
