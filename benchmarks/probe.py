"""What the gradient probe of stage 1 (Fig 5) adds to the step that it measures in.

.venv/bin/python benchmarks/probe.py      # minutes on two cores; writes benchmarks/results/probe_<device>.json

Steps with and without the probe take turns on the same model and batch, forward and backward without an optimizer. On
a CPU in float32 on one thread, in seconds of processor time, which a busy machine does not stretch; on a GPU in bf16
autocast, in seconds on the clock. The extra is the median over rounds of a pair's difference, its share the median of a
pair's ratio; `below_1_percent_from` is the smallest `task.probe_every` at which the mean step is at most 1 % longer.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from qlip.apps.demo import machine
from qlip.core.log import console
from qlip.engine.interfaces import Batch
from qlip.models.qlip.modeling import QLIPModel
from qlip.recipes.model import ModelConfig, TowerSize
from qlip.tasks.align import AlignConfig, AlignTask

RESULTS = Path(os.environ.get("OUT", Path(__file__).parent / "results"))
SMALL = TowerSize(hidden_size=384, num_layers=6, num_heads=6, intermediate_size=1024)
SMALL_TEXT = TowerSize(hidden_size=256, num_layers=6, num_heads=4, intermediate_size=1024)
SIZES = {
    "S-16-128": ModelConfig(image_size=128, encoder=SMALL, decoder=SMALL, text=SMALL_TEXT, projection_dim=256),
    "B-16-256": ModelConfig(),
}
BATCH = {"cpu": {"S-16-128": 8, "B-16-256": 2}, "cuda": {"S-16-128": 512, "B-16-256": 128}}
CLOCK = {"cpu": time.process_time, "cuda": time.perf_counter}
ROUNDS = {"cpu": {"S-16-128": 9, "B-16-256": 3}, "cuda": {"S-16-128": 30, "B-16-256": 30}}


def random_batch(config: ModelConfig, num: int, device: str) -> Batch:
    """Noise and texts of full length."""
    ids = torch.randint(1, 40_000, (num, config.context_length))
    ids[:, -1] = 49_407  # end of text
    batch: dict[str, Tensor] = {
        "pixel_values": torch.randn(num, 3, config.image_size, config.image_size),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
    }
    return {name: value.to(device) for name, value in batch.items()}


def seconds_of_step(task: AlignTask, batch: Batch, step: int, device: str) -> float:
    """Forward and backward, waited for."""
    started = CLOCK[device]()
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        terms = task.loss(task.phases(step)[0], batch, step)
    torch.stack([value.float() for name, value in terms.items() if name.endswith("_loss")]).sum().backward()
    if device == "cuda":
        torch.cuda.synchronize()
    task.model.zero_grad(set_to_none=True)
    return CLOCK[device]() - started


def measure(size: str, device: str) -> dict[str, Any]:
    """One row; the first step of each kind is not counted."""
    config, num = SIZES[size], BATCH[device][size]
    model = QLIPModel(config.build_config()).to(device).train()
    plain, probing = AlignTask(model, AlignConfig()), AlignTask(model, AlignConfig(probe_every=1))
    batch = random_batch(config, num, device)
    pairs = []
    for step in range(ROUNDS[device][size] + 1):
        order = (plain, probing) if step % 2 else (probing, plain)
        seconds = {task is probing: seconds_of_step(task, batch, step, device) for task in order}
        console.print(f"{size}  round {step}: plain {seconds[False]:.3f} s, with probe {seconds[True]:.3f} s")
        pairs.append((seconds[False], seconds[True]))
    pairs = pairs[1:]
    shares = [probed / without - 1 for without, probed in pairs]
    return {
        "size": size,
        "batch": num,
        "step_s": median(without for without, _ in pairs),
        "extra_s": median(probed - without for without, probed in pairs),
        "extra_share": median(shares),
        "extra_share_range": [min(shares), max(shares)],
        "rounds": len(pairs),
        "below_1_percent_from": max(1, math.ceil(median(shares) / 0.01)),
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = options.device
    torch.manual_seed(0)
    if device == "cpu":
        torch.set_num_threads(1)
    rows = [measure(size, device) for size in options.sizes]
    for row in rows:
        console.print(f"{row['size']}: the probe adds {row['extra_share']:.1%} to its step")
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["benchmarks/probe.py", *sys.argv[1:]]),
        "machine": machine() | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}),
        "threads": torch.get_num_threads(),
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True, parents=True)
    rounded = json.loads(json.dumps(result), parse_float=lambda digits: float(f"{float(digits):.4g}"))
    (RESULTS / f"probe_{device}.json").write_text(json.dumps(rounded, indent=1) + "\n")


if __name__ == "__main__":
    main()
