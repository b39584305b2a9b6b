"""`qlip balance`: the weight of the pixel loss from two trainings, one per objective (QLIP's balancing rule).

    OUT/alignment  OUT/reconstruction  OUT/balance.json

The paper's rule: train on alignment alone and on reconstruction alone; then a_r / a_a = L_align(end) / L_mse(end). Both
are ordinary run folders, so a stopped `qlip balance` goes on where it stopped.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import tyro

from qlip.core.distributed import launched_rank
from qlip.core.errors import UserError
from qlip.core.log import console, read_metrics
from qlip.engine.run_folder import git_commit, versions
from qlip.losses.balance import inverse_loss_ratio
from qlip.recipes.run import RunConfig, run_recipe
from qlip.tasks.align import AlignConfig

OBJECTIVES = {  # folder -> (the weight that is set to zero, the figure whose end counts)
    "alignment": ("pixel_weight", "contrastive"),
    "reconstruction": ("contrastive_weight", "mse"),
}
END_SHARE = 0.1  # of the logged lines: single ones are noisy
LONG_WARMUP = 0.2  # of the steps


@dataclass(kw_only=True, slots=True)
class BalanceOptions:
    """What `qlip balance RECIPE` takes: the recipe's fields, where to run and how long."""

    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    """The recipe."""
    out: Path
    """Folder for both trainings and balance.json; starting again in it resumes."""
    steps: int = 0
    """Optimizer steps of each training; 0 takes the recipe's."""


@dataclass(kw_only=True, slots=True)
class Balance:
    """What the two trainings say."""

    recipe: str
    """Name of the recipe."""
    steps: int
    """Optimizer steps of each training."""
    alignment: float
    """L_align at the end of the training on alignment alone, in nats."""
    reconstruction: float
    """L_mse at the end of the training on reconstruction alone, on [0, 1] pixels."""
    ratio: float
    """a_r / a_a, the first over the second."""
    rounded: float
    """The ratio as a power of ten, which is how the paper has it (1e3)."""
    pixel_weight: float
    """a_r for the recipe's a_a, from the rounded ratio."""


def run_balance(config: RunConfig, *, out: Path, steps: int = 0) -> Balance | None:
    """Train both objectives in `out`, or resume, write OUT/balance.json and print what it says.

    None is returned on other ranks than the first. Raises `UserError` for recipes that have not both objectives.
    """
    runs = single_objectives(config, steps=steps)
    for name in OBJECTIVES:  # a finished one only checks its config
        say_if_warmup_is_long(runs[name])
        run_recipe(runs[name], folder=out / name)
    if launched_rank() != 0:
        return None
    result = measured_balance(config, out=out, steps=runs["alignment"].trainer.steps)
    write_balance(out / "balance.json", result)
    _print(result, out)
    return result


def single_objectives(config: RunConfig, *, steps: int) -> dict[str, RunConfig]:
    """A config per objective: the recipe without the other one's weight. Raises `UserError` unless it has both."""
    task = config.task
    if not isinstance(task, AlignConfig):
        raise UserError(f"recipe {config.recipe} is of stage 2, which does not align: give a stage-1 recipe")
    if not (task.contrastive_weight and task.pixel_weight):
        raise UserError(f"recipe {config.recipe} has one objective only, nothing to balance: give a recipe with both")
    runs = {}
    for name, (absent, _) in OBJECTIVES.items():
        runs[name] = copy.deepcopy(config)
        runs[name].task = replace(task, balance="fixed")
        setattr(runs[name].task, absent, 0.0)
        runs[name].trainer.steps = steps or config.trainer.steps
    return runs


def say_if_warmup_is_long(run: RunConfig) -> None:
    """Losses that have not come down say little: point out a warm-up that leaves little time for it."""
    warmup, steps = run.task.optimizer.warmup_steps, run.trainer.steps
    if warmup > LONG_WARMUP * steps:
        console.print(
            f"the warm-up takes {warmup} of {steps} steps, so the losses will not have settled: "
            f"add --task.optimizer.warmup-steps {max(1, steps // 20)}"
        )


def measured_balance(config: RunConfig, *, out: Path, steps: int) -> Balance:
    """The rule on the losses with which the two trainings in `out` ended."""
    ends = {name: final_loss(out / name, figure) for name, (_, figure) in OBJECTIVES.items()}
    ratio = inverse_loss_ratio(ends["alignment"], pixel_end=ends["reconstruction"])
    rounded = 10.0 ** round(math.log10(ratio))
    task = config.task
    assert isinstance(task, AlignConfig)
    return Balance(
        recipe=config.recipe,
        steps=steps,
        **ends,
        ratio=ratio,
        rounded=rounded,
        pixel_weight=rounded * task.contrastive_weight,
    )


def final_loss(run: Path, figure: str) -> float:
    """Mean of a figure over the last tenth of a run's logged lines, at least one; NaN if one of them is.

    Raises `UserError` for a run that has never logged it.
    """
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "eval" not in line and figure in line]
    if not lines:
        raise UserError(f"{run} has logged no {figure!r}: delete the folder and start again")
    last = [line[figure] for line in lines[-max(1, round(END_SHARE * len(lines))) :]]
    return fmean(math.nan if value is None else value for value in last)


def write_balance(path: Path, result: Balance) -> None:
    """The result with versions and commit, whole or not at all."""
    record: dict[str, Any] = {
        "recipe": result.recipe,
        "steps": result.steps,
        "align_end": result.alignment,
        "pixel_end": result.reconstruction,
        "ratio": result.ratio,
        "rounded": result.rounded,
        "pixel_weight": result.pixel_weight,
        "end": f"mean over the last {END_SHARE:.0%} of the logged lines",
        "versions": versions(),
        "git_commit": git_commit(),
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(path)


def _print(result: Balance, out: Path) -> None:
    console.print(f"{result.recipe}, {result.steps} steps each ({out / 'balance.json'})")
    console.print(f"  alignment alone       L_align  {result.alignment:.4g} nats")
    console.print(f"  reconstruction alone  L_mse    {result.reconstruction:.4g} on [0, 1] pixels", markup=False)
    console.print(f"  a_r / a_a             {result.ratio:.4g}, as a power of ten {result.rounded:g}")
    console.print(f"use: --task.pixel-weight {result.pixel_weight:g}")
