"""How alignment and reconstruction share the encoder: the paper's rule and its running form.

QLIP, section on balancing: a_r / a_a = L_align / L_mse, each taken at the end of a training on that loss alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from qlip.core.distributed import mean_over_ranks
from qlip.core.errors import UserError

RATIO_RANGE = (1.0, 1e4)
"""Of a_r / a_a, as far as Table 3a goes: below, pictures are lost, above, zero-shot accuracy is."""


def inverse_loss_ratio(align_end: float, *, pixel_end: float) -> float:
    """The paper's a_r / a_a from two finished trainings: weights inverse to the losses that they end with.

    `align_end` in nats, of the training on alignment alone; `pixel_end` on [0, 1] pixels, of that on reconstruction
    alone. Raises `UserError` for a loss that is not finite and positive.
    """
    for name, loss in (("align_end", align_end), ("pixel_end", pixel_end)):
        if not (math.isfinite(loss) and loss > 0):
            raise UserError(f"{name} is {loss}: give the loss that a training ended with, finite and above 0")
    return align_end / pixel_end


class RunningBalance(nn.Module):
    """a_r of every step from the losses of the steps before: ``a_a ema(L_align) / ema(L_mse)``.

    The paper's rule without its two trainings: no extra backward pass, the same weight on every rank and for every
    micro-batch. The ratio is kept within `RATIO_RANGE`. The averages are a buffer, so checkpoints carry them.
    """

    averages: Tensor
    num_updates: Tensor

    def __init__(self, initial: float, *, contrastive_weight: float, momentum: float = 0.99) -> None:
        """`initial` is a_r until the first update, `momentum` the share of the averages that an update keeps.

        Raises `UserError` for a momentum outside [0, 1).
        """
        super().__init__()
        if not 0 <= momentum < 1:
            raise UserError(f"balance_momentum is {momentum}: give a number from 0 to below 1, such as 0.99")
        self.initial = initial
        self.contrastive_weight = contrastive_weight
        self.momentum = momentum
        self.register_buffer("averages", torch.zeros(2))  # of L_align and L_mse, float32
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    def forward(self) -> Tensor:
        """a_r, a scalar without gradient."""
        align, pixel = self.bias_corrected()
        weight = self.contrastive_weight * (align / pixel).clamp(*RATIO_RANGE)
        return torch.where(self.num_updates > 0, weight, self.initial)

    def bias_corrected(self) -> Tensor:
        """(2,) the averages of L_align and L_mse as weighted means of what was seen; NaN before the first update."""
        return self.averages / (1 - self.momentum**self.num_updates)

    @torch.no_grad()
    def update(self, align: Tensor, *, pixel: Tensor) -> None:
        """Take in the unweighted losses of a finished step, scalars of this rank; all ranks must call it together."""
        losses = mean_over_ranks(torch.stack([align, pixel]).float())
        self.averages.lerp_(losses, 1 - self.momentum)
        self.num_updates += 1
