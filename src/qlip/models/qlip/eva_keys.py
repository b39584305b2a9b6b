"""What EVA-02 (MIM), EVA02-CLIP and OpenAI's CLIP text tower call their tensors, and what QLIP calls them.

A MIM file names its tensors as in `VISION_KEYS`; EVA02-CLIP puts `visual.` and `text.` before them; files in CLIP's
older format have `visual.` but no `text.`. EVA-02 is arXiv 2303.11331, EVA-CLIP arXiv 2303.15389.
"""

from __future__ import annotations

import re

# Their name -> ours. `#` is a layer number and `*` weight or bias, the same on both sides; `{qkv}` cuts the tensor
# into three equal parts along its first axis. Names are matched whole: "attn" also occurs inside `inner_attn_ln`.
_VISION_LAYER, _TEXT_LAYER = "vision_model.encoder.layers.#", "text_model.encoder.layers.#"
VISION_KEYS = {
    "cls_token": "vision_model.embeddings.class_embedding",
    "pos_embed": "vision_model.embeddings.position_embedding.weight",
    "patch_embed.proj.*": "vision_model.embeddings.patch_embedding.*",
    "blocks.#.norm1.*": f"{_VISION_LAYER}.layer_norm1.*",
    "blocks.#.norm2.*": f"{_VISION_LAYER}.layer_norm2.*",
    "blocks.#.attn.q_proj.weight": f"{_VISION_LAYER}.self_attn.q_proj.weight",
    "blocks.#.attn.k_proj.weight": f"{_VISION_LAYER}.self_attn.k_proj.weight",
    "blocks.#.attn.v_proj.weight": f"{_VISION_LAYER}.self_attn.v_proj.weight",
    "blocks.#.attn.qkv.weight": f"{_VISION_LAYER}.self_attn.{{qkv}}_proj.weight",
    "blocks.#.attn.q_bias": f"{_VISION_LAYER}.self_attn.q_proj.bias",
    "blocks.#.attn.v_bias": f"{_VISION_LAYER}.self_attn.v_proj.bias",
    "blocks.#.attn.inner_attn_ln.*": f"{_VISION_LAYER}.self_attn.inner_attn_ln.*",
    "blocks.#.attn.proj.*": f"{_VISION_LAYER}.self_attn.out_proj.*",
    "blocks.#.mlp.w1.*": f"{_VISION_LAYER}.mlp.w1.*",
    "blocks.#.mlp.w2.*": f"{_VISION_LAYER}.mlp.w2.*",
    "blocks.#.mlp.w3.*": f"{_VISION_LAYER}.mlp.w3.*",
    "blocks.#.mlp.ffn_ln.*": f"{_VISION_LAYER}.mlp.ffn_ln.*",
    "norm.*": "vision_model.post_layernorm.*",
}
TEXT_KEYS = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "transformer.resblocks.#.ln_1.*": f"{_TEXT_LAYER}.layer_norm1.*",
    "transformer.resblocks.#.ln_2.*": f"{_TEXT_LAYER}.layer_norm2.*",
    "transformer.resblocks.#.attn.in_proj_weight": f"{_TEXT_LAYER}.self_attn.{{qkv}}_proj.weight",
    "transformer.resblocks.#.attn.in_proj_bias": f"{_TEXT_LAYER}.self_attn.{{qkv}}_proj.bias",
    "transformer.resblocks.#.attn.out_proj.*": f"{_TEXT_LAYER}.self_attn.out_proj.*",
    "transformer.resblocks.#.mlp.c_fc.*": f"{_TEXT_LAYER}.mlp.fc1.*",
    "transformer.resblocks.#.mlp.c_proj.*": f"{_TEXT_LAYER}.mlp.fc2.*",
    "ln_final.*": "text_model.final_layer_norm.*",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
KEYS = {
    **{prefix + name: target for prefix in ("", "visual.") for name, target in VISION_KEYS.items()},
    **{prefix + name: target for prefix in ("", "text.") for name, target in TEXT_KEYS.items()},
    "visual.head.*": "visual_projection.*",  # without the prefix, `head` is a classifier's
}
LEFTOVERS = {
    r"(visual\.)?mask_token": "stands for hidden patches in masked training only",
    r"(visual\.)?lm_head\.(weight|bias)": "predicts the features of hidden patches in masked training only",
    r"([\w.]+\.)?rope\.freqs_(cos|sin)": "rotary angles are computed, not stored",
    r"input_resolution|context_length|vocab_size": "a number that the shapes of the tensors tell too",
}
TEXT_TARGETS = ("text_model.", "text_projection.", "logit_scale")
_LAYER = re.compile(r"0|[1-9][0-9]{0,3}")


def targets_of(key: str) -> list[str]:
    """Our names for a tensor of theirs: one, three for a tensor that is cut into q, k and v, none if unknown."""
    parts = key.split(".")
    layer = next((part for part in parts if _LAYER.fullmatch(part)), "")
    pattern = ".".join("#" if _LAYER.fullmatch(part) else part for part in parts)
    target = KEYS.get(pattern)
    if target is None and parts[-1] in ("weight", "bias"):
        target = KEYS.get(f"{pattern.removesuffix(parts[-1])}*")
    if target is None:
        return []
    target = target.replace("#", layer).replace("*", parts[-1])
    return [target.replace("{qkv}", name) for name in "qkv"] if "{qkv}" in target else [target]


def source_of(target: str) -> str:
    """Their plainest name for one of our tensors, to name what a file lacks."""
    layer = next((part for part in target.split(".") if _LAYER.fullmatch(part)), "")
    ending = target.rpartition(".")[2]
    candidates = (name.replace("#", layer).replace("*", ending) for name in KEYS)
    return next(name for name in candidates if target in targets_of(name))


def is_text(target: str) -> bool:
    """Whether one of our tensors belongs to the text tower, its projection or the temperature."""
    return target.startswith(TEXT_TARGETS)


def leftover_reason(key: str) -> str | None:
    """Why a tensor of theirs has no counterpart in QLIP; None if it is not one of the known ones."""
    return next((reason for pattern, reason in LEFTOVERS.items() if re.fullmatch(pattern, key)), None)
