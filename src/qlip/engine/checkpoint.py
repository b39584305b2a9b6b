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
    temporary.mkdir(parents=True)
    state = _tensors(modules, averages, optimizers)
    state["rng"] = torch.get_rng_state()
    try:
        with _quiet():
            dcp.save(state, checkpoint_id=temporary, no_dist=True)
        (temporary / "position.json").write_text(json.dumps({"step": step, "loader": loader_state}))
        temporary.rename(final)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"could not write {final}: {error}; free disk space and start again to resume") from error
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
    """Fill modules, averages, optimizers and the RNG in place. Returns (step, loader state)."""
    state = _tensors(modules, averages, optimizers)
    state["rng"] = torch.get_rng_state()
    with _quiet():
        dcp.load(state, checkpoint_id=folder, no_dist=True)
    modules.load_state_dict(state["modules"])
    averages.load_state_dict(state["averages"])
    for name, optimizer in optimizers.items():
        set_optimizer_state_dict(modules, optimizer, state[f"optimizer/{name}"], options=FLAT)
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


class _quiet(warnings.catch_warnings):  # noqa: N801 - a context manager
    """DCP warns that no process group exists, which is what `no_dist` asks for."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
        logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
