"""Where figures and pictures of a run go besides metrics.jsonl: TensorBoard, trackio, wandb, or nowhere.

All keep to the `Tracker` contract of `engine/interfaces.py`. A run that is resumed goes on in the same place, and what
it does again is there once: TensorBoard is told to forget those steps; trackio and wandb take nothing back, so they
are not given what they have (resuming is exact, so it would be the same again). A process that is killed may take the
last seconds of those two with it, never of metrics.jsonl.
"""

from __future__ import annotations

import importlib
import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlip.core.errors import UserError, nearest_name

PROJECT = "qlip"
CLOSING_SECONDS = 10.0


def build_tracker(
    name: str, *, folder: Path, run_name: str, config: dict[str, Any], resume_step: int
) -> NoTracker | TensorBoardTracker | TrackioTracker | WandbTracker:
    """Open the tracker called `tensorboard`, `trackio`, `wandb` or `none` for the run in `folder`.

    The run goes on behind `resume_step`; at 0 it begins, so trackio and wandb then get a new run. `run_name` and
    `config` (JSON values) are what they show. Nothing leaves the machine unless the user's environment says so:
    WANDB_MODE is `offline` if not set, trackio writes to its local database unless TRACKIO_SPACE_ID names another.

    Raises `UserError` for an unknown name, a package that is not installed, and a wandb that cannot start.
    """
    if name == "none":
        return NoTracker()
    if name == "tensorboard":
        return TensorBoardTracker(folder / "tensorboard", resume_step=resume_step)
    if name == "trackio":
        return TrackioTracker(folder, run_name=run_name, config=config, resume_step=resume_step)
    if name == "wandb":
        return WandbTracker(folder, run_name=run_name, config=config, resume_step=resume_step)
    raise UserError(f"tracker {name!r} is unknown: {nearest_name(name, ('tensorboard', 'trackio', 'wandb', 'none'))}")


class NoTracker:
    """Figures stay in metrics.jsonl, pictures in samples/."""

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Nothing."""

    def images(self, step: int, name: str, pictures: Tensor) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class TensorBoardTracker:
    """Event files for `tensorboard --logdir runs`; opening them hides the steps behind `resume_step`."""

    def __init__(self, folder: Path, *, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # seconds to import

        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1)

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Record scalars of one step."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def images(self, step: int, name: str, pictures: Tensor) -> None:
        """Record a picture grid: (3, h, w) uint8."""
        self._writer.add_image(name, _channels_last(pictures), step, dataformats="HWC")

    def close(self) -> None:
        """Write what is buffered.

        A Ctrl-C inside of tensorboard's queue can leave it waiting for ever, so it is waited for a few seconds only.
        """
        closing = Thread(target=self._writer.close, daemon=True)
        closing.start()
        closing.join(CLOSING_SECONDS)


class TrackioTracker:
    """trackio's local database, for `trackio show --project qlip`."""

    def __init__(self, folder: Path, *, run_name: str, config: dict[str, Any], resume_step: int) -> None:
        self._trackio = _import_extra("trackio")
        identity = _run_identity(folder, resume_step=resume_step)
        self._recorded = _RecordedFigures(folder / "trackio_steps.json", identity)
        self._run = self._trackio.init(
            project=PROJECT,
            name=f"{run_name}-{identity}",  # trackio knows a run by its name, and folders may have equal ones
            config=config,
            resume="allow",
            embed=False,
        )

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Record scalars of one step."""
        self._recorded.send(step, figures, lambda values: self._run.log(values, step=step))

    def images(self, step: int, name: str, pictures: Tensor) -> None:
        """Record a picture grid: (3, h, w) uint8."""
        picture = self._trackio.Image(_channels_last(pictures))
        self._recorded.send(step, {name: picture}, lambda values: self._run.log(values, step=step))

    def close(self) -> None:
        """Write what is buffered."""
        self._trackio.finish()


class WandbTracker:
    """A wandb run in `folder`/wandb, for `wandb sync` or, with WANDB_MODE=online, on the user's account.

    The training step is a figure, `step`, that all charts have as their axis: wandb's own step may only grow, also
    from one session to the next, while evaluations come at steps that training has logged already.
    """

    def __init__(self, folder: Path, *, run_name: str, config: dict[str, Any], resume_step: int) -> None:
        self._wandb = _import_extra("wandb")
        identity = _run_identity(folder, resume_step=resume_step)
        self._recorded = _RecordedFigures(folder / "wandb_steps.json", identity)
        try:
            self._run = self._wandb.init(
                project=PROJECT,
                id=identity,
                name=run_name,
                dir=str(folder),
                config=config,
                allow_val_change=True,  # a run may be resumed with another config when the user accepts it
                resume="allow",
                mode=None if os.environ.get("WANDB_MODE") else "offline",
                settings={"console": "off"},  # what a run prints is the user's terminal, not wandb's
            )
        except self._wandb.Error as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise UserError(f"wandb does not start: {reason}; or unset WANDB_MODE to record offline") from error
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Record scalars of one step."""
        self._send(step, figures)

    def images(self, step: int, name: str, pictures: Tensor) -> None:
        """Record a picture grid: (3, h, w) uint8."""
        self._send(step, {name: self._wandb.Image(_channels_last(pictures))})

    def close(self) -> None:
        """Write what is buffered."""
        self._run.finish()

    def _send(self, step: int, values: Mapping[str, Any]) -> None:
        line = self._recorded.num_lines
        self._recorded.send(step, values, lambda new: self._run.log({"step": step, **new}, step=line, commit=True))


class _RecordedFigures:
    """What a tracker has of a run, in a file of the run folder: lines in all, and the last step of each figure.

    The file is for one identity of the run: another one has nothing yet.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self._path, self._identity = path, identity
        found = json.loads(path.read_text()) if path.exists() else {}
        if found.get("id") != identity:
            found = {"num_lines": 0, "last_steps": {}}
        self.num_lines: int = found["num_lines"]
        self._last_steps: dict[str, int] = found["last_steps"]

    def send(self, step: int, values: Mapping[str, Any], action: Callable[[dict[str, Any]], None]) -> None:
        """Call `action` with the values that were not yet recorded at this step or a later one, if there are any."""
        new = {name: value for name, value in values.items() if self._last_steps.get(name, -1) < step}
        if not new:
            return
        action(new)
        self.num_lines += 1
        self._last_steps |= dict.fromkeys(new, step)
        _replace_text(
            self._path,
            json.dumps({"id": self._identity, "num_lines": self.num_lines, "last_steps": self._last_steps}),
        )


def _run_identity(folder: Path, *, resume_step: int) -> str:
    """The name that a tracker knows this run by, kept in tracker_id.txt; a run that begins at step 0 gets a new one."""
    path = folder / "tracker_id.txt"
    if resume_step and path.exists():
        return path.read_text().strip()
    identity = secrets.token_hex(4)  # no seed reaches it: runs of equal seeds are different runs
    folder.mkdir(parents=True, exist_ok=True)
    _replace_text(path, identity + "\n")
    return identity


def _replace_text(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _import_extra(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise UserError(f"{name} is not installed: pip install 'qlip[trackers]', or take another tracker") from None


def _channels_last(pictures: Tensor) -> np.ndarray:
    """(3, h, w) uint8 -> (h, w, 3) array, which all trackers understand."""
    assert pictures.ndim == 3 and pictures.shape[0] == 3 and pictures.dtype == torch.uint8, pictures.shape
    return np.ascontiguousarray(pictures.permute(1, 2, 0).cpu().numpy())
