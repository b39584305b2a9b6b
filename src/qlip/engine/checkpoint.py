"""Save, find and resume checkpoints (torch.distributed.checkpoint), never leaving a half-written one behind.

    checkpoints/step_00000500/    weights, optimizers, EMA, RNG as DCP; position.json: step, each rank's data position

A checkpoint is written to `<name>.tmp` and renamed when all ranks have written their part, so what has its final name
is whole. Tensors are saved as the shards that ranks hold and read as those that they need, so the number of ranks and
the kind of parallelism may change. Only folders of our own runs are read: DCP metadata is a pickle, so a foreign folder
could run code.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from qlip.core.distributed import background_group, gather_objects, is_lost_peer, rank, wait_for_all, world_size
from qlip.core.errors import UserError

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


@dataclass(kw_only=True, slots=True)
class TrainingState:
    """The tensors of a run: what is saved and filled."""

    modules: nn.ModuleDict
    """Everything with weights or buffers, by the task's names."""
    averages: nn.ModuleDict
    """EMA copies by name; may be empty."""
    optimizers: dict[str, torch.optim.Optimizer]
    """By phase."""

    def tensors(self) -> dict[str, Any]:
        """All of it, and PyTorch's CPU random state, which is the same on every rank."""
        state: dict[str, Any] = {"modules": self.modules.state_dict(), "averages": self.averages.state_dict()}
        for name, optimizer in self.optimizers.items():
            state[f"optimizer/{name}"] = get_optimizer_state_dict(self.modules, optimizer, options=FLAT)
        return state | {"rng": torch.get_rng_state()}


def checkpoint_folders(run_folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = (run_folder / "checkpoints").glob("step_*")
    return sorted(path for path in found if path.suffix != ".tmp" and (path / "position.json").exists())


class CheckpointWriter:
    """Writes the checkpoints of a run, in the foreground or in the background; all ranks call it together."""

    def __init__(self, run_folder: Path, *, keep: int, background: bool) -> None:
        """`keep` newest ones stay. In the background a save costs a copy to the CPU, and is whole some steps later."""
        self.run_folder = run_folder
        self.keep = keep
        self._group = background_group() if background else None
        self._background = background
        self._under_way: tuple[Future, Path, dict[str, Any]] | None = None

    def save(self, step: int, state: TrainingState, *, loader: dict[str, Any]) -> None:
        """Write the checkpoint after `step` steps. `loader` is this rank's data position.

        Raises `UserError` when the disk is full, in the background with the next call; earlier checkpoints stay.
        """
        self.finish()
        final = self.run_folder / "checkpoints" / f"step_{step:08d}"
        temporary = final.with_suffix(".tmp")
        position = {"step": step, "loaders": gather_objects(loader)}
        try:
            if rank() == 0:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            wait_for_all()
            with _quiet():
                alone = world_size() == 1
                if self._background:
                    future = dcp.async_save(
                        state.tensors(), checkpoint_id=temporary, process_group=self._group, no_dist=alone
                    )
                    self._under_way = (cast(Future, future), final, position)
                    return
                dcp.save(state.tensors(), checkpoint_id=temporary, no_dist=alone)
            self._complete(final, position)
        except (OSError, RuntimeError, CheckpointException) as error:  # the last is no Exception, so name it
            raise _cannot_write(final, error) from error

    def poll(self) -> None:
        """Complete a background save that has ended, without waiting for one that has not."""
        if self._under_way is not None and self._under_way[0].done():
            self.finish()

    def finish(self) -> None:
        """Wait for a background save. Raises `UserError` as `save` does."""
        if self._under_way is None:
            return
        future, final, position = self._under_way
        self._under_way = None
        try:
            future.result()
            self._complete(final, position)
        except (OSError, RuntimeError, CheckpointException) as error:
            raise _cannot_write(final, error) from error

    def _complete(self, final: Path, position: dict[str, Any]) -> None:
        """Rank 0 knows that all parts are written, because it has written what joins them."""
        if rank() != 0:
            return
        temporary = final.with_suffix(".tmp")
        (temporary / "position.json").write_text(json.dumps(position))
        if final.exists():  # left without position.json by something else than us
            shutil.rmtree(final)
        temporary.rename(final)
        for old in checkpoint_folders(self.run_folder)[: -self.keep]:
            shutil.rmtree(old)


def load_checkpoint(folder: Path, state: TrainingState) -> tuple[int, list[dict[str, Any]]]:
    """Fill modules, averages, optimizers and the RNG in place. Returns the step and the loader states of all ranks.

    Rates, decays and betas stay those of the present config, which may have changed since the checkpoint.
    Raises `UserError` for a checkpoint that is damaged or of another model.
    """
    try:
        position = json.loads((folder / "position.json").read_text())
        _fill(folder, state)
        return position["step"], position["loaders"]
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, CheckpointException) as error:
        raise UserError(
            f"{folder} cannot be resumed: {_reason(error)}; delete it to resume from the one before, "
            "or choose another --out"
        ) from error


