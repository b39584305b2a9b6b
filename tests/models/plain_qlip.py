"""QLIP written out a second time, straight from its description: plain functions over an official state dict.

Nothing of qlip is used, so that equal outputs mean that both read the description alike. float64, slow, explicit.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Tensors = dict[str, Tensor]


def get(config: dict[str, Any], name: str, default: Any) -> Any:
    return config[name] if config.get(name) is not None else default


def layer_norm(x: Tensor, weights: Tensors, name: str, eps: float) -> Tensor:
    if f"{name}.weight" not in weights:
        return x
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)


def linear(x: Tensor, weights: Tensors, name: str) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def angles(grid: int, head_dim: int) -> Tensor:
    rows = []
    for r in range(grid):
        for c in range(grid):
            row = []
            for index in (r, c):
                t = index / grid * 16
                for j in range(head_dim // 4):
                    row += [t * 10000 ** (-2 * j / (head_dim / 2))] * 2
            rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    partner = torch.empty_like(x)
    partner[..., 0::2], partner[..., 1::2] = -x[..., 1::2], x[..., 0::2]
    return x * table.cos() + partner * table.sin()


def attention(
    x: Tensor, weights: Tensors, name: str, *, heads: int, eps: float, table: Tensor | None, shift: int, causal: bool
) -> Tensor:
    b, n, d = x.shape
    h = d // heads
    q, k, v = (linear(x, weights, f"{name}.{p}_proj").view(b, n, heads, h).transpose(1, 2) for p in "qkv")
    q = q * h**-0.5
    if table is not None:
        q = torch.cat([q[:, :, :shift], rotate(q[:, :, shift:], table)], dim=2)
        k = torch.cat([k[:, :, :shift], rotate(k[:, :, shift:], table)], dim=2)
    scores = q @ k.transpose(-1, -2)
    if causal:
        scores = scores + torch.full((n, n), -math.inf, dtype=torch.float64).triu(1)
    merged = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, d)
    return linear(layer_norm(merged, weights, f"{name}.inner_attn_ln", eps), weights, f"{name}.out_proj")


def mlp(x: Tensor, weights: Tensors, name: str, eps: float) -> Tensor:
    if f"{name}.w1.weight" in weights:
        inner = F.silu(linear(x, weights, f"{name}.w1")) * linear(x, weights, f"{name}.w2")
        return linear(layer_norm(inner, weights, f"{name}.ffn_ln", eps), weights, f"{name}.w3")
    inner = F.gelu(linear(x, weights, f"{name}.fc1"))
    return linear(layer_norm(inner, weights, f"{name}.ffn_ln", eps), weights, f"{name}.fc2")


def blocks(x: Tensor, weights: Tensors, tower: str, config: dict[str, Any], **how: Any) -> list[Tensor]:
    eps = get(config, "layer_norm_eps", 1e-5)
    states = [x]
    for i in range(get(config, "num_hidden_layers", 12)):
        name = f"{tower}.encoder.layers.{i}"
        y = layer_norm(x, weights, f"{name}.layer_norm1", eps)
        x = x + attention(y, weights, f"{name}.self_attn", eps=eps, **how)
        x = x + mlp(layer_norm(x, weights, f"{name}.layer_norm2", eps), weights, f"{name}.mlp", eps)
        states.append(x)
    return states


def bottleneck(x: Tensor, weights: Tensors, name: str) -> Tensor:
    return linear(F.gelu(linear(x, weights, f"{name}.c_fc")), weights, f"{name}.c_proj")


def vision(pixels: Tensor, weights: Tensors, config: dict[str, Any]) -> dict[str, Tensor]:
    patch, d = get(config, "patch_size", 32), get(config, "hidden_size", 768)
    grid = get(config, "image_size", 224) // patch
    e = "vision_model.embeddings"
    x = F.conv2d(pixels, weights[f"{e}.patch_embedding.weight"], weights[f"{e}.patch_embedding.bias"], stride=patch)
    x = x.flatten(2).transpose(1, 2)
    cls = weights[f"{e}.class_embedding"].expand(x.shape[0], 1, d)
    x = torch.cat([cls, x], dim=1) + weights[f"{e}.position_embedding.weight"]
    heads = get(config, "num_attention_heads", 12)
    table = angles(grid, d // heads) if config.get("rope") else None
    states = blocks(x, weights, "vision_model", config, heads=heads, table=table, shift=1, causal=False)
    pooled = layer_norm(states[-1][:, 0], weights, "vision_model.post_layernorm", get(config, "layer_norm_eps", 1e-5))
    z = states[-1][:, 1:]
    out = {"hidden_states": torch.stack(states), "pooler_output": pooled, "post_quant_features": z}
    if config.get("quantizer", "none") == "bsq":
        a = bottleneck(z, weights, "vision_model.quant_embed")
        u = a / a.norm(dim=-1, keepdim=True).clamp_min(1e-12) if config.get("quantizer_l2_norm") else a
        settings = config.get("quantizer_cfg", {})
        scale = settings.get("embed_dim", 18) ** -0.5 if settings.get("l2_norm", True) else 1.0
        codes = torch.where(u > 0, scale, -scale).double()
        out |= {"latents": u, "bits": u > 0}
        out["post_quant_features"] = bottleneck(codes, weights, "vision_model.quant_embed_post")
    return out


def decode(features: Tensor, weights: Tensors, config: dict[str, Any]) -> Tensor:
    patch, d = get(config, "patch_size", 32), get(config, "hidden_size", 768)
    grid = get(config, "image_size", 224) // patch
    heads = get(config, "num_attention_heads", 12)
    table = angles(grid, d // heads) if config.get("rope") else None
    x = features + weights["vision_decoder.position_embeddings"]
    x = blocks(x, weights, "vision_decoder", config, heads=heads, table=table, shift=0, causal=False)[-1]
    x = layer_norm(x, weights, "vision_decoder.norm", get(config, "layer_norm_eps", 1e-5))
    x = linear(torch.tanh(linear(x, weights, "vision_decoder.ffn.0")), weights, "vision_decoder.conv_out")
    channels = get(config, "num_channels", 3)
    picture = torch.empty(x.shape[0], channels, grid * patch, grid * patch, dtype=torch.float64)
    for r in range(grid):
        for c in range(grid):
            tile = x[:, r * grid + c].reshape(-1, channels, patch, patch)
            picture[:, :, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch] = tile
    return picture


def text(input_ids: Tensor, weights: Tensors, config: dict[str, Any]) -> Tensor:
    e = "text_model.embeddings"
    positions = weights[f"{e}.position_embedding.weight"][: input_ids.shape[1]]
    x = weights[f"{e}.token_embedding.weight"][input_ids] + positions
    heads = get(config, "num_attention_heads", 8)
    x = blocks(x, weights, "text_model", config, heads=heads, table=None, shift=0, causal=True)[-1]
    x = layer_norm(x, weights, "text_model.final_layer_norm", get(config, "layer_norm_eps", 1e-5))
    eos = get(config, "eos_token_id", 49407)
    pooled = []
    for ids, states in zip(input_ids.tolist(), x, strict=True):
        pooled.append(states[ids.index(max(ids)) if eos == 2 else ids.index(eos)])
    return torch.stack(pooled)


@torch.no_grad()
def run(config: dict[str, Any], weights: Tensors, pixels: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
    """Everything the released model returns, float64."""
    weights = {name: tensor.double() for name, tensor in weights.items()}
    out = vision(pixels.double(), weights, config.get("vision_config") or {})
    out["reconstructions"] = decode(out["post_quant_features"], weights, config["decoder_config"])
    image = linear(out["pooler_output"], weights, "visual_projection")
    sentence = linear(text(input_ids, weights, config.get("text_config") or {}), weights, "text_projection")
    out["image_embeds"] = image / image.norm(dim=-1, keepdim=True)
    out["text_embeds"] = sentence / sentence.norm(dim=-1, keepdim=True)
    out["logits_per_image"] = weights["logit_scale"].exp() * out["image_embeds"] @ out["text_embeds"].T
    return out
