"""PSNR and SSIM of uint8 pictures, per image; the evaluator averages them (PAPER.md section 6).

Shapes: `b` pictures, `h`, `w` pixels. Pictures are **rounded** uint8: unrounded floats score higher.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

PEAK = 255.0
SSIM_WINDOW = 11


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
    torchmetrics' own average also counts windows over a mirrored 5-pixel border: up to 0.003 away at 256 pixels.
    Raises `ValueError` for anything but uint8 and for pictures smaller than the window.
    """
    _check_pictures(x, y)
    if min(x.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"pictures of {tuple(x.shape[-2:])} pixels are smaller than the {SSIM_WINDOW}-pixel window")
    _, similarity = structural_similarity_index_measure(
        x.double(),  # float64: variances are differences of squares, and GPUs convolve float32 in TF32
        y.double(),
        gaussian_kernel=True,
        kernel_size=SSIM_WINDOW,
        sigma=1.5,
        data_range=PEAK,
        reduction="none",
        return_full_image=True,
    )
    border = SSIM_WINDOW // 2
    return similarity[..., border:-border, border:-border].mean(dim=(1, 2, 3))
