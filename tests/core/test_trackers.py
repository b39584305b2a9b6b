"""Where figures go: trackers record everything once, also across a resume, and of several processes one speaks.

TensorBoard's files are read back; trackio and wandb are stood in for by modules that keep the calls. With these calls
the real ones (trackio 0.43, wandb 0.31 offline) go on with a run, and keep twice what they are given twice.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qlip.core import log, trackers
from qlip.core.errors import UserError
from qlip.core.trackers import build_tracker

CONFIG = {"task": {"lr": 1e-3}}


def open_tracker(name: str, folder: Path, *, resume_step: int = 0):
    return build_tracker(name, folder=folder, run_name="align", config=CONFIG, resume_step=resume_step)


def picture(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, 4, 7), dtype=torch.uint8, generator=generator)


class FakeRun:
    """A run of wandb or trackio: keeps each call in order."""

    def __init__(self, **options) -> None:
        self.options = options
        self.lines: list[tuple[dict, dict]] = []
        self.defined: list[tuple[tuple, dict]] = []
        self.finished = 0

    def log(self, values: dict, **options) -> None:
        self.lines.append((values, options))

    def define_metric(self, *names, **options) -> None:
        self.defined.append((names, options))

    def finish(self) -> None:
        self.finished += 1


class FakeModule(SimpleNamespace):
    """wandb or trackio, as far as the trackers use them."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__(runs=[], Image=lambda array: array)

    def init(self, **options) -> FakeRun:
        self.runs.append(FakeRun(**options))
        return self.runs[-1]

    def finish(self) -> None:
        self.runs[-1].finish()


@pytest.fixture
def module(request, monkeypatch) -> FakeModule:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    fake = FakeModule()
    monkeypatch.setitem(sys.modules, request.param, fake)
    return fake


fake_wandb = pytest.mark.parametrize("module", ["wandb"], indirect=True)
fake_trackio = pytest.mark.parametrize("module", ["trackio"], indirect=True)


