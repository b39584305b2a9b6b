"""UM3's two choices at tiny size: the calm-down of text (Eq 7) and a softmax for each modality (Eq 6).

.venv/bin/python docs/results/unified.py --out runs/um3          # trains, two hours on two cores; resumes
.venv/bin/python docs/results/unified.py --out runs/um3 --draw   # table and plots from what is there

`scenes_um3_tiny` with and without each for a quarter of its steps, several seeds, and once in full; then held-out
scenes: stories continued, pictures captioned, prompts of GenEval's six kinds drawn. Without calm-down the shares are
those of its end from the first step on. Writes unified.json, unified.svg, unified_losses.svg and unified.png beside
this file, of which unified.md says what they show.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from tiny_studies import (
    ceilings,
    draw_bars,
    made_with,
    make_scenes,
    read_runs,
    spread,
    study_parser,
    train_in_processes,
)

SETTINGS = {  # name -> (calm-down, softmax)
    "um3": (True, "separate"),
    "constant": (False, "separate"),
    "joint": (True, "joint"),
    "constant_joint": (False, "joint"),
}
TITLES = {
    "um3": "calm-down, separate softmaxes (UM3)",
    "constant": "constant shares, separate softmaxes",
    "joint": "calm-down, joint softmax",
    "constant_joint": "constant shares, joint softmax",
}
FULL = "full"  # the recipe as it stands, on all cores, all held-out scenes
STORES = {"drawn": ("prompts", "captions.dense"), "captioned": ("captions.dense",)}  # fields of the captions
EVALS = ("scenes-stories-v1", "scenes-captions-v1", "scenes-geneval-v1")
CAPTIONS = {"objects": "objects", "colours": "colours", "counts": "counts"}
TAGS = {
    "single_object": "single",
    "two_object": "two",
    "counting": "counting",
    "colors": "colours",
    "position": "position",
    "color_attr": "attributes",
}
GROUPS = {"captions": CAPTIONS, "drawn": TAGS}
PICTURED = ("a star", "a red ring", "a blue square", "two triangles", "a green heart and a red cross")
HERE = Path(__file__).parent


def make_stores(out: Path) -> None:
    """Scenes, a coarse tokenizer (stage 1), and token stores of pictures to be drawn and to be captioned."""
    from qlip.apps.encoding import TokenizeOptions
    from qlip.apps.tokenize import tokenize_images
    from qlip.recipes import find_recipe
    from qlip.recipes.run import run_recipe

    make_scenes(out)
    scenes, tokenizer = str(out / "data" / "train"), out / "tokenizer" / "export"
    if not (tokenizer / "config.json").exists():
        config = find_recipe("scenes_tiny")
        config.data.train, config.model.patch_size = scenes, 16
        run_recipe(config, folder=out / "tokenizer")
    for name, fields in STORES.items():
        tokenize_images(
            scenes, TokenizeOptions(model=str(tokenizer), out=out / f"tokens_{name}", caption_fields=fields)
        )


def train_one(out: Path, name: str, seed: int, *, steps: int, scenes: int) -> None:
    """One model, on one thread unless it is the full recipe; its figures as <setting>_<seed>.json."""
    import torch

    from qlip.core.log import read_metrics
    from qlip.engine.run_folder import git_commit, versions
    from qlip.evals.run import EvalRequest, run_evals
    from qlip.recipes.unified import scenes_um3_tiny
    from qlip.recipes.unified_run import run_unified

    if name == FULL:
        steps, scenes = scenes_um3_tiny().trainer.steps, 0
    else:
        torch.set_num_threads(1)
    calm_down, softmax = SETTINGS.get(name, (True, "separate"))
    folder = out / f"{name}_{seed}"
    config = scenes_um3_tiny()
    config.tokenizer = str(out / "tokenizer" / "export")
    config.data.text = str(out / "data" / "train")
    config.data.tokens, config.data.captioned_tokens = (str(out / f"tokens_{name}") for name in STORES)
    config.data.calm_down_steps = config.data.calm_down_steps * steps // config.trainer.steps if calm_down else 0
    config.widening.softmax = softmax  # type: ignore[assignment]  # from the table above
    config.trainer.seed, config.trainer.steps, config.trainer.device = seed, steps, "cpu"
    started = time.monotonic()
    export = run_unified(config, folder=folder)
    seconds = time.monotonic() - started
    request = EvalRequest(data=str(out / "data" / "test"), evals=EVALS, max_samples=scenes)
    results = run_evals(export, request)
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "token_loss" in line]
    curves = ("text_task_nll", "image_to_text_task_nll", "text_to_image_task_nll", "text_share")
    content = {
        "setting": name,
        "seed": seed,
        "steps": steps,
        "batch": config.data.batch_size * config.data.sequence_length,
        "figures": {key: value for result in results for key, value in result["figures"].items()},
        "card": results[0]["card"],
        "curves": {key: [[line["step"], line[key]] for line in lines if key in line] for key in curves},
        "training_seconds": seconds,
        "evaluation_seconds": sum(result["card"].get("seconds", 0) for result in results),
        "git_commit": git_commit(),
        "versions": versions(),
    }
    folder.with_suffix(".json").write_text(json.dumps(content, indent=1))


def summarise(out: Path) -> dict[str, Any]:
    """Every figure of every seed per setting, chance, and what the runs were made with."""
    runs = read_runs(out)
    figures = [name for name in runs[0]["figures"] if not name.endswith("_baseline")]
    rows = {}
    for name in SETTINGS:
        mine = [run for run in runs if run["setting"] == name]
        if mine:
            rows[name] = {
                "seeds": [run["seed"] for run in mine],
                **{figure: [run["figures"][figure] for run in mine] for figure in figures},
                **{key: [run[key] for run in mine] for key in ("training_seconds", "evaluation_seconds")},
                "curves_of_seed_0": mine[0]["curves"],
            }
    given = next(run for run in runs if run["setting"] in SETTINGS)["figures"]
    chance = {name: given[f"{name}_baseline"] for name in figures if f"{name}_baseline" in given}
    full = next((run for run in runs if run["setting"] == FULL), {})
    in_full = {key: full[key] for key in ("steps", "figures", "training_seconds", "evaluation_seconds") if full}
    ceiling = ceilings({"tokenizer": out / "tokenizer" / "export"})["tokenizer"]
    return {
        "rows": rows,
        "chance": chance,
        "right_scenes_through_the_tokenizer": ceiling,
        "recipe_in_full": in_full,
        **made_with(runs[0]),
    }


def print_tables(summary: dict[str, Any]) -> None:
    """The tables of unified.md: mean and standard deviation over seeds, chance in the last row."""
    chance = summary["chance"]
    shares = {**CAPTIONS, **{tag: tag.replace("_", " ") for tag in TAGS}, "overall": "drawn, overall"}
    heads = ["perplexity", "bits a byte", *shares.values(), "training, s"]
    print("| | " + " | ".join(heads) + " |")
    print("|---|" + "---|" * len(heads))
    for name, row in summary["rows"].items():
        cells = [spread(row["perplexity"], digits=3), spread(row["bits_per_byte"], digits=4)]
        cells += [spread([100 * value for value in row[figure]], digits=1) for figure in shares]
        cells += [spread(row["training_seconds"], digits=0)]
        print(f"| {TITLES[name]} | " + " | ".join(cells) + " |")
    cells = [f"{chance['perplexity']:.1f}", f"{chance['bits_per_byte']:.3f}"]
    cells += [f"{100 * chance[figure]:.1f}" for figure in shares]
    print("| chance | " + " | ".join(cells) + " | |")
    most = summary["right_scenes_through_the_tokenizer"]
    cells = [f"{100 * most[figure]:.1f}" if figure in most else "" for figure in shares]
    print("| right scenes through the tokenizer and back | | | " + " | ".join(cells) + " | |")


def draw(summary: dict[str, Any], pictured: Path) -> None:
    """Bars for captions and drawings, curves of the three losses, and pictures of one model."""
    rows = {TITLES[name]: row for name, row in summary["rows"].items()}
    said, drawn = ({key: f"{what}:\n{name}" for key, name in columns.items()} for what, columns in GROUPS.items())
    draw_bars(HERE / "unified.svg", rows, said | drawn, summary["chance"], what="right, %")
    draw_curves(HERE / "unified_losses.svg", summary)
    draw_pictures(HERE / "unified.png", pictured)


def draw_curves(path: Path, summary: dict[str, Any]) -> None:
    """Nats a token of each task over training, seed 0, and the share of samples that are text."""
    from matplotlib.figure import Figure

    names = {
        "text_share": "share of text samples",
        "text_task_nll": "text, nats a token",
        "image_to_text_task_nll": "image to text",
        "text_to_image_task_nll": "text to image",
    }
    figure = Figure(figsize=(10, 2.8), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, len(names)), names.items(), strict=True):
        lowest = min(value for row in summary["rows"].values() for _, value in row["curves_of_seed_0"][key])
        for place, (name, row) in enumerate(summary["rows"].items()):
            steps, values = zip(*row["curves_of_seed_0"][key], strict=True)
            label = TITLES[name] if key == "text_share" else None
            axes.plot(steps, values, color=f"C{place}", linewidth=1, label=label)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        if key != "text_share":
            axes.set_ylim(lowest * 0.95, lowest * 1.6)
    figure.legend(frameon=False, fontsize=8, ncols=4, loc="outside upper center")
    figure.savefig(path, metadata={"Date": None})


def draw_pictures(path: Path, model: Path) -> None:
    """Four pictures of each prompt, seeds 0 to 3, nothing picked."""
    from qlip.apps.generate import sheet_of
    from qlip.evals.benchmark_files import save_png
    from qlip.models.unified_model import open_unified

    unified = open_unified(model)
    pictures = [picture for prompt in PICTURED for picture in unified.generate([prompt] * 4, seeds=[0, 1, 2, 3])]
    save_png(path, sheet_of(pictures, PICTURED, num=4))


def main() -> None:
    """Train what is missing, or draw."""
    parser = study_parser(__doc__, steps=1000)
    parser.add_argument("--scenes", type=int, default=1000, help="held-out scenes to tell of and to caption")
    options = parser.parse_args()
    if options.one:
        train_one(options.out, options.one[0], int(options.one[1]), steps=options.steps, scenes=options.scenes)
        return
    if not options.draw:
        make_stores(options.out)
        jobs = [(name, seed) for seed in range(options.seeds) for name in SETTINGS]
        more = ["--steps", str(options.steps), "--scenes", str(options.scenes)]
        train_in_processes(options.out, jobs, parallel=options.parallel, options=more)
        train_in_processes(options.out, [(FULL, 0)], parallel=1, options=more)
    summary = summarise(options.out)
    (HERE / "unified.json").write_text(json.dumps(summary, indent=1) + "\n")
    print_tables(summary)
    draw(summary, options.out / f"{FULL}_0" / "export")


if __name__ == "__main__":
    main()
