"""Peak memory and seconds of the contrastive losses in chunks against the whole matrix of logits.

.venv/bin/python benchmarks/contrastive.py       # 20 GB, a quarter of an hour; writes results/contrastive_cpu.json
.venv/bin/python benchmarks/contrastive.py --batch 512 --chunks 64     # quick, for a look at the script
.venv/bin/python benchmarks/contrastive.py --device cuda

One run is a forward and a backward pass over `batch` pairs of `width` unit vectors in float32 at the highest
temperature, in a process of its own, after a small one that is not counted. Peaks are what it needs above what was held
before, its gradients included: on a CPU resident memory, on a GPU what the allocator says. CPU seconds are those of all
threads of the process; other programs disturb them less than seconds. The variants of a loss take turns, `--rounds`
times: the highest peak and the median times count. Gradients of images, texts, temperature and bias are compared with
those of the whole matrix and with those of chunks in float64: the largest difference over the largest entry.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from qlip.core.log import console
from qlip.losses.contrastive import clip_loss, siglip_loss

RESULTS = Path(os.environ.get("OUT", Path(__file__).parent / "results"))
LOSSES = {"clip": clip_loss, "siglip": siglip_loss}
LOG_SCALE, BIAS = 4.6052, -10.0  # ln 100, where logits are largest; SigLIP's first bias
PAIR_COSINE = 0.15  # with 32,768 pairs of 512 numbers CLIP's loss is then about half of chance
# (b, b) tensors at the peak, and some more: two softmaxes, a gradient on either side of one; input, buffer, gradient
WHOLE_MATRICES = {"clip": 4.1, "siglip": 3.2}
BYTES_PER_GB = 1e9


def make_inputs(loss: str, *, batch: int, width: int, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Leaves, the same numbers in every process: images and texts (b, e), temperature and, for SigLIP, bias."""
    generator = torch.Generator().manual_seed(0)
    texts, noise = (F.normalize(torch.randn(batch, width, generator=generator), dim=-1) for _ in range(2))
    images = F.normalize(PAIR_COSINE * texts + (1 - PAIR_COSINE**2) ** 0.5 * noise, dim=-1)
    inputs = {"images": images, "texts": texts, "logit_scale": torch.tensor(LOG_SCALE)}
    if loss == "siglip":
        inputs["logit_bias"] = torch.tensor(BIAS)
    return {name: x.to(device, dtype).requires_grad_(True) for name, x in inputs.items()}


def resident_bytes(field: str) -> int:
    """VmRSS now, or VmHWM since the last reset, of this process; getrusage would start from the parent's."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024


def peak_memory(run: Callable[[], None], device: str) -> float:
    """GB that one call needs at its peak above what was held before it (Linux)."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / BYTES_PER_GB
    ctypes.CDLL(None).malloc_trim(0)
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest so far
    run()
    return (resident_bytes("VmHWM") - before) / BYTES_PER_GB


