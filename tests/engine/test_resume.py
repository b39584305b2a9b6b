"""A run that is killed and started again ends with the weights and figures of one that never stopped, bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_training import (
    CLI_SIZES,
    PLACES,
    assert_same_runs,
    curves,
    die_at,
    exported_weights,
    tiny_run,
    write_tiny_scenes,
)
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from qlip.core.errors import UserError
from qlip.engine.checkpoint import checkpoint_folders
from qlip.engine.trainer import Trainer
from qlip.recipes.run import RunConfig, run_recipe


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_tiny_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data) -> Path:
    """An uninterrupted stage-1 run of 40 steps; nobody may change it."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    run_recipe(tiny_run("scenes_tiny", data, image_size=24, steps=40), folder=folder)
    return folder


TWO_DEATHS = (("9", "before the optimizer"), ("17", "while saving"))


def test_command_killed_twice_ends_like_an_uninterrupted_run(tmp_path, data, finished):
    run = tmp_path / "killed"
    options = [
        *("--data.train", data, "--out", str(run), "--model.image-size", "24", *CLI_SIZES),
        *("--model.initializer-range", "0.02", "--data.batch-size", "4", "--data.shuffle-buffer", "16"),
        *("--data.num-workers", "0", "--trainer.steps", "40", "--trainer.log-every", "1", "--trainer.save-every", "7"),
        *("--trainer.device", "cpu", "--trainer.precision", "fp32"),
    ]
    for step, place in TWO_DEATHS:
        script = (
            "import sys, torch; torch.set_num_threads(1); from tiny_training import die_at; from qlip.cli import main"
        )
        command = [
            sys.executable,
            "-c",
            f"{script}; die_at({step}, {place!r}); main()",
            "train",
            "scenes_tiny",
            *options,
        ]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
        assert subprocess.run(command, stdout=subprocess.DEVNULL, env=environment).returncode == -signal.SIGKILL
    assert [path.name for path in checkpoint_folders(run)] == ["step_00000007", "step_00000014"]
    run_recipe(tiny_run("scenes_tiny", data, image_size=24, steps=40), folder=run)  # equal to the options above
    assert_same_runs(run, finished)


def dying_run(config: RunConfig, run: Path, step: int, place: str) -> None:
    """A run that dies there."""
    torch.set_num_threads(1)
    die_at(step, place)
    run_recipe(config, folder=run)


def died(config: RunConfig, run: Path, *, step: int, place: str) -> bool:
    """Whether the run died in a process of its own, or came to its end before.

    Its process is forked from a server that has imported everything and computed nothing: where gradients have been
    computed in several threads, PyTorch refuses to compute any in a fork.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny_training", "qlip.recipes.run"])
    process = context.Process(target=dying_run, args=(config, run, step, place))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def state_of(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's newest checkpoint: weights, averages, discriminator, optimizers, random state."""
    reader = FileSystemReader(checkpoint_folders(run)[-1])
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


@pytest.mark.parametrize("num_workers", [0, 2])
def test_killed_ten_times_at_random_points_ends_like_an_uninterrupted_run(tmp_path, data, finished, num_workers):
    """Stage 2, so two networks, two optimizers and an average; saved in the background without workers."""
    config = tiny_run("scenes_tiny_stage2", data, image_size=24, steps=24)
    config.task.init = str(finished / "export")
    config.task.r1_every, config.task.lecam_weight = 3, 0.1
    config.task.discriminator_channel_base, config.task.discriminator_max_channels = 64, 8
    config.data.num_workers, config.trainer.save_every = num_workers, 3
    config.trainer.ema_decay, config.trainer.async_save = 0.9, num_workers == 0
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run_recipe(config, folder=straight)
    seed = random.SystemRandom().randrange(10**6)
    drawn = random.Random(seed)
    points = sorted((drawn.randrange(24), drawn.choice(PLACES)) for _ in range(10 if num_workers == 0 else 2))
    for step, place in points:
        if not died(config, killed, step=step, place=place):
            assert step >= 22, (seed, points)  # the last checkpoint may be whole before this place is reached
    run_recipe(config, folder=killed)
    assert_same_runs(killed, straight)
    ours, others = state_of(killed), state_of(straight)
    assert ours.keys() == others.keys() and len(ours) > 200
    assert [name for name in ours if not torch.equal(ours[name], others[name])] == [], (seed, points)
    positions = [json.loads((checkpoint_folders(run)[-1] / "position.json").read_text()) for run in (killed, straight)]
    assert positions[0] == positions[1]


class StoppedError(Exception):
    """Stands for whatever ends a run in the middle of a step."""


def stop_at(monkeypatch, step: int) -> None:
    whole = Trainer.train_step

    def train_step(self, batches):
        if self.step == step:
            raise StoppedError
        return whole(self, batches)

    monkeypatch.setattr(Trainer, "train_step", train_step)


