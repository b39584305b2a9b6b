"""Table 7's question at tiny size: do text-aligned tokens make a better generator, and which head should write them?

.venv/bin/python docs/results/text_to_image.py --out runs/t2i          # trains, two hours on two cores; resumes
.venv/bin/python docs/results/text_to_image.py --out runs/t2i --draw   # tables and sheets from what is there

Two tokenizers of the same recipe, QLIP and BSQ-ViT (its contrastive weight 0), both with stage 2; over the tokens of
the same scenes `scenes_t2i_tiny` with each head, as many pictures, several seeds. Writes text_to_image.json, .svg
and one sheet of pictures beside this file; text_to_image.md says what they show.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import mean
from typing import Any

from tiny_studies import (
    TOKENIZERS,
    ceilings,
    draw_bars,
    made_with,
    make_tokenizers,
    read_runs,
    spread,
    study_parser,
    train_in_processes,
)

SETTINGS = {  # name -> (tokenizer, head)
    "qlip_bitwise": ("qlip", "bitwise"),
    "bsqvit_bitwise": ("bsqvit", "bitwise"),
    "qlip_depth": ("qlip", "depth"),
    "qlip_flat": ("qlip", "flat"),
}
TITLES = {
    "qlip_bitwise": "QLIP, bitwise",
    "qlip_depth": "QLIP, depth",
    "qlip_flat": "QLIP, flat",
    "bsqvit_bitwise": "BSQ-ViT, bitwise",
}
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
PROMPTS = ("a star", "a red circle", "a blue square", "a heart and a ring")
EVAL = "scenes-geneval-v1"
HERE = Path(__file__).parent


def make_tokens(out: Path) -> None:
    """The demo's scenes, both tokenizers and their token stores."""
    from qlip.apps.encoding import TokenizeOptions
    from qlip.apps.tokenize import tokenize_images

    make_tokenizers(out)
    for name in TOKENIZERS:
        export = out / name / "stage2" / "export"
        options = TokenizeOptions(model=str(export), out=out / name / "tokens", caption_fields=("prompts",))
        tokenize_images(str(out / "data" / "train"), options)


def train_one(out: Path, name: str, seed: int, steps: int) -> None:
    """One generator on one thread, its figures as <setting>_<seed>.json, pictures of `PROMPTS` beside them."""
    import torch

    from qlip.apps.generate import generate_pictures
    from qlip.core.log import read_metrics
    from qlip.engine.run_folder import git_commit, versions
    from qlip.evals.run import EvalRequest, run_evals
    from qlip.recipes.downstream import scenes_t2i_tiny
    from qlip.recipes.generation_run import run_generation

    torch.set_num_threads(1)
    tokenizer, head = SETTINGS[name]
    folder = out / f"{name}_{seed}"
    config = scenes_t2i_tiny()
    config.tokenizer, config.data.tokens = str(out / tokenizer / "stage2" / "export"), str(out / tokenizer / "tokens")
    config.model.head = head
    config.trainer.seed, config.trainer.steps, config.trainer.device = seed, steps, "cpu"
    started = time.monotonic()
    export = run_generation(config, folder=folder)
    seconds = time.monotonic() - started
    results = run_evals(export, EvalRequest(data=str(out / "data" / "test"), evals=(EVAL,)))
    generate_pictures(export, PROMPTS, num=4, out=folder / "pictures", sampling={})
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "token_loss" in line]
    content = {
        "setting": name,
        "seed": seed,
        "steps": steps,
        "batch": config.data.batch_size,
        "figures": results[0]["figures"],
        "card": results[0]["card"],
        "nats_per_token": mean(line["token_loss"] for line in lines[-4:]),
        "training_seconds": seconds,
        "evaluation_seconds": results[0]["card"].get("seconds"),
        "parameters": results[0]["card"].get("parameters"),
        "git_commit": git_commit(),
        "versions": versions(),
    }
    folder.with_suffix(".json").write_text(json.dumps(content, indent=1))


