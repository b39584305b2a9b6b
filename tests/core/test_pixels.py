"""The three pixel scales and the way between them."""

import pytest
import torch
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from qlip.core.pixels import CLIP_MEAN, CLIP_STD, from_uint8, normalise, to_uint8, to_unit


def test_constants_are_those_of_openai_clip():
    assert list(CLIP_MEAN) == OPENAI_CLIP_MEAN
    assert list(CLIP_STD) == OPENAI_CLIP_STD


def test_every_grey_level_of_every_channel_survives_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    assert torch.equal(to_uint8(from_uint8(levels)), levels)


def test_normalised_is_unit_minus_mean_over_std_per_channel():
    unit = torch.rand(3, 4, 4)
    expected = torch.stack([(unit[c] - CLIP_MEAN[c]) / CLIP_STD[c] for c in range(3)])
    torch.testing.assert_close(normalise(unit), expected)
    torch.testing.assert_close(to_unit(expected), unit)


def test_pictures_are_rounded_not_truncated():
    unit = torch.tensor([100.4, 100.6]).div(255)[:, None, None, None].expand(2, 3, 1, 1)
    assert to_uint8(normalise(unit))[:, 0, 0, 0].tolist() == [100, 101]
    unit = torch.rand(8, 3, 64, 64)
    bias = (to_uint8(normalise(unit)).double() - unit.double() * 255).mean()
    assert abs(bias) < 0.01  # truncation would give -0.5


def test_out_of_range_is_kept_for_losses_and_clamped_for_pictures():
    unit = torch.tensor([-0.5, 1.5])[:, None, None, None].expand(2, 3, 1, 1)
    torch.testing.assert_close(to_unit(normalise(unit)), unit)
    assert to_uint8(normalise(unit))[:, 0, 0, 0].tolist() == [0, 255]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_pixels_come_back_as_float32(dtype):
    assert to_unit(torch.zeros(1, 3, 2, 2, dtype=dtype)).dtype == torch.float32


def test_to_unit_passes_gradients_scaled_by_std():
    x = torch.randn(1, 3, 2, 2, requires_grad=True)
    to_unit(x).sum().backward()
    torch.testing.assert_close(x.grad[0, :, 0, 0], torch.tensor(CLIP_STD))
