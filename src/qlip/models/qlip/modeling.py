"""QLIP: image -> bits -> image, and image <-> text scores, in one transformers model (arXiv 2502.05178).

Shapes: `b` images, `t` texts or text tokens, `n` patches, `d` width, `L` bits per patch, `e` projection width.
Tensor names and shapes are those of the released checkpoints, so their weights load unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from qlip.models.qlip.configuration import QLIPConfig
from qlip.models.qlip.towers import (
    QLIPDecoder,
    QLIPPreTrainedModel,
    QLIPTextModel,
    QLIPVisionModel,
    QLIPVisionOutput,
)


@dataclass
class QLIPOutput(ModelOutput):
    """What `QLIPModel.forward` returns; fields whose input was not given are None."""

    logits_per_image: Tensor | None = None
    """(b, t) ``exp(logit_scale) * image_embeds @ text_embeds.T``."""
    logits_per_text: Tensor | None = None
    """(t, b), the transpose."""
    image_embeds: Tensor | None = None
    """(b, e), norm 1."""
    text_embeds: Tensor | None = None
    """(t, e), norm 1."""
    reconstructions: Tensor | None = None
    """(b, 3, S, S) CLIP-normalised, unclamped."""
    bits: Tensor | None = None
    """(b, n, L) bool."""
    vision_model_output: QLIPVisionOutput | None = None
    text_model_output: BaseModelOutputWithPooling | None = None


def unit_norm(x: Tensor) -> Tensor:
    """(..., e) divided by its L2 norm, no epsilon, in float32."""
    x = x.float()
    return x / x.norm(dim=-1, keepdim=True)


class QLIPModel(QLIPPreTrainedModel):
    """The text-aligned visual tokenizer: encoder, bottleneck, decoder, text tower, projections, temperature."""

    def __init__(self, config: QLIPConfig) -> None:
        super().__init__(config)
        vision, text = config.vision_config, config.text_config
        self.text_model = QLIPTextModel(text)
        self.vision_model = QLIPVisionModel(vision)
        self.vision_decoder = QLIPDecoder(config.decoder_config)
        self.visual_projection = nn.Linear(
            vision.hidden_size, config.projection_dim, bias=config.vision_projection_bias
        )
        self.text_projection = nn.Linear(text.hidden_size, config.projection_dim, bias=config.text_projection_bias)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        self.post_init()

    def get_image_features(self, pixel_values: Tensor) -> QLIPVisionOutput:
        """(b, 3, S, S) -> vision output whose `pooler_output` is the projected image embedding (b, e), not normed."""
        output = self.vision_model(pixel_values)
        output.pooler_output = self.visual_projection(output.pooler_output)
        return output

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> BaseModelOutputWithPooling:
        """(b, t) ids -> text output whose `pooler_output` is the projected text embedding (b, e), not normed."""
        output = self.text_model(input_ids, attention_mask)
        output.pooler_output = self.text_projection(output.pooler_output)
        return output

    def encode(self, pixel_values: Tensor) -> Tensor:
        """(b, 3, S, S) CLIP-normalised pixels -> (b, n, L) bool, patches in row-major order.

        Raises `ValueError` for a model without quantizer.
        """
        quantized = self.vision_model(pixel_values).quantized
        if quantized is None:
            raise ValueError("this model has no quantizer (quantizer: none), so it has no bits")
        return quantized.bits

    def decode(self, bits: Tensor) -> Tensor:
        """(b, n, L) bool -> (b, 3, S, S) CLIP-normalised pixels, unclamped.

        Raises `ValueError` for a model without quantizer, or when the number of tokens or bits is not this model's.
        """
        vision = self.config.vision_config
        if vision.quantizer == "none":
            raise ValueError("this model has no quantizer (quantizer: none), so it decodes no bits")
        if tuple(bits.shape[1:]) != (vision.grid_size**2, vision.num_bits):
            raise ValueError(
                f"bits are {tuple(bits.shape)}, this model takes (batch, {vision.grid_size**2}, {vision.num_bits})"
            )
        return self.vision_decoder(self.vision_model.embed_codes(self.vision_model.quantizer.decode(bits)))

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: object,
    ) -> QLIPOutput:
        """Pixels (b, 3, S, S) and/or texts (t, length) -> `QLIPOutput` with whatever can be computed."""
        output = QLIPOutput()
        if pixel_values is not None:
            vision = self.vision_model(pixel_values)
            output.vision_model_output = vision
            output.bits = None if vision.quantized is None else vision.quantized.bits
            output.reconstructions = self.vision_decoder(vision.last_hidden_state)
            output.image_embeds = unit_norm(self.visual_projection(vision.pooler_output))
        if input_ids is not None:
            output.text_model_output = self.text_model(input_ids, attention_mask)
            output.text_embeds = unit_norm(self.text_projection(output.text_model_output.pooler_output))
        if output.image_embeds is not None and output.text_embeds is not None:
            scale = self.logit_scale.float().exp()
            output.logits_per_image = scale * output.image_embeds @ output.text_embeds.T
            output.logits_per_text = output.logits_per_image.T
        return output