def train_all(out: Path, *, seeds: int, steps: int, parallel: int) -> None:
    """Every setting and seed, `parallel` processes at a time; what is there already is kept."""
    make_tokens(out)
    jobs = [(name, seed) for seed in range(seeds) for name in SETTINGS]
    train_in_processes(out, jobs, parallel=parallel, options=["--steps", str(steps)])


def summarise(out: Path) -> dict[str, Any]:
    """Every figure of every seed per setting, chance, and what the runs were made with."""
    runs = read_runs(out)
    rows = {}
    for name in SETTINGS:
        mine = [run for run in runs if run["setting"] == name]
        if mine:
            rows[name] = {
                "seeds": [run["seed"] for run in mine],
                **{tag: [run["figures"][tag] for run in mine] for tag in (*TAGS, "overall")},
                **{key: [run[key] for run in mine] for key in ("nats_per_token", "training_seconds")},
                "parameters": mine[0]["parameters"],
            }
    chance = {tag: runs[0]["figures"][f"{tag}_baseline"] for tag in (*TAGS, "overall")}
    most = ceilings({name: out / name / "stage2" / "export" for name in TOKENIZERS})
    return {"rows": rows, "chance": chance, "ceilings": most, **made_with(runs[0])}


def print_table(summary: dict[str, Any]) -> None:
    """The table of text_to_image.md: per cent, mean and standard deviation over seeds."""
    tags = (*TAGS, "overall")
    print("| | " + " | ".join(tag.replace("_", " ") for tag in tags) + " | nats a token | training, s |")
    print("|---|" + "---|" * (len(tags) + 2))
    for name, row in summary["rows"].items():
        cells = [spread([100 * value for value in row[tag]], digits=1) for tag in tags]
        cells += [spread(row["nats_per_token"], digits=2), spread(row["training_seconds"], digits=0)]
        print(f"| {TITLES[name]} | " + " | ".join(cells) + " |")
    print("| chance | " + " | ".join(f"{100 * summary['chance'][tag]:.1f}" for tag in tags) + " | | |")
    for name, shares in summary["ceilings"].items():
        print(f"| right scenes, {name} | " + " | ".join(f"{100 * shares[tag]:.1f}" for tag in tags) + " | | |")


def draw(out: Path, summary: dict[str, Any]) -> None:
    """Bars per category with a point for every seed, and a sheet of the first seed's pictures of each setting."""
    import torch
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    from qlip.apps.generate import sheet_of
    from qlip.evals.benchmark_files import save_png

    rows = {TITLES[name]: row for name, row in summary["rows"].items()}
    columns = {tag: tag.replace("_", " ") for tag in TAGS}
    draw_bars(HERE / "text_to_image.svg", rows, columns, summary["chance"], what="right, %")
    pictures, texts = [], []
    for name in summary["rows"]:
        record = json.loads((out / f"{name}_0" / "pictures" / "generation.json").read_text())
        files = [entry["file"] for entry in record["pictures"]]
        chosen = [file for place, file in enumerate(files) if place % 4 < 2]  # the first two of each prompt
        pictures += [pil_to_tensor(Image.open(out / f"{name}_0" / "pictures" / file).convert("RGB")) for file in chosen]
        texts.append(f"{TITLES[name]}: " + ", ".join(PROMPTS))
    save_png(HERE / "text_to_image.png", sheet_of(torch.stack(pictures).unbind(), texts, num=2 * len(PROMPTS), side=96))


def main() -> None:
    """Train what is missing, or draw."""
    options = study_parser(__doc__, steps=1600).parse_args()
    if options.one:
        train_one(options.out, options.one[0], int(options.one[1]), options.steps)
        return
    if not options.draw:
        train_all(options.out, seeds=options.seeds, steps=options.steps, parallel=options.parallel)
    summary = summarise(options.out)
    (HERE / "text_to_image.json").write_text(json.dumps(summary, indent=1) + "\n")
    print_table(summary)
    draw(options.out, summary)


if __name__ == "__main__":
    main()
