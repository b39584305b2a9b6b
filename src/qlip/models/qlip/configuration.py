"""QLIPConfig and its three parts, in transformers' config format (defaults are QLIP-B-16-256).

Each class also reads config.json of the released layout (`official.py`), so that every `from_pretrained` does.
Annotations stay objects in this file: `strict` checks no field whose annotation is a string.
"""

import os
from dataclasses import fields
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from qlip.core.errors import UserError, nearest_name
from qlip.models.qlip import official
from qlip.nn.blocks import ACTIVATIONS
from qlip.quantizers.build import KINDS, fsq_num_bits, latent_width

LIMITS = {  # far above any model, far below what would fill a machine while the model is only being described
    "hidden_size": 65_536,
    "intermediate_size": 1_048_576,
    "num_hidden_layers": 1_024,
    "num_attention_heads": 4_096,
    "image_size": 65_536,
    "patch_size": 4_096,
    "num_channels": 1_024,
    "num_bits": 4_096,
    "hidden_size_post_q": 65_536,
    "vocab_size": 16_777_216,
    "max_position_embeddings": 1_048_576,
    "projection_dim": 65_536,
    "num_labels": 1_048_576,
}
FINITE = {  # field: smallest and largest value
    "layer_norm_eps": (0.0, 1.0),
    "initializer_range": (0.0, 1e3),
    "attention_dropout": (0.0, 1.0),
    "quantizer_inv_temperature": (1e-6, 1e6),
    "logit_scale_init_value": (-100.0, 100.0),
}
GENERIC_FIELDS = {  # what transformers and its Trainer write beside a config's own fields
    *("auto_map", "dtype", "torch_dtype", "architectures", "quantization_config", "use_cache", "tie_word_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "transformers_weights"),
}
POOLINGS = ("cls", "mean", "cls+mean")


def _check_sizes(config: PreTrainedConfig) -> None:
    for name, largest in LIMITS.items():
        value = getattr(config, name, 1)
        if not 1 <= value <= largest:
            raise ValueError(f"{name} must be at least 1 and at most {largest}, got {value}")
    for name, (smallest, most) in FINITE.items():
        if not smallest <= getattr(config, name, smallest) <= most:  # NaN fails too
            raise ValueError(f"{name} must be from {smallest:g} to {most:g}, got {getattr(config, name)}")


def _check_tower(config: "QLIPTextConfig | QLIPVisionConfig | QLIPDecoderConfig") -> None:
    _check_sizes(config)
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"hidden_size {config.hidden_size} is not a multiple of num_attention_heads {config.num_attention_heads}"
        )
    if config.hidden_act not in ACTIVATIONS:
        raise ValueError(f"hidden_act {config.hidden_act!r} is unknown; known: {', '.join(ACTIVATIONS)}")


