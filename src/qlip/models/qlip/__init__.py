"""The QLIP tokenizer: configs, model, processor; importing it teaches transformers' Auto classes `qlip`."""

from transformers import AutoConfig, AutoModel

from qlip.models.qlip.configuration import QLIPConfig, QLIPDecoderConfig, QLIPTextConfig, QLIPVisionConfig
from qlip.models.qlip.modeling import QLIPModel
from qlip.models.qlip.processing import QLIPProcessor
from qlip.models.qlip.towers import QLIPDecoder, QLIPTextModel, QLIPVisionModel

AutoConfig.register("qlip", QLIPConfig, exist_ok=True)
AutoModel.register(QLIPConfig, QLIPModel, exist_ok=True)

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
