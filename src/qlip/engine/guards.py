"""What watches a run: non-finite steps, recorded and skipped alike on all ranks, and signs that training has collapsed.

    non-finite loss or gradient on any rank  -> record on every rank, no weight of the phase moves -> next step
    too many in a row                        -> everything back to the newest checkpoint, once
    the same again, or nothing to go back to -> the run stops with one line

Going back reads the same data in the same order: it mends a fault that passes, such as one of the hardware, and ends a
run whose weights or data are at fault.
"""

from __future__ import annotations

import base64
import json
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qlip.core.distributed import any_rank, own_part, rank
from qlip.core.errors import UserError
from qlip.core.log import console
from qlip.engine.interfaces import Batch

REMEMBERED_STEPS = 20  # losses of so many steps go into a record


class NonFiniteStepError(UserError):
    """A run that cannot go on: losses or gradients stay NaN or infinite."""


class RollBack(Exception):  # noqa: N818 - a decision, not an error
    """Too many steps in a row were skipped: the trainer has to go back to its newest checkpoint."""


@dataclass(kw_only=True, slots=True)
class StepPlace:
    """Where in a run a value was computed."""

    step: int
    """Optimizer steps done before this one."""
    phase: str
    """Name of the phase."""
    folder: Path
    """Run folder, for the record."""
    device: torch.device
    """Where ranks agree."""


class FiniteGuard:
    """Decides on every phase, on all ranks alike, whether its optimizer may move."""

    def __init__(self, action: Literal["skip", "stop"], *, max_skipped_steps: int) -> None:
        """`stop` raises at the first non-finite step; `skip` goes on until more than `max_skipped_steps` in a row."""
        self.action = action
        self.max_skipped_steps = max_skipped_steps
        self.in_a_row = 0
        self.rolled_back_to = -1
        self._recent: deque[dict[str, Any]] = deque(maxlen=REMEMBERED_STEPS)

    def allows(
        self, values: dict[str, Tensor], *, batches: list[Batch], modules: nn.ModuleDict, place: StepPlace
    ) -> bool:
        """True when losses and gradient norm are finite on every rank; else the step is recorded and to be skipped.

        What is only logged does not count.

        Raises `NonFiniteStepError` where the action is `stop`, `RollBack` after too many skipped steps in a row.
        """
        deciding = [value for name, value in values.items() if name.endswith(("loss", "grad_norm"))]
        finite = torch.stack([value.detach().isfinite().all().to(place.device) for value in deciding]).all()
        self._recent.append({"step": place.step, "phase": place.phase, **values})
        if not any_rank(not bool(finite), device=place.device):
            return True
        figures = {name: float(value.detach()) for name, value in values.items()}
        names = ", ".join(name for name, value in figures.items() if not math.isfinite(value)) or "another rank's value"
        record = self._write(figures, batches=batches, modules=modules, place=place)
        where = f"step {place.step} ({place.phase}): {names} not finite"
        if self.action == "stop":
            raise NonFiniteStepError(
                f"{where}; no weight of this phase has moved, the samples are in {record}; lower the learning rate "
                "or remove the sample and start again to resume, or skip such steps (--trainer.nonfinite skip)"
            )
        self.in_a_row += 1
        console.print(f"{where}; skipped, the samples are in {record}")
        if self.in_a_row > self.max_skipped_steps:
            raise RollBack(where)
        return False

    def passed(self) -> None:
        """A whole step was finite."""
        self.in_a_row = 0

    def roll_back(self, checkpoint_step: int | None, reason: str) -> None:
        """Allow going back to a checkpoint once. Raises `NonFiniteStepError` the second time, or without one."""
        if checkpoint_step is None or checkpoint_step == self.rolled_back_to:
            again = "no checkpoint to go back to" if checkpoint_step is None else "the same as before the roll-back"
            raise NonFiniteStepError(
                f"{reason}, more than {self.max_skipped_steps} steps in a row, {again}; "
                "lower the learning rate, or look at the samples in nonfinite_step_*.json"
            )
        self.rolled_back_to = checkpoint_step
        self.in_a_row = 0
        console.print(f"{reason}, {self.max_skipped_steps + 1} steps in a row: going back to step {checkpoint_step}")

    def _write(
        self, figures: dict[str, float], *, batches: list[Batch], modules: nn.ModuleDict, place: StepPlace
    ) -> Path:
        """`nonfinite_step_XXXXXXXX_rankR.json`: what one needs to find the sample and the layer."""
        content = {
            "step": place.step,
            "phase": place.phase,
            "rank": rank(),
            "values": {name: _plain(value) for name, value in figures.items()},
            "keys": [list(batch["key"]) for batch in batches],
            "nonfinite_pixels": [key for batch in batches for key in _with_nonfinite_pixels(batch)],
            "norms": _norms(modules),
            "recent": [{name: _plain(value) for name, value in line.items()} for line in self._recent],
            "cpu_random_state": base64.b64encode(bytes(torch.get_rng_state().tolist())).decode(),
        }
        path = place.folder / f"nonfinite_step_{place.step:08d}_rank{rank()}.json"
        try:
            path.write_text(json.dumps(content, indent=1))
        except OSError as error:  # the decision counts, and ranks must not part over a full disk
            console.print(f"cannot write {path}: {error.strerror}")
        return path


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = float(value.detach())
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _with_nonfinite_pixels(batch: Batch) -> list[str]:
    pixels = batch["pixel_values"].float()
    return [key for key, picture in zip(batch["key"], pixels, strict=True) if not bool(picture.isfinite().all())]


