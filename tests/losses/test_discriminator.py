"""The discriminator's size, layers and numerics, against numpy loops and the description written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from qlip.losses.adversarial import r1_penalty
from qlip.losses.discriminator import (
    Discriminator,
    EqualisedConv,
    EqualisedLinear,
    ResidualBlock,
    blur,
    leaky_relu,
    minibatch_stddev,
)


def tiny(image_size: int = 8) -> Discriminator:
    torch.manual_seed(0)
    return Discriminator(image_size, channel_base=64, max_channels=8)


def test_paper_size_has_28_864_129_parameters():
    with torch.device("meta"):
        assert sum(p.numel() for p in Discriminator(256).parameters()) == 28_864_129


def test_small_size_runs_on_cpu():
    torch.manual_seed(0)
    discriminator = Discriminator(64, channel_base=1024, max_channels=64)
    logits = discriminator(torch.randn(6, 3, 64, 64))
    assert logits.shape == (6,) and logits.isfinite().all()
    assert len(discriminator.blocks) == 4
    assert not discriminator.state_dict().keys() - dict(discriminator.named_parameters()).keys()


@pytest.mark.parametrize("image_size", [0, 4, 12, 392])
def test_sizes_other_than_powers_of_two_are_refused(image_size):
    with pytest.raises(ValueError, match="random power-of-two crop"):
        Discriminator(image_size)


def test_pictures_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"takes \(8, 8\).*same_crop"):
        tiny()(torch.zeros(1, 3, 16, 16))


def test_weights_have_unit_variance_and_are_scaled_at_run_time():
    torch.manual_seed(0)
    discriminator = Discriminator(32, channel_base=1024, max_channels=64)
    for module in discriminator.modules():
        if isinstance(module, EqualisedConv | EqualisedLinear):
            fan_in = module.weight[0].numel()
            assert module.scale == pytest.approx(fan_in**-0.5)
            assert module.bias is None or (module.bias == 0).all()
            if module.weight.numel() > 5000:
                assert module.weight.std().item() == pytest.approx(1, abs=0.05)
    x = torch.randn(512, 1024)
    hidden = discriminator.hidden(x)
    torch.testing.assert_close(hidden, F.linear(x, discriminator.hidden.weight / 32))
    assert hidden.std().item() == pytest.approx(1, abs=0.05)
    assert leaky_relu(x).square().mean().item() == pytest.approx(1.04, abs=0.02)  # 2 (1 + 0.2^2) / 2


def test_blur_is_the_separable_binomial_filter():
    x = torch.randn(1, 2, 6, 7, dtype=torch.float64)
    taps = np.array([1, 3, 3, 1]) / 8
    for c in range(2):
        padded = np.pad(x[0, c].numpy(), 2)
        rows = np.apply_along_axis(np.convolve, 0, padded, taps, "valid")
        expected = np.apply_along_axis(np.convolve, 1, rows, taps, "valid")
        np.testing.assert_allclose(blur(x, padding=2)[0, c].numpy(), expected, atol=1e-12)
    torch.testing.assert_close(blur(x, padding=1, stride=2), blur(x, padding=1)[..., ::2, ::2])


def test_residual_block_is_the_description_written_out():
    torch.manual_seed(0)
    block = ResidualBlock(4, 6).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    path = leaky_relu(F.conv2d(x, block.conv1.weight / 6, block.conv1.bias, padding=1))
    path = F.conv2d(blur(path, padding=2), block.conv2.weight / 6, block.conv2.bias, stride=2)
    skip = F.conv2d(blur(x, padding=1), block.skip.weight / 2, stride=2)
    expected = leaky_relu(path) * math.sqrt(1 / 2) + skip * math.sqrt(1 / 2)
    assert expected.shape == (2, 6, 4, 4)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize(("batch", "group"), [(8, 4), (6, 3), (2, 2), (5, 1), (1, 1)])
def test_minibatch_stddev_equals_a_numpy_loop(batch, group):
    x = torch.randn(batch, 3, 4, 4, dtype=torch.float64)
    output = minibatch_stddev(x)
    assert output.shape == (batch, 4, 4, 4)
    assert torch.equal(output[:, :3], x)
    num_groups = batch // group
    for i in range(batch):
        members = np.stack([x[j].numpy() for j in range(batch) if j % num_groups == i % num_groups])
        assert len(members) == group
        expected = np.sqrt(members.var(axis=0) + 1e-8).mean()
        np.testing.assert_allclose(output[i, 3].numpy(), expected, rtol=1e-10)


def test_autocast_changes_nothing():
    discriminator, x = tiny(16), torch.randn(4, 3, 16, 16)
    plain, plain_penalty = discriminator(x), r1_penalty(discriminator, x)
    with torch.autocast("cpu", torch.bfloat16):
        logits, penalty = discriminator(x), r1_penalty(discriminator, x)
        half = discriminator(x.bfloat16())
    assert logits.dtype == half.dtype == torch.float32
    assert torch.equal(logits, plain) and torch.equal(penalty, plain_penalty)
    penalty.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in discriminator.parameters())
