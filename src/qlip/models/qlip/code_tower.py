"""QLIP as a vision tower whose features come from its codes: what is left of a picture behind the quantizer.

| features         | of a token                                         | width |
|------------------|----------------------------------------------------|-------|
| `post_quantizer` | Z^, the code through the upper half of the bottleneck (Table 6, "after Q") | d' |
| `codes`          | the code itself, L numbers of +-1/sqrt(L): token embeddings, a projector's table in the bits | L |

`hidden_states[-2]`, the paper's choice, needs no tower of its own: transformers' LLaVA takes it from `QLIPVisionModel`.
Annotations stay objects in this file: `strict` checks no field whose annotation is a string.
"""

from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from qlip.core.precision import float32_region
from qlip.models.qlip.configuration import QLIPVisionConfig
from qlip.models.qlip.pretrained import QLIPPreTrainedModel
from qlip.models.qlip.towers import QLIPVisionModel

CodeFeatures = Literal["post_quantizer", "codes"]


@strict
class QLIPCodeTowerConfig(PreTrainedConfig):
    """A QLIP vision encoder and which features of its codes are handed on."""

    model_type = "qlip_code_tower"
    sub_configs_defaults = {"vision_config": SubConfigSpec(config_class=QLIPVisionConfig)}

    vision_config: dict | PreTrainedConfig | None = None
    features: CodeFeatures = "post_quantizer"

    def validate_architecture(self) -> None:
        """Called by `strict` on construction; raises `ValueError` for an encoder without quantizer."""
        if self.vision_config is not None and self._vision.quantizer == "none":
            raise ValueError("vision_config has no quantizer, hence no codes: take hidden states as features")

    @property
    def _vision(self) -> QLIPVisionConfig:
        assert isinstance(self.vision_config, QLIPVisionConfig)
        return self.vision_config

    @property
    def hidden_size(self) -> int:
        """Width of a feature, which transformers' projector asks for."""
        return self._vision.hidden_size_post_q if self.features == "post_quantizer" else self._vision.latent_dim

    @property
    def image_size(self) -> int:
        """S in pixels."""
        return self._vision.image_size

    @property
    def patch_size(self) -> int:
        """Pixels of a patch's side."""
        return self._vision.patch_size


class QLIPCodeTower(QLIPPreTrainedModel):
    """Pictures -> features of their codes, in the form in which transformers' LLaVA takes them."""

    config_class = QLIPCodeTowerConfig
    base_model_prefix = "code_tower"
    input_modalities = ("image",)

    def __init__(self, config: QLIPCodeTowerConfig) -> None:
        super().__init__(config)
        self.tokenizer_encoder = QLIPVisionModel(config._vision)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The patch convolution."""
        return self.tokenizer_encoder.get_input_embeddings()

    @can_return_tuple
    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """(b, 3, S, S) CLIP-normalised -> `hidden_states` of one entry (b, n, width), without CLS.

        Computed in the weights' own dtype whatever autocast is on: rounding would flip bits.
        """
        with float32_region(pixel_values.device.type):
            weight = self.tokenizer_encoder.post_layernorm.weight
            output = self.tokenizer_encoder(pixel_values.to(weight.dtype))
        assert output.quantized is not None and output.last_hidden_state is not None
        features = output.last_hidden_state
        if self.config.features == "codes":
            features = output.quantized.z_q.to(weight.dtype)
        return BaseModelOutputWithPooling(
            last_hidden_state=features, pooler_output=output.pooler_output, hidden_states=(features,)
        )


def code_tower(encoder: QLIPVisionModel, features: CodeFeatures) -> QLIPCodeTower:
    """A tower around an encoder, whose weights it shares. Raises `ValueError` for one without quantizer."""
    config = QLIPCodeTowerConfig(vision_config=encoder.config, features=features)
    with torch.device("meta"):
        tower = QLIPCodeTower(config)
    tower.tokenizer_encoder = encoder
    return tower.eval()