def read_back(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def test_tensorboard_holds_figures_and_pictures_once_after_a_resume(tmp_path):
    first = open_tracker("tensorboard", tmp_path)
    for step in range(1, 6):
        first.log(step, {"pixel_loss": step / 8, "eval/psnr": float(step)})
    first.images(2, "reconstructions", picture(2))
    first.images(4, "reconstructions", picture(4))
    first.close()
    assert [e.step for e in read_back(tmp_path).Scalars("pixel_loss")] == [1, 2, 3, 4, 5]  # what is to be hidden

    again = open_tracker("tensorboard", tmp_path, resume_step=3)
    for step in (4, 5, 6):
        again.log(step, {"pixel_loss": 100.0 + step})
    again.images(4, "reconstructions", picture(40))
    again.close()

    events = read_back(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("pixel_loss")] == [
        (1, 0.125), (2, 0.25), (3, 0.375), (4, 104.0), (5, 105.0), (6, 106.0),
    ]  # fmt: skip
    assert [e.step for e in events.Scalars("eval/psnr")] == [1, 2, 3]
    images = events.Images("reconstructions")
    assert [e.step for e in images] == [2, 4]
    for event, seed in zip(images, (2, 40), strict=True):
        shown = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
        assert np.array_equal(shown, picture(seed).permute(1, 2, 0).numpy())


def test_tensorboard_opened_again_at_its_last_step_keeps_it(tmp_path):
    """The trainer closes the tracker with the last step and opens it again for the evaluation at the end."""
    first = open_tracker("tensorboard", tmp_path)
    first.log(5, {"pixel_loss": 2.0})
    first.close()
    last = open_tracker("tensorboard", tmp_path, resume_step=5)
    last.log(5, {"eval/psnr": 20.0})
    last.close()
    events = read_back(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("pixel_loss")] == [(5, 2.0)]
    assert [(e.step, e.value) for e in events.Scalars("eval/psnr")] == [(5, 20.0)]


@fake_wandb
def test_wandb_starts_offline_in_the_run_folder(module, tmp_path):
    open_tracker("wandb", tmp_path).close()
    (run,) = module.runs
    identity = (tmp_path / "tracker_id.txt").read_text().strip()
    assert len(identity) == 8
    assert run.options == {
        "project": "qlip", "id": identity, "name": "align", "dir": str(tmp_path), "config": CONFIG,
        "allow_val_change": True, "resume": "allow", "mode": "offline", "settings": {"console": "off"},
    }  # fmt: skip
    assert run.defined == [(("*",), {"step_metric": "step"})]
    assert run.finished == 1


@fake_wandb
def test_wandb_mode_of_the_environment_is_left_to_wandb(module, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    open_tracker("wandb", tmp_path)
    assert module.runs[0].options["mode"] is None


@fake_wandb
def test_wandb_goes_on_under_its_id_and_says_nothing_twice(module, tmp_path):
    first = open_tracker("wandb", tmp_path)
    for step in (1, 2, 3):
        first.log(step, {"pixel_loss": step / 8})
    first.log(3, {"eval/psnr": 20.0})  # an evaluation comes at a step that has a training line
    first.images(3, "reconstructions", picture(3))
    first.close()

    again = open_tracker("wandb", tmp_path, resume_step=2)  # stopped after step 3, the checkpoint is of step 2
    again.log(3, {"pixel_loss": 3 / 8, "balance": 1.0})
    again.log(3, {"eval/psnr": 20.0})
    again.images(3, "reconstructions", picture(3))
    again.log(4, {"pixel_loss": 0.5})
    again.close()

    assert module.runs[0].options["id"] == module.runs[1].options["id"]
    lines = [line for run in module.runs for line in run.lines]
    assert [line for line, _ in lines[:4]] == [
        {"step": 1, "pixel_loss": 0.125},
        {"step": 2, "pixel_loss": 0.25},
        {"step": 3, "pixel_loss": 0.375},
        {"step": 3, "eval/psnr": 20.0},
    ]
    assert lines[4][0]["step"] == 3
    assert np.array_equal(lines[4][0]["reconstructions"], picture(3).permute(1, 2, 0).numpy())
    assert [line for line, _ in lines[5:]] == [{"step": 3, "balance": 1.0}, {"step": 4, "pixel_loss": 0.5}]
    assert [options for _, options in lines] == [{"step": number, "commit": True} for number in range(7)]


@fake_wandb
def test_wandb_that_cannot_start_is_one_line_with_a_remedy(module, tmp_path, monkeypatch):
    def refuse(**options):
        raise module.Error("No API key configured. Use `wandb login` to log in.\nwhile retrying")

    monkeypatch.setattr(module, "init", refuse)
    with pytest.raises(UserError, match=r"wandb login` to log in; or unset WANDB_MODE to record offline$") as raised:
        open_tracker("wandb", tmp_path)
    assert "\n" not in str(raised.value)


@fake_trackio
def test_trackio_goes_on_under_its_name_and_says_nothing_twice(module, tmp_path):
    first = open_tracker("trackio", tmp_path)
    first.log(1, {"pixel_loss": 0.5})
    first.log(2, {"pixel_loss": 0.25})
    first.images(2, "reconstructions", picture(2))
    first.close()
    again = open_tracker("trackio", tmp_path, resume_step=1)
    again.log(2, {"pixel_loss": 0.25})
    again.images(2, "reconstructions", picture(2))
    again.log(2, {"eval/psnr": 20.0})
    again.close()

    identity = (tmp_path / "tracker_id.txt").read_text().strip()
    expected = {
        "project": "qlip", "name": f"align-{identity}", "config": CONFIG, "resume": "allow", "embed": False,
    }  # fmt: skip
    assert [run.options for run in module.runs] == [expected, expected]
    assert [run.finished for run in module.runs] == [1, 1]
    lines = [line for run in module.runs for line in run.lines]
    assert np.array_equal(lines.pop(2)[0]["reconstructions"], picture(2).permute(1, 2, 0).numpy())
    assert lines == [
        ({"pixel_loss": 0.5}, {"step": 1}),
        ({"pixel_loss": 0.25}, {"step": 2}),
        ({"eval/psnr": 20.0}, {"step": 2}),
    ]


@pytest.mark.parametrize(
    ("name", "module", "key"), [("wandb", "wandb", "id"), ("trackio", "trackio", "name")], indirect=["module"]
)
def test_a_run_that_begins_again_is_a_new_one(module, name, key, tmp_path):
    for value in (1.0, 2.0):  # stopped before the first checkpoint: the second may have another config
        tracker = open_tracker(name, tmp_path)
        tracker.log(1, {"pixel_loss": value})
        tracker.close()
    first, second = module.runs
    assert first.options[key] != second.options[key]
    assert [run.lines[0][0]["pixel_loss"] for run in module.runs] == [1.0, 2.0]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_package_names_the_extra(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)  # import then fails
    with pytest.raises(UserError, match=rf"^{name} is not installed: pip install 'qlip\[trackers\]'"):
        open_tracker(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_broken_package_is_not_called_missing(tmp_path, monkeypatch):
    def broken(name: str):
        raise ModuleNotFoundError("No module named 'absent'", name="absent")

    monkeypatch.setattr(trackers.importlib, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="absent"):
        open_tracker("wandb", tmp_path)


def test_no_tracker_leaves_nothing(tmp_path):
    open_tracker("none", tmp_path).log(1, {"pixel_loss": 0.5})
    open_tracker("none", tmp_path).images(1, "reconstructions", picture(1))
    assert not list(tmp_path.iterdir())


def test_an_unknown_tracker_is_one_line_with_the_nearest_name(tmp_path):
    with pytest.raises(UserError, match=r"^tracker 'wanb' is unknown: did you mean 'wandb'\?$"):
        open_tracker("wanb", tmp_path)


SPEAK = """
from qlip.core.log import console, progress
console.print("printed")
with progress("stage 1", 4, unit="images", units_per_step=1000) as bar:
    bar.update(2, "loss 3.2")
    bar.update(4, "loss 3.1")
"""


@pytest.mark.parametrize("terminal", [False, True])
def test_only_the_first_of_several_processes_speaks(terminal):
    said = []
    for rank in ("0", "1"):
        environment = os.environ | {"RANK": rank, "WORLD_SIZE": "2", "TERM": "xterm"}
        environment |= {"FORCE_COLOR": "1"} if terminal else {}
        done = subprocess.run(
            [sys.executable, "-c", SPEAK], capture_output=True, text=True, check=True, env=environment, timeout=60
        )
        said.append(done.stdout + done.stderr)
    assert "printed" in said[0] and "stage 1" in said[0] and "4/4" in said[0] and "images/s  loss 3.1" in said[0]
    assert ("\x1b[" in said[0]) == terminal  # a bar that moves the cursor
    assert said[1] == ""


def test_the_rate_counts_the_batches_of_all_processes(monkeypatch):
    moments = iter([100.0, 110.0])  # opened, asked
    monkeypatch.setattr(log.time, "monotonic", lambda: next(moments))
    line = log.ProgressLine("stage 1", 50, start=10, unit="images", units_per_step=4096)
    assert line.rate(30) == 20 * 4096 / 10
