"""Peak memory of real training steps by batch size, with and without LPIPS + GAN, beside what `qlip check` predicts.

.venv/bin/python benchmarks/memory.py                 # on a GPU; writes benchmarks/results/memory_cuda.json and .svg
.venv/bin/python benchmarks/memory.py --recipe qlip_b_16_256 --device cuda --batches 64 128 -- --trainer.no-compile
.venv/bin/python benchmarks/memory.py --device cpu    # a minute: the same code at a tiny size, resident memory only

The shape is that of QLIP's Fig 3: GB over pictures at once. Every point is the trainer's own step (forward, backward,
optimizer) on random pictures and random weights, on which memory does not depend, twice, so that moments exist; the
step is one with R1. Sizes double until memory is exhausted. On a GPU the peak is the allocator's
(`max_memory_allocated`), which the prediction without its reserve should equal; on a CPU it is the resident memory of
the process, libraries and all: a smoke test, not a figure.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

import torch
import torchvision
from matplotlib import pyplot as plt

from qlip.apps.check_files import BesideTask
from qlip.apps.check_measure import Variant, batch_shapes, measure, variants_of
from qlip.apps.demo import machine
from qlip.core.arguments import parse_arguments
from qlip.core.log import console
from qlip.engine.interfaces import Batch
from qlip.engine.trainer import Trainer
from qlip.models.qlip.modeling import QLIPModel
from qlip.recipes import find_recipe
from qlip.recipes.run import RunConfig
from qlip.tasks.align import AlignConfig, AlignTask
from qlip.tasks.reconstruct import ReconstructConfig, ReconstructTask

RESULTS = Path(os.environ.get("OUT", Path(__file__).parent / "results"))
RECIPE = {"cuda": "qlip_b_16_256_stage2", "cpu": "scenes_tiny_stage2"}
BATCHES = {"cuda": tuple(2**k for k in range(13)), "cpu": (4, 8)}
BYTES_PER_GB = 1e9


@dataclass(kw_only=True, slots=True)
class Point:
    """One measured batch size."""

    variant: str
    """What is on or off."""
    batch_size: int
    """Pictures at once."""
    measured_gb: float
    """Peak."""
    predicted_gb: float
    """By `qlip check`, without its reserve."""


def random_vgg(folder: Path) -> Path:
    """torchvision's VGG-16 with random numbers, without its classifier."""
    path = folder / "vgg16.pth"
    torch.save(torchvision.models.vgg16().features.state_dict(prefix="features."), path)
    return path


def random_batch(model: QLIPModel, size: int) -> Batch:
    """Random pictures, and texts that end with the largest id."""
    batch: Batch = {"key": [str(i) for i in range(size)]}
    for name, (shape, dtype) in batch_shapes(model).items():
        batch[name] = torch.randn(size, *shape) if dtype.is_floating_point else torch.ones(size, *shape, dtype=dtype)
    batch["input_ids"] = torch.randint(300, 40_000, batch["input_ids"].shape)
    batch["input_ids"][:, -1] = model.config.text_config.vocab_size - 1
    return batch


def trainer_of(config: RunConfig, folder: Path, *, perceptual: bool) -> Trainer:
    """The trainer on a fresh model, which is made on the CPU as in a run."""
    model = QLIPModel(config.model.build_config())
    if isinstance(config.task, AlignConfig):
        return Trainer(AlignTask(model, config.task), None, config.trainer, folder)  # type: ignore[arg-type]
    task = ReconstructTask(model, config.task)
    if not perceptual:
        task.perceptual = BesideTask("none", lambda x, y: x.new_zeros(len(x)))
    return Trainer(task, None, config.trainer, folder)  # type: ignore[arg-type]


