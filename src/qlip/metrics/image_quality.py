"""PSNR and SSIM of uint8 pictures, per image; the evaluator averages them.

Shapes: `b` pictures, `h`, `w` pixels. Pictures are **rounded** uint8: unrounded floats score higher.
"""

from __future__ import annotations

import torch
from torch import Tensor

PEAK = 255.0
SSIM_WINDOW = 11
SSIM_SIGMA = 1.5


def _check_pictures(x: Tensor, y: Tensor) -> None:
    for pictures in (x, y):
        if pictures.dtype != torch.uint8:
            raise ValueError(f"pictures are {pictures.dtype}: round them first through qlip.core.pixels.to_uint8")
    if x.shape != y.shape or x.ndim != 4:
        raise ValueError(f"pictures are {tuple(x.shape)} and {tuple(y.shape)}: give two batches of one (b, 3, h, w)")


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """``10 log10(255^2 / mean squared error)``. uint8 (b, 3, h, w) twice -> (b,) float64, dB, higher is better.

    Identical pictures give inf, which a mean does not survive. The mean over images of this is the field's PSNR, not
    the PSNR of the mean error. Raises `ValueError` for anything but uint8.
    """
    _check_pictures(x, y)
    squared_error = (x.int() - y.int()).square().double().mean(dim=(1, 2, 3))
    return 10 * torch.log10(PEAK**2 / squared_error)


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity on RGB: uint8 (b, 3, h, w) twice -> (b,) float64, at most 1, higher is better.

    Gaussian window 11x11 of sigma 1.5, k1 0.01, k2 0.03, range 255, averaged over the windows that lie inside the
    picture (Wang et al. 2004; equal to scikit-image's with `gaussian_weights=True`, `use_sample_covariance=False`).
    Computed here because torchmetrics needs float64 for the same digits (in float32 it is up to 1e-3 off on flat
    pictures) and then takes seconds per hundred. Raises `ValueError` for anything but uint8 and for pictures smaller
    than the window.
    """
    _check_pictures(x, y)
    if min(x.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"pictures of {tuple(x.shape[-2:])} pixels are smaller than the {SSIM_WINDOW}-pixel window")
    x, y = x.double(), y.double()  # variances are differences of squares
    rows, columns = (_window_means(size, device=x.device) for size in x.shape[-2:])

    def mean(z: Tensor) -> Tensor:
        return rows @ z @ columns.T

    mean_x, mean_y = mean(x), mean(y)
    variance_x, variance_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _window_means(size: int, *, device: torch.device) -> Tensor:
    """(size - 10, size) matrix whose rows are the Gaussian window at every place where it fits."""
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64, device=device) - SSIM_WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    matrix = torch.zeros(size - SSIM_WINDOW + 1, size, dtype=torch.float64, device=device)
    for row in range(len(matrix)):
        matrix[row, row : row + SSIM_WINDOW] = weights / weights.sum()
    return matrix
