"""Run evaluations by name on a model folder, print figures beside their baselines, write them with their cards."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rich.table import Table

from qlip.core.config import to_json
from qlip.core.errors import UserError, nearest_name
from qlip.core.log import console
from qlip.engine.parallel import pick_device
from qlip.evals.reconstruction import EvalData, ReconstructionEvaluator
from qlip.evals.zero_shot import SceneZeroShotEvaluator
from qlip.models.qlip.loading import load_model, load_processor
from qlip.models.qlip.processing import QLIPProcessor
from qlip.models.qlip.tokenizer import text_tokenizer

EVALUATIONS = ("reconstruction", "zero_shot")
SUFFIX = "_baseline"


def run_evals(
    model: Path, *, data: str, evals: tuple[str, ...], max_samples: int, device: str = "auto"
) -> list[dict[str, Any]]:
    """One result per evaluation: `eval`, `figures`, `details`, `card`.

    Raises `UserError` for an unknown evaluation, a folder that is no model, or data that is not there.
    """
    processor = load_processor(model)
    source = EvalData(shards=data, max_samples=max_samples)
    evaluators = {name: build_evaluator(name, source, processor) for name in evals}
    place = pick_device(device)
    network = load_model(model).to(place)
    results = []
    for name, evaluator in evaluators.items():
        figures = evaluator.run(network, place)
        card = {"model": str(model), "settings": to_json(source), **evaluator.card()}
        results.append({"eval": name, "figures": figures, "details": evaluator.details, "card": card})
    return results


def build_evaluator(
    name: str, source: EvalData, processor: QLIPProcessor
) -> ReconstructionEvaluator | SceneZeroShotEvaluator:
    """The evaluation of that name. Raises `UserError` naming the nearest one when there is none."""
    if name == "reconstruction":
        return ReconstructionEvaluator(source)
    if name == "zero_shot":
        return SceneZeroShotEvaluator(source, text_tokenizer(processor.tokenizer))
    raise UserError(f"evaluation {name!r} is unknown: {nearest_name(name, EVALUATIONS)}")


def print_results(results: list[dict[str, Any]]) -> None:
    """A table per evaluation: figure, value, baseline."""
    for result in results:
        card = result["card"]
        table = Table(title=f"{card['protocol']}  ({card['count']} samples of {card['data']})", title_justify="left")
        table.add_column("figure")
        table.add_column("value", justify="right")
        table.add_column(card["baseline"], justify="right")
        for name, value in result["figures"].items():
            if not name.endswith(SUFFIX):
                baseline = result["figures"].get(name + SUFFIX, "")
                table.add_row(name, _shown(value), _shown(baseline))
        console.print(table)


def _shown(value: float | str | None) -> str:
    """Four digits; a dash for what could not be measured (NaN here, null in a file)."""
    if isinstance(value, str):
        return value
    return "\N{EN DASH}" if value is None or math.isnan(value) else f"{value:.4f}"


def write_results(path: Path, results: list[dict[str, Any]]) -> None:
    """Write results as JSON, NaN and infinities as null; the file appears whole or not at all."""
    results = [
        {**result, "figures": {k: v if math.isfinite(v) else None for k, v in result["figures"].items()}}
        for result in results
    ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(results, indent=1))
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another --json file") from None
