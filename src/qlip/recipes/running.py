"""What all kinds of runs share between their config and `engine.trainer.train`: checks, folder, tracker, endings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from qlip.core import distributed
from qlip.core.config import differences, to_json
from qlip.core.errors import RankError, UserError
from qlip.core.log import console
from qlip.core.trackers import build_tracker
from qlip.engine.interfaces import Tracker
from qlip.engine.parallel import pick_device, pick_parallel
from qlip.engine.run_folder import prepare_run_folder
from qlip.engine.trainer import TrainerConfig
from qlip.models.qlip.loading import EXPORT_MARKER
from qlip.recipes import RECIPES, find_recipe
from qlip.recipes.endings import said_in_one_line

LEAST_OF_TRAINER = {
    **dict.fromkeys(("steps", "log_every", "save_every", "keep_checkpoints"), 1),
    **dict.fromkeys(("eval_every", "images_every", "max_skipped_steps", "ema_decay"), 0),
}


class BatchSizes(Protocol):
    """What `split_batch` reads of a data config."""

    batch_size: int
    global_batch_size: int


class AnyRun(Protocol):
    """What every run config has."""

    recipe: str
    trainer: TrainerConfig


def refuse_small(config: Any, least: dict[str, dict[str, int]]) -> None:
    """Raise `UserError` for the first field of a part (`{"data": {"batch_size": 1}}`) that is below its least value."""
    for part, fields in least.items():
        for name, value in fields.items():
            if getattr(getattr(config, part), name) < value:
                raise UserError(f"{part}.{name} is {getattr(getattr(config, part), name)}: give at least {value}")
    if config.trainer.ema_decay >= 1:
        raise UserError(f"trainer.ema_decay is {config.trainer.ema_decay}: give a number below 1, and 0 for no average")
    if config.task.optimizer.lr < 0:
        raise UserError(f"task.optimizer.lr is {config.task.optimizer.lr}: give 0 or more")


def device_type(trainer: TrainerConfig) -> str:
    """`cpu`, `cuda`, ... of a run, before its processes meet."""
    try:
        return pick_device(trainer.device).type
    except UserError as error:  # processes have not met yet, so each speaks for itself
        if distributed.launched_processes() == 1:
            raise
        raise RankError(f"rank {distributed.launched_rank()}: {error}") from None


def split_batch(data: BatchSizes, *, num_ranks: int) -> tuple[int, int]:
    """Samples per optimizer step over all ranks, and the micro-batches in which each rank reads its share.

    Raises `UserError` when `global_batch_size` cannot be shared evenly.
    """
    at_once = data.batch_size * num_ranks
    total = data.global_batch_size or at_once
    if total % at_once:
        fitting = [size for size in range(1, data.batch_size + 1) if total % (size * num_ranks) == 0]
        remedy = f"take --data.batch-size {fitting[-1]}" if fitting else "start a number of processes that divides it"
        raise UserError(
            f"data.global_batch_size {total} is not a multiple of {num_ranks} processes x data.batch_size "
            f"{data.batch_size}: {remedy}"
        )
    return total, total // at_once


def begin(trainer: TrainerConfig, data: BatchSizes) -> tuple[int, int]:
    """Join the processes that torchrun has started, with equal random states. Returns what `split_batch` does.

    Raises `UserError` for a parallelism, a device or a batch that is not possible here.
    """
    pick_parallel(trainer.parallel)
    shares = split_batch(data, num_ranks=distributed.launched_processes())
    distributed.start(device_type=device_type(trainer))
    torch.manual_seed(trainer.seed)  # equal weights and random numbers on all ranks
    return shares


def prepare_folder(
    folder: Path, config: AnyRun, *, num_weights: int, extra_held: int = 0, accept_changes: bool
) -> bool:
    """Make or check the run folder, on rank 0 for all. Returns whether the run is finished already, and says so.

    A checkpoint holds weights, two moments, the average, and `extra_held` numbers more, or less where that is negative.
    """
    held = 3 * num_weights + (num_weights if config.trainer.ema_decay else 0) + extra_held
    finished = distributed.gather_objects(is_finished(folder, config))[0]  # rank 0's view: file systems may lag
    base = find_recipe(config.recipe) if config.recipe in RECIPES else config  # a config of one's own has no recipe
    prepare = partial(
        prepare_run_folder,
        folder,
        to_json(config),
        changes=differences(to_json(base), to_json(config)),
        bytes_needed=4 * held * (config.trainer.keep_checkpoints + 1) + 4 * num_weights,  # float32
        accept_changes=accept_changes and not finished,  # config.json goes on describing the weights beside it
    )
    distributed.on_first_rank(prepare)
    if finished:
        console.print(f"{folder} is finished ({config.trainer.steps} steps); its model is {folder / 'export'}")
    return finished


def is_finished(folder: Path, config: AnyRun) -> bool:
    """Whether the run in `folder` has been trained to its last step and exported."""
    marker = folder / "export" / EXPORT_MARKER
    return marker.exists() and int(marker.read_text()) == config.trainer.steps


def tracker_of(config: AnyRun, folder: Path) -> Callable[[int], Tracker]:
    """What opens the tracker at the step that is resumed; rank 0's alone writes."""

    def open_at(resume_step: int) -> Tracker:
        name = config.trainer.tracker if distributed.rank() == 0 else "none"
        return build_tracker(name, folder=folder, run_name=folder.name, config=to_json(config), resume_step=resume_step)

    return open_at


@contextmanager
def said_once() -> Iterator[None]:
    """Turn what ends a training into one line wherever the user can do something about it."""
    try:
        yield
    except (UserError, RuntimeError, OSError) as error:
        problem = said_in_one_line(error)
        if problem is error:
            raise
        raise problem from error
