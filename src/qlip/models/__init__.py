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
from qlip.models.unified import UM3Config, UM3ForCausalLM
from qlip.models.unified_processor import UM3Processor

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
    "UM3Config",
    "UM3ForCausalLM",
    "UM3Processor",
]
