"""`qlip train` under torchrun: a killed rank costs nothing, and a mistake that one rank meets ends all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import CLI_SIZES, assert_same_runs, tiny_run, write_tiny_scenes

from qlip.core.errors import UserError
from qlip.core.log import read_metrics
from qlip.recipes.run import run_recipe
from qlip.recipes.running import split_batch
from ranks import on_ranks

DIES_ONCE = """
import os, sys, torch
torch.set_num_threads(1)
from tiny_training import die_at
from qlip.cli import main
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    die_at(9, "before the optimizer")
main()
"""


def torchrun(script: str, *arguments: str, restarts: int) -> subprocess.CompletedProcess[str]:
    """Two ranks on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), "--monitor-interval", "0.1", "--no-python"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    command += [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=150)


def uninterrupted(data: str, folder: str) -> None:
    """The run that the options of the test below describe."""
    config = tiny_run("scenes_tiny", data, steps=16)
    config.data.global_batch_size = 16
    config.trainer.parallel, config.trainer.ema_decay, config.trainer.async_save = "fsdp", 0.9, True
    run_recipe(config, folder=Path(folder))


@pytest.mark.slow
def test_a_rank_killed_under_torchrun_leads_to_the_same_weights(tmp_path):
    data, run = write_tiny_scenes(tmp_path / "data"), tmp_path / "killed"
    on_ranks(uninterrupted, data, str(tmp_path / "straight"), num_ranks=2, folder=tmp_path / "ranks")
    options = [
        *("train", "scenes_tiny", "--data.train", data, "--out", str(run), "--model.image-size", "16", *CLI_SIZES),
        *("--model.initializer-range", "0.02", "--data.batch-size", "4", "--data.global-batch-size", "16"),
        *("--data.shuffle-buffer", "16", "--trainer.steps", "16", "--trainer.log-every", "1"),
        *("--trainer.save-every", "3", "--trainer.device", "cpu", "--trainer.precision", "fp32"),
        *("--trainer.parallel", "fsdp", "--trainer.ema-decay", "0.9", "--trainer.async-save"),
    ]
    done = torchrun(DIES_ONCE, *options, restarts=1)
    assert done.returncode == 0, done.stderr
    assert "exitcode: -9" in done.stderr
    # the save of step 6 waits for that of step 3, but may itself be cut off in the background
    assert any(f"resuming {run} at step {step}" in done.stdout for step in (3, 6)), done.stdout
    assert_same_runs(run, tmp_path / "straight")
    assert len(read_metrics(run / "metrics.jsonl")) == 16  # one line per step, by one rank


@pytest.mark.slow
def test_what_one_rank_alone_meets_is_one_line_and_ends_all(tmp_path):
    """The second rank's only shard holds no tar."""
    data = write_tiny_scenes(tmp_path / "data")
    (tmp_path / "data" / "00001.tar").write_text("<html>not found</html>")
    options = ["train", "scenes_tiny", "--data.train", data, "--out", str(tmp_path / "run"), *CLI_SIZES]
    options += ["--model.image-size", "16", "--data.batch-size", "4", "--data.shuffle-buffer", "0"]
    done = torchrun("from qlip.cli import main; main()", *options, restarts=0)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("qlip: ") and "process has gone" not in line]
    assert len(lines) == 1 and lines[0].startswith("qlip: rank 1: 1 of 1 samples skipped"), done.stderr
    assert "not a tar" in lines[0]


def split(num_ranks: int, **sizes: Any) -> tuple[int, int]:
    config = tiny_run("scenes_tiny", "").data
    for name, value in sizes.items():
        setattr(config, name, value)
    return split_batch(config, num_ranks=num_ranks)


def test_the_global_batch_is_shared_evenly_or_refused():
    assert split(1, batch_size=8) == (8, 1)
    assert split(4, batch_size=8) == (32, 1)
    assert split(4, batch_size=8, global_batch_size=96) == (96, 3)
    with pytest.raises(
        UserError, match=r"96 is not a multiple of 4 processes x data.batch_size 7: .*--data.batch-size 6"
    ):
        split(4, batch_size=7, global_batch_size=96)
    with pytest.raises(UserError, match=r"96 is not a multiple of 5 processes .*: start a number of processes that"):
        split(5, batch_size=8, global_batch_size=96)


def test_a_world_that_cannot_share_the_batch_stops_before_it_meets(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    config = tiny_run("scenes_tiny", "somewhere")
    config.data.global_batch_size = 16
    with pytest.raises(UserError, match="not a multiple of 3 processes"):
        run_recipe(config, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists() and not torch.distributed.is_initialized()
