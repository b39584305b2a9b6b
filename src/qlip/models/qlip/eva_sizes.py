"""The config of a QLIP whose towers have the sizes of an EVA file's tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qlip.core.errors import UserError
from qlip.models.qlip.configuration import QLIPConfig, QLIPDecoderConfig, QLIPTextConfig, QLIPVisionConfig
from qlip.models.qlip.eva_moves import (
    CLASS_EMBEDDING,
    TEXT_PROJECTION,
    VISUAL_PROJECTION,
    Move,
    misshapen,
    missing,
)

TEXT_TOKENS = "text_model.embeddings.token_embedding.weight"
TEXT_POSITIONS = "text_model.embeddings.position_embedding.weight"
NUM_TOKEN_IDS = 49408  # of CLIP's tokenizer, which every QLIP uses


@dataclass(kw_only=True, slots=True)
class EvaImportConfig:
    """What the shapes of the tensors do not tell."""

    image_size: int = 256
    """Side of the new model's pictures in pixels."""
    patch_size: int = 16
    """Side of its patches in pixels."""
    head_dim: int = 64
    """Width of one attention head of the imported towers; 64 in all releases."""
    decoder_layers: int | None = None
    """Blocks of the decoder; None gives it as many as the encoder has."""
    quantizer: Literal["bsq", "none"] = "bsq"
    """Of the fresh bottleneck; none lets the decoder see the encoder's states."""
    seed: int = 0
    """Seed of the fresh weights."""


def build_config(moves: dict[str, Move], config: EvaImportConfig, *, src: Path, text_src: Path) -> QLIPConfig:
    """Encoder and text tower as in the files, the decoder of the encoder's size.

    Raises `UserError` for a tensor that is missing or misshapen, and for options that do not fit the file.
    """
    width = _shape(moves, CLASS_EMBEDDING, 1, path=src)[0]
    _check_options(config, width)
    names = [name for name in moves if name.startswith("vision_model.encoder.")]
    tower: dict[str, Any] = {
        **_tower(moves, "vision_model", width=width, head_dim=config.head_dim, path=src),
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "q_bias": any(name.endswith(".q_proj.bias") for name in names),
        "k_bias": False,
        "v_bias": any(name.endswith(".v_proj.bias") for name in names),
        "subln": any(".ffn_ln." in name for name in names),  # EVA-02 Ti and S have none
        "swiglu": True,
        "rope": True,
    }
    decoder = tower if config.decoder_layers is None else tower | {"num_hidden_layers": config.decoder_layers}
    return QLIPConfig(
        text_config=QLIPTextConfig(**_text(moves, encoder_width=width, head_dim=config.head_dim, path=text_src)),
        vision_config=QLIPVisionConfig(**tower, quantizer=config.quantizer, hidden_size_post_q=width),
        decoder_config=QLIPDecoderConfig(**decoder),
        projection_dim=_projection_dim(moves, encoder_width=width, src=src, text_src=text_src),
        vision_projection_bias=VISUAL_PROJECTION not in moves or "visual_projection.bias" in moves,
    )


def _check_options(config: EvaImportConfig, width: int) -> None:
    for name in ("image_size", "patch_size", "head_dim", "decoder_layers"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; give a number of at least 1")
    if config.image_size % config.patch_size:
        raise UserError(
            f"image_size {config.image_size} is no multiple of patch_size {config.patch_size}; change one of them"
        )
    if config.head_dim % 4:
        raise UserError(f"head_dim {config.head_dim} is no multiple of 4; give the one that the file was trained with")
    _check_heads(width, config.head_dim)


def _check_heads(width: int, head_dim: int) -> None:
    if width == 0 or width % head_dim:
        raise UserError(f"width {width} is no multiple of head_dim {head_dim}; change head_dim")


def _shape(moves: dict[str, Move], target: str, num_axes: int, *, path: Path) -> tuple[int, ...]:
    if target not in moves:
        raise missing(target, path)
    shape = tuple(moves[target].tensor.shape)
    if len(shape) != num_axes:
        raise misshapen(moves[target], f"{num_axes} axes")
    return shape


def _tower(moves: dict[str, Move], part: str, *, width: int, head_dim: int, path: Path) -> dict[str, int]:
    prefix = f"{part}.encoder.layers."
    layers = {int(name.removeprefix(prefix).split(".")[0]) for name in moves if name.startswith(prefix)}
    absent = next(i for i in range(len(layers) + 1) if i not in layers)
    if absent < max(len(layers), 1):  # a gap, or no block at all
        raise missing(f"{prefix}{absent}.layer_norm1.weight", path)
    feed_forward = "mlp.w1.weight" if part == "vision_model" else "mlp.fc1.weight"
    return {
        "hidden_size": width,
        "num_hidden_layers": len(layers),
        "num_attention_heads": width // head_dim,
        "intermediate_size": _shape(moves, f"{prefix}0.{feed_forward}", 2, path=path)[0],
    }


def _text(moves: dict[str, Move], *, encoder_width: int, head_dim: int, path: Path) -> dict[str, int]:
    """Sizes of the file's text tower; without one, of the paper's for an encoder of this width."""
    if not any(name.startswith("text_model.") for name in moves):
        if encoder_width <= 768:
            return {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048}
        return {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
    vocab_size, width = _shape(moves, TEXT_TOKENS, 2, path=path)
    if vocab_size != NUM_TOKEN_IDS:
        raise misshapen(moves[TEXT_TOKENS], f"({NUM_TOKEN_IDS}, width), the vocabulary of CLIP's tokenizer")
    _check_heads(width, head_dim)
    context_length = _shape(moves, TEXT_POSITIONS, 2, path=path)[0]
    tower = _tower(moves, "text_model", width=width, head_dim=head_dim, path=path)
    return tower | {"max_position_embeddings": context_length}


def _projection_dim(moves: dict[str, Move], *, encoder_width: int, src: Path, text_src: Path) -> int:
    for name, path in ((TEXT_PROJECTION, text_src), (VISUAL_PROJECTION, src)):
        if name in moves:
            return _shape(moves, name, 2, path=path)[0]
    return 512 if encoder_width <= 768 else 768  # the paper's
