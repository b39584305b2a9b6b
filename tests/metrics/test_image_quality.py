"""PSNR and SSIM equal scikit-image's."""

from __future__ import annotations

import math

import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from qlip.metrics.image_quality import psnr, ssim


@pytest.fixture
def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth and noisy uint8 pictures (4, 3, 40, 33) and increasingly disturbed copies."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.linspace(0, 6, 40), torch.linspace(0, 5, 33), indexing="ij")
    smooth = torch.stack([(y + x).sin(), (y - x).cos(), (y * x).sin()]) * 100 + 128
    a = smooth + torch.randn(4, 3, 40, 33, generator=generator) * torch.tensor([0.0, 2, 10, 60])[:, None, None, None]
    b = a + torch.randn(a.shape, generator=generator) * torch.tensor([1.0, 5, 20, 80])[:, None, None, None]
    return tuple(p.round().clamp(0, 255).to(torch.uint8) for p in (a, b))


def test_psnr_equals_scikit_image(pictures):
    x, y = pictures
    expected = [peak_signal_noise_ratio(a.numpy(), b.numpy(), data_range=255) for a, b in zip(x, y, strict=True)]
    assert psnr(x, y).tolist() == pytest.approx(expected, rel=1e-9)


def test_psnr_known_values():
    black = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    assert psnr(black, black + 255).item() == 0
    assert psnr(black, black + 1).item() == pytest.approx(20 * math.log10(255))
    assert psnr(black, black).item() == math.inf


def outside_ssim(x: torch.Tensor, y: torch.Tensor) -> float:
    """scikit-image's, of uint8 pictures (3, h, w) and with the window of the SSIM paper."""
    return structural_similarity(
        x.numpy(),
        y.numpy(),
        data_range=255,
        channel_axis=0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )


def test_ssim_equals_scikit_image(pictures):
    x, y = pictures
    expected = [outside_ssim(a, b) for a, b in zip(x, y, strict=True)]
    assert ssim(x, y).tolist() == pytest.approx(expected, abs=1e-9)
    assert ssim(x, x).tolist() == pytest.approx([1] * 4)
    assert ssim(x, y).tolist() == pytest.approx(ssim(y, x).tolist())


@pytest.mark.parametrize("size", [(11, 11), (11, 30), (37, 12), (64, 64), (96, 128)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_sizes_equal_scikit_image(size):
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(0, 256, (1, 3, *size), generator=generator, dtype=torch.uint8)
    y = (x + torch.randn(x.shape, generator=generator) * 25).round().clamp(0, 255).to(torch.uint8)
    assert psnr(x, y).item() == pytest.approx(peak_signal_noise_ratio(x.numpy(), y.numpy(), data_range=255), rel=1e-9)
    assert ssim(x, y).item() == pytest.approx(outside_ssim(x[0], y[0]), abs=1e-9)


def constant(value: int) -> torch.Tensor:
    return torch.full((1, 3, 16, 16), value, dtype=torch.uint8)


@pytest.mark.parametrize(("first", "second"), [(0, 255), (7, 9), (128, 0), (254, 255)])
def test_constant_pictures_equal_scikit_image(first, second):
    x, y = constant(first), constant(second)
    assert psnr(x, y).item() == pytest.approx(
        peak_signal_noise_ratio(x.numpy(), y.numpy(), data_range=255), rel=1e-9, abs=1e-12
    )
    assert ssim(x, y).item() == pytest.approx(outside_ssim(x[0], y[0]), abs=1e-9)
    c1 = (0.01 * 255) ** 2  # without variance only the luminance is left
    assert ssim(x, y).item() == pytest.approx((2 * first * second + c1) / (first**2 + second**2 + c1), abs=1e-9)


@pytest.mark.parametrize("value", [0, 100, 255])
def test_identical_constant_pictures(value):
    x = constant(value)
    assert psnr(x, x).item() == math.inf
    assert ssim(x, x).item() == pytest.approx(outside_ssim(x[0], x[0]), abs=1e-9) == 1


def test_constant_against_noise_equals_scikit_image():
    noise = torch.randint(0, 256, (1, 3, 16, 16), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
    assert ssim(constant(128), noise).item() == pytest.approx(outside_ssim(constant(128)[0], noise[0]), abs=1e-9)


def test_each_picture_is_scored_alone(pictures):
    x, y = pictures
    for measure in (psnr, ssim):
        alone = torch.cat([measure(x[i : i + 1], y[i : i + 1]) for i in range(len(x))])
        torch.testing.assert_close(measure(x, y), alone)


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_floats_and_unequal_batches_are_refused(measure, pictures):
    x, y = pictures
    with pytest.raises(ValueError, match=r"qlip\.core\.pixels\.to_uint8"):
        measure(x.float() / 255, y.float() / 255)
    with pytest.raises(ValueError, match="two batches of one"):
        measure(x[:2], y)


def test_ssim_refuses_pictures_below_the_window():
    tiny = torch.zeros(1, 3, 10, 64, dtype=torch.uint8)
    with pytest.raises(ValueError, match="smaller than the 11-pixel window"):
        ssim(tiny, tiny)
