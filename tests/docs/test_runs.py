"""The files of runs/ and the launch lines of docs/training.md start what they should, with options that parse.

They are executed by bash with stand-ins for `qlip`, torchrun and Slurm that write down how they were called.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_readme import ROOT, check, shell_commands
from torch.distributed.run import get_args_parser

from qlip.apps.balance import BalanceOptions
from qlip.core.arguments import parse_arguments
from qlip.core.config import to_json
from qlip.recipes import RECIPES, find_recipe
from qlip.recipes.run import RunConfig

TRAINING = (ROOT / "docs" / "training.md").read_text()
FILES = sorted(path for pattern in ("*.sh", "*.slurm") for path in (ROOT / "runs").glob(pattern))
RECORDER = """#!{python}
import json, os, pathlib, subprocess, sys
name, words = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps([name, *words]) + "\\n")
if name == "ray" and words == ["status"]:  # there is a cluster once `ray start` was called
    sys.exit('["ray", "start"' not in pathlib.Path(os.environ["RECORD"]).read_text())
if name == "scontrol":
    print("node0\\nnode1")
while name == "srun" and words[0].startswith("-"):
    words.pop(0)
while name == "sbatch" and not words[0].endswith(".slurm"):
    words.pop(0)
if name in ("srun", "sbatch"):
    command = words if name == "srun" else ["bash", *words]
    job = {{"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_NUM_NODES": "2"}}
    sys.exit(subprocess.run(command, env=os.environ | job).returncode)
