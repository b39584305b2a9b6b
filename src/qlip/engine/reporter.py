"""What a run says of itself: metrics.jsonl and the tracker on rank 0, evaluations on all ranks together."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlip.core.distributed import mean_over_ranks, rank
from qlip.core.log import MetricsFile
from qlip.engine.guards import CollapseWatch
from qlip.engine.interfaces import Evaluator, Tracker


def unmoved_random_state() -> AbstractContextManager[None]:
    """What happens inside leaves PyTorch's CPU generator, which a checkpoint keeps, as it was."""
    return torch.random.fork_rng(devices=[])


class Reporter:
    """Writes what a run measures: metrics.jsonl and the tracker on rank 0; evaluations run on all ranks together."""

    def __init__(
        self,
        folder: Path,
        resume_step: int,
        *,
        evaluators: dict[str, Evaluator],
        tracker: Tracker,
        pictures: Callable[[nn.Module, int], Tensor] | None,
        evaluate_again: bool = False,
    ) -> None:
        """`evaluate_again`: evaluations of `resume_step` that are there already will be made anew."""
        self.evaluators = evaluators
        self.tracker = tracker
        self.pictures = pictures
        self.watch = CollapseWatch()
        first = rank() == 0
        path = folder / "metrics.jsonl"
        self.metrics = MetricsFile(path, resume_step=resume_step, evaluate_again=evaluate_again) if first else None

    def log(self, step: int, figures: dict[str, float]) -> None:
        """One training line: to metrics.jsonl, the tracker, and the watch for signs of collapse."""
        self._write({"step": step, **figures}, step, figures)
        self.watch.look(step, figures)

    def evaluate(self, step: int, model: nn.Module, device: torch.device) -> None:
        """A line of metrics.jsonl per evaluator, with its card."""
        for name, evaluator in self.evaluators.items():
            with unmoved_random_state():
                figures = evaluator.run(model, device)
            line = {"step": step, "eval": name, **figures, "card": evaluator.card()}
            self._write(line, step, {f"{name}/{key}": value for key, value in figures.items()})

    def picture(self, step: int, model: nn.Module) -> None:
        """The fixed batch and what the model makes of it."""
        if self.pictures is not None and rank() == 0:
            with unmoved_random_state():
                self.tracker.images(step, "reconstructions", self.pictures(model, step))

    def _write(self, line: dict[str, Any], step: int, figures: dict[str, float]) -> None:
        if self.metrics is not None:
            self.metrics.log(line)
            self.tracker.log(step, figures)

    def close(self) -> None:
        """Write what is buffered."""
        if self.metrics is not None:
            self.metrics.close()
        self.tracker.close()


def mean_figures(window: list[dict[str, Tensor]]) -> dict[str, float]:
    """Mean of each figure over the steps that have it (lazy terms are absent from most) and over ranks."""
    names = sorted({name for figures in window for name in figures})
    if not names:
        return {}
    means = [torch.stack([f[name].float().mean().cpu() for f in window if name in f]).mean() for name in names]
    return dict(zip(names, mean_over_ranks(torch.stack(means)).tolist(), strict=True))


def summary(figures: dict[str, float]) -> str:
    """`contrastive 2.31  pixel 3.9`: the weighted terms, for the progress line."""
    terms = {name.split("/")[-1]: value for name, value in figures.items() if name.endswith("_loss")}
    return "  ".join(f"{name.removesuffix('_loss')} {value:.3g}" for name, value in terms.items())
