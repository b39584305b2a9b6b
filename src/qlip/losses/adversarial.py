"""What the stage-2 adversary is trained with: GAN losses, R1 and LeCAM penalties, warm-up and adaptive weights, crops.

Shapes: `b` pictures, `h`, `w` pixels; logits (b,) are positive for "real". `D(x)` are the logits of real pictures,
`D(x^)` those of reconstructions. The network is in `discriminator.py`. StyleGAN2 (arXiv 1912.04958) has the
non-saturating losses with lazy R1, which are QLIP's default by way of BSQ-ViT (arXiv 2406.07548).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GanLoss = Literal["nonsaturating", "hinge"]


def generator_loss(fake_logits: Tensor, *, kind: GanLoss = "nonsaturating") -> Tensor:
    """Small when D takes reconstructions for real. (b,) -> ().

    `nonsaturating`: ``mean softplus(-D(x^))``. `hinge`: ``-mean D(x^)``, unbounded below.
    """
    return -fake_logits.mean() if kind == "hinge" else F.softplus(-fake_logits).mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, *, kind: GanLoss = "nonsaturating") -> Tensor:
    """Half the sum of the losses on real pictures and on reconstructions. (b,) twice -> ().

    `nonsaturating`: ``softplus(-D(x))`` and ``softplus(D(x^))``; ln 2 for a discriminator that cannot tell.
    `hinge`: ``relu(1 - D(x))`` and ``relu(1 + D(x^))``; 1 for such a one, 0 beyond the margin.
    """
    if kind == "hinge":
        return (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()) / 2
    return (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()) / 2


def r1_penalty(discriminator: Callable[[Tensor], Tensor], real: Tensor) -> Tensor:
    """``mean_b |dD/dx_b|^2`` at real pictures (b, 3, h, w), differentiable in D's weights (arXiv 1801.04406). -> ().

    The caller multiplies by gamma / 2, and by the interval when it is computed every so many steps (lazy R1).
    """
    with torch.autocast(device_type=real.device.type, enabled=False):  # squared gradients underflow in float16
        real = real.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(discriminator(real).sum(), real, create_graph=True)
        return gradient.square().sum(dim=(1, 2, 3)).mean()


class LecamPenalty(nn.Module):
    """LeCAM (arXiv 2104.03310): keeps D's logits from drifting apart, each side anchored at the other's average.

        mean relu(D(x) - average of D(x^))^2 + mean relu(average of D(x) - D(x^))^2

    The averages are exponential, of logits over all pictures of a step, and buffers, so that checkpoints keep them.
    """

    real_average: Tensor
    fake_average: Tensor
    started: Tensor

    def __init__(self, *, decay: float = 0.99) -> None:
        """`decay` of the averages per step, the paper's 0.99."""
        super().__init__()
        self.decay = decay
        self.register_buffer("real_average", torch.zeros(()))
        self.register_buffer("fake_average", torch.zeros(()))
        self.register_buffer("started", torch.zeros(()))  # 1 from the first update on

    def forward(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """(b,) twice -> (); zero before the first `update`, when there is nothing to be near to."""
        above = F.relu(real_logits - self.fake_average).square().mean()
        below = F.relu(self.real_average - fake_logits).square().mean()
        return self.started * (above + below)

    @torch.no_grad()
    def update(self, *, real_logit: Tensor, fake_logit: Tensor) -> None:
        """Move the averages towards a step's mean logits, () each, equal on all ranks; the first are taken whole."""
        weight = 1 - self.decay * self.started
        self.real_average.lerp_(real_logit.to(self.real_average), weight)
        self.fake_average.lerp_(fake_logit.to(self.fake_average), weight)
        self.started.fill_(1)


def warmup_factor(step: int, *, start_step: int, warmup_steps: int) -> float:
    """0 before `start_step`, then ``(step - start_step + 1) / warmup_steps`` up to 1; without warm-up 1 at once."""
    if step < start_step:
        return 0.0
    return min(1.0, (step - start_step + 1) / max(1, warmup_steps))


def adaptive_weight(reference_norm: Tensor, generator_norm: Tensor, *, maximum: float) -> Tensor:
    """VQGAN's weight of the generator loss: it pulls at the last layer as hard as the reference losses. () -> ().

    ``min(|reference gradient| / (|generator gradient| + 1e-4), maximum)``, without gradient (arXiv 2012.09841).
    """
    return (reference_norm / (generator_norm + 1e-4)).clamp(0, maximum).detach()


def same_crop(
    real: Tensor, fake: Tensor, *, size: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """One random (size, size) window, cut out of both. (b, 3, h, w) twice -> (b, 3, size, size) twice.

    The window is drawn uniformly, once per call, from the CPU `generator` (default: PyTorch's).
    Raises `ValueError` when the two differ in height or width or are smaller than the window.
    """
    height, width = real.shape[-2:]
    if fake.shape[-2:] != real.shape[-2:] or min(height, width) < size:
        raise ValueError(
            f"cannot cut the same {size}-pixel crop from {tuple(real.shape)} and {tuple(fake.shape)}: "
            "give pictures of one size, at least as large as the crop"
        )
    top = int(torch.randint(height - size + 1, (), generator=generator))
    left = int(torch.randint(width - size + 1, (), generator=generator))
    window = (..., slice(top, top + size), slice(left, left + size))
    return real[window], fake[window]
