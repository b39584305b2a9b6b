"""Both stages of `scenes_small`, evaluated after each: figures, curves, pictures (`train.py`, scenes)."""

from __future__ import annotations

import math
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure

from qlip.apps.demo import TRAIN_OBJECT_COUNTS
from qlip.core.log import console, read_metrics
from qlip.data.scene_shards import write_scene_shards
from qlip.data.scenes import SceneConfig
from qlip.evals.results import print_results
from qlip.evals.run import EvalRequest, run_evals
from qlip.recipes import find_recipe
from qlip.recipes.model import ModelConfig, TowerSize
from qlip.recipes.run import RunConfig, run_recipe
from qlip.tasks.reconstruct import ReconstructConfig
from train_parts.record import cores, header, write_record

STAGES = {"stage1": "scenes_small", "stage2": "scenes_small_stage2"}
TINY_TOWER = TowerSize(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=48)
BATCHES_PER_WORKER = 3  # that wait in shared memory: two ahead, one being made
PANELS = (
    ("stage1", "contrastive", "stage 1: contrastive"),
    ("stage1", "mse", "stage 1: pixel MSE on [0, 1]"),
    ("stage1", "bit_entropy", "stage 1: entropy per bit, nats"),
    ("stage1", "top1", "stage 1: zero-shot top-1, held out"),
    ("stage2", "decoder/encoder", "stage 2: encoder distance"),
    ("stage2", "decoder/mse", "stage 2: pixel MSE on [0, 1]"),
    ("stage2", "decoder/generator", "stage 2: generator, unweighted"),
    ("stage2", "discriminator/discriminator_loss", "stage 2: discriminator"),
)
BYTES_PER_GB = 1e9


@dataclass(kw_only=True, slots=True, frozen=True)
class Amounts:
    """How much of everything."""

    folders: int
    """Of training scenes, each with a seed of its own, so that they can be painted side by side."""
    scenes: int
    """In each of them."""
    test_scenes: int
    """Held out."""
    samples: int
    """Scored after each stage."""
    curve_samples: int
    """Scored during training, for the curve."""
    curve_points: int
    """How often."""


FULL = Amounts(folders=20, scenes=5000, test_scenes=4000, samples=2000, curve_samples=500, curve_points=4)
TINY = Amounts(folders=2, scenes=40, test_scenes=60, samples=24, curve_samples=12, curve_points=2)


