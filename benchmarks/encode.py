"""Images per second and peak memory of encoding and decoding at the paper's sizes, against a plain implementation.

.venv/bin/python benchmarks/encode.py      # half an hour on two cores; writes benchmarks/results/encode_<device>.json
.venv/bin/python benchmarks/encode.py --sizes B-16-256 --device cuda

The modes of a size take turns, call by call, so that a slow minute of the machine slows them all; a rate is the median
over the calls, `x plain` the median over the rounds of the ratio to the plain mode of the same precision. `plain` is
attention with the softmax matrix written out (attn_implementation="eager"), all else equal. Peaks are what one call
needs above what was held before it, in a process of its own: on a CPU resident memory, with glibc told to map every
large tensor on its own, so that what is freed goes back; on a GPU what the allocator says. Utilisation is counted FLOPs
over the rate of a large matrix product, measured in the same run.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from qlip.apps.demo import machine
from qlip.core.log import console
from qlip.models import QLIPDecoder, QLIPDecoderConfig, QLIPVisionConfig, QLIPVisionModel

RESULTS = Path(os.environ.get("OUT", Path(__file__).parent / "results"))
LARGE = {"hidden_size": 1024, "intermediate_size": 2730, "num_hidden_layers": 24, "num_attention_heads": 16}
SIZES: dict[str, dict[str, int]] = {
    "B-16-256": {"image_size": 256, "patch_size": 16},
    "B-8-256": {"image_size": 256, "patch_size": 8},
    "L-14-392": {"image_size": 392, "patch_size": 14, **LARGE},
}
BATCH = {"cpu": {"B-16-256": 8, "B-8-256": 2, "L-14-392": 2}, "cuda": {"B-16-256": 256, "B-8-256": 64, "L-14-392": 64}}
MODES = ("fp32", "fp32 plain", "fp32 compiled", "bf16", "bf16 plain", "bf16 compiled")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROUNDS = {"cpu": 5, "cuda": 30}
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # costs time, so rates are measured without it
BYTES_PER_MB = 1e6


class Encode(nn.Module):
    """Pictures to bits."""

    def __init__(self, size: str, attention: str) -> None:
        super().__init__()
        width = SIZES[size].get("hidden_size", 768)
        config = QLIPVisionConfig(hidden_size_post_q=width, attn_implementation=attention, **SIZES[size])
        self.model = QLIPVisionModel(config)

    def example(self, batch: int) -> Tensor:
        """(b, 3, S, S)."""
        side = self.model.config.image_size
        return torch.randn(batch, 3, side, side)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(b, 3, S, S) -> (b, n, 28) bool."""
        return self.model.quantize(pixel_values).bits


class Decode(nn.Module):
    """Latents behind the bottleneck to pictures; the bottleneck's upper half is a thousandth of the work."""

    def __init__(self, size: str, attention: str) -> None:
        super().__init__()
        self.model = QLIPDecoder(QLIPDecoderConfig(attn_implementation=attention, **SIZES[size]))

    def example(self, batch: int) -> Tensor:
        """(b, n, d)."""
        config = self.model.config
        return torch.randn(batch, config.grid_size**2, config.hidden_size)

    def forward(self, latents: Tensor) -> Tensor:
        """(b, n, d) -> (b, 3, S, S)."""
        return self.model(latents)


JOBS = {"encode": Encode, "decode": Decode}


def build(job: str, size: str, attention: str) -> Encode | Decode:
    """With random weights, without the time that initialisation by the rules takes."""
    with torch.device("meta"):
        module = JOBS[job](size, attention)
    module.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.02)
    return module.eval()


def flops_per_image(job: str, size: str) -> float:
    """Multiplications and additions of one picture, attention included."""
    with torch.device("meta"):
        module = JOBS[job](size, "eager").eval()
        example = module.example(1)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(example)
    return float(counter.get_total_flops())


# --- one mode --------------------------------------------------------------------------


def resident_bytes(field: str) -> int:
    """VmRSS now, or VmHWM since the last reset, of this process (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"{field} is not in /proc/self/status")


def peak_memory(run: Any, device: str) -> float:
    """MB that one call needs at its peak above what was held before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / BYTES_PER_MB
    ctypes.CDLL(None).malloc_trim(0)
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    run()
    return (resident_bytes("VmHWM") - before) / BYTES_PER_MB


class Mode:
    """A job at a size in one of `MODES`, ready to be called."""

    def __init__(self, job: str, size: str, mode: str, device: str) -> None:
        dtype = DTYPES[mode.split()[0]]
        self.module = build(job, size, "eager" if "plain" in mode else "sdpa").to(device, dtype)
        self.example = self.module.example(BATCH[device][size]).to(device, dtype)
        self.function = torch.compile(self.module, fullgraph=True) if "compiled" in mode else self.module
        self.on_gpu = device == "cuda"

    @torch.inference_mode()
    def seconds(self) -> float:
        """Of one call, waited for."""
        started = time.perf_counter()
        self.function(self.example)
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - started