def _check_grid(config: "QLIPVisionConfig | QLIPDecoderConfig") -> None:
    if config.image_size % config.patch_size:
        raise ValueError(f"image_size {config.image_size} is not a multiple of patch_size {config.patch_size}")
    if config.rope and (config.hidden_size // config.num_attention_heads) % 4:
        raise ValueError("rope needs hidden_size / num_attention_heads divisible by 4")


class QLIPPreTrainedConfig(PreTrainedConfig):
    """Reads our config.json, refusing fields it does not know, and that of the released layout."""

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The dictionary in config.json, translated from the released layout when it is in that.

        Raises `UserError` for another kind of model.
        """
        hub = {name: kwargs[name] for name in official.HUB_OPTIONS if name in kwargs}
        values, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not isinstance(values, dict):
            raise UserError("config.json holds no JSON object; export or download it again")
        if official.is_official(values):
            return official.config_from_official(values, pretrained_model_name_or_path, **hub), unused
        kind = values.get("model_type")
        is_ours = kind in (cls.model_type, QLIPConfig.model_type)
        if not is_ours and (not cls.base_config_key or cls.base_config_key not in values):
            what = f"holds a {kind!r} model, not {cls.model_type!r}" if kind else "is not a model folder"
            raise UserError(f"it {what}; give the `export` folder of a run, or `qlip export RUN OUT` first")
        return values, unused

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers', which its Auto classes call too. Raises `UserError` naming the first unknown field."""
        if config_dict.get("model_type") == cls.model_type:
            refuse_unknown_fields(config_dict, cls)
        return super().from_dict(config_dict, **kwargs)


def refuse_unknown_fields(values: dict[str, Any], config_class: type[PreTrainedConfig], *, path: str = "") -> None:
    """transformers keeps a mistyped field as an attribute nobody reads. Raises `UserError` naming the nearest."""
    own = {field.name for field in fields(config_class)}
    generic = set(PreTrainedConfig().to_dict()) | GENERIC_FIELDS
    labels = values.get("num_labels", 0)
    if isinstance(labels, int) and labels > LIMITS["num_labels"]:
        raise UserError(f"config.json: {path}num_labels is {labels}; at most {LIMITS['num_labels']} are possible")
    for name, value in values.items():
        part = config_class.sub_configs_defaults.get(name)
        if part is not None and isinstance(value, dict):
            refuse_unknown_fields(value, part.config_class, path=f"{name}.")
        elif name not in own | generic and not name.startswith("_"):
            raise UserError(f"config.json: {path}{name} is unknown: {nearest_name(name, own)}")


@strict
class QLIPTextConfig(QLIPPreTrainedConfig):
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
    attention_dropout: float = 0.0
    bos_token_id: int | None = 49406
    eos_token_id: int | None = 49407
    pad_token_id: int | None = 49407

    def validate_architecture(self) -> None:
        """Called by `strict` on construction; raises `ValueError` naming the field."""
        _check_tower(self)


@strict
class QLIPVisionConfig(QLIPPreTrainedConfig):
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
    attention_dropout: float = 0.0
    rope: bool = True
    subln: bool = True
    swiglu: bool = True
    quantizer: str = "bsq"  # or none, fsq, lfq, vq
    quantizer_embed_type: str = "mlp"  # or identity: the encoder's own states are quantized
    num_bits: int = 28
    quantizer_group_size: int = 1
    quantizer_inv_temperature: float = 1.0
    quantizer_gamma_0: float = 1.0  # weight of the entropy per token
    quantizer_gamma: float = 1.0  # weight of the entropy of the codebook
    quantizer_beta: float = 0.0  # weight of the distance between latents and codes
    quantizer_l2_norm: bool = True  # latents are put on the unit sphere
    quantizer_unit_codes: bool = True  # code vectors have norm 1; otherwise entries +-1
    fsq_levels: list[int] | None = None  # levels of each latent dimension, for fsq alone
    hidden_size_post_q: int = 768

    @property
    def grid_size(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def latent_dim(self) -> int:
        """Dimensions that the quantizer takes; as many as bits, but for fsq, whose levels each take several."""
        return latent_width(self.quantizer, num_bits=self.num_bits, fsq_levels=self.fsq_levels or ())

    @property
    def decoder_width(self) -> int:
        """Width of what the tower hands to the decoder."""
        if self.quantizer == "none" or self.quantizer_embed_type == "identity":
            return self.hidden_size
        return self.hidden_size_post_q

    def validate_architecture(self) -> None:
        """Called by `strict` on construction; raises `ValueError` naming the field."""
        _check_tower(self)
        _check_grid(self)
        if self.quantizer not in ("none", *KINDS):
            raise ValueError(f"quantizer {self.quantizer!r} is unknown; known: none, {', '.join(KINDS)}")
        if self.quantizer_embed_type not in ("mlp", "identity"):
            raise ValueError(f"quantizer_embed_type {self.quantizer_embed_type!r} is unknown; known: mlp, identity")
        if self.quantizer == "fsq" and fsq_num_bits(self.fsq_levels or []) != self.num_bits:
            raise ValueError(
                f"fsq_levels {self.fsq_levels} take {fsq_num_bits(self.fsq_levels or [])} bits, "
                f"but num_bits is {self.num_bits}"
            )
        passes_through = self.quantizer != "none" and self.quantizer_embed_type == "identity"
        if passes_through and self.latent_dim != self.hidden_size:
            raise ValueError(
                f"quantizer_embed_type identity quantizes {self.hidden_size} dimensions (hidden_size), "
                f"but the quantizer takes {self.latent_dim}"
            )


@strict
class QLIPDecoderConfig(QLIPPreTrainedConfig):
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
    attention_dropout: float = 0.0
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
class QLIPConfig(QLIPPreTrainedConfig):
    """The whole tokenizer: text tower, vision tower with bottleneck, decoder, projections, temperature."""

    model_type = "qlip"
    sub_configs_defaults = {
        "text_config": SubConfigSpec(QLIPTextConfig),
        "vision_config": SubConfigSpec(QLIPVisionConfig),
        "decoder_config": SubConfigSpec(QLIPDecoderConfig),
    }

    text_config: Any = None  # a QLIPTextConfig, or a dict or None from which transformers builds one
    vision_config: Any = None
    decoder_config: Any = None
    projection_dim: int = 512
    vision_projection_bias: bool = True
    text_projection_bias: bool = False
    classifier_pooling: str = "cls"  # or mean, cls+mean: what QLIPForImageClassification reads
    logit_scale_init_value: float = 2.6592
    initializer_range: float = 0.02

    def validate_architecture(self) -> None:
        """Called by `strict` on construction; raises `ValueError` when the parts do not fit together."""
        _check_sizes(self)
        if self.classifier_pooling not in POOLINGS:
            raise ValueError(f"classifier_pooling {self.classifier_pooling!r} is unknown; known: {', '.join(POOLINGS)}")
        vision, decoder = self.vision_config, self.decoder_config
        if not isinstance(vision, QLIPVisionConfig) or not isinstance(decoder, QLIPDecoderConfig):
            return  # parts given as dicts are built, and checked again, by transformers afterwards
        if (vision.image_size, vision.patch_size) != (decoder.image_size, decoder.patch_size):
            raise ValueError("vision_config and decoder_config must agree on image_size and patch_size")
        if vision.decoder_width != decoder.hidden_size:
            through = vision.quantizer != "none" and vision.quantizer_embed_type == "mlp"
            field = "hidden_size_post_q" if through else "hidden_size"
            raise ValueError(
                f"vision_config.{field} {vision.decoder_width} must equal "
                f"decoder_config.hidden_size {decoder.hidden_size}"
            )
