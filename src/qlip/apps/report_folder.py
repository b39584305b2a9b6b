"""What a demo folder holds of each stage: config, training lines, evaluation results, model."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlip.core.errors import UserError
from qlip.core.log import read_metrics

STAGES = {"stage1": "stage 1", "stage2": "stage 2"}


@dataclass(kw_only=True, slots=True)
class Stage:
    """What a demo folder holds of one stage."""

    name: str
    """`stage1` or `stage2`: its folder and its file of results."""
    title: str
    """`stage 1` or `stage 2`."""
    config: dict[str, Any]
    """config.json of the run folder: `config`, `git_commit`, `versions`; empty when there is none."""
    lines: list[dict[str, Any]]
    """Training lines of metrics.jsonl."""
    results: dict[str, dict[str, Any]]
    """Evaluation name -> `figures`, `details`, `card`."""
    export: Path | None
    """Model folder."""

    def figure(self, evaluation: str, name: str) -> float | None:
        """A figure, or None where it was not measured."""
        return self.results.get(evaluation, {}).get("figures", {}).get(name)


def read_stages(folder: Path) -> list[Stage]:
    """The stages that have a run folder. Raises `UserError` when there is none."""
    stages = []
    for name, title in STAGES.items():
        run = folder / name
        if not (run / "config.json").is_file() and not (run / "metrics.jsonl").is_file():
            continue
        export = run / "export"
        stages.append(
            Stage(
                name=name,
                title=title,
                config=read_json(run / "config.json", default={}),
                lines=[line for line in read_metrics(run / "metrics.jsonl") if "eval" not in line],
                results={r["eval"]: r for r in read_json(folder / "results" / f"{name}.json", default=[])},
                export=export if (export / "config.json").is_file() else None,
            )
        )
    if not stages:
        raise UserError(
            f"{folder} is no demo folder (no run in stage1 or stage2); give the --out folder of `qlip demo`"
        )
    return stages


def read_json(path: Path, *, default: Any) -> Any:
    """What the file holds, or `default` without one. Raises `UserError` for a broken file."""
    if not path.is_file():
        return default
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"cannot read {path}: {error}; delete it and run `qlip demo` again") from None


def run_facts(stage: Stage) -> dict[str, str]:
    """Recipe, length and speed of one run."""
    config = stage.config.get("config", {})
    speeds = [line["images_per_second"] for line in stage.lines if line.get("images_per_second")]
    return {
        "title": stage.title,
        "recipe": str(config.get("recipe", "")),
        "steps": str(stage.lines[-1]["step"]) if stage.lines else "",
        "batch": str(config.get("data", {}).get("batch_size", "")),
        "speed": f"{statistics.median(speeds):.0f}" if speeds else "",
        "commit": (stage.config.get("git_commit") or "")[:12],
    }