def _fill(folder: Path, state: TrainingState) -> None:
    saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = state.tensors()
    settings: dict[str, dict[str, Any]] = {}
    for name in state.optimizers:
        flat = tensors[f"optimizer/{name}"]
        keep = [key for key in flat if _is_setting(key) or f"optimizer/{name}.{key}" not in saved]
        settings[name] = {key: flat.pop(key) for key in keep}
    with _quiet():
        dcp.load(tensors, checkpoint_id=folder, no_dist=world_size() == 1)
    state.modules.load_state_dict(tensors["modules"])
    state.averages.load_state_dict(tensors["averages"])
    for name, optimizer in state.optimizers.items():
        flat = tensors[f"optimizer/{name}"] | settings[name]
        set_optimizer_state_dict(state.modules, optimizer, flat, options=FLAT)
        for parameter_name, parameter in state.modules.named_parameters():
            if any(key.startswith(f"state.{parameter_name}.") for key in settings[name]):
                del optimizer.state[parameter]  # had no gradient before the checkpoint, so it had no state either
    torch.set_rng_state(tensors["rng"])


def load_module(folder: Path, name: str, module: nn.Module, *, averaged: bool = False) -> None:
    """Fill one module (its EMA copy with `averaged`) from a checkpoint, for export.

    Raises `UserError` for a checkpoint that is damaged or of another model.
    """
    parameters = {key for key, _ in module.named_parameters()}
    filled = {
        key: torch.empty_like(value).reshape(1) if value.ndim == 0 and key in parameters else torch.empty_like(value)
        for key, value in module.state_dict().items()
    }
    prefix = f"{name}.module." if averaged else f"{name}."
    wanted = {"averages" if averaged else "modules": {prefix + key: value for key, value in filled.items()}}
    try:
        with _quiet():
            dcp.load(wanted, checkpoint_id=folder, no_dist=True)
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, CheckpointException) as error:
        raise UserError(f"{folder} cannot be read: {_reason(error)}; choose another --step") from error
    module.load_state_dict({key: value.reshape(module.state_dict()[key].shape) for key, value in filled.items()})


def _is_setting(key: str) -> bool:
    """Whether a flat optimizer key is a group's setting; LAMB alone keeps a step count in its groups."""
    return key.startswith("param_groups.") and not key.endswith(".step")


def _cannot_write(final: Path, error: BaseException) -> UserError:
    """Removes what was begun; Ctrl-C in the middle of a save, which DCP wraps too, stays Ctrl-C."""
    if rank() == 0:
        shutil.rmtree(final.with_suffix(".tmp"), ignore_errors=True)
    cause = _first_cause(error)
    if isinstance(cause, KeyboardInterrupt) or (isinstance(cause, RuntimeError) and is_lost_peer(cause)):
        raise cause from None
    return UserError(f"could not write {final}: {_reason(error)}; free disk space and start again to resume")


def _reason(error: BaseException) -> str:
    cause = _first_cause(error)
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]


def _first_cause(error: BaseException) -> BaseException:
    """Why DCP failed: the first failure it collected, else the error itself."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


class _quiet(warnings.catch_warnings):  # noqa: N801 - a context manager
    """DCP warns that no process group exists, which is what `no_dist` asks for."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
        logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
