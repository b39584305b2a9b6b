"""Random weights under the names of EVA-02, EVA02-CLIP and OpenAI's CLIP, at a size that imports in a second."""

from __future__ import annotations

from pathlib import Path

import torch
from open_clip.transformer import TextTransformer
from torch import Tensor

from qlip.models.qlip.eva import Imported, import_eva
from qlip.models.qlip.eva_sizes import EvaImportConfig

WIDTH, FEED_FORWARD, HEAD_DIM, NUM_LAYERS = 32, 85, 16, 2
TEXT_WIDTH, CONTEXT_LENGTH, PROJECTION_DIM = 32, 8, 24


def mim_state(
    *, grid: int = 4, patch: int = 16, inner_norm: bool = False, ffn_norm: bool = True, fused: bool = False
) -> dict[str, Tensor]:
    """EVA-02 after masked training: no prefix, no text. `fused` without `ffn_norm` is the layout of Ti and S."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, WIDTH),
        "mask_token": (1, 1, WIDTH),
        "pos_embed": (1, 1 + grid**2, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, patch, patch),
        "patch_embed.proj.bias": (WIDTH,),
        "rope.freqs_cos": (grid**2, HEAD_DIM),
        "rope.freqs_sin": (grid**2, HEAD_DIM),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
        "lm_head.weight": (40, WIDTH),
        "lm_head.bias": (40,),
    }
    for layer in range(NUM_LAYERS):
        block = f"blocks.{layer}"
        norms = ["norm1", "norm2", *(["attn.inner_attn_ln"] if inner_norm else [])]
        shapes |= {f"{block}.{name}.{kind}": (WIDTH,) for name in norms for kind in ("weight", "bias")}
        if fused:
            shapes[f"{block}.attn.qkv.weight"] = (3 * WIDTH, WIDTH)
        else:
            shapes |= {f"{block}.attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkv"}
        shapes |= {f"{block}.attn.{name}": (WIDTH,) for name in ("q_bias", "v_bias", "proj.bias")}
        shapes |= {f"{block}.attn.proj.weight": (WIDTH, WIDTH), f"{block}.mlp.w3.weight": (WIDTH, FEED_FORWARD)}
        shapes |= {f"{block}.mlp.{name}.weight": (FEED_FORWARD, WIDTH) for name in ("w1", "w2")}
        shapes |= {f"{block}.mlp.{name}.bias": (FEED_FORWARD,) for name in ("w1", "w2")}
        shapes[f"{block}.mlp.w3.bias"] = (WIDTH,)
        if ffn_norm:
            shapes |= {f"{block}.mlp.ffn_ln.{kind}": (FEED_FORWARD,) for kind in ("weight", "bias")}
        shapes |= {f"{block}.attn.rope.freqs_{name}": (grid**2, HEAD_DIM) for name in ("cos", "sin")}
    return {name: 0.2 * torch.randn(shape) for name, shape in shapes.items()}


def text_tower() -> TextTransformer:
    """open_clip's text transformer, tiny but for CLIP's vocabulary; its tensors bear the names of CLIP files."""
    tower = TextTransformer(
        context_length=CONTEXT_LENGTH,
        vocab_size=49408,
        width=TEXT_WIDTH,
        heads=TEXT_WIDTH // HEAD_DIM,
        layers=NUM_LAYERS,
        output_dim=PROJECTION_DIM,
    )
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return tower.eval()


def text_state(prefix: str = "text.") -> dict[str, Tensor]:
    """The text side of an EVA02-CLIP file, or with an empty prefix of an older one."""
    state = {prefix + name: tensor for name, tensor in text_tower().state_dict().items()}
    return state | {"logit_scale": torch.tensor(4.6)}


def clip_state(*, grid: int = 4, patch: int = 16, text_prefix: str = "text.") -> dict[str, Tensor]:
    """An EVA02-CLIP file: `visual.` and `text.`, a LayerNorm between heads and projection, a projecting head."""
    vision = mim_state(grid=grid, patch=patch, inner_norm=True)
    vision = {name: t for name, t in vision.items() if name != "mask_token" and not name.startswith("lm_head.")}
    vision |= {"head.weight": 0.2 * torch.randn(PROJECTION_DIM, WIDTH), "head.bias": torch.randn(PROJECTION_DIM)}
    return {f"visual.{name}": tensor for name, tensor in vision.items()} | text_state(text_prefix)


def import_states(
    folder: Path, state: dict[str, Tensor], text: dict[str, Tensor] | None = None, *, image_size: int = 64, **options
) -> Imported:
    """Save the states as weight files and import them; 64 px and patch 16 are the grid of the tiny files."""
    torch.save(state, folder / "vision.pt")
    text_from = None
    if text is not None:
        text_from = folder / "text.pt"
        torch.save(text, text_from)
    config = EvaImportConfig(image_size=image_size, **{"head_dim": HEAD_DIM} | options)
    return import_eva(folder / "vision.pt", text_from=text_from, config=config)
