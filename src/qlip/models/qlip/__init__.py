"""The QLIP tokenizer: configs, models, processor; importing it teaches transformers' Auto classes their types."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPTokenizer,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from qlip.models.qlip.classification import QLIPForImageClassification
from qlip.models.qlip.code_tower import QLIPCodeTower, QLIPCodeTowerConfig
from qlip.models.qlip.configuration import QLIPConfig, QLIPDecoderConfig, QLIPTextConfig, QLIPVisionConfig
from qlip.models.qlip.modeling import QLIPModel
from qlip.models.qlip.processing import QLIPProcessor
from qlip.models.qlip.towers import QLIPDecoder, QLIPTextModel, QLIPVisionModel

for _model in (QLIPModel, QLIPVisionModel, QLIPTextModel, QLIPDecoder, QLIPCodeTower):
    AutoConfig.register(_model.config_class.model_type, _model.config_class, exist_ok=True)
    AutoModel.register(_model.config_class, _model, exist_ok=True)
AutoModelForZeroShotImageClassification.register(QLIPConfig, QLIPModel, exist_ok=True)
AutoModelForImageClassification.register(QLIPConfig, QLIPForImageClassification, exist_ok=True)
AutoProcessor.register(QLIPConfig, QLIPProcessor, exist_ok=True)
AutoTokenizer.register(QLIPConfig, fast_tokenizer_class=CLIPTokenizer, exist_ok=True)
for _config in (QLIPConfig, QLIPVisionConfig):
    AutoImageProcessor.register(
        _config,
        image_processor_classes={"pil": CLIPImageProcessorPil, "torchvision": CLIPImageProcessor},
        exist_ok=True,
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