def measure(loss: str, chunk_size: int, dtype: torch.dtype, options: argparse.Namespace) -> dict[str, float]:
    """The child process: one counted run; its gradients go to the file that `--gradients` names."""
    torch.set_num_threads(options.threads)

    def run(batch: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        inputs = make_inputs(loss, batch=batch, width=options.width, device=options.device, dtype=dtype)
        figures: dict[str, float] = {}

        def forward_and_backward() -> None:
            started, cpu_started = time.perf_counter(), time.process_time()
            value = LOSSES[loss](*inputs.values(), chunk_size=chunk_size)
            value.backward()
            figures["loss"] = value.item()  # also waits for a GPU
            if options.device == "cuda":
                torch.cuda.synchronize()
            figures["seconds"] = time.perf_counter() - started
            figures["cpu_seconds"] = time.process_time() - cpu_started

        figures["peak_gb"] = peak_memory(forward_and_backward, options.device)
        return inputs, figures

    run(64)
    inputs, figures = run(options.batch)
    save_file({name: x.grad for name, x in inputs.items() if x.grad is not None}, options.gradients)
    return figures


def refuse_if_too_large(loss: str, options: argparse.Namespace) -> None:
    """End with one line instead of being killed by the system halfway."""
    needed = WHOLE_MATRICES[loss] * 4 * options.batch**2 + 4 * 4 * options.batch * options.width + BYTES_PER_GB
    free = torch.cuda.mem_get_info()[0] if options.device == "cuda" else psutil.virtual_memory().available
    if needed > free:
        half = options.batch // 2
        sys.exit(
            f"the whole matrix needs {needed / BYTES_PER_GB:.1f} GB on the {options.device} and "
            f"{free / BYTES_PER_GB:.1f} are free: close other programs or give a smaller batch, such as --batch {half}"
        )


def measure_in_process(
    loss: str, chunk_size: int, gradients: Path, options: argparse.Namespace, *, dtype: str = "float32"
) -> dict[str, float]:
    """One run in a fresh interpreter."""
    size = ["--batch", str(options.batch), "--width", str(options.width), "--device", options.device]
    size += ["--threads", str(options.threads)]
    command = [sys.executable, __file__, *size, "--one", loss, str(chunk_size), dtype, "--gradients", str(gradients)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        sys.exit(
            f"{loss} with chunks of {chunk_size} ended with code {done.returncode}: {said}: give a smaller --batch"
        )
    return json.loads(done.stdout.splitlines()[-1])


def differences(actual: Path, expected: Path) -> dict[str, float]:
    """Of every gradient, the largest difference over the largest entry."""
    ours, theirs = load_file(actual), load_file(expected)
    return {name: float((ours[name] - x).abs().max() / x.abs().max()) for name, x in theirs.items()}


def measure_loss(loss: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for the whole matrix (chunk_size 0) and one for every chunk size."""
    runs: dict[int, list[dict[str, float]]] = {size: [] for size in [0, *options.chunks]}
    compared: dict[int, dict[str, dict[str, float]]] = {}
    refuse_if_too_large(loss, options)
    with tempfile.TemporaryDirectory() as folder:
        exact, whole, chunked = (Path(folder) / f"{name}.safetensors" for name in ("exact", "whole", "chunked"))
        for number in range(options.rounds):
            for size, figures in runs.items():
                gradients = chunked if size else whole
                figures.append(measure_in_process(loss, size, gradients, options))
                console.print(f"{loss} {size}  round {number + 1}: {json.dumps(figures[-1])}")
                if not exact.exists():
                    measure_in_process(loss, options.chunks[0], exact, options, dtype="float64")
                compared[size] = {"gradients_from_float64": differences(gradients, exact)}
                if size:
                    compared[size]["gradients_from_whole"] = differences(gradients, whole)
    rows: list[dict[str, Any]] = []
    for size, figures in runs.items():
        row = {"loss_function": loss, "chunk_size": size, "loss": figures[0]["loss"]}
        row["peak_gb"] = max(run["peak_gb"] for run in figures)
        row |= {name: median(run[name] for run in figures) for name in ("seconds", "cpu_seconds")}
        for name in ("peak_gb", "seconds", "cpu_seconds") if size else ():
            row[f"{name}_x_whole"] = row[name] / rows[0][name]
        rows.append(row | compared[size])
    return rows


def print_rows(rows: list[dict[str, Any]], *, title: str) -> None:
    """One line a row; in brackets the ratio to the whole matrix, last how far the worst gradient is from two others."""
    table = Table(title=title, title_justify="left", box=None)
    for name in ("loss", "chunk", "peak GB", "seconds", "CPU seconds", "float64", "whole"):
        table.add_column(name, justify="left" if name == "loss" else "right", no_wrap=True)
    for row in rows:
        cells = [row["loss_function"], str(row["chunk_size"] or "whole")]
        for name in ("peak_gb", "seconds", "cpu_seconds"):
            ratio = row.get(f"{name}_x_whole")
            cells.append(f"{row[name]:.3g}" + (f" ({ratio:.2f})" if ratio else ""))
        for name in ("gradients_from_float64", "gradients_from_whole"):
            cells.append(f"{max(row[name].values()):.0e}" if name in row else "")
        table.add_row(*cells)
    console.print(table)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32_768)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--chunks", type=int, nargs="+", default=[256, 2048])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--gradients", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        loss, chunk_size, dtype = options.one
        print(json.dumps(measure(loss, int(chunk_size), getattr(torch, dtype), options)))
        return
    from qlip.apps.demo import machine  # here: the processes that are measured stay small

    for loss in LOSSES:
        refuse_if_too_large(loss, options)
    rows = [row for loss in LOSSES for row in measure_loss(loss, options)]
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["benchmarks/contrastive.py", *sys.argv[1:]]),
        "machine": machine() | ({"gpu": torch.cuda.get_device_name()} if options.device == "cuda" else {}),
        "versions": {"torch": version("torch"), "qlip": version("qlip")},
        "threads": options.threads,
        "batch": options.batch,
        "width": options.width,
        "rounds": options.rounds,
        "rows": rows,
    }
    print_rows(rows, title=f"{options.batch:,} pairs of width {options.width} on the {options.device}")
    RESULTS.mkdir(exist_ok=True, parents=True)
    rounded = json.loads(json.dumps(result), parse_float=lambda digits: float(f"{float(digits):.4g}"))
    (RESULTS / f"contrastive_{options.device}.json").write_text(json.dumps(rounded, indent=1) + "\n")


if __name__ == "__main__":
    main()
