"""Table 3a at tiny size: how the weight of the pixel loss trades zero-shot accuracy for reconstruction.

.venv/bin/python docs/results/pixel_weight.py --out runs/pixel_weight            # trains, hours on two cores; resumes
.venv/bin/python docs/results/pixel_weight.py --out runs/pixel_weight --draw     # table and plot from what is there

Every run is `scenes_tiny` with other weights, other seeds and fewer steps; seeds change the weights and the data order,
the scenes stay. Writes pixel_weight.json and pixel_weight.svg beside this file; pixel_weight.md says what they show.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

WEIGHTS = {  # name -> (a_a, a_r)
    "1:0": (1.0, 0.0),
    "1:1": (1.0, 1.0),
    "1:10": (1.0, 10.0),
    "1:100": (1.0, 100.0),
    "1:1000": (1.0, 1000.0),
    "0:1": (0.0, 1.0),
}
FIGURES = {"top1": "zero-shot top-1", "psnr": "PSNR, dB"}
HERE = Path(__file__).parent


def make_data(out: Path) -> None:
    """The demo's scenes: 40,000 to train on, 4,000 held out."""
    from qlip.apps.demo import TRAIN_OBJECT_COUNTS
    from qlip.data.scene_shards import write_scene_shards
    from qlip.data.scenes import SceneConfig

    train = SceneConfig(image_size=48, object_counts=TRAIN_OBJECT_COUNTS)
    write_scene_shards(out / "data" / "train", num=40_000, split="train", config=train)
    write_scene_shards(out / "data" / "test", num=4_000, split="test", config=SceneConfig(image_size=48))


def train_one(out: Path, name: str, seed: int, steps: int) -> None:
    """One run on one thread, and its figures as <weights>_<seed>.json."""
    import torch

    from qlip.core.log import read_metrics
    from qlip.engine.run_folder import git_commit, versions
    from qlip.evals.run import EvalRequest, run_evals
    from qlip.recipes import find_recipe
    from qlip.recipes.run import run_recipe

    torch.set_num_threads(1)
    folder = out / f"{name.replace(':', '_')}_{seed}"
    config = find_recipe("scenes_tiny")
    config.data.train = str(out / "data" / "train")
    config.task.contrastive_weight, config.task.pixel_weight = WEIGHTS[name]
    config.trainer.seed, config.trainer.steps, config.trainer.device = seed, steps, "cpu"
    export = run_recipe(config, folder=folder)
    results = run_evals(export, EvalRequest(data=str(out / "data" / "test"), max_samples=2000))
    last = [line for line in read_metrics(folder / "metrics.jsonl") if "mse" in line][-10:]
    content = {
        "weights": name,
        "seed": seed,
        "steps": steps,
        "figures": {key: value for result in results for key, value in result["figures"].items()},
        "last_losses": {key: mean(line[key] for line in last) for key in ("contrastive", "mse", "bit_entropy")},
        "git_commit": git_commit(),
        "versions": versions(),
    }
    folder.with_suffix(".json").write_text(json.dumps(content, indent=1))


def train_all(out: Path, *, seeds: int, steps: int, parallel: int) -> None:
    """Every weight and seed, `parallel` processes at a time; what is there already is kept."""
    make_data(out)
    jobs = [(name, seed) for seed in range(seeds) for name in WEIGHTS]

    def run(job: tuple[str, int]) -> None:
        name, seed = job
        if (out / f"{name.replace(':', '_')}_{seed}.json").exists():
            return
        log = out / f"{name.replace(':', '_')}_{seed}.log"
        options = ["--out", str(out), "--one", name, str(seed), "--steps", str(steps)]
        with log.open("a") as file:
            subprocess.run([sys.executable, __file__, *options], stdout=file, stderr=subprocess.STDOUT, check=True)
        print(name, seed, "done", flush=True)

    with ThreadPoolExecutor(parallel) as pool:
        list(pool.map(run, jobs))


def summarise(out: Path) -> dict[str, Any]:
    """Mean and standard deviation over seeds per weight, and the paper's rule on the two single-objective runs."""
    runs = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    rows = {}
    for name in WEIGHTS:
        mine = [run for run in runs if run["weights"] == name]
        rows[name] = {
            "seeds": [run["seed"] for run in mine],
            **{key: [run["figures"][key] for run in mine] for key in FIGURES},
            "contrastive": [run["last_losses"]["contrastive"] for run in mine],
            "mse": [run["last_losses"]["mse"] for run in mine],
        }
    rule = mean(rows["1:0"]["contrastive"]) / mean(rows["0:1"]["mse"])
    some = runs[0]
    return {
        "rows": rows,
        "rule_ratio": rule,
        "steps": some["steps"],
        "git_commit": some["git_commit"],
        "versions": some["versions"],
    }


def draw(summary: dict[str, Any]) -> None:
    """Both figures against the weight, one point per seed, a line through the means."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, len(FIGURES))
    for panel, (key, title) in zip(axes, FIGURES.items(), strict=True):
        values = [row[key] for row in summary["rows"].values()]
        for place, seeds in enumerate(values):
            panel.plot([place] * len(seeds), seeds, "o", color="tab:blue", markersize=4, alpha=0.6)
        panel.plot(range(len(values)), [mean(seeds) for seeds in values], color="tab:blue", linewidth=1)
        panel.set_xticks(range(len(values)), list(summary["rows"]))
        panel.set_xlabel("weight of contrast : pixels")
        panel.set_title(title)
        panel.grid(alpha=0.3)
    figure.savefig(HERE / "pixel_weight.svg", metadata={"Date": None})


def table(summary: dict[str, Any]) -> str:
    """The Markdown table of pixel_weight.md."""
    lines = ["| contrast : pixels | " + " | ".join(FIGURES.values()) + " |", "|---" * (1 + len(FIGURES)) + "|"]
    for name, row in summary["rows"].items():
        cells = [f"{mean(row[key]):.3g} ± {stdev(row[key]) if len(row[key]) > 1 else 0:.2g}" for key in FIGURES]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--parallel", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--draw", action="store_true", help="do not train")
    parser.add_argument("--one", nargs=2, metavar=("WEIGHTS", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        train_one(options.out, options.one[0], int(options.one[1]), options.steps)
        return
    if not options.draw:
        train_all(options.out, seeds=options.seeds, steps=options.steps, parallel=options.parallel)
    summary = summarise(options.out)
    (HERE / "pixel_weight.json").write_text(json.dumps(summary, indent=1))
    draw(summary)
    print(table(summary))
    print(f"the paper's rule, L_align(end) / L_mse(end): {summary['rule_ratio']:.0f}")


if __name__ == "__main__":
    main()
