"""Rate of a stage-1 step of B-16-256 in several ways, against the rate of a large matrix product (`train.py`, step)."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from encode import matrix_product_flops
from memory import predicted_bytes, random_batch, trainer_of
from qlip.apps.check_measure import Variant, measure, training_flops
from qlip.core.log import console
from qlip.engine.interfaces import Batch
from qlip.engine.trainer import Trainer
from qlip.models.qlip.modeling import QLIPModel
from qlip.recipes import find_recipe
from qlip.recipes.model import ModelConfig, TowerSize
from qlip.recipes.run import RunConfig
from train_parts.record import header, write_record

RECIPE = "qlip_b_16_256"
REQUIRED_SHARE = 0.35  # of the matrix product's rate, what `qlip check` assumes
MIN_STEPS = 3
TINY_TOWER = TowerSize(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=48)
BYTES_PER_GB = 1e9


@dataclass(kw_only=True, slots=True, frozen=True)
class Job:
    """One way of doing a step."""

    batch_size: int
    """Pairs per micro-batch."""
    micro_batches: int = 1
    """Several are two passes each (GradCache), with the gradient of the joined batch."""
    compiled: bool = True
    """`trainer.compile`."""
    recomputed: bool = True
    """`trainer.activation_checkpointing`."""

    @property
    def mode(self) -> str:
        """`compiled, recomputed`."""
        return f"{'compiled' if self.compiled else 'eager'}, {'recomputed' if self.recomputed else 'kept'}"


JOBS = (  # the most telling first: what time does not allow is left out
    Job(batch_size=512),
    Job(batch_size=128, recomputed=False),
    Job(batch_size=512, compiled=False),
    Job(batch_size=128, compiled=False, recomputed=False),
    Job(batch_size=512, micro_batches=4),
    Job(batch_size=128, micro_batches=4, recomputed=False),
    Job(batch_size=1024),
    Job(batch_size=192, recomputed=False),
    Job(batch_size=256),
    Job(batch_size=64, recomputed=False),
)
TINY_JOBS = (  # none is compiled, which takes a CPU a minute whatever the size
    Job(batch_size=8, compiled=False),
    Job(batch_size=8, compiled=False, recomputed=False),
    Job(batch_size=8, micro_batches=4, compiled=False),
)


def recipe_config(device: str, *, tiny: bool) -> RunConfig:
    """The paper's stage 1 in one process, each step one micro-batch; tiny: with towers of a block."""
    config = find_recipe(RECIPE)
    config.data.global_batch_size = 0
    config.trainer.device, config.trainer.parallel = device, "none"
    if tiny:
        config.model = ModelConfig(
            image_size=32, patch_size=8, encoder=TINY_TOWER, decoder=TINY_TOWER, text=TINY_TOWER, projection_dim=32
        )
    return config


class Costs:
    """FLOPs and memory of jobs by the arithmetic of `qlip check`."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self._variants = {
            recomputed: measure("", _with(config, recomputed=recomputed), perceptual=True, num_gpus=1)
            for recomputed in (False, True)
        }

    def _variant(self, job: Job) -> Variant:
        variant = self._variants[job.recomputed]
        spread = replace(variant.plan.spread, global_batch=job.batch_size * job.micro_batches)
        return replace(variant, plan=replace(variant.plan, spread=spread))

    def computed_flops(self, job: Job) -> float:
        """Per picture: all that is computed, recomputation and the first of two passes included."""
        config = replace(self.config, data=replace(self.config.data, batch_size=job.batch_size))
        return sum(training_flops(self._variant(job), config).values())

    def needed_flops(self, job: Job) -> float:
        """Per picture: what no way of computing the step can leave out."""
        return self.computed_flops(replace(job, micro_batches=1, recomputed=False))

    def predicted_gb(self, job: Job) -> float:
        """Peak memory without the allocator's reserve."""
        return predicted_bytes(self._variant(job), job.batch_size) / BYTES_PER_GB


def _with(config: RunConfig, *, recomputed: bool, compiled: bool = False) -> RunConfig:
    trainer = replace(config.trainer, activation_checkpointing=recomputed, compile=compiled)
    return replace(config, trainer=trainer)


def pinned(batch: Batch) -> Batch:
    """In page-locked memory, as the loader hands it out; steps copy it to the GPU."""
    return {name: x.pin_memory() if isinstance(x, Tensor) else x for name, x in batch.items()}


