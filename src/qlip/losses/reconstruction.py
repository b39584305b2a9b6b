"""Pixel and commitment terms of both stages (QLIP Eq 3 and 4)."""

from __future__ import annotations

from torch import Tensor

from qlip.core import pixels


def pixel_mse(reconstructions: Tensor, pixel_values: Tensor) -> Tensor:
    """Mean squared error on the **[0, 1]** scale, from CLIP-normalised (b, 3, h, w). Scalar.

    The unit matters: normalised pixels would give 13.9 times as much, and the weight 1e3 of Table 8 goes with [0, 1].
    """
    return (pixels.to_unit(reconstructions) - pixels.to_unit(pixel_values)).square().mean()


def commitment(pre_quant: Tensor, post_quant: Tensor) -> Tensor:
    """``mean (sg(Z^) - Z)^2`` over elements of (b, n, d); the gradient reaches the encoder only. Scalar."""
    return (post_quant.detach().float() - pre_quant.float()).square().mean()
