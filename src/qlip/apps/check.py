"""`qlip check RECIPE`: what a run needs, without a GPU: parameters, FLOPs, memory, batch sizes, time, missing files.

The recipe's own task is built without memory and a step of it is measured (`engine/step_cost.py`); `engine/planner.py`
turns that into bytes per GPU and hours. `docs/check.md` says how, and how far off it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.table import Table

from qlip.apps.check_files import meta_model, not_ready
from qlip.apps.check_measure import Part, Variant, measure, parts_of, training_flops, variants_of
from qlip.core.errors import UserError
from qlip.core.log import console
from qlip.engine.planner import Speed, logit_bytes, power_of_two, suggested_chunk
from qlip.recipes.run import RunConfig

BYTES_PER_GB = 1e9


@dataclass(kw_only=True, slots=True)
class CheckOptions:
    """What `qlip check RECIPE` takes: the recipe's fields and the machines it shall run on."""

    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    """The recipe."""
    gpus: int = 1
    """GPUs of the run, one process each."""
    vram: float = 80.0
    """Memory of one GPU in GB (10^9 bytes)."""
    mfu: float = 0.35
    """Share of the peak that training is assumed to reach."""
    tflops: float = 989.0
    """Peak of one GPU for bf16 in TFLOP/s (dense): 989 H100, 312 A100. Float32 is taken to have half of it."""


@dataclass(kw_only=True, slots=True)
class Report:
    """What `qlip check` found."""

    options: CheckOptions
    """What was asked."""
    parts: list[Part]
    """Parameters and FLOPs."""
    variants: list[Variant]
    """The recipe as it is comes first."""
    flops: dict[str, float]
    """Of a training step per sample, by dtype: recomputation, second passes, contrast and R1's share included."""
    seconds: float
    """Estimated time of the whole run."""
    problems: list[str]
    """What is missing, with remedies."""


def check(options: CheckOptions) -> Report:
    """Measure the recipe. Raises `UserError` for impossible options; missing files are part of the report."""
    config = options.run
    _refuse_impossible(options)
    _, problems = meta_model(config)
    problems += not_ready(config, num_gpus=options.gpus)
    variants = [
        measure(name, changed, perceptual=perceptual, num_gpus=options.gpus)
        for name, changed, perceptual in variants_of(config)
    ]
    flops = training_flops(variants[0], config)
    samples = variants[0].plan.spread.samples_per_gpu(config.data.batch_size)
    seconds = Speed(tflops=options.tflops, mfu=options.mfu).seconds(flops) * samples * config.trainer.steps
    return Report(
        options=options,
        parts=parts_of(variants[0].run),
        variants=variants,
        flops=flops,
        seconds=seconds,
        problems=problems,
    )


def _refuse_impossible(options: CheckOptions) -> None:
    for name in ("gpus", "vram", "mfu", "tflops"):
        if not 0 < getattr(options, name) < float("inf"):
            raise UserError(f"--{name} is {getattr(options, name)}: give more than 0")
    for name, least in (("batch_size", 1), ("global_batch_size", 0)):
        if getattr(options.run.data, name) < least:
            raise UserError(f"data.{name} is {getattr(options.run.data, name)}: give at least {least}")


def run_check(options: CheckOptions) -> None:
    """Measure the recipe and print the report."""
    print_report(check(options))


def print_report(report: Report) -> None:
    """Tables of parts, memory and batch sizes, then the step, the time and what is missing."""
    config = report.options.run
    console.print(_parts_table(report))
    console.print(_memory_table(report))
    console.print(_batches_table(report))
    for line in (*_step_lines(report), *(f"not ready: {problem}" for problem in report.problems)):
        console.print(line)
    if not report.problems:
        console.print(f"ready: qlip train {config.recipe} finds its files")


def _parts_table(report: Report) -> Table:
    table = Table(title=f"{report.options.run.recipe}: parts", title_justify="left")
    table.add_column("part")
    for name in ("parameters", "trained", "GFLOP forward"):
        table.add_column(name, justify="right")
    for part in report.parts:
        table.add_row(part.name, f"{part.parameters:,}", f"{part.trained:,}", f"{part.flops / 1e9:.2f}")
    table.add_section()
    network = [part for part in report.parts if part.name not in ("discriminator", "LPIPS")]
    total, trained = sum(part.parameters for part in network), sum(part.trained for part in network)
    table.add_row("model in all", f"{total:,}", f"{trained:,}", f"{sum(part.flops for part in network) / 1e9:.2f}")
    return table


def _memory_table(report: Report) -> Table:
    options, variant = report.options, report.variants[0]
    batch_size = options.run.data.batch_size
    title = f"memory of one of {options.gpus} GPUs at batch {batch_size}, {variant.name}"
    table = Table(title=title, title_justify="left")
    table.add_column("held for")
    table.add_column("GB", justify="right")
    for name, size in variant.plan.parts(batch_size).items():
        if size:
            table.add_row(name, f"{size / BYTES_PER_GB:.2f}")
    table.add_section()
    total = variant.plan.total(batch_size) / BYTES_PER_GB
    verdict = "fits" if total <= options.vram else "does NOT fit"
    table.add_row(f"in all: {verdict} {options.vram:g} GB", f"{total:.2f}")
    return table


def _batches_table(report: Report) -> Table:
    table = Table(title=f"pictures at once on a GPU of {report.options.vram:g} GB", title_justify="left")
    table.add_column("", no_wrap=True)
    for name in ("MB each", "kept MB", "largest", "power of 2"):
        table.add_column(name, justify="right")
    for variant in report.variants:
        largest = variant.plan.largest_batch(report.options.vram * BYTES_PER_GB)
        table.add_row(
            variant.name,
            f"{variant.plan.bytes_per_sample(report.options.run.data.batch_size) / 1e6:.1f}",
            f"{variant.plan.moments.saved / 1e6:.1f}",
            str(largest),
            str(power_of_two(largest) if largest else 0),
        )
    return table


def _step_lines(report: Report) -> list[str]:
    options, plan = report.options, report.variants[0].plan
    config, spread = options.run, plan.spread
    size = config.data.batch_size
    kind = f", {spread.parallel}" if options.gpus > 1 else ""
    lines = [
        f"a step: {spread.all_samples(size):,} pictures = {options.gpus} (GPUs{kind}) x "
        f"{spread.micro_batches(size)} (micro-batches) x {size}"
    ]
    if plan.contrast.width:
        rows, columns = spread.samples_per_gpu(size), spread.all_samples(size)
        taken = logit_bytes(rows, columns, chunk=plan.contrast.chunk) / BYTES_PER_GB
        chunk = suggested_chunk(rows, columns)
        advice = f"--task.contrastive-chunk {chunk}" if chunk else "0 (all at once)"
        lines.append(
            f"contrast: {rows:,} x {columns:,} pairs; with contrastive_chunk {plan.contrast.chunk} logits take "
            f"{taken:.2f} GB; suggested: {advice}"
        )
    total = sum(report.flops.values())
    flops = ", ".join(f"{value / total:.0%} in {name}" for name, value in report.flops.items())
    lines.append(f"training takes {total / 1e9:.4g} GFLOP a picture ({flops})")
    lines.append(
        f"time: about {_duration(report.seconds)} for {config.trainer.steps:,} steps; an estimate from "
        f"{options.mfu:.0%} of {options.tflops:g} TFLOP/s in bf16 and half of it in float32"
    )
    if config.trainer.compile:
        lines.append("trainer.compile is on: compiled blocks hold somewhat less than counted here")
    return lines


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86_400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} seconds"