def peak_resident_bytes() -> int:
    """VmHWM of this process since its last reset (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("VmHWM is not in /proc/self/status")


def peak_bytes(trainer: Trainer, batch: Batch, device: str) -> int:
    """Peak of a step on which everything rare is due and moments exist."""
    trainer.train_step([batch])
    trainer.step = 0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        trainer.train_step([batch])
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    trainer.train_step([batch])
    return peak_resident_bytes()


def predicted_bytes(variant: Variant, batch_size: int) -> float:
    """What the planner says is allocated: all parts but the reserve, which the allocator does not count."""
    parts = variant.plan.parts(batch_size)
    return sum(parts.values()) - parts["reserve"]


def measure_variant(
    name: str, config: RunConfig, batches: list[int], device: str, *, perceptual: bool, folder: Path
) -> list[Point]:
    """A point per batch size, until memory is exhausted."""
    variant = measure(name, config, perceptual=perceptual, num_gpus=1)
    trainer = trainer_of(config, folder, perceptual=perceptual)
    model = trainer.modules["model"]
    assert isinstance(model, QLIPModel)
    points = []
    for size in batches:
        predicted = predicted_bytes(variant, size) / BYTES_PER_GB
        try:
            measured = peak_bytes(trainer, random_batch(model, size), device) / BYTES_PER_GB
        except torch.cuda.OutOfMemoryError:
            console.print(f"{name}  {size}: out of memory ({predicted:.2f} GB predicted)")
            break
        points.append(Point(variant=name, batch_size=size, measured_gb=measured, predicted_gb=predicted))
        console.print(f"{name}  {size}: {measured:.2f} GB, {predicted:.2f} GB predicted")
    return points


def run_all(config: RunConfig, batches: list[int], device: str) -> list[Point]:
    """Both variants, one after the other, with random VGG weights where LPIPS is asked for."""
    config = replace(config, data=replace(config.data, global_batch_size=0))
    config.trainer.device, config.trainer.parallel = device, "none"
    points = []
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(config.task, ReconstructConfig) and config.task.perceptual == "lpips":
            config = replace(config, task=replace(config.task, vgg_weights=str(random_vgg(Path(folder)))))
        for name, changed, perceptual in reversed(variants_of(config)):  # the smaller one first
            points += measure_variant(name, changed, batches, device, perceptual=perceptual, folder=Path(folder))
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
    return points


def draw(points: list[Point], path: Path, *, title: str) -> None:
    """GB over pictures at once: measured points, predicted lines."""
    figure, axes = plt.subplots(figsize=(6, 4))
    for colour, name in enumerate(dict.fromkeys(point.variant for point in points)):
        own = [point for point in points if point.variant == name]
        sizes = [point.batch_size for point in own]
        axes.plot(sizes, [point.measured_gb for point in own], "o", color=f"C{colour}", label=f"{name}: measured")
        axes.plot(sizes, [point.predicted_gb for point in own], "-", color=f"C{colour}", label="predicted")
    axes.set(xlabel="pictures at once", ylabel="GB", title=title)
    axes.set_xscale("log", base=2)
    axes.legend()
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--recipe", default="", help="default: B-16 stage 2, on a CPU that of the tiny scenes")
    parser.add_argument("--batches", nargs="+", type=int, help="pictures at once, growing")
    parser.add_argument("fields", nargs=argparse.REMAINDER, help="after --: fields of the recipe, as for qlip train")
    options = parser.parse_args()
    name = options.recipe or RECIPE[options.device]
    fields = [word for word in options.fields if word != "--"]
    config = parse_arguments(RunConfig, fields, prog="memory.py", default=find_recipe(name))
    points = run_all(config, options.batches or list(BATCHES[options.device]), options.device)
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["benchmarks/memory.py", *sys.argv[1:]]),
        "machine": machine() | ({"gpu": torch.cuda.get_device_name()} if options.device == "cuda" else {}),
        "recipe": name,
        "compiled": config.trainer.compile,
        "activation_checkpointing": config.trainer.activation_checkpointing,
        "points": [
            {field: getattr(point, field) for field in ("variant", "batch_size", "measured_gb", "predicted_gb")}
            for point in points
        ],
    }
    RESULTS.mkdir(exist_ok=True, parents=True)
    rounded = json.loads(json.dumps(result), parse_float=lambda digits: float(f"{float(digits):.4g}"))
    (RESULTS / f"memory_{options.device}.json").write_text(json.dumps(rounded, indent=1) + "\n")
    draw(points, RESULTS / f"memory_{options.device}.svg", title=f"{name}: peak memory of a training step")


if __name__ == "__main__":
    main()
