"""Start a QLIP from EVA-02 (MIM) or EVA02-CLIP weights; bottleneck and decoder are fresh.

After arXiv 2502.05178, section 4 and Table 3b: the encoder from EVA-02, the text tower from EVA02-CLIP. Every tensor
of the files is taken, resized or ignored for a reason, and every parameter of the model is taken, resized or fresh.
Shapes: `n` patches on a grid of g x g, `d` width, `p` patch size.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from qlip.core.errors import UserError
from qlip.models.qlip.eva_keys import is_text
from qlip.models.qlip.eva_moves import (
    POSITIONS,
    ImportReport,
    Move,
    Resized,
    Taken,
    drop_unfit_head,
    misshapen,
    missing,
    read_moves,
)
from qlip.models.qlip.eva_sizes import EvaImportConfig, build_config
from qlip.models.qlip.modeling import QLIPModel
from qlip.nn.vision import resize_positions

KERNEL = "vision_model.embeddings.patch_embedding.weight"
OPTIONAL_PARTS = (  # what files may lack, but only as a whole
    re.compile(r"vision_decoder\."),
    re.compile(r"vision_model\.quant_embed(_post)?\."),
    re.compile(r"vision_model\.encoder\..*\.inner_attn_ln\."),  # EVA-02 has no such LayerNorm, EVA02-CLIP has
    re.compile(r"visual_projection\."),
    re.compile(r"text_(model|projection)\."),
    re.compile(r"logit_scale"),
)


class Imported(NamedTuple):
    """The new model and what became of every tensor."""

    model: QLIPModel
    report: ImportReport


def import_eva(src: Path, *, text_from: Path | None = None, config: EvaImportConfig) -> Imported:
    """A float32 QLIP with the encoder of `src` and the text side of `text_from`, or else of `src` if it has one.

    Raises `UserError` in one line for a file that cannot be read, names the first key that is unknown, doubled,
    missing or misshapen, and refuses options that do not fit the file.
    """
    report = ImportReport()
    moves = read_moves(src, vision=True, text=text_from is None, report=report)
    if text_from is not None:
        text_moves = read_moves(text_from, vision=False, text=True, report=report, label=f"{text_from.name}:")
        if not text_moves:
            raise UserError(f"{text_from} has no text tower; give an EVA02-CLIP or CLIP file")
        moves |= text_moves
        drop_unfit_head(moves, report)
    text_src = text_from or src
    model_config = build_config(moves, config, src=src, text_src=text_src)
    with torch.device("meta"):  # shapes alone, so that a file which does not fit costs no memory
        shapes = {name: tuple(parameter.shape) for name, parameter in QLIPModel(model_config).named_parameters()}
    _refuse_gaps(moves, shapes, src=src, text_src=text_src)
    tensors = {name: _fit(move, name, shapes[name], report) for name, move in moves.items()}
    report.fresh = [name for name in shapes if name not in moves]
    report.assert_complete(shapes)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(config.seed)
        model = QLIPModel(model_config)
        for name, parameter in model.named_parameters():
            if name in tensors:
                parameter.copy_(tensors[name])
    return Imported(model.eval(), report)


def _refuse_gaps(moves: dict[str, Move], shapes: dict[str, tuple[int, ...]], *, src: Path, text_src: Path) -> None:
    """Raise `UserError` for a parameter that should have come from a file, and for a tensor without a parameter."""
    lacking = {part for part in OPTIONAL_PARTS if not any(part.match(name) for name in moves)}
    for name in shapes:
        if name not in moves and not any(part.match(name) for part in lacking):
            raise missing(name, text_src if is_text(name) else src)
    for name, move in moves.items():
        if name not in shapes:
            raise UserError(
                f"{move.path}: {move.source} fits no model of this kind; use an unchanged file of a release"
            )


def _fit(move: Move, target: str, shape: tuple[int, ...], report: ImportReport) -> Tensor:
    """The move's tensor in the shape of its target, resized where EVA resizes; one line for the report."""
    tensor = move.tensor
    if target == POSITIONS:
        tensor = _resize_positions(move, shape)
    elif target == KERNEL:  # decided apart: patch 14 at 224 px and patch 16 at 256 px have one grid
        tensor = _resize_kernel(move, shape)
    if tensor.shape != shape:
        raise misshapen(move, shape)
    if tensor is move.tensor:
        report.taken.append(Taken(target=target, source=move.source))
    else:
        from_shape = tuple(move.tensor.shape)
        report.resized.append(Resized(target=target, source=move.source, from_shape=from_shape, to_shape=shape))
    return tensor


def _resize_positions(move: Move, shape: tuple[int, ...]) -> Tensor:
    """(1 + n, d) table for another grid: CLS kept, the rest bicubic; the tensor itself if the grid is the same."""
    table = move.tensor
    if table.ndim != 2 or table.shape[1] != shape[1] or table.shape[0] == shape[0]:
        return table
    grid, new_grid = math.isqrt(table.shape[0] - 1), math.isqrt(shape[0] - 1)
    if grid < 1 or grid**2 != table.shape[0] - 1:
        raise misshapen(move, "CLS and a square grid of patches")
    return torch.cat([table[:1], resize_positions(table[1:], (new_grid, new_grid))])


def _resize_kernel(move: Move, shape: tuple[int, ...]) -> Tensor:
    """(d, 3, p, p) kernel for another patch size, bicubic; the tensor itself if the size is the same."""
    kernel = move.tensor
    if kernel.ndim != 4 or kernel.shape[:2] != shape[:2] or kernel.shape[2:] == shape[2:]:
        return kernel
    if kernel.shape[2] != kernel.shape[3] or kernel.shape[2] == 0:
        raise misshapen(move, "a kernel of square patches")
    return F.interpolate(kernel, size=shape[2:], mode="bicubic", align_corners=False)
