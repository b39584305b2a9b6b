"""Which tensor of an EVA file goes to which parameter of QLIP, and the report that accounts for all of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from qlip.core.errors import UserError
from qlip.models.qlip.eva_keys import is_text, leftover_reason, source_of, targets_of
from qlip.models.qlip.foreign_weights import read_tensors
from qlip.models.qlip.weight_files import shown

CLASS_EMBEDDING = "vision_model.embeddings.class_embedding"
POSITIONS = "vision_model.embeddings.position_embedding.weight"
TEXT_PROJECTION = "text_projection.weight"
VISUAL_PROJECTION = "visual_projection.weight"


@dataclass(kw_only=True, slots=True)
class Taken:
    """A parameter that equals a source tensor, or the rows of one that `source` names in brackets."""

    target: str
    source: str


@dataclass(kw_only=True, slots=True)
class Resized:
    """A parameter interpolated from a source tensor of another grid or patch size."""

    target: str
    source: str
    from_shape: tuple[int, ...]
    to_shape: tuple[int, ...]


@dataclass(kw_only=True, slots=True)
class Ignored:
    """A source tensor that went nowhere."""

    source: str
    reason: str


@dataclass(kw_only=True, slots=True)
class ImportReport:
    """Where every parameter came from and where every source tensor went."""

    taken: list[Taken] = field(default_factory=list)
    resized: list[Resized] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    """Parameters with their initial values."""
    ignored: list[Ignored] = field(default_factory=list)

    def assert_complete(self, parameters: Iterable[str]) -> None:
        """Every parameter is in the report exactly once."""
        named = [*(row.target for row in self.taken), *(row.target for row in self.resized), *self.fresh]
        assert sorted(named) == sorted(parameters)


@dataclass(frozen=True, slots=True)
class Move:
    """A source tensor, or a third of one, brought into the axes of its target."""

    path: Path
    source: str
    tensor: Tensor


def read_moves(path: Path, *, vision: bool, text: bool, report: ImportReport, label: str = "") -> dict[str, Move]:
    """Target -> move for the wanted sides of a file; its other tensors are added to the report as ignored.

    `label` goes before the file's keys in the report. Raises `UserError` for a key that is unknown or doubled.
    """
    moves: dict[str, Move] = {}
    for key, tensor in read_tensors(path).items():
        targets, reason = targets_of(key), leftover_reason(key)
        if not vision and (key.startswith("visual.") or (targets and not is_text(targets[0]))):
            reason = "this file gives the text side only"
        elif not text and targets and is_text(targets[0]):
            reason = "another file gives the text side"
        if reason is not None:
            report.ignored.append(Ignored(source=label + key, reason=reason))
            continue
        if not targets:
            raise UserError(f"{path}: {shown(key)} is no tensor of EVA-02 or EVA02-CLIP; give a file of that kind")
        for target, move in zip(targets, _cut(Move(path, label + key, tensor), len(targets)), strict=True):
            if target in moves:
                earlier = moves[target].source
                raise UserError(f"{path}: {earlier} and {move.source} both stand for {target}; remove one of them")
            moves[target] = Move(path, move.source, _turn(move.tensor, target))
    return moves


def drop_unfit_head(moves: dict[str, Move], report: ImportReport) -> None:
    """Leave out an image projection whose width is not the text projection's, which came from another file."""
    head, text = moves.get(VISUAL_PROJECTION), moves.get(TEXT_PROJECTION)
    if head is None or text is None or head.tensor.shape[:1] == text.tensor.shape[:1]:
        return
    reason = f"projects to another width than {text.path.name}"
    for name in [name for name in moves if name.startswith("visual_projection.")]:
        report.ignored.append(Ignored(source=moves.pop(name).source, reason=reason))


def misshapen(move: Move, expected: object) -> UserError:
    """The error for a tensor whose shape fits nothing."""
    shape = tuple(move.tensor.shape)
    return UserError(f"{move.path}: {move.source} is {shape}, expected {expected}; use an unchanged file of a release")


def missing(target: str, path: Path) -> UserError:
    """The error for a tensor that a file should have, named as the file would name it."""
    return UserError(f"{path} has no {source_of(target)} (for {target}); use a complete file of a release")


def _cut(move: Move, num_parts: int) -> list[Move]:
    """The move itself, or its tensor in equal parts along the first axis: q, k and v of a fused projection."""
    if not move.tensor.is_floating_point():
        raise UserError(f"{move.path}: {move.source} holds {move.tensor.dtype}, not weights; use another file")
    if num_parts == 1:
        return [move]
    if move.tensor.ndim == 0 or move.tensor.shape[0] % num_parts:
        raise misshapen(move, "q, k and v of one size after each other")
    rows = move.tensor.shape[0] // num_parts
    parts = move.tensor.chunk(num_parts)
    return [Move(move.path, f"{move.source}[{i * rows}:{(i + 1) * rows}]", part) for i, part in enumerate(parts)]


def _turn(tensor: Tensor, target: str) -> Tensor:
    """Without the batch axes of EVA's CLS vector and position table; the text projection as a Linear's weight."""
    if target == CLASS_EMBEDDING:
        return tensor.squeeze(0).squeeze(0)  # (1, 1, d) -> (d)
    if target == POSITIONS:
        return tensor.squeeze(0)  # (1, 1 + n, d) -> (1 + n, d)
    if target == TEXT_PROJECTION:
        return tensor.transpose(0, -1)  # (width, e) -> (e, width)
    return tensor
