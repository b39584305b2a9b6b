"""Tokens per second of our sampling against transformers' own `generate` on the same weights, and the three heads.

.venv/bin/python benchmarks/generate.py                # two minutes on one core; writes results/generate_cpu.json
.venv/bin/python benchmarks/generate.py --device cuda  # B and XL, bf16, 16 pictures at once

Weights are random; speed does not depend on them. For the comparison a token is one sub-code of 14 bits, so that a
plain `LlamaForCausalLM` with the same trunk, rotary positions and tables (each row with the part of its bits added) is
the same model. Captions become rows of its table, the only form of a prompt that `generate` takes together with
`guidance_scale`, for which it runs the model a second time, on the empty caption. `generate static` is its static
cache, with which it compiles its steps. All draw at temperature 1 from the 1,000 most probable codes; every other
caption fills half of its slots.

A rate is the tokens of all pictures over the median seconds of whole calls, the captions' pass included. Variants take
turns, call by call, after one call each that is not counted (it compiles); `x generate` is the median over rounds of
the ratio to `generate`. On a CPU one thread works and seconds are those of the processor, which a busy machine does
not stretch. `uncached` runs the whole sequence anew for every token, and is called once.
What speed must not change is checked first (`generate_parts/facts.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table

from generate_parts.drawing import (
    ALL_SIZES,
    TOP_K,
    TransformersGenerate,
    build_model,
    one_code_model,
    random_captions,
    sample_uncached,
)
from generate_parts.facts import check_facts
from qlip.apps.demo import machine
from qlip.core.log import console
from qlip.engine.run_folder import versions
from qlip.models.sampling import Sampler, SamplingConfig

RESULTS = Path(os.environ.get("OUT", Path(__file__).parent / "results"))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLOCK = {"cpu": time.process_time, "cuda": time.perf_counter}
HEADS: dict[str, dict[str, Any]] = {
    "flat 2 x 14": {"head": "flat", "division": [14, 14]},
    "depth 2 x 14": {"head": "depth", "division": [14, 14]},
    "depth 4 x 7": {"head": "depth", "division": [7, 7, 7, 7]},
    "bitwise": {"head": "bitwise"},
}


def batch_of(size: str, options: argparse.Namespace) -> int:
    """Pictures at once."""
    return options.batch or (16 if options.device == "cuda" else 4 if size == "tiny" else 1)


# --- rates --------------------------------------------------------------------------------------------------------


def seconds_of(run: Callable[[], object], device: str) -> float:
    """Of one call, waited for."""
    started = CLOCK[device]()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return CLOCK[device]() - started


def take_turns(
    title: str, runs: dict[str, Callable[[], object]], *, rounds: int, device: str
) -> dict[str, list[float]]:
    """Seconds of every call; `uncached` is called once, without a call before it."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        names = [name for name in runs if name != "uncached" or number == 1]
        for name in names if number % 2 else reversed(names):
            taken = seconds_of(runs[name], device)
            if number:
                seconds[name].append(taken)
        if number:
            said = ", ".join(f"{name} {times[-1]:.3f} s" for name, times in seconds.items())
            console.print(f"{title}  round {number}: {said}")
    return seconds


def compare_sampling(size: str, options: argparse.Namespace, guidance: float, *, uncached: bool) -> dict[str, Any]:
    """Rates of all ways to draw from the same model."""
    model = one_code_model(size, side=options.side, device=options.device, dtype=DTYPES[options.dtype])
    batch = batch_of(size, options)
    caption, mask = random_captions(model, batch)
    theirs = TransformersGenerate(model, caption, mask)
    config, seeds = SamplingConfig(guidance=guidance, top_k=TOP_K), list(range(batch))
    ours = Sampler(model, config)
    runs: dict[str, Callable[[], object]] = {
        "cached": lambda: ours.sample(caption, mask, seeds=seeds),
        "generate": lambda: theirs(guidance=guidance),
    }
    if options.device == "cuda":
        runs["generate static"] = lambda: theirs(guidance=guidance, static=True)
        plain = Sampler(model, config, compile=False)
        runs["cached, not compiled"] = lambda: plain.sample(caption, mask, seeds=seeds)
    if uncached:
        runs["uncached"] = lambda: sample_uncached(model, caption, mask, seeds=seeds, config=config)
    seconds = take_turns(f"{size} guidance {guidance:g}", runs, rounds=options.rounds, device=options.device)
    count = batch * model.config.num_tokens
    row: dict[str, Any] = {"size": size, "guidance": guidance, "batch": batch}
    row |= {"tokens_of_a_picture": model.config.num_tokens, "caption_slots": mask.shape[1], "dtype": options.dtype}
    row["tokens_per_s"] = {name: count / median(times) for name, times in seconds.items()}
    row["x_generate"] = {
        name: median(g / t for g, t in zip(seconds["generate"], times, strict=False)) for name, times in seconds.items()
    }
    ratios = [g / t for g, t in zip(seconds["generate"], seconds["cached"], strict=True)]
    row["cached_x_generate_range"] = [min(ratios), max(ratios)]
    return row


