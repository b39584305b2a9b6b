"""`qlip eval results`: what the scorers of GenEval and DPG-Bench wrote, as a table beside the paper's rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from rich.table import Table

from qlip.core.errors import UserError
from qlip.core.log import console
from qlip.evals import dpg_bench, geneval

PAPER: dict[str, dict[str, tuple[float, ...]]] = {  # Tables 7, 12 and 13; shares
    "geneval": {
        "VQGAN": (0.32, 0.69, 0.36, 0.20, 0.57, 0.06, 0.02),
        "BSQ-ViT-B/16": (0.31, 0.77, 0.26, 0.13, 0.56, 0.05, 0.06),
        "QLIP-B/16": (0.48, 0.91, 0.59, 0.22, 0.80, 0.17, 0.24),
    },
    "dpg": {
        "VQGAN": (0.4322, 0.7660, 0.5788, 0.6696, 0.7578, 0.4280),
        "BSQ-ViT-B/16": (0.3403, 0.6839, 0.4770, 0.6340, 0.7377, 0.3360),
        "QLIP-B/16": (0.7817, 0.8237, 0.8468, 0.8697, 0.9250, 0.7920),
    },
}
DPG_CATEGORIES = ("global", "entity", "attribute", "relation", "other")


def print_scores(benchmark: Literal["geneval", "dpg"], results: Path) -> None:
    """Print the scorer's figures, what they were taken over, and what to keep in mind.

    Raises `UserError` naming line and field of a malformed file.
    """
    if not results.is_file():
        raise UserError(f"no file at {results}: give the results that the scorer of {benchmark} wrote")
    columns, own, notes = _geneval(results) if benchmark == "geneval" else _dpg(results)
    table = Table(title=f"{benchmark}: {results}; beside it the paper's generators, by tokenizer", title_justify="left")
    table.add_column("category")
    for name in ("these results", *PAPER[benchmark]):
        table.add_column(name, justify="right", no_wrap=True)
    for category, *row in zip(columns, own, *PAPER[benchmark].values(), strict=True):
        table.add_row(category, *map(_percent, row))
    console.print(table)
    for note in notes:
        console.print(f"- {note}")


def _geneval(results: Path) -> tuple[list[str], list[float], list[str]]:
    scores = geneval.read_results(results)
    counts = ", ".join(f"{tag} {number}" for tag, number in scores.pictures.items())
    notes = [
        f"pictures: {counts}; prompts: {scores.num_prompts} of {geneval.NUM_PROMPTS}",
        f"all pictures of a prompt right: {_percent(scores.all_right)}; at least one: {_percent(scores.any_right)}",
    ]
    if scores.missing_tags:
        notes.append(f"without {', '.join(scores.missing_tags)}: overall is the mean of the others")
    own = [scores.overall, *(scores.tags.get(tag, math.nan) for tag in geneval.TAGS)]
    return ["overall", *geneval.TAGS], own, notes


def _dpg(results: Path) -> tuple[list[str], list[float], list[str]]:
    scores = dpg_bench.read_results(results)
    notes = [
        f"pictures: {scores.num_pictures} of {dpg_bench.NUM_PROMPTS}; tiles: {', '.join(map(_percent, scores.tiles))}",
        *dpg_bench.QUIRKS,
    ]
    own = [scores.overall, *(scores.categories.get(name, math.nan) for name in DPG_CATEGORIES)]
    return ["overall", *DPG_CATEGORIES], own, notes


def _percent(share: float) -> str:
    return "\N{EN DASH}" if math.isnan(share) else f"{100 * share:.1f}"
