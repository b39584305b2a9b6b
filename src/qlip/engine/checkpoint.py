"""Save, find and resume checkpoints (torch.distributed.checkpoint), never leaving a half-written one behind.

    checkpoints/step_00000500/    weights, optimizers, EMA, RNG as DCP; position.json: step and data position

A checkpoint is written to `<name>.tmp` and renamed when complete, so what has its final name is whole. Only folders
of our own runs are read: DCP metadata is a pickle, so a foreign folder could run code.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from qlip.core.errors import UserError

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def checkpoint_folders(run_folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = (run_folder / "checkpoints").glob("step_*")
    return sorted(path for path in found if path.suffix != ".tmp" and (path / "position.json").exists())


def save_checkpoint(
    run_folder: Path,
    *,
    step: int,
    modules: nn.ModuleDict,
    averages: nn.ModuleDict,
    optimizers: dict[str, torch.optim.Optimizer],
    loader_state: dict[str, Any],
    keep: int,
) -> Path:
    """Write the checkpoint after `step` steps, then delete all but the newest `keep`.

    Raises `UserError` when the disk is full; earlier checkpoints stay as they were.
    """
    final = run_folder / "checkpoints" / f"step_{step:08d}"
    temporary = final.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    state = _tensors(modules, averages, optimizers)
    state["rng"] = torch.get_rng_state()
    try:
        temporary.mkdir(parents=True)
        with _quiet():
            dcp.save(state, checkpoint_id=temporary, no_dist=True)
        (temporary / "position.json").write_text(json.dumps({"step": step, "loader": loader_state}))
        temporary.rename(final)
    except (OSError, RuntimeError, CheckpointException) as error:  # the last is no Exception, so name it
        shutil.rmtree(temporary, ignore_errors=True)
        cause = _first_cause(error)
        if isinstance(cause, KeyboardInterrupt):  # Ctrl-C in the middle of a save; DCP wraps it too
            raise cause from None
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise UserError(f"could not write {final}: {reason}; free disk space and start again to resume") from error
    for old in checkpoint_folders(run_folder)[:-keep]:
        shutil.rmtree(old)
    return final


def load_checkpoint(
    folder: Path,
    *,
    modules: nn.ModuleDict,
    averages: nn.ModuleDict,
    optimizers: dict[str, torch.optim.Optimizer],
) -> tuple[int, dict[str, Any]]:
    """Fill modules, averages, optimizers and the RNG in place. Returns (step, loader state).

    Rates, decays and betas stay those of the present config, which may have changed since the checkpoint.
    """
    saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    state = _tensors(modules, averages, optimizers)
    state["rng"] = torch.get_rng_state()
    settings: dict[str, dict[str, Any]] = {}
    for name in optimizers:
        flat = state[f"optimizer/{name}"]
        keep = [key for key in flat if _is_setting(key) or f"optimizer/{name}.{key}" not in saved]
        settings[name] = {key: flat.pop(key) for key in keep}
    with _quiet():
        dcp.load(state, checkpoint_id=folder, no_dist=True)
    modules.load_state_dict(state["modules"])
    averages.load_state_dict(state["averages"])
    for name, optimizer in optimizers.items():
        flat = state[f"optimizer/{name}"] | settings[name]
        set_optimizer_state_dict(modules, optimizer, flat, options=FLAT)
        for parameter_name, parameter in modules.named_parameters():
            if any(key.startswith(f"state.{parameter_name}.") for key in settings[name]):
                del optimizer.state[parameter]  # had no gradient before the checkpoint, so it had no state either
    torch.set_rng_state(state["rng"])
    position = json.loads((folder / "position.json").read_text())
    return position["step"], position["loader"]


def load_module(folder: Path, name: str, module: nn.Module, *, averaged: bool = False) -> None:
    """Fill one module (its EMA copy with `averaged`) from a checkpoint, for export."""
    prefix = {"averages": {f"{name}.module.{k}": v for k, v in module.state_dict().items()}}
    plain = {"modules": {f"{name}.{k}": v for k, v in module.state_dict().items()}}
    with _quiet():
        dcp.load(prefix if averaged else plain, checkpoint_id=folder, no_dist=True)


def _tensors(
    modules: nn.ModuleDict, averages: nn.ModuleDict, optimizers: dict[str, torch.optim.Optimizer]
) -> dict[str, Any]:
    state: dict[str, Any] = {"modules": modules.state_dict(), "averages": averages.state_dict()}
    for name, optimizer in optimizers.items():
        state[f"optimizer/{name}"] = get_optimizer_state_dict(modules, optimizer, options=FLAT)
    return state


def _is_setting(key: str) -> bool:
    """Whether a flat optimizer key is a group's setting; LAMB alone keeps a step count in its groups."""
    return key.startswith("param_groups.") and not key.endswith(".step")


def _first_cause(error: BaseException) -> BaseException:
    """Why DCP failed: the first failure it collected, else the error itself."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


class _quiet(warnings.catch_warnings):  # noqa: N801 - a context manager
    """DCP warns that no process group exists, which is what `no_dist` asks for."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
        logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
