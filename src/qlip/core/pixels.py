"""The one place that knows the three pixel scales.

uint8 [0, 255] (pictures), unit float [0, 1] (losses and metrics), and CLIP-normalised float (what the model sees
and what the decoder returns): ``normalised = (unit - mean) / std`` per channel, mean and std of OpenAI CLIP.
"""

from __future__ import annotations

import torch
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def _per_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None, None]


def normalise(unit: Tensor) -> Tensor:
    """Unit pixels (..., 3, h, w) in [0, 1] -> CLIP-normalised pixels."""
    return (unit - _per_channel(CLIP_MEAN, unit)) / _per_channel(CLIP_STD, unit)


def to_unit(normalised: Tensor) -> Tensor:
    """CLIP-normalised pixels (..., 3, h, w) -> unit pixels, **not** clamped (losses need the gradient outside)."""
    return normalised.float() * _per_channel(CLIP_STD, normalised) + _per_channel(CLIP_MEAN, normalised)


def unit_to_uint8(unit: Tensor) -> Tensor:
    """Unit pixels -> uint8 pictures: clamped to [0, 1], then **rounded** (truncation is biased by -0.5)."""
    return (unit.clamp(0, 1) * 255).round().to(torch.uint8)


def to_uint8(normalised: Tensor) -> Tensor:
    """CLIP-normalised pixels -> uint8 pictures, as `unit_to_uint8`."""
    return unit_to_uint8(to_unit(normalised))


def from_uint8(pictures: Tensor) -> Tensor:
    """uint8 pictures (..., 3, h, w) -> CLIP-normalised float32 pixels."""
    return normalise(pictures.float() / 255)
