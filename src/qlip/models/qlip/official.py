"""The layout of the released QLIP checkpoints: their config.json and tensor names <-> ours.

The layout was learned from the released files. Weights have our names already; what differs is config.json, and the
rotary tables that are stored there and computed here. A folder is in that layout when its config has `decoder_config`
and is not one of ours: its `model_type` says `clip` and its `auto_map` names modules that do not exist.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qlip.models.qlip.weight_files import HUB_OPTIONS, tensor_names
from qlip.nn.attention import rotary_2d

if TYPE_CHECKING:
    from qlip.models.qlip.configuration import QLIPConfig, QLIPDecoderConfig, QLIPVisionConfig
    from qlip.models.qlip.modeling import QLIPModel

__all__ = ["HUB_OPTIONS", "config_from_official", "is_official", "official_config", "official_tensors"]

COMPUTED_TENSORS = r"(^|\.)(rope\.freqs_(cos|sin)|position_ids)$"  # stored under any tower's name, or not at all

BIASES = {"q_bias": True, "k_bias": True, "v_bias": True}
TEXT_DEFAULTS = {
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 1,
    **BIASES,
}
TOWER_DEFAULTS = {
    "image_size": 224,
    "patch_size": 32,
    "num_channels": 3,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
    "rope": False,
    "subln": False,
    "swiglu": False,
    **BIASES,
}
QUANTIZER_FIELDS = {  # theirs in quantizer_cfg: (ours, default)
    "embed_dim": ("num_bits", 18),
    "group_size": ("quantizer_group_size", 9),
    "inv_temperature": ("quantizer_inv_temperature", 100.0),
    "gamma_0": ("quantizer_gamma_0", 1.0),
    "gamma_1": ("quantizer_gamma", 1.0),
    "beta": ("quantizer_beta", 0.0),
    "l2_norm": ("quantizer_unit_codes", True),
}
INITIALIZER_RANGE = 0.02  # written to every part of ours; theirs has it in none


def is_official(config: Mapping[str, Any]) -> bool:
    """Whether the content of a config.json is in the released layout."""
    return isinstance(config.get("decoder_config"), dict) and config.get("model_type") != "qlip"


def config_from_official(config: Mapping[str, Any], source: str | os.PathLike, **hub: Any) -> dict[str, Any]:
    """Content of a released config.json -> that of ours. Fields without effect are dropped.

    Whether the projections have a bias is read from the tensor names of `source` where the config does not say.
    Raises `ValueError` for a quantizer other than bsq or none.
    """
    for name in ("text_config", "vision_config", "decoder_config"):
        section = config.get(name)
        if section is not None and not isinstance(section, dict):
            raise ValueError(f"{name} must be an object, got {section!r:.50}")
    vision = _section(config.get("vision_config"), TOWER_DEFAULTS)
    decoder = _section(config.get("decoder_config"), TOWER_DEFAULTS)
    return {
        "model_type": "qlip",
        "text_config": {"model_type": "qlip_text_model", **_section(config.get("text_config"), TEXT_DEFAULTS)},
        "vision_config": {
            "model_type": "qlip_vision_model",
            **vision,
            **_quantizer(config.get("vision_config") or {}, hidden_size=vision["hidden_size"]),
        },
        "decoder_config": {"model_type": "qlip_decoder", **decoder},
        "projection_dim": _value(config, "projection_dim", 512),
        "logit_scale_init_value": _value(config, "logit_scale_init_value", 2.6592),
        **_projection_biases(config, source, **hub),
    }


def _value(section: Mapping[str, Any], name: str, default: Any) -> Any:
    """A field, null meaning absent, a whole number where a float belongs made one."""
    value = section.get(name)
    if value is None:
        return default
    return float(value) if isinstance(default, float) and type(value) is int else value


def _section(section: Mapping[str, Any] | None, defaults: dict[str, Any]) -> dict[str, Any]:
    values = {name: _value(section or {}, name, default) for name, default in defaults.items()}
    if values.get("swiglu"):
        values["hidden_act"] = defaults["hidden_act"]  # has no effect there
    return values


def _quantizer(vision: Mapping[str, Any], *, hidden_size: int) -> dict[str, Any]:
    kind = _value(vision, "quantizer", "none") or "none"
    if kind not in ("bsq", "none"):
        raise ValueError(f"vision_config.quantizer {kind!r} is unknown in the released layout; known: bsq, none")
    settings = vision.get("quantizer_cfg") or {}
    if not isinstance(settings, dict):
        raise ValueError(f"vision_config.quantizer_cfg must be an object, got {settings!r:.50}")
    return {
        "quantizer": kind,
        "quantizer_embed_type": _value(vision, "quantizer_embed_type", "identity"),
        "quantizer_l2_norm": _value(vision, "quantizer_l2_norm", False),
        "hidden_size_post_q": _value(vision, "hidden_size_post_q", hidden_size),
        **{ours: _value(settings, theirs, default) for theirs, (ours, default) in QUANTIZER_FIELDS.items()},
    }


def _projection_biases(config: Mapping[str, Any], source: str | os.PathLike, **hub: Any) -> dict[str, bool]:
    biases = {}
    for field, tensor, otherwise in (
        ("vision_projection_bias", "visual_projection.bias", True),
        ("text_projection_bias", "text_projection.bias", False),
    ):
        said = config.get(field)
        if said is None:
            names = tensor_names(source, **hub)
            said = tensor in names if names else otherwise
        biases[field] = said
    return biases


def official_config(config: QLIPConfig) -> dict[str, Any]:
    """Ours -> the content of a config.json in the released layout, every field written out.

    Raises `ValueError` for a quantizer that layout does not know.
    """
    vision = config.vision_config
    if vision.quantizer not in ("bsq", "none"):
        raise ValueError(f"the released layout knows the quantizers bsq and none, not {vision.quantizer}")
    return {
        "architectures": ["QLIPModel"],
        "model_type": "clip",
        "projection_dim": config.projection_dim,
        "logit_scale_init_value": config.logit_scale_init_value,
        "initializer_factor": 1.0,
        "vision_projection_bias": config.vision_projection_bias,
        "text_projection_bias": config.text_projection_bias,
        "torch_dtype": str(config.dtype or torch.float32).removeprefix("torch."),
        "text_config": {
            "model_type": "clip_text_model",
            **{name: getattr(config.text_config, name) for name in TEXT_DEFAULTS},
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            **_official_tower(vision, rope_shift=1),
            "quantizer": vision.quantizer,
            "quantizer_embed_type": "identity" if vision.quantizer == "none" else vision.quantizer_embed_type,
            "quantizer_l2_norm": vision.quantizer_l2_norm,
            "hidden_size_post_q": vision.hidden_size_post_q,
            "quantizer_cfg": {
                "input_format": "blc",
                **{theirs: getattr(vision, ours) for theirs, (ours, _) in QUANTIZER_FIELDS.items()},
            },
        },
        "decoder_config": {"model_type": "clip_decoder_model", **_official_tower(config.decoder_config, rope_shift=0)},
    }


def _official_tower(tower: QLIPVisionConfig | QLIPDecoderConfig, *, rope_shift: int) -> dict[str, Any]:
    return {**{name: getattr(tower, name) for name in TOWER_DEFAULTS}, "rope_shift": rope_shift}


def official_tensors(model: QLIPModel) -> dict[str, Tensor]:
    """The state dict with the rotary tables (n, h) that the released files store, float32, one pair per tower."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    for tower in ("vision_model", "vision_decoder"):
        config = getattr(model, tower).config
        if config.rope:
            grid = (config.grid_size, config.grid_size)
            head_dim = config.hidden_size // config.num_attention_heads
            rotary = rotary_2d(grid, head_dim, device=torch.device("cpu"))
            tensors[f"{tower}.rope.freqs_cos"], tensors[f"{tower}.rope.freqs_sin"] = rotary.cos, rotary.sin
    return tensors
