"""What an engine does with a task in one step, written out: one pass, or two over micro-batches."""

from __future__ import annotations

import torch
from tiny_qlip import scene_batch
from torch import Tensor

from qlip.core.distributed import whole
from qlip.engine.interfaces import Batch
from qlip.tasks.align import AlignTask


def total(terms: dict[str, Tensor]) -> Tensor:
    """The loss that an engine differentiates."""
    return torch.stack([value for name, value in terms.items() if name.endswith("_loss")]).sum()


def gradients(task: AlignTask) -> dict[str, Tensor]:
    """Those of all modules, taken away."""
    found = {
        f"{part}.{name}": whole(parameter.grad).clone()
        for part, module in task.modules().items()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    for module in task.modules().values():
        module.zero_grad()
    return found


def one_pass(task: AlignTask, batch: Batch, step: int = 0) -> dict[str, Tensor]:
    """Terms of one batch, its gradients in `.grad`."""
    terms = task.loss(task.phases(0)[0], batch, step)
    total(terms).backward()
    return terms


def two_passes(task: AlignTask, batches: list[Batch], step: int = 0) -> Tensor:
    """GradCache written out: features of all, their gradient, then every micro-batch again. Returns the loss."""
    (phase,) = task.phases(0)
    with torch.no_grad():
        cached = [task.parts(phase, batch, step).features for batch in batches]
    joined = {name: torch.cat([x[name] for x in cached]).requires_grad_() for name in cached[0]}
    joint = total(task.joint_loss(phase, joined, step))
    grads = dict(zip(joined, torch.autograd.grad(joint, list(joined.values())), strict=True))
    loss = joint.detach()
    for index, batch in enumerate(batches):
        parts = task.parts(phase, batch, step)
        mean = total(parts.terms) / len(batches)
        pieces = {name: grad.chunk(len(batches))[index] for name, grad in grads.items()}
        (mean + sum((parts.features[name] * piece).sum() for name, piece in pieces.items())).backward()
        loss += mean.detach()
    return loss


def cut(batch: Batch, num: int) -> list[Batch]:
    """Into `num` micro-batches, in order."""
    size = len(batch["key"]) // num
    return [{name: value[i * size : (i + 1) * size] for name, value in batch.items()} for i in range(num)]


def double_batch(num: int = 8) -> Batch:
    """Scenes in float64."""
    batch = scene_batch(num)
    return batch | {"pixel_values": batch["pixel_values"].double()}


def assert_equal_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], *, tolerance: float) -> None:
    """Of every parameter by name, relative to its largest entry."""
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        if name.endswith("k_proj.bias"):  # softmax does not feel it: rounding alone
            assert max(found[name].abs().max().item(), gradient.abs().max().item()) < 1e-7 * largest
            continue
        scale = gradient.abs().max()
        torch.testing.assert_close(found[name] / scale, gradient / scale, rtol=0, atol=tolerance, msg=name)
