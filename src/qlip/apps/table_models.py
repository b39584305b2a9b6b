"""Results of `qlip eval` -> models, one per fingerprint, whatever files their figures come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from qlip.apps.table_formats import one_line
from qlip.core.errors import UserError
from qlip.evals.compare import differences, read_results

KINDS = {"top1": "zero_shot", "linear_cls": "linear_probe", "linear_mean": "linear_probe"}
KINDS |= {"linear_cls+mean": "linear_probe"}
"""Figure -> the evaluation that has it; reconstruction has the rest."""
COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "compression_ratio": ("ratio", lambda value: f"{value:.1f}".removesuffix(".0")),
    "top1": ("ZS", lambda value: f"{100 * value:.1f}"),
    "rfid": ("rFID", lambda value: f"{value:.2f}"),
    "psnr": ("PSNR", lambda value: f"{value:.2f}"),
    "ssim": ("SSIM", lambda value: f"{value:.4f}".replace("0.", ".", 1)),
    "fd_encoder": ("FD (encoder)", lambda value: f"{value:.4g}"),
    **{
        f"linear_{position}": (f"linear probe of {position}", lambda value: f"{100 * value:.1f}")
        for position in ("cls", "mean", "cls+mean")
    },
}
"""Figure -> its column and its digits, which are the paper's."""


class Figure(NamedTuple):
    """A measured value."""

    value: float
    card: dict[str, Any]
    path: Path


@dataclass(kw_only=True, slots=True)
class Model:
    """All that was measured of one model, from whatever files."""

    path: str
    """What `qlip eval` was given."""
    name: str = ""
    """Folder of the model, or of the run that exported it; made longer where two would be equal."""
    cards: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, Figure] = field(default_factory=dict)
    """By the names of `COLUMNS`."""

    def fact(self, key: str) -> Any:
        """The first card's that has it."""
        return next((card[key] for card in self.cards if card.get(key) is not None), None)


def read_models(paths: list[Path], *, wanted: Iterable[str], protocols: tuple[str, ...] = ()) -> list[Model]:
    """One model per fingerprint, in the order of the files, with those of the `wanted` figures that were measured.

    Raises `UserError` when a figure was measured in two ways, and as `read_results` does.
    """
    if not paths:
        raise UserError("no results; give at least one results.json written by `qlip eval`")
    models: dict[str, Model] = {}
    for path in paths:
        for result in read_results(path):
            card = result["card"]
            if protocols and card["protocol"] not in protocols:
                continue
            key = card.get("model_fingerprint") or f"{path}:{card.get('model', '')}"
            model = models.setdefault(key, Model(path=one_line(card.get("model", "")) or "model"))
            model.cards.append(card)
            for name in wanted:
                value = result["figures"].get(name)
                if value is not None and result["eval"] == KINDS.get(name, "reconstruction"):
                    _add(model, name, Figure(value=value, card=card, path=path))
    if not models:
        raise UserError(f"no result is of protocol {' or '.join(protocols)}; see what the files hold, or leave it out")
    _name(models)
    return list(models.values())


def _add(model: Model, name: str, figure: Figure) -> None:
    """Keep a figure; the same one measured again alike changes nothing."""
    known = model.figures.setdefault(name, figure)
    column, digits = COLUMNS[name]
    if known is figure or name == "compression_ratio":  # of the model, not of the protocol
        return
    alike = not differences(known.card, figure.card).blocking
    if alike and digits(known.value) == digits(figure.value):
        return
    first, second = (one_line(found.card["protocol"]) for found in (known, figure))
    said = [
        f"{protocol} on {one_line(found.card.get('data', 'unknown'))} (n = {found.card['count']}) in {found.path}"
        for protocol, found in ((first, known), (second, figure))
    ]
    remedy = f"choose with --protocols {first}" if first != second else "give the file of one of them"
    raise UserError(f"{model.path}: column {column} was measured by {said[0]} and by {said[1]}; {remedy}")


def _name(models: dict[str, Model]) -> None:
    """Names that tell models apart: the folder, else with the one above, else with the fingerprint."""
    for key, model in models.items():
        for depth in (1, 2):
            model.name = _folders(model.path, depth)
            if [_folders(other.path, depth) for other in models.values()].count(model.name) == 1:
                break
        else:
            model.name += f" ({one_line(key)[:8]})"


def _folders(path: str, depth: int) -> str:
    """The last folders of a model's path; `export` is every run's."""
    parts = [part for part in Path(path).parts if part not in ("/", "export")] or [path]
    return "/".join(parts[-depth:])
