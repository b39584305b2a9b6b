"""Whole networks; importing this room registers them with transformers' Auto classes."""

from qlip.models.qlip import (
    QLIPCodeTower,
    QLIPCodeTowerConfig,
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
    "QLIPCodeTower",
    "QLIPCodeTowerConfig",
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
