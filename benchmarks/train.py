"""What a GPU has to show, in one command of at most 28 minutes on an H100 or H200.

.venv/bin/python benchmarks/train.py                           # all parts; writes runs/train_benchmark
.venv/bin/python benchmarks/train.py --parts scenes            # one part; a stopped training goes on where it was
.venv/bin/python benchmarks/train.py --device cpu --tiny       # two minutes: the same code with small models

    step     rate of stage-1 steps of B-16-256, compiled or not, activations kept or recomputed, in one micro-batch or
             several, as a share of a bf16 matrix product's rate: step_<device>.json
    memory   `benchmarks/memory.py`, the paper's Fig 3 with both its lines: memory_<device>.json and .svg
    scenes   `scenes_small`, both stages on scenes painted here, scored after each: scenes_small.json, .svg, two .png

OUT also gets `scenes_small.md`, a page of all that is in it, made for docs/results; OUT/work holds data and runs. Every
part is a process of its own with a limit of its own (`LIMITS`, together 25 minutes) and writes down what it has as it
goes: neither a crash nor a limit takes more than what it was doing. Sizes follow from the limits. `step` has ten rows
of about 10 seconds, most of them after up to a minute of compiling, the most telling first; `memory` stops at the
largest batch that fits; `scenes` reads 2.4M pictures, of which a core decodes about 1,000 a second: 4 minutes with ten
cores, and painting, computing what decoding does not hide and scoring take as long again (estimates, no GPU was there).
On a CPU all is tiny.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PARTS = ("step", "memory", "scenes")
LIMITS = {"step": 480, "memory": 240, "scenes": 780}  # seconds
RESERVE = 20.0  # seconds before its limit in which a part starts nothing new
MEMORY_BATCHES = ("1", "2", "4", "8", "16", "32", "48", "64", "128", "256", "512", "1024", "2048")
BENCHMARKS = Path(__file__).parent


def run_part(command: list[str], *, limit: float, environment: dict[str, str] | None = None) -> str | None:
    """Run a process with all its children until it ends or its limit is over. Returns why it failed, None if not."""
    process = subprocess.Popen(command, env=os.environ | (environment or {}), process_group=0)
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:g} seconds"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return None if code == 0 else f"ended with code {code}"


def command_of(part: str, options: argparse.Namespace, limit: float) -> tuple[list[str], dict[str, str]]:
    """The words of a part's process, and what its environment adds."""
    environment = {"OMP_NUM_THREADS": "1"} if options.device == "cpu" else {}  # small models are slower with more
    if part == "memory":
        words = [sys.executable, str(BENCHMARKS / "memory.py"), "--device", options.device]
        if options.device == "cuda" and not options.tiny:  # each size would be compiled anew, a minute each
            words += ["--batches", *MEMORY_BATCHES, "--", "--trainer.no-compile"]
        elif options.device == "cuda":
            words += ["--recipe", "scenes_tiny_stage2", "--batches", "4", "8"]
        return words, environment | {"OUT": str(options.out)}
    words = [sys.executable, __file__, "--one", part, "--out", str(options.out), "--device", options.device]
    return [*words, *(["--tiny"] if options.tiny else []), "--limit", f"{limit:g}"], environment


def run_one(part: str, options: argparse.Namespace) -> None:
    """A part, inside its own process."""
    from train_parts.scenes import run_scenes
    from train_parts.step import run_step

    started = time.monotonic()
    if part == "scenes":
        run_scenes(options.out, device=options.device, tiny=options.tiny)
        return
    run_step(
        options.out / f"step_{options.device}.json",
        device=options.device,
        tiny=options.tiny,
        time_left=lambda: options.limit - RESERVE - (time.monotonic() - started),
    )


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """What was asked for; exits with one line for what cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="of step,memory,scenes; joined by commas")
    parser.add_argument("--out", type=Path, default=Path("runs/train_benchmark"))
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--tiny", action="store_true", help="small models, to try the script; always on a CPU")
    parser.add_argument("--limit", type=float, help="seconds for a part at most, less than its own limit")
    parser.add_argument("--one", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    options.parts = options.parts.split(",")
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"--parts: {', '.join(unknown)} is none of {', '.join(PARTS)}")
    if options.limit is not None and options.limit <= RESERVE:
        parser.error(f"--limit {options.limit:g}: give more than {RESERVE:g} seconds")
    if options.device is None:
        import torch

        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    options.tiny = options.tiny or options.device == "cpu"
    return options


def main() -> int:
    """Run the parts, write the page; 1 when one of them failed."""
    options = arguments()
    if options.one:
        run_one(options.one, options)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part ends too
    options.out.mkdir(parents=True, exist_ok=True)
    failures = {}
    for part in options.parts:
        limit = min(LIMITS[part], options.limit or LIMITS[part])
        words, environment = command_of(part, options, limit)
        started = time.monotonic()
        failure = run_part(words, limit=limit, environment=environment)
        print(f"{part}: {failure or 'done'} after {time.monotonic() - started:.0f} seconds", flush=True)
        if failure:
            failures[part] = failure
    from train_parts.page import write_page  # here: the process that waits stays small

    print(write_page(options.out, device=options.device, failures=failures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
