"""Run evaluations by name on a model folder, print figures beside their baselines, write them with their cards."""

from __future__ import annotations

import json
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
from qlip.models.qlip.processing import text_tokenizer

EVALUATIONS = ("reconstruction", "zero_shot")
SUFFIX = "_baseline"


def run_evals(
    model: Path, *, data: str, evals: tuple[str, ...], max_samples: int, device: str = "auto"
) -> list[dict[str, Any]]:
    """One result per evaluation: `eval`, `figures`, `details`, `card`.

    Raises `UserError` for an unknown evaluation, a folder that is no model, or data that is not there.
    """
    for name in evals:
        if name not in EVALUATIONS:
            raise UserError(f"evaluation {name!r} is unknown: {nearest_name(name, EVALUATIONS)}")
    network, processor = load_model(model), load_processor(model)
    place = pick_device(device)
    network.to(place)
    source = EvalData(shards=data, max_samples=max_samples)
    results = []
    for name in evals:
        evaluator: ReconstructionEvaluator | SceneZeroShotEvaluator
        if name == "reconstruction":
            evaluator = ReconstructionEvaluator(source)
        else:
            evaluator = SceneZeroShotEvaluator(source, text_tokenizer(processor.tokenizer))
        figures = evaluator.run(network, place)
        card = {"model": str(model), "settings": to_json(source), **evaluator.card()}
        results.append({"eval": name, "figures": figures, "details": evaluator.details, "card": card})
    return results


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
                baseline = result["figures"].get(name + SUFFIX)
                table.add_row(name, f"{value:.4f}", "" if baseline is None else f"{baseline:.4f}")
        console.print(table)


def write_results(path: Path, results: list[dict[str, Any]]) -> None:
    """Write results as JSON; the file appears whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(results, indent=1))
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another --json file") from None