def test_stage_2_resumes_both_optimizers_the_average_and_the_random_crops(tmp_path, data, finished, monkeypatch):
    """24 px: the discriminator sees random 16-px crops, so the random state counts; R1 comes every third step."""
    config = tiny_run("scenes_tiny_stage2", data, steps=12)
    config.task.init = str(finished / "export")
    config.task.r1_every = 3
    config.task.discriminator_channel_base, config.task.discriminator_max_channels = 64, 8
    config.trainer.ema_decay, config.trainer.save_every = 0.9, 4
    run_recipe(config, folder=tmp_path / "straight")
    for stop in (5, 10):
        with monkeypatch.context() as patch, pytest.raises(StoppedError):
            stop_at(patch, stop)
            run_recipe(config, folder=tmp_path / "stopped")
    run_recipe(config, folder=tmp_path / "stopped")
    assert_same_runs(tmp_path / "stopped", tmp_path / "straight")
    with_r1 = [line["step"] for line in curves(tmp_path / "straight") if "discriminator/r1_loss" in line]
    assert with_r1 == [1, 4, 7, 10]  # the lines are numbered by steps done


def test_evaluations_between_steps_are_logged_once_with_their_cards(tmp_path, data, monkeypatch):
    config = tiny_run("scenes_tiny", data, steps=9)
    config.evals.data, config.evals.names, config.evals.max_samples = data, ("images-recon-offline-v1",), 8
    config.trainer.eval_every = config.trainer.save_every = 4
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        stop_at(patch, 6)
        run_recipe(config, folder=tmp_path)
    run_recipe(config, folder=tmp_path)
    evaluations = [line for line in curves(tmp_path) if "eval" in line]
    assert [line["step"] for line in evaluations] == [4, 8, 9]
    assert all(line["card"] and line["psnr"] > 0 for line in evaluations)


def test_a_run_stopped_between_its_last_evaluation_and_its_export_logs_that_evaluation_once(
    tmp_path, data, monkeypatch
):
    config = tiny_run("scenes_tiny", data, steps=4)
    config.evals.data, config.evals.names, config.evals.max_samples = data, ("images-recon-offline-v1",), 8

    def stopped(*_arguments: object, **_options: object) -> None:
        raise StoppedError

    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr("qlip.recipes.run.save_model", stopped)
        run_recipe(config, folder=tmp_path)
    run_recipe(config, folder=tmp_path)
    assert [line["step"] for line in curves(tmp_path) if "eval" in line] == [4]
    assert [line["step"] for line in curves(tmp_path) if "eval" not in line] == [1, 2, 3, 4]


def test_pictures_of_a_fixed_batch_change_nothing_else(tmp_path, data):
    plain, painting = (tiny_run("scenes_tiny", data, steps=5) for _ in range(2))
    painting.trainer.images_every = 2
    run_recipe(plain, folder=tmp_path / "plain")
    run_recipe(painting, folder=tmp_path / "painting")
    assert_same_runs(tmp_path / "painting", tmp_path / "plain")
    pictures = sorted((tmp_path / "painting" / "samples").iterdir())
    assert [path.name for path in pictures] == [f"step_{step:08d}.png" for step in (2, 4, 5)]
    grids = [np.asarray(Image.open(path)) for path in pictures]
    assert all(grid.shape == (3 * 16 + 4, 8 * 16 + 14, 3) for grid in grids)
    assert all((grid[:16] == grids[0][:16]).all() for grid in grids)  # the same originals
    assert (grids[0][18:34] != grids[2][18:34]).any()  # other reconstructions
    reader = EventAccumulator(str(tmp_path / "painting" / "tensorboard"))
    reader.Reload()
    assert [image.step for image in reader.Images("reconstructions")] == [2, 4, 5]


def test_finished_run_says_so_and_changes_nothing(finished, data, capsys):
    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in sorted(finished.rglob("*")) if path.is_file()}

    before = contents()
    run_recipe(tiny_run("scenes_tiny", data, image_size=24, steps=40), folder=finished)
    assert f"{finished} is finished (40 steps)" in capsys.readouterr().out
    assert contents() == before


def test_changed_config_is_refused_by_name_and_accepted_on_demand(tmp_path, data, monkeypatch):
    config = tiny_run("scenes_tiny", data, steps=10)
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        stop_at(patch, 8)
        run_recipe(config, folder=tmp_path)
    config.task.optimizer.lr = 0.0
    with pytest.raises(UserError, match=r"task\.optimizer\.lr: [\d.]+ -> 0\.0; add --accept-changes") as refused:
        run_recipe(config, folder=tmp_path)
    assert "\n" not in str(refused.value)
    run_recipe(config, folder=tmp_path, accept_changes=True)
    weights = exported_weights(tmp_path)
    run_recipe(tiny_run("scenes_tiny", data, steps=7), folder=tmp_path / "seven")
    # Both have the weights of step 7: the new rate 0 is the one that counts, not the one in the checkpoint.
    others = exported_weights(tmp_path / "seven")
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_a_finished_run_keeps_the_config_of_its_weights(finished, data):
    config = tiny_run("scenes_tiny", data, image_size=24, steps=40)
    config.task.optimizer.lr = 0.5
    before = (finished / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"task\.optimizer\.lr: .* choose another --out"):
        run_recipe(config, folder=finished, accept_changes=True)
    assert (finished / "config.json").read_bytes() == before


def test_a_config_of_ones_own_needs_no_recipe_in_the_table(tmp_path, data):
    config = tiny_run("scenes_tiny", data, steps=1)
    config.recipe = "mine"
    assert run_recipe(config, folder=tmp_path).is_dir()
