"""The QLIP tokenizer: configs, model, processor."""

from qlip.models.qlip.configuration import QLIPConfig, QLIPDecoderConfig, QLIPTextConfig, QLIPVisionConfig
from qlip.models.qlip.modeling import QLIPDecoder, QLIPModel, QLIPTextModel, QLIPVisionModel
from qlip.models.qlip.processing import QLIPProcessor

__all__ = [
    "QLIPConfig",
    "QLIPDecoder",
    "QLIPDecoderConfig",
    "QLIPModel",
    "QLIPProcessor",
    "QLIPTextConfig",
    "QLIPTextModel",
    "QLIPVisionConfig",
    "QLIPVisionModel",
]
