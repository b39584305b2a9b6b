"""Results of evaluations, printed beside their baselines and written as JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rich.table import Table

from qlip.core.errors import UserError
from qlip.core.log import console

SUFFIX = "_baseline"


def print_results(results: list[dict[str, Any]]) -> None:
    """A table per evaluation: figure, value, baseline."""
    for result in results:
        card = result["card"]
        part = "" if card.get("complete", True) else ", not the full set"
        title = f"{card['protocol']}  ({card['count']} samples of {card['data']}{part})"
        table = Table(title=title, title_justify="left")
        table.add_column("figure")
        table.add_column("value", justify="right")
        if card["baseline"]:
            table.add_column(card["baseline"], justify="right")
        for name, value in result["figures"].items():
            if not name.endswith(SUFFIX):
                cells = [_shown(value)]
                if card["baseline"]:
                    cells.append(_shown(result["figures"].get(name + SUFFIX, "")))
                table.add_row(name, *cells)
        console.print(table)


def _shown(value: float | str | None) -> str:
    """Four digits; a dash for what could not be measured (NaN here, null in a file)."""
    if isinstance(value, str):
        return value
    return "\N{EN DASH}" if value is None or math.isnan(value) else f"{value:.4f}"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def write_results(path: Path, results: list[dict[str, Any]]) -> None:
    """Write results as JSON; the file appears whole or not at all.

    What could not be measured (NaN, infinities, None where it was read from a file) is null.
    """
    results = [{**result, "figures": {k: _finite(v) for k, v in result["figures"].items()}} for result in results]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(results, indent=1))
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another file") from None