def write_data(folder: Path, amounts: Amounts, *, image_size: int, processes: int) -> tuple[str, str]:
    """Paint training and test scenes, what is there is kept. Returns both as shards for `data.train`."""
    train = [
        (folder / f"train_{seed:02d}", amounts.scenes, "train", seed, image_size) for seed in range(amounts.folders)
    ]
    jobs = [*train, (folder / "test", amounts.test_scenes, "test", 0, image_size)]
    if processes == 1:
        for job in jobs:
            _write_folder(*job)
    else:  # spawned, since a fork of a process that has used torch's threads can hang in them
        with ProcessPoolExecutor(
            min(processes, len(jobs)), get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            list(pool.map(_write_folder, *zip(*jobs, strict=True)))
    return "::".join(str(job[0]) for job in train), str(folder / "test")


def _write_folder(path: Path, num: int, split: str, seed: int, image_size: int) -> None:
    counts = {"object_counts": TRAIN_OBJECT_COUNTS} if split == "train" else {}
    config = SceneConfig(image_size=image_size, seed=seed, **counts)
    write_scene_shards(path, num=num, split=split, config=config)  # type: ignore[arg-type]


def data_workers(config: RunConfig, *, num_cores: int, shared_memory: float) -> int:
    """Decoding processes: all cores but two, as far as their batches fit half of the shared memory; at least one."""
    batch_bytes = config.data.batch_size * 3 * config.model.image_size**2 * 4
    fitting = int(shared_memory / 2 / (BATCHES_PER_WORKER * batch_bytes))
    return max(1, min(num_cores - 2, fitting, 16))


def stage_config(
    name: str, *, train: str, test: str, device: str, amounts: Amounts, init: str = "", tiny: bool = False
) -> RunConfig:
    """A recipe with its data, its curve and its pictures; tiny: towers of a block and a few steps."""
    config = find_recipe(name)
    if tiny:
        shrink(config)
    shared = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").exists() else 0
    config.data.train = train
    config.data.num_workers = data_workers(config, num_cores=cores(), shared_memory=shared)
    config.task.init = init
    config.evals.data, config.evals.max_samples = test, amounts.curve_samples
    trainer = config.trainer
    trainer.device, trainer.tracker = device, "none"
    trainer.eval_every, trainer.images_every = trainer.steps // amounts.curve_points, trainer.steps
    return config


def shrink(config: RunConfig) -> None:
    """To what a CPU trains in seconds; losses, data and optimizers stay those of the recipe."""
    config.model = ModelConfig(
        image_size=32,
        patch_size=8,
        encoder=TINY_TOWER,
        decoder=TINY_TOWER,
        text=TINY_TOWER,
        context_length=40,
        projection_dim=32,
    )
    config.data.batch_size, config.data.shuffle_buffer = 16, 40
    config.trainer.steps, config.trainer.log_every, config.trainer.save_every = 12, 2, 12
    config.trainer.compile = False
    if isinstance(config.task, ReconstructConfig):
        config.task.discriminator_channel_base, config.task.discriminator_max_channels = 128, 8


def stage_2_changes(first: dict[str, float], second: dict[str, float]) -> dict[str, Any]:
    """What stage 2 has to change, and what it must not: nothing on the zero-shot path moves."""
    zero_shot = [name for name in first if "top" in name]
    return {
        "encoder_distance_fall": 1 - second["encoder_distance"] / first["encoder_distance"],
        "zero_shot_same": all(
            first[name] == second[name] or math.isnan(first[name] + second[name]) for name in zero_shot
        ),
    }


def without_paths(card: dict[str, Any]) -> dict[str, Any]:
    """A card that says nothing of this machine's folders; the fingerprint names the model."""
    return {name: value for name, value in card.items() if name not in ("model", "command")}


def curve_of(folder: Path) -> list[dict[str, float]]:
    """Of every line of metrics.jsonl the step and what the panels show."""
    names = {name for _, name, _ in PANELS}
    lines = [{key: line[key] for key in line if key in names} | {"step": line["step"]} for line in read_metrics(folder)]
    return [line for line in lines if len(line) > 1]


def speed_of(folder: Path, *, batch_size: int) -> dict[str, float]:
    """Images per second and seconds of training by metrics.jsonl, which counts those of a stopped run too."""
    lines = [line for line in read_metrics(folder) if "images_per_second" in line]
    steps = [0, *(line["step"] for line in lines)]
    seconds = [
        (step - before) * batch_size / line["images_per_second"]
        for before, step, line in zip(steps[:-1], steps[1:], lines, strict=True)
    ]
    rates = [line["images_per_second"] for line in lines]
    return {"images_per_s": median(rates), "training_s": sum(seconds)}


def train_and_measure(config: RunConfig, folder: Path, *, test: str, amounts: Amounts, device: str) -> dict[str, Any]:
    """One stage: trained, or taken up again where it was stopped, and scored as `qlip eval` scores it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    export = run_recipe(config, folder=folder, accept_changes=True)  # another machine has other workers
    results = run_evals(export, EvalRequest(data=test, max_samples=amounts.samples), device=device)
    console.print(f"{config.recipe}:")
    print_results(results)
    stage = {
        "recipe": config.recipe,
        "steps": config.trainer.steps,
        "batch_size": config.data.batch_size,
        "num_workers": config.data.num_workers,
        **speed_of(folder / "metrics.jsonl", batch_size=config.data.batch_size),
        "figures": {key: value for result in results for key, value in result["figures"].items()},
        "cards": {result["eval"]: without_paths(result["card"]) for result in results},
        "curve": curve_of(folder / "metrics.jsonl"),
    }
    if device == "cuda":
        stage["peak_gb"] = torch.cuda.max_memory_allocated() / BYTES_PER_GB
    return stage


def run_scenes(out: Path, *, device: str, tiny: bool, processes: int = 0) -> dict[str, Any]:
    """Paint, train, evaluate; writes `scenes_small.json`, `.svg` and a picture of each stage anew after each.

    Data and run folders stay under `out`/work, where a stopped training goes on. `processes` paint, 0 is one per core.
    """
    amounts = TINY if tiny else FULL
    image_size = 32 if tiny else find_recipe(STAGES["stage1"]).model.image_size
    work = out / "work"
    train, test = write_data(work / "data", amounts, image_size=image_size, processes=processes or cores())
    record = header("scenes", device=device, tiny=tiny) | {
        "train_scenes": amounts.folders * amounts.scenes,
        "test_scenes": amounts.test_scenes,
        "image_size": image_size,
        "stages": {},
        "finished": False,
    }
    init = ""
    for stage, name in STAGES.items():
        config = stage_config(name, train=train, test=test, device=device, amounts=amounts, init=init, tiny=tiny)
        folder = work / stage
        record["stages"][stage] = train_and_measure(config, folder, test=test, amounts=amounts, device=device)
        init = str(folder / "export")
        picture = folder / "samples" / f"step_{config.trainer.steps:08d}.png"
        shutil.copyfile(picture, out / f"scenes_small_{stage}.png")
        if stage == "stage2":
            figures = (record["stages"][name]["figures"] for name in STAGES)
            record |= {"stage_2": stage_2_changes(*figures), "finished": True}
        write_record(out / "scenes_small.json", record)
        draw_curves(record, out / "scenes_small.svg")
    return record


def draw_curves(record: dict[str, Any], path: Path) -> None:
    """A panel per term, from what the record holds."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    for panel, (stage, name, title) in zip(figure.subplots(2, 4).flat, PANELS, strict=True):
        lines = [line for line in record["stages"].get(stage, {}).get("curve", []) if line.get(name) is not None]
        style = "o-" if name == "top1" else "-"
        panel.plot([line["step"] for line in lines], [line[name] for line in lines], style, linewidth=1, markersize=3)
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("step", fontsize=8)
        panel.tick_params(labelsize=8)
        if name.endswith("mse"):
            panel.set_yscale("log")
    temporary = path.with_suffix(".tmp")
    figure.savefig(temporary, format="svg", metadata={"Date": None})
    temporary.replace(path)