def measure_peak(job: str, size: str, mode: str, device: str) -> dict[str, float]:
    """MB of the weights, and of a call beyond them; the first call, which may compile, does not count."""
    ready = Mode(job, size, mode, device)
    ready.seconds()
    weights = sum(p.numel() * p.element_size() for p in ready.module.parameters()) / BYTES_PER_MB
    return {"peak_mb": peak_memory(ready.seconds, device), "weights_mb": weights}


def measure_rates(job: str, size: str, modes: list[str], device: str) -> dict[str, list[float]]:
    """Seconds of every call of every mode, taken in turns; the first two of each are not counted."""
    ready = {mode: Mode(job, size, mode, device) for mode in modes}
    for mode in ready.values():
        mode.seconds()
        mode.seconds()
    seconds: dict[str, list[float]] = {mode: [] for mode in modes}
    for number in range(ROUNDS[device]):
        for name, mode in ready.items():
            seconds[name].append(mode.seconds())
        said = ", ".join(f"{name} {times[-1]:.2f} s" for name, times in seconds.items())
        console.print(f"{job} {size}  round {number + 1}: {said}")
    return seconds


@torch.inference_mode()
def matrix_product_flops(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product: the peak that a model could reach."""
    side = 8192 if device == "cuda" else 512  # CPUs without bf16 instructions take minutes for more
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    rates = []
    for _ in range(20 if device == "cuda" else 5):
        started = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        rates.append(2 * side**3 / (time.perf_counter() - started))
    return max(rates)


# --- all rows --------------------------------------------------------------------------------------------------


def peak_in_process(job: str, size: str, mode: str, device: str) -> dict[str, Any]:
    """The peak as a fresh interpreter measures it, or why it could not."""
    command = [sys.executable, __file__, "--peak", job, size, mode, device]
    environment = os.environ | RETURN_MEMORY
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def measure_size(job: str, size: str, device: str, modes: list[str], peaks: dict[str, float]) -> list[dict[str, Any]]:
    """A row for every mode of a job at a size."""
    flops, batch = flops_per_image(job, size), BATCH[device][size]
    rows: dict[str, dict[str, Any]] = {}
    for mode in modes:
        rows[mode] = {"job": job, "size": size, "mode": mode, "batch": batch, "gflop_per_image": flops / 1e9}
        rows[mode] |= peak_in_process(job, size, mode, device)
    usable = [mode for mode, row in rows.items() if "failed" not in row]
    seconds = measure_rates(job, size, usable, device)
    for mode in usable:
        row, times, precision = rows[mode], seconds[mode], mode.split()[0]
        row["images_per_s"] = batch / median(times)
        row["images_per_s_range"] = [batch / max(times), batch / min(times)]
        row["utilisation"] = row["images_per_s"] * flops / peaks[precision]
        if (plain := f"{precision} plain") in usable:
            row["speed_x_plain"] = median(p / t for p, t in zip(seconds[plain], times, strict=True))
            row["peak_x_plain"] = row["peak_mb"] / rows[plain]["peak_mb"]
    return list(rows.values())


def print_rows(rows: list[dict[str, Any]]) -> None:
    """One line a row; the ratios are to the plain row of the same precision."""
    table = Table(title="encode and decode", title_justify="left")
    for name in ("job", "size", "mode", "batch", "images/s", "x plain", "peak MB", "x plain", "of matmul peak"):
        table.add_column(name, justify="left" if name in ("job", "size", "mode") else "right", no_wrap=True)
    for row in rows:
        start = [row["job"], row["size"], row["mode"], str(row["batch"])]
        if "failed" in row:
            table.add_row(*start, row["failed"])
            continue
        ratios = [f"{row[name]:.2f}" if name in row else "" for name in ("speed_x_plain", "peak_x_plain")]
        table.add_row(
            *start, f"{row['images_per_s']:.2f}", ratios[0], f"{row['peak_mb']:.0f}", ratios[1],
            f"{row['utilisation']:.0%}",
        )  # fmt: skip
    console.print(table)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(json.dumps(measure_peak(*options.peak)))
        return
    device = options.device
    peaks = {name: matrix_product_flops(device, dtype) for name, dtype in DTYPES.items()}
    rows = []
    for size in options.sizes:
        for job in options.jobs:
            rows += measure_size(job, size, device, options.modes, peaks)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["benchmarks/encode.py", *sys.argv[1:]]),
        "machine": machine() | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}),
        "threads": torch.get_num_threads(),
        "matrix_product_gflop_per_s": {name: rate / 1e9 for name, rate in peaks.items()},
        "rows": rows,
    }
    print_rows(rows)
    RESULTS.mkdir(exist_ok=True, parents=True)
    rounded = json.loads(json.dumps(result), parse_float=lambda digits: float(f"{float(digits):.4g}"))
    (RESULTS / f"encode_{device}.json").write_text(json.dumps(rounded, indent=1) + "\n")


if __name__ == "__main__":
    main()
