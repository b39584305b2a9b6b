"""LlamaGen's VQGAN checkpoints: their tensors put into diffusers' VQModel, which is the same network.

`vq_ds16_c2i.pt`, `vq_ds16_t2i.pt` and `vq_ds8_c2i.pt` hold `{model: state dict}`, checkpoints of its training also
`ema`, `args` and optimizers. All sizes are read from the tensors' shapes. Latents and codebook are brought to norm 1
before the nearest code is sought, and the code of norm 1 is what is decoded.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from qlip.core.errors import UserError
from qlip.models.autoencoders import MeasuredAutoencoder, import_diffusers
from qlip.models.baselines import whole_model
from qlip.models.qlip.foreign_weights import checked_tensor, read_pickle, read_tensors

SUFFIXES = (".pt", ".pth", ".safetensors")
STATE_DICTS = ("ema", "model", "state_dict")
"""Where a checkpoint keeps its weights; averaged ones first, as LlamaGen's own evaluation takes them."""
CODEBOOK = "quantize.embedding.weight"
LEFT_OUT = ("quantize.codebook_used",)
"""Tensors of theirs that compute nothing: which codes the last steps of training used."""
KEY_RULES = (  # theirs -> diffusers', applied one after the other
    (r"^encoder\.conv_blocks\.", "encoder.down_blocks."),
    (r"^decoder\.conv_blocks\.", "decoder.up_blocks."),
    (r"^(encoder|decoder)\.mid\.1\.", r"\1.mid_block.attentions.0."),
    (r"^(encoder|decoder)\.mid\.0\.", r"\1.mid_block.resnets.0."),
    (r"^(encoder|decoder)\.mid\.2\.", r"\1.mid_block.resnets.1."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
    (r"_blocks\.(\d+)\.res\.", r"_blocks.\1.resnets."),
    (r"_blocks\.(\d+)\.attn\.", r"_blocks.\1.attentions."),
    (r"\.downsample\.conv\.", ".downsamplers.0.conv."),
    (r"\.upsample\.conv\.", ".upsamplers.0.conv."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.attentions\.(\d+)\.norm\.", r".attentions.\1.group_norm."),
    (r"\.attentions\.(\d+)\.([qkv])\.", r".attentions.\1.to_\2."),
    (r"\.attentions\.(\d+)\.proj_out\.", r".attentions.\1.to_out.0."),
)
REMEDY = "give LlamaGen's vq_ds16_c2i.pt, vq_ds16_t2i.pt or vq_ds8_c2i.pt"


def open_llamagen(path: Path) -> MeasuredAutoencoder:
    """LlamaGen's VQGAN from its file, in float32; nothing in the file is executed.

    Raises `UserError` for a file that is damaged, carries code, or lacks or has tensors beyond those of this network,
    and without diffusers.
    """
    tensors, part, unit_codes = _read(path)
    sizes = _sizes(tensors, path)
    vq_model = import_diffusers().VQModel

    def load() -> tuple[Any, dict[str, list[str]]]:
        with torch.device("meta"):
            model = vq_model(**sizes)
        given, info = moved(tensors, model.state_dict())
        if not any(info.values()):
            model.load_state_dict(given, assign=True)
        return model, info

    model = whole_model(path, load)
    if unit_codes:
        model.quantize.embedding.weight.data = normalize(model.quantize.embedding.weight.data, dim=-1)
    return MeasuredAutoencoder(
        model, name="LlamaGenVQ", source_family="LlamaGen", unit_codes=unit_codes, facts={"weights": part}
    )


def diffusers_name(name: str) -> str:
    """Their name of a tensor -> the name that it has in diffusers' VQModel."""
    for pattern, replacement in KEY_RULES:
        name = re.sub(pattern, replacement, name)
    return name


def moved(
    tensors: Mapping[str, Tensor], needed: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Their tensors by diffusers' names, 1x1 convolutions of attention as the linear layers they are; and which are
    missing, unexpected or mismatched (`missing_keys`, ...), the last two by their names."""
    given: dict[str, Tensor] = {}
    info: dict[str, list[str]] = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    for theirs, tensor in tensors.items():
        name = diffusers_name(theirs)
        if name not in needed or name in given:
            info["unexpected_keys"].append(theirs)
            continue
        is_linear = ".attentions." in name and tensor.ndim == 4 and tensor.shape[2:] == (1, 1)
        given[name] = tensor[:, :, 0, 0] if is_linear else tensor
        if given[name].shape != needed[name].shape:
            info["mismatched_keys"].append(theirs)
    info["missing_keys"] = [name for name in needed if name not in given]
    return given, info


def _sizes(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """What diffusers' VQModel has to be told, from names and shapes. Raises `UserError` where these do not say."""

    def size(name: str, axis: int) -> int:
        shape = tensors[name].shape if name in tensors else ()
        if axis >= len(shape):
            raise UserError(f"{path} is no VQGAN of LlamaGen: it has no weight {name} of such a network; {REMEDY}")
        return shape[axis]

    levels = range(max(1, _count(tensors, r"encoder\.conv_blocks\.(\d+)\.")))
    down, up = (
        ["Attn" * (f"{side}.conv_blocks.{level}.attn.0.norm.weight" in tensors) for level in levels]
        for side in ("encoder", "decoder")
    )
    return {
        "block_out_channels": [size(f"encoder.conv_blocks.{level}.res.0.conv1.weight", 0) for level in levels],
        "layers_per_block": _count(tensors, r"encoder\.conv_blocks\.0\.res\.(\d+)\."),
        "down_block_types": [f"{attention}DownEncoderBlock2D" for attention in down],
        "up_block_types": [f"{attention}UpDecoderBlock2D" for attention in up],
        "latent_channels": size("encoder.conv_out.weight", 0),
        "num_vq_embeddings": size(CODEBOOK, 0),
        "vq_embed_dim": size(CODEBOOK, 1),
        "norm_num_groups": 32,
    }


def _count(tensors: Iterable[str], pattern: str) -> int:
    """How many different numbers stand where the pattern has its group."""
    return len({found[1] for name in tensors if (found := re.match(pattern, name))})


def _read(path: Path) -> tuple[dict[str, Tensor], str, bool]:
    """Tensors of the file but for `LEFT_OUT`, what the file calls them, and whether codes are brought to norm 1."""
    if path.suffix not in SUFFIXES or not path.is_file():
        raise UserError(f"{path} is no weight file; {REMEDY}")
    if path.suffix == ".safetensors":
        tensors, part, unit_codes = read_tensors(path), "model", True
    else:
        with torch.serialization.safe_globals([argparse.Namespace]):  # their `args`, plain settings of the training
            content = read_pickle(path)
        if not isinstance(content, dict):
            raise UserError(f"{path} holds no state dict; {REMEDY}")
        part = next((name for name in STATE_DICTS if isinstance(content.get(name), dict)), "")
        held = content[part] if part else content
        found = {str(name): value for name, value in held.items() if isinstance(value, Tensor)}
        tensors = {name: checked_tensor(value.detach(), key=name, path=path) for name, value in found.items()}
        unit_codes = getattr(content.get("args"), "codebook_l2_norm", True) is not False
    return {name: tensor for name, tensor in tensors.items() if name not in LEFT_OUT}, part or "state dict", unit_codes
