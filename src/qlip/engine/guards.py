"""Stop before a non-finite step does harm, and record what was in the batch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qlip.core.distributed import any_rank
from qlip.core.errors import UserError
from qlip.engine.interfaces import Batch


class NonFiniteStepError(UserError):
    """A loss or gradient that is NaN or infinite; raised before the optimizer moves a weight."""


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


def stop_unless_finite(values: dict[str, Tensor], *, batch: Batch, place: StepPlace) -> None:
    """Raise `NonFiniteStepError` on every rank when any value on any rank is NaN or infinite.

    The record `nonfinite_step_XXXXXXXX.json` in the run folder keeps the step, the phase, the values and the keys
    of the batch, which is what one needs to find the sample.
    """
    finite = torch.stack([value.detach().isfinite().all() for value in values.values()]).all()
    if not any_rank(not bool(finite), device=place.device):
        return
    figures = {name: float(value.detach()) for name, value in values.items()}
    record = place.folder / f"nonfinite_step_{place.step:08d}.json"
    pixels = batch["pixel_values"].float()
    content = {
        "step": place.step,
        "phase": place.phase,
        "values": {name: value if math.isfinite(value) else str(value) for name, value in figures.items()},
        "keys": list(batch["key"]),
        "nonfinite_pixels": [k for k, p in zip(batch["key"], pixels, strict=True) if not bool(p.isfinite().all())],
    }
    record.write_text(json.dumps(content, indent=1))
    names = ", ".join(name for name, value in figures.items() if not math.isfinite(value)) or "another rank's value"
    raise NonFiniteStepError(
        f"step {place.step} ({place.phase}): {names} not finite; its optimizer has not moved a weight, "
        f"the batch's keys are in {record}; lower the learning rate or remove the sample, then start again: "
        "the run resumes from its last checkpoint"
    )
