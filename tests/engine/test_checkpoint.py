"""Checkpoints come back bit for bit, appear whole or not at all, and a full disk costs no earlier one."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemWriter

from qlip.core.errors import UserError
from qlip.engine.checkpoint import (
    CheckpointWriter,
    TrainingState,
    checkpoint_folders,
    load_checkpoint,
    load_module,
)
from qlip.engine.interfaces import OptimizerConfig
from qlip.engine.optim import build_optimizer
from qlip.engine.parallel import exponential_average, update_average

CONFIGS = {
    "decoder": OptimizerConfig(name="lamb", lr=0.01, part_lrs={"model.0": 0.02}),
    "discriminator": OptimizerConfig(lr=0.03),
}
PARTS = {"decoder": "model", "discriminator": "discriminator"}


class State:
    """Two networks, an optimizer for each, an average of the first."""

    def __init__(self, seed: int, *, configs: dict[str, OptimizerConfig] = CONFIGS) -> None:
        torch.manual_seed(seed)
        self.modules = nn.ModuleDict(
            {
                "model": nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)),
                "discriminator": nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)),
            }
        )
        self.averages = nn.ModuleDict({"model": exponential_average(self.modules["model"], 0.9)})
        self.optimizers = {
            name: build_optimizer([(f"{part}.{n}", p) for n, p in self.modules[part].named_parameters()], configs[name])
            for name, part in PARTS.items()
        }

    def step(self, *, with_last_layer: bool = True) -> None:
        """One random step of both."""
        x = torch.randn(5, 3)
        self.modules["model"](x).square().mean().backward()
        hidden = self.modules["discriminator"][0](x)
        (self.modules["discriminator"][1](hidden) if with_last_layer else hidden).square().mean().backward()
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        update_average(self.averages["model"], self.modules["model"])

    def save(self, folder: Path, step: int, *, keep: int = 2) -> Path:
        CheckpointWriter(folder, keep=keep, background=False).save(step, self.whole(), loader={"at": [step]})
        return folder / "checkpoints" / f"step_{step:08d}"

    def load(self, checkpoint: Path) -> tuple[int, list[dict]]:
        return load_checkpoint(checkpoint, self.whole())

    def whole(self) -> TrainingState:
        return TrainingState(modules=self.modules, averages=self.averages, optimizers=self.optimizers)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a step depends on."""
        found = {f"modules.{k}": v for k, v in self.modules.state_dict().items()}
        found |= {f"averages.{k}": v for k, v in self.averages.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            state = optimizer.state_dict()
            for index, values in state["state"].items():
                found |= {f"{name}.{index}.{key}": torch.as_tensor(value) for key, value in values.items()}
            for index, group in enumerate(state["param_groups"]):
                found |= {
                    f"{name}.{index}.{k}": torch.as_tensor(v) for k, v in group.items() if isinstance(v, float | int)
                }
        return {name: tensor.clone() for name, tensor in found.items()}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_everything_comes_back_bit_for_bit(tmp_path):
    state = State(0)
    for _ in range(3):
        state.step()
    checkpoint = state.save(tmp_path, 3)
    saved = state.tensors()
    state.step()
    after = state.tensors()
    other = State(1)
    assert other.load(checkpoint) == (3, [{"at": [3]}])
    assert_equal(other.tensors(), saved)
    other.step()  # draws from the restored random state
    assert_equal(other.tensors(), after)


def test_parameters_that_never_had_a_gradient_come_back_without_state(tmp_path):
    state = State(0)
    for _ in range(2):
        state.step(with_last_layer=False)
    checkpoint = state.save(tmp_path, 2)
    state.step()
    after = state.tensors()
    other = State(1)
    other.load(checkpoint)
    assert len(other.optimizers["discriminator"].state) == 2  # of four parameters
    other.step()
    assert_equal(other.tensors(), after)


def test_rates_come_from_the_present_config_not_from_the_checkpoint(tmp_path):
    state = State(0)
    state.step()
    checkpoint = state.save(tmp_path, 1)
    changed = {"decoder": OptimizerConfig(name="lamb", lr=0.5, betas=(0.8, 0.9)), "discriminator": OptimizerConfig()}
    other = State(1, configs=changed)
    other.load(checkpoint)
    for group in other.optimizers["decoder"].param_groups:
        assert (group["peak_lr"], tuple(group["betas"]), group["step"]) == (0.5, (0.8, 0.9), 1)
    assert_equal(
        {k: v for k, v in other.tensors().items() if "exp_avg" in k and k.startswith("discriminator")},
        {k: v for k, v in state.tensors().items() if "exp_avg" in k and k.startswith("discriminator")},
    )


def test_only_the_newest_are_kept(tmp_path):
    state = State(0)
    for step in (5, 10, 15, 100):
        state.step()
        state.save(tmp_path, step)
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["step_00000015", "step_00000100"]
    state.save(tmp_path, 101, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000101"]


def test_what_a_kill_left_behind_is_ignored_and_overwritten(tmp_path):
    state = State(0)
    state.step()
    state.save(tmp_path, 1)
    half = tmp_path / "checkpoints" / "step_00000002.tmp"
    half.mkdir()
    (half / "position.json").write_text('{"step": 2')
    (half / "__0_0.distcp").write_bytes(b"half")
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["step_00000001"]
    final = state.save(tmp_path, 2)
    assert not half.exists()
    assert json.loads((final / "position.json").read_text())["step"] == 2
    assert State(1).load(final)[0] == 2


def test_one_module_or_its_average_can_be_loaded_alone(tmp_path):
    state = State(0)
    for _ in range(3):
        state.step()
    checkpoint = state.save(tmp_path, 3)
    plain, averaged = State(1).modules["model"], State(2).modules["model"]
    load_module(checkpoint, "model", plain)
    load_module(checkpoint, "model", averaged, averaged=True)
    assert_equal(dict(plain.state_dict()), dict(state.modules["model"].state_dict()))
    assert_equal(dict(averaged.state_dict()), dict(state.averages["model"].module.state_dict()))
    assert not torch.equal(plain[0].weight, averaged[0].weight)


FULL_DISK = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
from qlip.core.errors import UserError
from test_checkpoint import State
state, folder = State(0), Path({folder!r})
state.step()
state.save(folder, 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    state.save(folder, 2)
except UserError as error:
    print(error)
"""


def test_a_full_disk_is_one_line_and_costs_no_earlier_checkpoint(tmp_path):
    """A limit on the file size stands for the full disk; the limit cannot be lifted again, hence the process."""
    script = FULL_DISK.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 1, done.stdout
    assert "could not write" in lines[0] and "step_00000002" in lines[0] and "free disk space" in lines[0]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    assert State(1).load(tmp_path / "checkpoints" / "step_00000001")[0] == 1


def test_a_disk_that_fills_up_at_the_last_file_leaves_no_half_folder(tmp_path, monkeypatch):
    state = State(0)
    state.step()
    state.save(tmp_path, 1)

    def write_text(self, text):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left on device; free disk space"):
        patch.setattr(Path, "write_text", write_text)
        state.save(tmp_path, 2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]


def test_in_the_background_the_state_of_the_moment_is_saved_and_appears_whole(tmp_path):
    state = State(0)
    state.step()
    saved = state.tensors()
    writer = CheckpointWriter(tmp_path, keep=1, background=True)
    writer.save(1, state.whole(), loader={"at": [1]})
    state.step()  # while it is being written
    writer.finish()
    other = State(1)
    assert other.load(tmp_path / "checkpoints" / "step_00000001") == (1, [{"at": [1]}])
    assert_equal(other.tensors(), saved)
    writer.save(2, state.whole(), loader={})
    for _ in range(1000):
        writer.poll()
        if checkpoint_folders(tmp_path)[0].name == "step_00000002":
            break
        time.sleep(0.01)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]


def test_a_background_save_that_fails_is_one_line_at_the_next_call(tmp_path, monkeypatch):
    state = State(0)
    writer = CheckpointWriter(tmp_path, keep=2, background=True)
    writer.save(1, state.whole(), loader={})
    writer.finish()

    def full(*_args: object, **_options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FileSystemWriter, "write_data", full)
    writer.save(2, state.whole(), loader={})
    with pytest.raises(UserError, match=r"step_00000002: .*No space left on device; free disk space"):
        writer.finish()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    writer.finish()  # nothing is under way any more


@pytest.mark.parametrize("damage", ["cut", "metadata", "position", "other model"])
def test_a_damaged_checkpoint_is_one_line_that_says_what_to_do(tmp_path, damage):
    state = State(0)
    state.step()
    checkpoint = state.save(tmp_path, 1)
    other = State(1)
    if damage == "cut":
        tensors = next(checkpoint.glob("*.distcp"))
        tensors.write_bytes(tensors.read_bytes()[:100])
    elif damage == "metadata":
        (checkpoint / ".metadata").write_bytes(b"")
    elif damage == "position":
        (checkpoint / "position.json").write_text('{"step": 1')
    else:
        other.modules["model"] = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
        other.averages["model"] = exponential_average(other.modules["model"], 0.9)
    with pytest.raises(UserError, match=r"step_00000001 cannot be resumed: .*; delete it to resume") as error:
        other.load(checkpoint)
    assert "\n" not in str(error.value)


def test_ctrl_c_during_a_save_stays_ctrl_c_and_costs_no_earlier_checkpoint(tmp_path, monkeypatch):
    state = State(0)
    state.save(tmp_path, step=1)

    def interrupted(*_args: object, **_options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FileSystemWriter, "write_data", interrupted)  # DCP wraps what is raised here
        state.save(tmp_path, step=2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
