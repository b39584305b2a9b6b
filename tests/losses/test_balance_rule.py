"""The balancing rule, its running form against a hand loop, and gradient norms at a Linear against the real ones."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlip.core.errors import UserError
from qlip.losses.balance import RATIO_RANGE, GradientProbe, RunningBalance, inverse_loss_ratio


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


class Net(nn.Module):
    """Two linear layers with the probed one in the middle of a residual branch."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.before, self.probed, self.after = (nn.Linear(5, 5, dtype=dtype) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(x + self.probed(torch.tanh(self.before(x))))


def two_losses(y: Tensor) -> tuple[Tensor, Tensor]:
    return y.float().square().mean(), F.softplus(y.float()).sum()


def test_norms_equal_those_of_the_weights_gradient_and_leave_no_gradient():
    net, probe = Net(), GradientProbe()
    with probe.watching(net.probed):
        first, second = two_losses(net(torch.randn(3, 7, 5, dtype=torch.float64)))
    for loss in (first, second, first):  # in any order, as often as one likes
        norm = probe.norm(loss)
        (gradient,) = torch.autograd.grad(loss, net.probed.weight, retain_graph=True)
        torch.testing.assert_close(norm, gradient.norm(), rtol=1e-6, atol=0)
        assert not norm.requires_grad
    assert all(parameter.grad is None for parameter in net.parameters())
    (first + second).backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_norms_are_summed_in_float32_under_bf16_autocast():
    """The products of bf16 factors, added in float32: closer to the truth than the weight's own bf16 gradient."""
    net, probe = Net(torch.float32), GradientProbe()
    x = torch.randn(64, 49, 5)
    (reference,) = torch.autograd.grad(two_losses(net(x))[0], net.probed.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with probe.watching(net.probed):
            loss, _ = two_losses(net(x))
        norm = probe.norm(loss)  # as in a training step, whose forward pass is inside autocast
    assert norm.dtype == torch.float32
    captured_x, captured_y = probe._captured
    assert captured_x.dtype in (torch.float32, torch.bfloat16) and captured_y.dtype == torch.bfloat16
    (grad_y,) = torch.autograd.grad(loss, captured_y, retain_graph=True)
    exact = torch.einsum("bnd,bni->di", grad_y.double(), captured_x.double()).norm()
    torch.testing.assert_close(norm.double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(norm, reference.norm(), rtol=2e-2, atol=0)


def test_nothing_is_captured_outside():
    net, probe = Net(), GradientProbe()
    x = torch.randn(3, 7, 5, dtype=torch.float64)
    with probe.watching(net.probed):
        inside, _ = two_losses(net(x))
    before = probe.norm(inside)
    net(2 * x)
    assert torch.equal(probe.norm(inside), before)
    probe.release()
    with pytest.raises(AssertionError, match="watching"):
        probe.norm(inside)


def test_a_compiled_module_is_watched_too():
    net, probe = Net(), GradientProbe()
    x = torch.randn(3, 7, 5, dtype=torch.float64)
    net.compile(backend="eager")
    plain = net(x)
    with probe.watching(net.probed):
        watched = net(x)
    assert torch.equal(plain, watched)
    (gradient,) = torch.autograd.grad(two_losses(watched)[0], net.probed.weight, retain_graph=True)
    torch.testing.assert_close(probe.norm(two_losses(watched)[0]), gradient.norm(), rtol=1e-6, atol=0)
