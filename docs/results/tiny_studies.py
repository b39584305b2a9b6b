"""What the studies over tiny tokenizers share: two tokenizers on the same scenes, a process per run, spreads."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

TOKENIZERS = ("qlip", "bsqvit")


def make_scenes(out: Path) -> None:
    """The demo's scenes as OUT/data/train and OUT/data/test."""
    from qlip.apps.demo import TRAIN_OBJECT_COUNTS
    from qlip.data.scene_shards import write_scene_shards
    from qlip.data.scenes import SceneConfig

    train = SceneConfig(image_size=48, object_counts=TRAIN_OBJECT_COUNTS)
    write_scene_shards(out / "data" / "train", num=40_000, split="train", config=train)
    write_scene_shards(out / "data" / "test", num=4_000, split="test", config=SceneConfig(image_size=48))


def make_tokenizers(out: Path) -> None:
    """Scenes, and over them OUT/<name>/stage2/export: QLIP, and BSQ-ViT (contrastive weight 0)."""
    from qlip.recipes import find_recipe
    from qlip.recipes.run import run_recipe

    make_scenes(out)
    for name in TOKENIZERS:
        if (out / name / "stage2" / "export" / "config.json").exists():
            continue
        for stage, recipe in (("stage1", "scenes_tiny"), ("stage2", "scenes_tiny_stage2")):
            if (out / name / stage / "export" / "config.json").exists():
                continue
            config = find_recipe(recipe)
            config.data.train = str(out / "data" / "train")
            if stage == "stage2":
                config.task.init = str(out / name / "stage1" / "export")
            elif name == "bsqvit":
                config.task.contrastive_weight = 0.0
            run_recipe(config, folder=out / name / stage)


def ceilings(tokenizers: dict[str, Path]) -> dict[str, dict[str, float]]:
    """What right scenes get that go through each tokenizer and back: the most that its generator can reach."""
    from qlip.data.scenes import render
    from qlip.evals.scene_reader import read_scenes
    from qlip.evals.scenes import ground_truth_scenes, scene_prompts, score_scenes
    from qlip.models.image_tokenizer import open_image_tokenizer

    prompts = scene_prompts(num_per_category=200, seed=1)
    pictures = render(ground_truth_scenes(prompts, seed=1), image_size=48)
    found = {"pictures themselves": score_scenes(prompts, read_scenes(pictures)).shares()}
    for name, folder in tokenizers.items():
        tokenizer = open_image_tokenizer(folder)
        decoded = [tokenizer.decode(tokenizer.encode(part)) for part in pictures.split(100)]
        found[name] = score_scenes(prompts, [scene for part in decoded for scene in read_scenes(part)]).shares()
    return found


def study_parser(description: str | None, *, steps: int) -> argparse.ArgumentParser:
    """What every study can be told; `steps` of training unless told otherwise."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of data, runs and figures")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps of each training")
    parser.add_argument("--parallel", type=int, default=2, help="processes at a time, one thread each")
    parser.add_argument("--one", nargs=2, metavar=("SETTING", "SEED"), help="train one setting alone")
    parser.add_argument("--draw", action="store_true", help="tables and pictures from what is there")
    return parser


def train_in_processes(out: Path, jobs: list[tuple[str, int]], *, parallel: int, options: list[str]) -> None:
    """Call the script again for every (setting, seed) without OUT/<setting>_<seed>.json, `parallel` at a time."""

    def run(job: tuple[str, int]) -> None:
        name, seed = job
        if (out / f"{name}_{seed}.json").exists():
            return
        command = [sys.executable, sys.argv[0], "--out", str(out), "--one", name, str(seed), *options]
        with (out / f"{name}_{seed}.log").open("a") as file:
            subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=True)
        print(name, seed, "done", flush=True)

    with ThreadPoolExecutor(parallel) as pool:
        list(pool.map(run, jobs))


def read_runs(out: Path) -> list[dict[str, Any]]:
    """What the processes have written, in the order of settings and seeds."""
    return [json.loads(path.read_text()) for path in sorted(out.glob("*_[0-9].json"))]


def made_with(run: dict[str, Any]) -> dict[str, Any]:
    """What all runs of a study have in common, without folders."""
    kept = {key: run[key] for key in ("steps", "batch", "card", "git_commit", "versions")}
    kept["card"] = {key: value for key, value in kept["card"].items() if key not in ("model", "command")}
    return kept


def draw_bars(
    path: Path, rows: dict[str, dict[str, list[float]]], columns: dict[str, str], levels: dict[str, float], *, what: str
) -> None:
    """A group of bars for each of `columns` (figure -> its name), a bar for each of `rows` (title -> figures of all
    seeds in [0, 1]), a point for each seed, and `levels` (figure -> chance) dotted. `what` names the axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(rows)
    for place, (title, row) in enumerate(rows.items()):
        for column, name in enumerate(columns):
            values = [100 * value for value in row[name]]
            x = column + (place - (len(rows) - 1) / 2) * width
            axes.bar(x, mean(values), width=0.9 * width, color=f"C{place}", label=None if column else title)
            axes.scatter([x] * len(values), values, s=8, color="black", zorder=3)
    for column, name in enumerate(columns):
        axes.hlines(100 * levels[name], column - 0.42, column + 0.42, color="black", linestyle="dotted")
    axes.set_xticks(range(len(columns)), columns.values())
    axes.set_ylabel(what)
    figure.legend(frameon=False, fontsize=8, ncols=3, loc="outside upper center")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def spread(values: list[float], *, digits: int) -> str:
    """Mean and standard deviation: `72.3 +- 4.1`."""
    shown = f"{mean(values):.{digits}f}"
    return shown + (f" \N{PLUS-MINUS SIGN} {stdev(values):.{digits}f}" if len(values) > 1 else "")
