"""QLIPConfig and its three parts, in transformers' config format (defaults are QLIP-B-16-256)."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from qlip.nn.blocks import ACTIVATIONS


def _check_tower(config: QLIPTextConfig | QLIPVisionConfig | QLIPDecoderConfig) -> None:
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"hidden_size {config.hidden_size} is not a multiple of num_attention_heads {config.num_attention_heads}"
        )
    if config.hidden_act not in ACTIVATIONS:
        raise ValueError(f"hidden_act {config.hidden_act!r} is unknown; known: {', '.join(ACTIVATIONS)}")


def _check_grid(config: QLIPVisionConfig | QLIPDecoderConfig) -> None:
    for name in ("image_size", "patch_size", "num_channels"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    if config.image_size % config.patch_size:
        raise ValueError(f"image_size {config.image_size} is not a multiple of patch_size {config.patch_size}")
    if config.rope and (config.hidden_size // config.num_attention_heads) % 4:
        raise ValueError("rope needs hidden_size / num_attention_heads divisible by 4")


@strict
class QLIPTextConfig(PreTrainedConfig):
    """CLIP text transformer. `eos_token_id == 2` means: pool at the largest id (files of old CLIP releases)."""

    model_type = "qlip_text_model"
    base_config_key = "text_config"

    vocab_size: int = 49408
    max_position_embeddings: int = 77
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    q_bias: bool = True
    k_bias: bool = True
    v_bias: bool = True
    bos_token_id: int | None = 49406
    eos_token_id: int | None = 49407
    pad_token_id: int | None = 49407

    def validate_architecture(self) -> None:
        """Called by `strict` on construction; raises `ValueError` naming the field."""
        _check_tower(self)


@strict
class QLIPVisionConfig(PreTrainedConfig):
    """EVA-02 style encoder and the bottleneck behind it: MLP down, quantizer, MLP up."""

    model_type = "qlip_vision_model"
    base_config_key = "vision_config"

    image_size: int = 256
    patch_size: int = 16
    num_channels: int = 3
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    q_bias: bool = True
    k_bias: bool = False
    v_bias: bool = True
    rope: bool = True
    subln: bool = True
    swiglu: bool = True
    quantizer: str = "bsq"
    num_bits: int = 28
    quantizer_group_size: int = 1
    quantizer_inv_temperature: float = 1.0
    quantizer_gamma: float = 1.0
    quantizer_l2_norm: bool = True
    hidden_size_post_q: int = 768

    @property
    def grid_size(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    def validate_architecture(self) -> None:
        """Called by `strict` on construction; raises `ValueError` naming the field."""
        _check_tower(self)
        _check_grid(self)
        if self.quantizer not in ("bsq", "none"):
            raise ValueError(f"quantizer {self.quantizer!r} is unknown; known: bsq, none")
        if self.num_bits < 1:
            raise ValueError(f"num_bits must be at least 1, got {self.num_bits}")


@strict
class QLIPDecoderConfig(PreTrainedConfig):
    """The visual decoder: the same blocks, no CLS, pixel head."""

    model_type = "qlip_decoder"
    base_config_key = "decoder_config"

    image_size: int = 256
    patch_size: int = 16
    num_channels: int = 3
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    q_bias: bool = True
    k_bias: bool = False
    v_bias: bool = True
    rope: bool = True
    subln: bool = True
    swiglu: bool = True

    @property
    def grid_size(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    def validate_architecture(self) -> None:
        """Called by `strict` on construction; raises `ValueError` naming the field."""
        _check_tower(self)
        _check_grid(self)


@strict
class QLIPConfig(PreTrainedConfig):
    """The whole tokenizer: text tower, vision tower with bottleneck, decoder, projections, temperature."""

    model_type = "qlip"
    sub_configs_defaults = {
        "text_config": QLIPTextConfig,
        "vision_config": QLIPVisionConfig,
        "decoder_config": QLIPDecoderConfig,
    }

    text_config: Any = None  # a QLIPTextConfig, or a dict or None from which transformers builds one
    vision_config: Any = None
    decoder_config: Any = None
    projection_dim: int = 512
    vision_projection_bias: bool = True
    text_projection_bias: bool = False
    logit_scale_init_value: float = 2.6592
    initializer_range: float = 0.02

    def validate_architecture(self) -> None:
        """Called by `strict` on construction; raises `ValueError` when the parts do not fit together."""
        vision, decoder = self.vision_config, self.decoder_config
        if not isinstance(vision, QLIPVisionConfig) or not isinstance(decoder, QLIPDecoderConfig):
            return  # parts given as dicts are built, and checked again, by transformers afterwards
        if (vision.image_size, vision.patch_size) != (decoder.image_size, decoder.patch_size):
            raise ValueError("vision_config and decoder_config must agree on image_size and patch_size")
        field = "hidden_size" if vision.quantizer == "none" else "hidden_size_post_q"  # what the decoder receives
        if getattr(vision, field) != decoder.hidden_size:
            raise ValueError(
                f"vision_config.{field} {getattr(vision, field)} must equal "
                f"decoder_config.hidden_size {decoder.hidden_size}"
            )
