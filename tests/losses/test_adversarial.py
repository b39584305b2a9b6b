"""GAN losses, penalties, weights and crops of the adversary, against closed forms, loops and finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from qlip.losses.adversarial import (
    LecamPenalty,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    r1_penalty,
    same_crop,
    warmup_factor,
)
from qlip.losses.discriminator import Discriminator


def tiny(image_size: int = 8) -> Discriminator:
    torch.manual_seed(0)
    return Discriminator(image_size, channel_base=64, max_channels=8)


def test_losses_have_their_closed_forms():
    real, fake = torch.tensor([0.3, -2.0, 5.0]), torch.tensor([1.0, -0.5])
    expected_generator = sum(math.log1p(math.exp(-v)) for v in (1.0, -0.5)) / 2
    expected_real = sum(math.log1p(math.exp(-v)) for v in (0.3, -2.0, 5.0)) / 3
    expected_fake = sum(math.log1p(math.exp(v)) for v in (1.0, -0.5)) / 2
    assert generator_loss(fake).item() == pytest.approx(expected_generator, rel=1e-6)
    assert discriminator_loss(real, fake).item() == pytest.approx((expected_real + expected_fake) / 2, rel=1e-6)
    assert discriminator_loss(torch.zeros(4), torch.zeros(4)).item() == pytest.approx(math.log(2))
    assert generator_loss(torch.tensor([-1e4])).isfinite()


def test_hinge_losses_have_their_closed_forms_and_stop_at_the_margin():
    real, fake = (
        torch.tensor([0.25, -2.0, 5.0], requires_grad=True),
        torch.tensor([1.0, -0.5, -3.0], requires_grad=True),
    )
    loss = discriminator_loss(real, fake, kind="hinge")
    assert loss.item() == pytest.approx(((0.75 + 3 + 0) / 3 + (2 + 0.5 + 0) / 3) / 2, rel=1e-6)
    loss.backward()
    torch.testing.assert_close(real.grad, torch.tensor([-1.0, -1.0, 0.0]) / 6)
    torch.testing.assert_close(fake.grad, torch.tensor([1.0, 1.0, 0.0]) / 6)
    assert generator_loss(fake, kind="hinge").item() == pytest.approx(2.5 / 3, rel=1e-6)
    assert discriminator_loss(torch.zeros(4), torch.zeros(4), kind="hinge").item() == 1
    assert discriminator_loss(torch.full((2,), 1.5), torch.full((2,), -1.5), kind="hinge").item() == 0


def test_lecam_follows_its_averages_and_penalises_distance_from_the_other_sides():
    lecam = LecamPenalty(decay=0.9).double()
    real, fake = torch.randn(2, 5, dtype=torch.float64)
    assert lecam(real + 9, fake - 9).item() == 0  # no average yet
    average_real, average_fake = None, None
    for step in range(4):
        means = torch.tensor([1.0 + step, -2.0 * step], dtype=torch.float64)
        lecam.update(real_logit=means[0], fake_logit=means[1])
        first = average_real is None
        average_real = 1.0 if first else 0.9 * average_real + 0.1 * (1.0 + step)
        average_fake = 0.0 if first else 0.9 * average_fake - 0.1 * 2.0 * step
        expected = sum(max(v - average_fake, 0) ** 2 for v in real.tolist()) / 5
        expected += sum(max(average_real - v, 0) ** 2 for v in fake.tolist()) / 5
        assert lecam(real, fake).item() == pytest.approx(expected, rel=1e-12)
    assert lecam(torch.full((2,), average_fake - 1), torch.full((2,), average_real + 1)).item() == 0


def test_lecams_averages_are_saved_and_are_no_parameters():
    lecam, again = LecamPenalty(), LecamPenalty()
    lecam.update(real_logit=torch.tensor(2.0), fake_logit=torch.tensor(-1.0))
    assert not list(lecam.parameters())
    again.load_state_dict(lecam.state_dict())
    logits = torch.randn(3), torch.randn(3)
    assert lecam(*logits) > 0 and torch.equal(again(*logits), lecam(*logits))


def test_warm_up_is_a_ramp_behind_its_start():
    ramp = [warmup_factor(step, start_step=3, warmup_steps=4) for step in range(9)]
    assert ramp == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert [warmup_factor(step, start_step=2, warmup_steps=0) for step in range(4)] == [0, 0, 1, 1]
    assert warmup_factor(0, start_step=0, warmup_steps=0) == 1


def test_the_adaptive_weight_is_a_ratio_with_bounds_and_no_gradient():
    reference, generator = torch.tensor(3.0, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    weight = adaptive_weight(reference, generator, maximum=1e4)
    assert weight.item() == pytest.approx(3 / (0.5 + 1e-4), rel=1e-6) and not weight.requires_grad
    assert adaptive_weight(reference, torch.tensor(0.0), maximum=1e4).item() == 1e4
    assert adaptive_weight(reference, torch.tensor(0.0), maximum=7.0).item() == 7
    assert adaptive_weight(torch.tensor(0.0), generator, maximum=1e4).item() == 0


def test_r1_of_linear_and_quadratic_discriminators():
    real = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    w = torch.randn(3, 4, 4, dtype=torch.float64, requires_grad=True)
    penalty = r1_penalty(lambda x: (x * w).sum(dim=(1, 2, 3)), real)
    torch.testing.assert_close(penalty, w.square().sum())
    penalty.backward()
    torch.testing.assert_close(w.grad, 2 * w.detach())
    quadratic = r1_penalty(lambda x: x.square().sum(dim=(1, 2, 3)) / 2, real)
    torch.testing.assert_close(quadratic, real.square().sum(dim=(1, 2, 3)).mean())
    assert not real.requires_grad and real.grad is None


def test_r1_gradient_equals_finite_differences():
    discriminator = tiny().double()
    real = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    parameters = list(discriminator.parameters())
    gradients = torch.autograd.grad(r1_penalty(discriminator, real), parameters, materialize_grads=True)
    directions = [torch.randn_like(p) for p in parameters]
    analytic = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    step = 1e-6
    values = []
    for sign in (1, -1):
        moved = {
            name: p + sign * step * d for (name, p), d in zip(discriminator.named_parameters(), directions, strict=True)
        }
        values.append(r1_penalty(lambda x, moved=moved: torch.func.functional_call(discriminator, moved, (x,)), real))
    numeric = (values[0] - values[1]) / (2 * step)
    assert analytic.abs() > 1e-4
    torch.testing.assert_close(numeric, analytic, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("kind", ["nonsaturating", "hinge"])
def test_a_discriminator_learns_to_tell(kind):
    discriminator = tiny()
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=2e-3, betas=(0.0, 0.99))
    real, fake = torch.randn(8, 3, 8, 8), torch.randn(8, 3, 8, 8) * 0.3
    losses = []
    for _ in range(60):
        loss = discriminator_loss(discriminator(real), discriminator(fake), kind=kind)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_same_crop_cuts_the_same_window():
    real = torch.arange(2 * 3 * 12 * 10).reshape(2, 3, 12, 10)
    seen = set()
    for seed in range(200):
        a, b = same_crop(real, real + 7, size=8, generator=torch.Generator().manual_seed(seed))
        assert a.shape == (2, 3, 8, 8)
        assert torch.equal(a + 7, b)
        seen.add(int(a[0, 0, 0, 0]))
    assert seen == {10 * top + left for top in range(5) for left in range(3)}
    again, _ = same_crop(real, real, size=8, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(a, again)
    whole, _ = same_crop(real[..., :8, :8], real[..., :8, :8], size=8)
    assert torch.equal(whole, real[..., :8, :8])


@pytest.mark.parametrize("size", [(6, 6), (8, 9)])
def test_same_crop_refuses_what_does_not_fit(size):
    with pytest.raises(ValueError, match="at least as large as the crop"):
        same_crop(torch.zeros(1, 3, *size), torch.zeros(1, 3, 6, 6), size=8)