def _norms(modules: nn.ModuleDict) -> dict[str, dict[str, Any]]:
    """L2 norms of weights and gradients per direct part of every module; of a sharded module, of this rank's share."""
    squares: dict[str, dict[str, float]] = {}
    for name, parameter in modules.named_parameters():
        part = ".".join(name.split(".")[:3])
        sums = squares.setdefault(part, {"weight": 0.0, "gradient": 0.0})
        sums["weight"] += float(own_part(parameter.detach()).double().square().sum())
        if parameter.grad is not None:
            sums["gradient"] += float(own_part(parameter.grad).double().square().sum())
    return {part: {kind: _plain(value**0.5) for kind, value in sums.items()} for part, sums in squares.items()}


@dataclass(frozen=True, slots=True)
class Symptom:
    """A figure that says something has gone wrong although everything is finite."""

    figure: str
    """Last part of the figure's name."""
    is_bad: Callable[[float], bool]
    """Whether a value shows it."""
    message: str
    """What it means and what helps; `{value}` is the value."""


SYMPTOMS = (
    Symptom(
        "bits_alive",
        lambda value: value < 0.999,
        "{value:.0%} of the bits are alive, the others are the same for every token: raise task.quantizer-weight",
    ),
    Symptom(
        "bit_entropy",
        lambda value: value < 0.3,
        "entropy per bit is {value:.2f} nats of 0.69: the code is collapsing; raise task.quantizer-weight",
    ),
    Symptom(
        "discriminator_loss",
        lambda value: value < 0.05,
        "discriminator loss is {value:.3f}: it has won and teaches the decoder nothing; "
        "raise task.r1-gamma or lower its rate",
    ),
)


class CollapseWatch:
    """Warns once per symptom, when it shows in several logged lines in a row."""

    def __init__(self, *, lines: int = 5) -> None:
        self.lines = lines
        self._seen: dict[str, int] = {}

    def look(self, step: int, figures: dict[str, float]) -> list[str]:
        """Figures of one logged line -> the warnings that are due now; they are also printed."""
        warnings = []
        for symptom in SYMPTOMS:
            values = [value for name, value in figures.items() if name.split("/")[-1] == symptom.figure]
            if not values:
                continue
            bad = symptom.is_bad(values[0])
            self._seen[symptom.figure] = self._seen.get(symptom.figure, 0) + 1 if bad else 0
            if self._seen[symptom.figure] == self.lines:
                warnings.append(f"warning at step {step}: {symptom.message.format(value=values[0])}")
                console.print(warnings[-1])
        return warnings