"""
VARIABLES = {"DATA": "shards/{00000..00999}.tar", "HELD_OUT": "held out/{00000..00009}.tar"}


def called(script: list[str], folder: Path, **variables: str) -> list[list[str]]:
    """Every command that the script calls, with its words."""
    stand_ins = folder / "bin"
    stand_ins.mkdir()
    for name in ("qlip", "torchrun", "srun", "sbatch", "scontrol", "ray"):
        (stand_ins / name).write_text(RECORDER.format(python=sys.executable))
        (stand_ins / name).chmod(0o755)
    environment = {"PATH": f"{stand_ins}:{os.environ['PATH']}", "RECORD": str(folder / "record"), **variables}
    done = subprocess.run(["bash", *script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return [json.loads(line) for line in (folder / "record").read_text().splitlines()]


def qlip_call(words: list[str]) -> list[str] | None:
    """The words behind `qlip`, of a call of its own or under torchrun, whose options are checked by its own parser."""
    if words[0] == "qlip":
        return words[1:]
    if words[0] == "torchrun":
        launch = get_args_parser().parse_args(words[1:])
        assert launch.no_python and launch.training_script == "qlip"
        return launch.training_script_args
    return None


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_open_with_their_command_and_stop_at_the_first_failure(path):
    lines = path.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert f"runs/{path.name}" in lines[1] and lines[1].startswith("# ")
    assert "set -euo pipefail" in lines
    assert subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT, check=False).returncode == 1


@pytest.mark.parametrize("cluster", ["0", "1"])
@pytest.mark.parametrize("name", ["demo.sh", "small.sh", "qlip_b_16_256.sh"])
def test_every_command_of_a_pipeline_parses(tmp_path, name, cluster):
    words = called([f"runs/{name}"], tmp_path, **VARIABLES, CLUSTER=cluster, START=str(tmp_path / "start"))
    commands = [command for call in words if (command := qlip_call(call)) is not None]
    for command in commands:
        check(command)
    stages = [command for command in commands if command[0] == "train"]
    assert [command[0] for command in commands][-1] == "export"
    if name == "demo.sh":
        assert commands[0][0] == "demo" and not stages
        return
    assert commands[0][:2] == ["import", "eva"]
    assert [find_recipe(command[1]).task.kind for command in stages] == ["align", "reconstruct"]
    options = [dict(zip(command[2::2], command[3::2], strict=True)) for command in stages]
    assert options[1]["--task.init"] == options[0]["--out"] + "/export"
    assert options[0]["--task.init"] == str(tmp_path / "start")
    assert all(option["--data.train"] == VARIABLES["DATA"] for option in options)
    assert sum(call[0] == "sbatch" for call in words) == (2 if (name, cluster) == ("qlip_b_16_256.sh", "1") else 0)


@pytest.mark.parametrize("name", ["small.sh", "qlip_b_16_256.sh"])
def test_data_must_be_named(tmp_path, name):
    done = subprocess.run(["bash", f"runs/{name}"], cwd=ROOT, env={"PATH": os.environ["PATH"]}, capture_output=True)
    assert done.returncode != 0 and b"set DATA to img2dataset shards" in done.stderr


def test_slurm_meets_at_the_first_node_and_asks_for_what_the_recipe_is_made_for(tmp_path):
    words = ["qlip_l_14_392", "--data.train", "a b.tar", "--out", "runs/l"]
    calls = called(["-c", 'sbatch --nodes 2 runs/qlip.slurm "$@"', "bash", *words], tmp_path)
    launch = get_args_parser().parse_args(next(call for call in calls if call[0] == "torchrun")[1:])
    assert (launch.rdzv_backend, launch.rdzv_endpoint, launch.nnodes) == ("c10d", "node0:29500", "2")
    assert launch.training_script_args == ["train", *words]
    check(launch.training_script_args)
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", (ROOT / "runs" / "qlip.slurm").read_text(), re.MULTILINE))
    data = find_recipe("qlip_b_16_256").data
    assert int(asked["nodes"]) * int(asked["gpus-per-node"]) * data.batch_size == data.global_batch_size
    assert asked["ntasks-per-node"] == "1" and asked["signal"].startswith("B:USR1@")
    assert int(asked["cpus-per-task"]) >= int(asked["gpus-per-node"]) * (data.num_workers + 1)


def test_a_signal_puts_the_job_back_into_the_queue(tmp_path):
    """USR1 comes while srun runs; the stand-in for torchrun sends it to the batch script, its grandparent."""
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    (stand_ins / "scontrol").write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/record\necho node0\n')
    (stand_ins / "srun").write_text('#!/bin/bash\nkill -USR1 "$PPID"\nsleep 5\n')
    for path in stand_ins.iterdir():
        path.chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node0", "SLURM_JOB_NUM_NODES": "1"}
    done = subprocess.run(
        ["bash", "runs/qlip.slurm", "qlip_b_16_256"],
        cwd=ROOT,
        env=job | {"PATH": f"{stand_ins}:{os.environ['PATH']}"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0
    assert (tmp_path / "record").read_text().splitlines()[-1] == "requeue 7"


def test_slurm_tokenizes_on_a_ray_cluster_with_an_actor_for_each_gpu(tmp_path):
    words = ["a model", "{00000..00003}.tar", "out", "--compress"]
    calls = called(["-c", 'sbatch runs/tokenize_ray.slurm "$@"', "bash", *words], tmp_path)
    (command,) = [qlip_call(call) for call in calls if call[0] == "qlip"]
    check(command)
    assert command[:5] == ["tokenize", *words]
    options = dict(zip(command[5::2], command[6::2], strict=True))
    assert options["--ray-actors"] == "16" and (options["--engine"], options["--ray-address"]) == ("ray", "auto")
    (start,) = [call for call in calls if call[:2] == ["ray", "start"]]
    assert "--head" in start and start[start.index("--port") + 1] == "6379" and "--block" in start
    cpus, gpus = (int(start[start.index(name) + 1]) for name in ("--num-cpus", "--num-gpus"))
    assert gpus * (int(options["--workers"]) + 1) == cpus, "an actor has a CPU for itself and one for each decoder"


def test_kubernetes_job_asks_for_what_its_actors_need():
    job = yaml.safe_load((ROOT / "runs" / "tokenize_ray.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    command = shlex.split(job["spec"]["entrypoint"])
    check(command[1:])
    options = dict(zip(command[5::2], command[6::2], strict=True))
    cluster = job["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    pods = [group["template"]["spec"] for group in (cluster["headGroupSpec"], workers)]
    (head,), (worker,) = (pod["containers"] for pod in pods)
    limits = worker["resources"]["limits"]
    assert int(options["--ray-actors"]) == workers["replicas"] * int(limits["nvidia.com/gpu"])
    assert int(options["--workers"]) + 1 == int(limits["cpu"]) and options["--ray-gpus"] == "1"
    assert head["image"] == worker["image"] and head["volumeMounts"] == worker["volumeMounts"]
    assert pods[0]["volumes"] == pods[1]["volumes"]
    assert all(path.startswith(head["volumeMounts"][0]["mountPath"] + "/") for path in command[2:5])


def test_launch_lines_of_the_training_page_parse():
    found = 0
    for words in shell_commands(TRAINING):
        if words[0] == "torchrun":
            command = qlip_call(words)
        elif words[0] == "sbatch":
            command = ["train", *words[words.index("runs/qlip.slurm") + 1 :]]
        else:
            continue
        assert command is not None
        check(command)
        found += 1
    assert found >= 3


def test_the_training_pages_balance_line_parses():
    (line,) = re.findall(r"^    qlip balance (\w+) (.+)$", TRAINING, re.MULTILINE)
    default = BalanceOptions(run=find_recipe(line[0]), out=Path("out"))
    options = parse_arguments(BalanceOptions, shlex.split(line[1]), prog="qlip balance", default=default)
    assert options.steps > 0 and options.run.task.init and options.run.data.train


def fields(values: dict, path: str = "") -> set[str]:
    """`task.optimizer.lr` and all others, as options name them."""
    found = set()
    for name, value in values.items():
        found.add((path + name).replace("_", "-"))
        found |= fields(value, f"{path}{name}.") if isinstance(value, dict) else set()
    return found


def test_options_and_recipes_that_the_training_page_names_exist():
    known = fields(to_json(find_recipe("qlip_b_16_256"))) | fields(to_json(find_recipe("qlip_b_16_256_stage2")))
    named = set(re.findall(r"--((?:data|task|model|trainer|evals)\.[\w.-]*\w)", TRAINING))
    assert len(named) > 25 and named <= known
    table = TRAINING.split("## The recipes")[1].split("##")[0]
    tokenizers = [name for name in RECIPES if isinstance(find_recipe(name), RunConfig)]
    full = {name for name in tokenizers if not name.startswith("scenes") and not name.endswith("_small")}
    rows = [re.findall(r"`(\w+)`", line.split("|")[1]) for line in table.splitlines() if line.startswith("| `")]
    spelled = {row[0].split("_")[0] + name if name.startswith("_") else name for row in rows for name in row}
    assert spelled == full
