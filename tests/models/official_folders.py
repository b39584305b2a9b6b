"""Random checkpoints in the released layout, with any flags: config.json written by hand, not by qlip."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

OFFICIAL = Path(__file__).parents[1] / "data" / "official_layout"
BASE: dict[str, Any] = json.loads((OFFICIAL / "config.json").read_text())


def official_config(**changes: Any) -> dict[str, Any]:
    """The fixture's config with fields changed: `vision__rope=False`, `both__subln=False`, `projection_dim=8`.

    A value of None removes the field.
    """
    config = copy.deepcopy(BASE)
    for name, value in changes.items():
        part, _, field = name.rpartition("__")
        parts = {"": [config], "both": [config["vision_config"], config["decoder_config"]]}
        parts["quantizer"] = [config["vision_config"].get("quantizer_cfg", {})]
        for section in parts[part] if part in parts else [config[f"{part}_config"]]:
            section.pop(field, None)
            if value is not None:
                section[field] = value
    return config


def random_weights(config: dict[str, Any], *, seed: int = 0) -> dict[str, Tensor]:
    """Every tensor that a released file of this config holds, by the table of names and shapes."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"logit_scale": ()}
    vision, decoder, text = config["vision_config"], config["decoder_config"], config["text_config"]
    for tower, part in (("vision_model", vision), ("vision_decoder", decoder), ("text_model", text)):
        for i in range(part["num_hidden_layers"]):
            shapes |= _block(f"{tower}.encoder.layers.{i}", part, sub_ln=bool(part.get("subln")))
    d, dd, td = vision["hidden_size"], decoder["hidden_size"], text["hidden_size"]
    p, n = vision["patch_size"], (vision["image_size"] // vision["patch_size"]) ** 2
    channels = vision.get("num_channels", 3)
    e = "vision_model.embeddings"
    shapes |= {f"{e}.class_embedding": (d,), f"{e}.position_embedding.weight": (n + 1, d)}
    shapes |= {f"{e}.patch_embedding.weight": (d, channels, p, p), f"{e}.patch_embedding.bias": (d,)}
    shapes |= _norm("vision_model.post_layernorm", d)
    if vision.get("quantizer", "none") == "bsq":
        bits, post = vision.get("quantizer_cfg", {}).get("embed_dim", 18), vision.get("hidden_size_post_q", d)
        shapes |= _linear("vision_model.quant_embed.c_fc", d, d) | _linear("vision_model.quant_embed.c_proj", d, bits)
        shapes |= _linear("vision_model.quant_embed_post.c_fc", bits, post)
        shapes |= _linear("vision_model.quant_embed_post.c_proj", post, post)
    shapes |= {"vision_decoder.position_embeddings": (1, n, dd)} | _norm("vision_decoder.norm", dd)
    shapes |= _linear("vision_decoder.ffn.0", dd, decoder["intermediate_size"])
    shapes |= _linear("vision_decoder.conv_out", decoder["intermediate_size"], channels * p * p)
    shapes |= {"text_model.embeddings.token_embedding.weight": (text["vocab_size"], td)}
    shapes |= {"text_model.embeddings.position_embedding.weight": (text["max_position_embeddings"], td)}
    shapes |= _norm("text_model.final_layer_norm", td)
    e = config["projection_dim"]
    shapes |= _linear("visual_projection", d, e, bias=config.get("vision_projection_bias", True))
    shapes |= _linear("text_projection", td, e, bias=config.get("text_projection_bias", False))
    weights = {}
    for name, shape in sorted(shapes.items()):
        noise = torch.randn(shape, generator=generator) * 0.3
        is_norm = name.endswith("weight") and ("norm" in name or "_ln" in name)
        weights[name] = torch.tensor(1.3) if name == "logit_scale" else noise + 1 if is_norm else noise
    return weights


def _linear(name: str, inputs: int, outputs: int, *, bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if bias else {})


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _block(name: str, part: dict[str, Any], *, sub_ln: bool) -> dict[str, tuple[int, ...]]:
    d, inner = part["hidden_size"], part["intermediate_size"]
    shapes = _norm(f"{name}.layer_norm1", d) | _norm(f"{name}.layer_norm2", d)
    for letter in "qkv":
        shapes |= _linear(f"{name}.self_attn.{letter}_proj", d, d, bias=part.get(f"{letter}_bias", True))
    shapes |= _linear(f"{name}.self_attn.out_proj", d, d)
    if part.get("swiglu"):
        for w in ("w1", "w2"):
            shapes |= _linear(f"{name}.mlp.{w}", d, inner)
        shapes |= _linear(f"{name}.mlp.w3", inner, d)
    else:
        shapes |= _linear(f"{name}.mlp.fc1", d, inner) | _linear(f"{name}.mlp.fc2", inner, d)
    if sub_ln:
        shapes |= _norm(f"{name}.self_attn.inner_attn_ln", d) | _norm(f"{name}.mlp.ffn_ln", inner)
    return shapes


def write_official(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> Path:
    """config.json and model.safetensors, as released."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
