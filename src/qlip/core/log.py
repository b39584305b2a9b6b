"""Console, progress and metrics.jsonl: what a run says to its user, on the first of several processes only.

One line of metrics.jsonl is one JSON object: training lines have `step` and scalars, evaluation lines have `step`,
`eval`, the figures and the card behind them.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

# torchrun gives every process its rank before it starts; core/distributed.py would bring torch along, which is slow
FIRST_PROCESS = os.environ.get("RANK", "0") == "0"
console = Console(highlight=False, soft_wrap=True, quiet=not FIRST_PROCESS)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics.jsonl; a line cut off by a kill is left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


class MetricsFile:
    """metrics.jsonl of a run. Opening it for a resume at step s drops the lines of steps that will be run again."""

    def __init__(self, path: Path, *, resume_step: int, evaluate_again: bool = False) -> None:
        """`evaluate_again` also drops the evaluations of step s itself, which a kill before the export had ended."""
        kept = [
            line
            for line in read_metrics(path)
            if line["step"] < resume_step or (line["step"] == resume_step and not (evaluate_again and "eval" in line))
        ]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(path)
        self._file = path.open("a")

    def log(self, line: dict[str, Any]) -> None:
        """Append one line; NaN and infinities are written as null, which JSON can hold."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class ProgressLine:
    """A bar with rate and time left on a terminal, a plain line every few seconds elsewhere."""

    def __init__(self, title: str, total: int, *, start: int, unit: str, units_per_step: int) -> None:
        self.title, self.total, self.unit, self.units_per_step = title, total, unit, units_per_step
        self._start, self._started = start, time.monotonic()
        self._last_line = self._started
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        if console.is_terminal and not console.quiet:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
                console=console,
            )
            self._task = self._progress.add_task(title, total=total or None, completed=start, text="")
            self._progress.start()

    def rate(self, step: int) -> float:
        """Units per second since the start of this process's part."""
        return (step - self._start) * self.units_per_step / max(time.monotonic() - self._started, 1e-9)

    def update(self, step: int, text: str = "") -> None:
        """`step` steps are done; `text` is what to say beside the rate. A total of 0 is not known."""
        rate = self.rate(step)
        text = f"{rate:.0f} {self.unit}/s  {text}"
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step, text=text)
        elif time.monotonic() - self._last_line >= 10 or step == self.total:
            self._last_line = time.monotonic()
            console.print(f"{self.title}  {self._state(step, rate)}  {text}")

    def _state(self, step: int, rate: float) -> str:
        if not self.total:
            return str(step)
        seconds_left = (self.total - step) * self.units_per_step / max(rate, 1e-9)
        left = "done" if step == self.total else f"{seconds_left / 60:.1f} min left"
        return f"{step}/{self.total}  {left}"

    def close(self) -> None:
        """Take the bar down."""
        if self._progress is not None:
            self._progress.stop()


@contextmanager
def progress(
    title: str, total: int, *, start: int = 0, unit: str = "images", units_per_step: int = 1
) -> Iterator[ProgressLine]:
    """`with progress("stage 1", 1000, units_per_step=64) as bar: bar.update(step, "loss 3.2")`."""
    line = ProgressLine(title, total, start=start, unit=unit, units_per_step=units_per_step)
    try:
        yield line
    finally:
        line.close()
