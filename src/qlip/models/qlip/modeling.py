"""QLIP: image -> bits -> image, and image <-> text scores, in one transformers model (arXiv 2502.05178).

Shapes: `b` images, `t` texts or text tokens, `n` patches, `d` width, `L` bits per patch, `e` projection width.
Tensor names and shapes are those of the released checkpoints, so their weights load unchanged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, can_return_tuple

from qlip.core.precision import float32_kind
from qlip.models.qlip.configuration import QLIPConfig
from qlip.models.qlip.pretrained import QLIPPreTrainedModel
from qlip.models.qlip.towers import QLIPDecoder, QLIPTextModel, QLIPVisionModel, QLIPVisionOutput
from qlip.quantizers.ids import ids_to_bits, subcodes_to_bits


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

    def get_input_embeddings(self) -> nn.Module:
        """The text tower's token table."""
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the text tower's token table."""
        self.text_model.set_input_embeddings(value)

    def get_image_features(self, pixel_values: Tensor, **options: Any) -> QLIPVisionOutput:
        """(b, 3, S, S) -> vision output whose `pooler_output` is the projected image embedding (b, e), not normed.

        `options` are those of `QLIPVisionModel.forward`.
        """
        output = self.vision_model(pixel_values, **(options | {"return_dict": True}))
        output.pooler_output = self.visual_projection(output.pooler_output)
        return output

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> BaseModelOutputWithPooling:
        """(b, t) ids -> text output whose `pooler_output` is the projected text embedding (b, e), not normed.

        `options` are those of `QLIPTextModel.forward`.
        """
        output = self.text_model(input_ids, attention_mask, **(options | {"return_dict": True}))
        output.pooler_output = self.text_projection(output.pooler_output)
        return output

    @torch.no_grad()  # bits carry no gradient, so nothing is kept for one
    def encode(
        self, pixel_values: Tensor, *, batch_invariant: bool = False, interpolate_pos_encoding: bool = False
    ) -> Tensor:
        """(b, 3, S, S) CLIP-normalised pixels -> (b, n, L) bool, patches in row-major order.

        `batch_invariant` computes picture by picture in float32, so that what a picture is batched with changes no
        bit; slower on a GPU. Without it a bit whose latent lies at zero to rounding can flip (`qlip verify` counts).
        `interpolate_pos_encoding` takes other sides that are multiples of the patch size, on which the model was not
        trained. Raises `ValueError` for a model without quantizer, and for weights that are not float32 in
        batch-invariant mode.
        """
        if not batch_invariant:
            return self.vision_model.quantize(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding).bits
        if self.vision_model.post_layernorm.weight.dtype != torch.float32:
            raise ValueError("batch-invariant encoding needs float32 weights: call model.float() first")
        with float32_kind(), torch.autocast(pixel_values.device.type, enabled=False):
            quantized = (
                self.vision_model.quantize(picture, interpolate_pos_encoding=interpolate_pos_encoding)
                for picture in pixel_values.float().split(1)
            )
            return torch.cat([picture.bits for picture in quantized])

    def decode(
        self, bits: Tensor, *, grid: tuple[int, int] | None = None, interpolate_pos_encoding: bool = False
    ) -> Tensor:
        """(b, n, L) bool -> (b, 3, S, S) CLIP-normalised pixels, unclamped.

        With `interpolate_pos_encoding` n may be another than trained: `grid` = (rows, columns) of patches, a square
        if not given. Raises `ValueError` for a model without quantizer, or when the number of tokens or bits does
        not fit.
        """
        vision = self.config.vision_config
        if vision.quantizer == "none":
            raise ValueError("this model has no quantizer (quantizer: none), so it decodes no bits")
        num_tokens = vision.grid_size**2
        if bits.ndim != 3 or bits.shape[2] != vision.num_bits:
            raise ValueError(f"bits are {tuple(bits.shape)}, this model takes (batch, {num_tokens}, {vision.num_bits})")
        if bits.shape[1] != num_tokens and not interpolate_pos_encoding:
            raise ValueError(
                f"bits are {tuple(bits.shape)}, this model takes (batch, {num_tokens}, {vision.num_bits}); "
                "for pictures of another size pass interpolate_pos_encoding=True"
            )
        if grid is None:
            side = math.isqrt(bits.shape[1])
            if side**2 != bits.shape[1]:
                raise ValueError(f"{bits.shape[1]} tokens are no square: pass grid=(rows, columns)")
            grid = (side, side)
        latents = self.vision_model.embed_codes(self.vision_model.quantizer.decode(bits))
        return self.vision_decoder(latents, grid=grid)

    def decode_ids(
        self, ids: Tensor, *, grid: tuple[int, int] | None = None, interpolate_pos_encoding: bool = False
    ) -> Tensor:
        """Integer ids (b, n), or sub-codes (b, n, k) of equal size, int64 -> pixels as `decode` returns them.

        Raises `ValueError` for ids out of range, and as `decode` does.
        """
        num_bits = self.config.vision_config.num_bits
        bits = ids_to_bits(ids, num_bits) if ids.ndim == 2 else subcodes_to_bits(ids, num_bits)
        return self.decode(bits, grid=grid, interpolate_pos_encoding=interpolate_pos_encoding)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool = False,
        reconstruct: bool = True,
        **_: object,
    ) -> QLIPOutput:
        """Pixels (b, 3, S, S) and/or texts (t, length) -> `QLIPOutput` with whatever can be computed.

        `reconstruct=False` leaves the decoder out, which scores and bits do not need.
        """
        if output_hidden_states is None and self.config.output_hidden_states:
            output_hidden_states = True
        found: dict[str, Any] = {}
        if pixel_values is not None:
            vision = self.vision_model(
                pixel_values,
                output_hidden_states=output_hidden_states,
                interpolate_pos_encoding=interpolate_pos_encoding,
            )
            patch = self.config.vision_config.patch_size
            grid = (pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch)
            found["image_embeds"] = unit_norm(self.visual_projection(vision.pooler_output))
            if reconstruct:
                found["reconstructions"] = self.vision_decoder(vision.last_hidden_state, grid=grid)
            found["bits"] = None if vision.quantized is None else vision.quantized.bits
            found["vision_model_output"] = vision
        if input_ids is not None:
            text = self.text_model(input_ids, attention_mask, output_hidden_states=output_hidden_states)
            found["text_embeds"] = unit_norm(self.text_projection(text.pooler_output))
            found["text_model_output"] = text
        if "image_embeds" in found and "text_embeds" in found:
            scale = self.logit_scale.float().exp()
            found["logits_per_image"] = scale * found["image_embeds"] @ found["text_embeds"].T
            found["logits_per_text"] = found["logits_per_image"].T
        return QLIPOutput(**found)
