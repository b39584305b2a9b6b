"""The balancing rule and its running form against a hand loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qlip.core.errors import UserError
from qlip.losses.balance import RATIO_RANGE, RunningBalance, inverse_loss_ratio


def test_the_papers_rule_is_the_ratio_of_the_final_losses():
    assert inverse_loss_ratio(1.4, pixel_end=3.5e-3) == pytest.approx(400)


@pytest.mark.parametrize(("align", "pixel"), [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0), (math.nan, 1.0), (1.0, math.inf)])
def test_the_rule_refuses_losses_that_no_training_ends_with(align, pixel):
    with pytest.raises(UserError, match="give the loss that a training ended with"):
        inverse_loss_ratio(align, pixel_end=pixel)


def losses(num: int) -> list[tuple[Tensor, Tensor]]:
    """Pairs of a falling contrastive and a falling pixel loss."""
    return [(torch.tensor(4.0 / (step + 1) + 1), torch.tensor(0.1 / (step + 1) + 3e-3)) for step in range(num)]


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99])
def test_running_balance_equals_a_hand_loop(momentum):
    balance = RunningBalance(20.0, contrastive_weight=2.0, momentum=momentum)
    assert balance().item() == 20
    seen: list[tuple[float, float]] = []
    for align, pixel in losses(12):
        balance.update(align, pixel=pixel)
        seen.append((align.item(), pixel.item()))
        ages = [momentum ** (len(seen) - 1 - i) for i in range(len(seen))]  # weights of an average from the first on
        mean_align, mean_pixel = (
            sum(w * pair[k] for w, pair in zip(ages, seen, strict=True)) / sum(ages) for k in (0, 1)
        )
        assert balance.bias_corrected().tolist() == pytest.approx([mean_align, mean_pixel], rel=1e-5)
        assert balance().item() == pytest.approx(2 * mean_align / mean_pixel, rel=1e-5)


@pytest.mark.parametrize(("align", "pixel", "ratio"), [(1e-3, 1.0, 1.0), (5.0, 1e-9, 1e4), (5.0, 0.0, 1e4)])
def test_running_balance_stays_within_its_range(align, pixel, ratio):
    balance = RunningBalance(20.0, contrastive_weight=0.5)
    balance.update(torch.tensor(align), pixel=torch.tensor(pixel))
    assert ratio in RATIO_RANGE
    assert balance().item() == 0.5 * ratio


def test_a_checkpoint_carries_the_running_balance():
    balance, again = (RunningBalance(20.0, contrastive_weight=1.0) for _ in range(2))
    (first, second) = losses(2)
    balance.update(first[0], pixel=first[1])
    again.load_state_dict(balance.state_dict())
    for module in (balance, again):
        module.update(second[0], pixel=second[1])
    assert torch.equal(balance(), again())
    assert list(balance.parameters()) == []


@pytest.mark.parametrize("momentum", [-0.1, 1.0, math.nan])
def test_impossible_momenta_are_refused(momentum):
    with pytest.raises(UserError, match="give a number from 0 to below 1"):
        RunningBalance(20.0, contrastive_weight=1.0, momentum=momentum)