def compare_heads(size: str, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens of 28 bits, patches of a picture, per second with each head."""
    runs: dict[str, Callable[[], object]] = {}
    parameters, batch = {}, batch_of(size, options)
    for name, head in HEADS.items():
        model = build_model(size, side=options.side, device=options.device, dtype=DTYPES[options.dtype], **head)
        caption, mask = random_captions(model, batch)
        sampler = Sampler(model, SamplingConfig(guidance=options.guidance, top_k=TOP_K))
        parameters[name] = sum(parameter.numel() for parameter in model.head.parameters())
        runs[name] = partial(sampler.sample, caption, mask, seeds=list(range(batch)))
    seconds = take_turns(f"{size} heads", runs, rounds=options.rounds, device=options.device)
    count = batch * options.side**2
    return {
        "size": size,
        "guidance": options.guidance,
        "batch": batch,
        "tokens_per_s": {name: count / median(times) for name, times in seconds.items()},
        "head_parameters": parameters,
    }


# --- all rows -----------------------------------------------------------------------------------------------------


def print_rows(rows: list[dict[str, Any]], heads: list[dict[str, Any]]) -> None:
    """A line for each way to draw, and for each head."""
    table = Table(title="drawing image tokens", title_justify="left")
    for name in ("size", "batch", "guidance", "drawn", "tokens/s", "x generate"):
        table.add_column(name, justify="left" if name in ("size", "drawn") else "right", no_wrap=True)
    for row in rows + heads:
        for name, rate in row["tokens_per_s"].items():
            ratio = f"{row['x_generate'][name]:.2f}" if "x_generate" in row else ""
            start = [row["size"], str(row["batch"]), f"{row['guidance']:g}", name]
            table.add_row(*start, f"{rate:.1f}", ratio)
    console.print(table)


def arguments() -> argparse.Namespace:
    """What was asked for, with the defaults of the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=ALL_SIZES, help="default: tiny b on a CPU, b xl on a GPU")
    parser.add_argument("--batch", type=int, help="pictures at once; default: 16 on a GPU, 4 or 1 on a CPU")
    parser.add_argument("--side", type=int, help="rows and columns of tokens; default: 8 on a CPU, 16 on a GPU")
    parser.add_argument("--guidance", type=float, default=7.5, help="measured beside 1, which is none")
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    options.size = options.size or (["b", "xl"] if on_gpu else ["tiny", "b"])
    options.side = options.side or (16 if on_gpu else 8)
    options.dtype = options.dtype or ("bf16" if on_gpu else "fp32")
    return options


def main() -> None:
    """Check, measure, print, write."""
    options = arguments()
    on_gpu = options.device == "cuda"
    if not on_gpu:
        torch.set_num_threads(1)
    smallest, scales = options.size[0], (1.0, options.guidance)
    facts = check_facts(
        smallest,
        batch=batch_of(smallest, options),
        side=options.side,
        guidance=options.guidance,
        device=options.device,
    )
    console.print_json(data=facts)
    rows = [
        compare_sampling(size, options, scale, uncached=size == smallest and scale != 1)
        for size in options.size
        for scale in scales
    ]
    heads = [compare_heads(smallest, options)]
    print_rows(rows, heads)
    gpu = torch.cuda.get_device_name() if on_gpu else ""
    name = re.sub(r"\W+", "_", gpu.removeprefix("NVIDIA ").lower()) if on_gpu else "cpu"
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["benchmarks/generate.py", *sys.argv[1:]]),
        "machine": machine() | ({"gpu": gpu} if on_gpu else {}),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "facts": facts,
        "sampling": rows,
        "heads": heads,
    }
    options.out.mkdir(exist_ok=True, parents=True)
    rounded = json.loads(json.dumps(result), parse_float=lambda digits: float(f"{float(digits):.4g}"))
    (options.out / f"generate_{name}.json").write_text(json.dumps(rounded, indent=1) + "\n")


if __name__ == "__main__":
    main()