def seconds_of_step(trainer: Trainer, batches: list[Batch], device: str) -> float:
    """One optimizer step, waited for."""
    started = time.perf_counter()
    if not trainer.train_step(batches):
        raise RuntimeError("a step was not finite")
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure_job(job: Job, config: RunConfig, costs: Costs, *, device: str, peak: float, seconds: float) -> dict:
    """A row; the first step, which may compile, and the second are not counted among the timed ones."""
    torch._dynamo.reset()  # every size is compiled for itself, as in a run
    with tempfile.TemporaryDirectory() as folder:
        changed = _with(config, recomputed=job.recomputed, compiled=job.compiled)
        trainer = trainer_of(changed, Path(folder), perceptual=True)
        model = trainer.modules["model"]
        assert isinstance(model, QLIPModel)
        batch = random_batch(model, job.batch_size)
        batches = [pinned(batch) if device == "cuda" else batch] * job.micro_batches
        first = seconds_of_step(trainer, batches, device)
        seconds_of_step(trainer, batches, device)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times: list[float] = []
        while len(times) < MIN_STEPS or sum(times) < seconds:
            times.append(seconds_of_step(trainer, batches, device))
    images_per_s = job.batch_size * job.micro_batches / median(times)
    row = {
        "images_per_s": images_per_s,
        "step_s": median(times),
        "step_s_range": [min(times), max(times)],
        "steps": len(times),
        "first_step_s": first,
        "needed_gflop_per_image": costs.needed_flops(job) / 1e9,
        "computed_gflop_per_image": costs.computed_flops(job) / 1e9,
        "share_of_peak": images_per_s * costs.needed_flops(job) / peak,
        "share_of_peak_computed": images_per_s * costs.computed_flops(job) / peak,
    }
    if device == "cuda":
        row |= {"peak_gb": torch.cuda.max_memory_allocated() / BYTES_PER_GB, "predicted_gb": costs.predicted_gb(job)}
    return row


def described(job: Job) -> dict[str, Any]:
    """What a row is of."""
    return {"mode": job.mode, "batch_size": job.batch_size, "micro_batches": job.micro_batches}


def compare(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The best share of the peak, and what several micro-batches cost beside one of the same kind and size."""
    measured = [row for row in rows if "failed" not in row]
    single = {(row["mode"], row["batch_size"]): row for row in measured if row["micro_batches"] == 1}
    found: dict[str, Any] = {"required_share": REQUIRED_SHARE}
    if single:
        best = max(single.values(), key=lambda row: row["share_of_peak"])
        found |= {name: best[name] for name in ("mode", "batch_size", "share_of_peak")}
        found["reached"] = best["share_of_peak"] >= REQUIRED_SHARE
    found["accumulation"] = [
        {
            "mode": row["mode"],
            "batch_size": row["batch_size"],
            "micro_batches": row["micro_batches"],
            "time_x_single": one["images_per_s"] / row["images_per_s"],
            "flops_x_single": row["computed_gflop_per_image"] / one["computed_gflop_per_image"],
        }
        for row in measured
        if row["micro_batches"] > 1 and (one := single.get((row["mode"], row["batch_size"])))
    ]
    return found


def verdict(best: dict[str, Any]) -> str:
    """The line that says whether the share is reached."""
    if "share_of_peak" not in best:
        return f">= {best['required_share']:.0%} of the matrix product's rate: not measured"
    kind = "reached" if best["reached"] else "NOT reached"
    return (
        f">= {best['required_share']:.0%} of the matrix product's rate: {kind}, {best['share_of_peak']:.1%} "
        f"({best['mode']}, {best['batch_size']} pairs at once)"
    )


def run_step(
    path: Path, *, device: str, tiny: bool, time_left: Callable[[], float], jobs: tuple[Job, ...] | None = None
) -> dict[str, Any]:
    """Measure, print, and write `path` anew after every row."""
    config = recipe_config(device, tiny=tiny)
    costs = Costs(config)
    jobs = jobs or (TINY_JOBS if tiny else JOBS)
    peak = matrix_product_flops(device, torch.bfloat16)
    rows: list[dict[str, Any]] = []
    record: dict[str, Any] = {"recipe": RECIPE, "matrix_product_tflop_per_s": peak / 1e12, "finished": False}
    record = header("step", device=device, tiny=tiny) | record
    longest = 0.0
    for job in jobs:
        started = time.monotonic()
        row = described(job)
        if time_left() < 1.2 * longest:
            row["failed"] = "left out: no time"
        else:
            try:
                row |= measure_job(job, config, costs, device=device, peak=peak, seconds=0.0 if tiny else 6.0)
            except Exception as error:  # out of memory, or a compiler's: the other rows still count
                row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"[:200]
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        longest = max(longest, time.monotonic() - started)
        rows.append(row)
        console.print(f"{job.mode}, {job.micro_batches} x {job.batch_size}: {_said(row)}")
        record |= {"rows": rows, "best": compare(rows)}
        write_record(path, record)
    record["finished"] = True
    write_record(path, record)
    console.print(verdict(record["best"]))
    return record


def _said(row: dict[str, Any]) -> str:
    if "failed" in row:
        return row["failed"]
    return f"{row['images_per_s']:.0f} images/s, {row['share_of_peak']:.1%} of the matrix product's rate"
