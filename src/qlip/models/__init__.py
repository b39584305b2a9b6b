"""Whole networks; importing this room registers them with transformers' Auto classes."""

from qlip.models.qlip import (
    QLIPConfig,
    QLIPDecoder,
    QLIPDecoderConfig,
    QLIPForImageClassification,
    QLIPModel,
    QLIPProcessor,
    QLIPTextConfig,
    QLIPTextModel,
    QLIPVisionConfig,
    QLIPVisionModel,
)

__all__ = [
    "QLIPConfig",
    "QLIPDecoder",
    "QLIPDecoderConfig",
    "QLIPForImageClassification",
    "QLIPModel",
    "QLIPProcessor",
    "QLIPTextConfig",
    "QLIPTextModel",
    "QLIPVisionConfig",
    "QLIPVisionModel",
]
