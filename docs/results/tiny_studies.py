"""What the studies over tiny tokenizers share: two tokenizers on the same scenes, a process per run, spreads."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

TOKENIZERS = ("qlip", "bsqvit")


def make_tokenizers(out: Path) -> None:
    """The demo's scenes as OUT/data, and OUT/<tokenizer>/stage2/export: QLIP, and BSQ-ViT (contrastive weight 0)."""
    from qlip.apps.demo import TRAIN_OBJECT_COUNTS
    from qlip.data.scene_shards import write_scene_shards
    from qlip.data.scenes import SceneConfig
    from qlip.recipes import find_recipe
    from qlip.recipes.run import run_recipe

    train = SceneConfig(image_size=48, object_counts=TRAIN_OBJECT_COUNTS)
    write_scene_shards(out / "data" / "train", num=40_000, split="train", config=train)
    write_scene_shards(out / "data" / "test", num=4_000, split="test", config=SceneConfig(image_size=48))
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


def train_in_processes(
    out: Path, jobs: list[tuple[str, int]], *, parallel: int, options: Callable[[str, int], list[str]]
) -> None:
    """Call the script again for every (setting, seed) without OUT/<setting>_<seed>.json, `parallel` at a time."""

    def run(job: tuple[str, int]) -> None:
        name, seed = job
        if (out / f"{name}_{seed}.json").exists():
            return
        command = [sys.executable, sys.argv[0], "--out", str(out), "--one", name, str(seed), *options(name, seed)]
        with (out / f"{name}_{seed}.log").open("a") as file:
            subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=True)
        print(name, seed, "done", flush=True)

    with ThreadPoolExecutor(parallel) as pool:
        list(pool.map(run, jobs))


def spread(values: list[float], *, digits: int) -> str:
    """Mean and standard deviation: `72.3 +- 4.1`."""
    shown = f"{mean(values):.{digits}f}"
    return shown + (f" \N{PLUS-MINUS SIGN} {stdev(values):.{digits}f}" if len(values) > 1 else "")
