"""Table 6's question at tiny size: which features of which tokenizer can a language model answer questions from?

.venv/bin/python docs/results/understanding.py --out runs/llava          # trains, two hours on two cores; resumes
.venv/bin/python docs/results/understanding.py --out runs/llava --draw   # table and plot from what is there

Two tokenizers of the same recipe, QLIP and BSQ-ViT (its contrastive weight 0: reconstruction alone), both with stage
2; over each setting `scenes_llava_tiny` with the same conversations, several seeds; then every question about held-out
scenes. Writes understanding.json and understanding.svg beside this file; understanding.md says what they show.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import mean
from typing import Any

from tiny_studies import draw_bars, made_with, make_tokenizers, read_runs, spread, study_parser, train_in_processes

SETTINGS = {  # name -> (tokenizer, features, layer)
    "qlip_second_last": ("qlip", "hidden", -2),
    "qlip_last": ("qlip", "hidden", -1),
    "qlip_after_q": ("qlip", "post_quantizer", -2),  # behind the last layer, whatever the number
    "qlip_codes": ("qlip", "codes", -2),
    "bsqvit_second_last": ("bsqvit", "hidden", -2),
}
TITLES = {
    "qlip_second_last": "QLIP, layer -2",
    "qlip_last": "QLIP, layer -1",
    "qlip_after_q": "QLIP, after the quantizer",
    "qlip_codes": "QLIP, the bits as embeddings",
    "bsqvit_second_last": "BSQ-ViT, layer -2",
}
KINDS = ("existence", "colour", "count", "position")
EVAL = "scenes-questions-v1"
HERE = Path(__file__).parent


def make_conversations(out: Path) -> None:
    """Scenes, tokenizers, and the scenes' questions as conversations."""
    from qlip.data.scene_conversations import write_scene_conversations

    make_tokenizers(out)
    if not (out / "conversations.json").exists():
        write_scene_conversations(str(out / "data" / "train"), out / "conversations.json")


def train_one(out: Path, name: str, seed: int, *, steps: int, scenes: int) -> None:
    """One assistant on one thread, its figures as <setting>_<seed>.json."""
    import torch

    from qlip.core.log import read_metrics
    from qlip.engine.run_folder import git_commit, versions
    from qlip.evals.run import EvalRequest, run_evals
    from qlip.recipes.downstream import scenes_llava_tiny
    from qlip.recipes.instruction_run import run_instruction

    torch.set_num_threads(1)
    tokenizer, features, layer = SETTINGS[name]
    folder = out / f"{name}_{seed}"
    config = scenes_llava_tiny()
    config.tower = str(out / tokenizer / "stage2" / "export")
    config.features, config.layer = features, layer  # type: ignore[assignment]  # from the table above
    config.data.conversations, config.data.images = str(out / "conversations.json"), str(out / "data" / "train")
    config.trainer.seed, config.trainer.steps, config.trainer.device = seed, steps, "cpu"
    started = time.monotonic()
    export = run_instruction(config, folder=folder)
    seconds = time.monotonic() - started
    request = EvalRequest(data=str(out / "data" / "test"), evals=(EVAL,), max_samples=scenes)
    results = run_evals(export, request)
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
        "git_commit": git_commit(),
        "versions": versions(),
    }
    folder.with_suffix(".json").write_text(json.dumps(content, indent=1))


def summarise(out: Path) -> dict[str, Any]:
    """Every figure of every seed per setting, majority answers, and what the runs were made with."""
    runs = read_runs(out)
    figures = [*(f"accuracy_{kind}" for kind in KINDS), "accuracy_all_questions"]
    rows = {}
    for name in SETTINGS:
        mine = [run for run in runs if run["setting"] == name]
        if mine:
            rows[name] = {
                "seeds": [run["seed"] for run in mine],
                **{figure: [run["figures"][figure] for run in mine] for figure in figures},
                **{key: [run[key] for run in mine] for key in ("nats_per_token", "training_seconds")},
                "evaluation_seconds": [run["evaluation_seconds"] for run in mine],
            }
    majority = {figure: runs[0]["figures"][f"{figure}_baseline"] for figure in figures}
    return {"rows": rows, "majority": majority, **made_with(runs[0])}


def print_table(summary: dict[str, Any]) -> None:
    """The table of understanding.md: per cent, mean and standard deviation over seeds."""
    figures = [*(f"accuracy_{kind}" for kind in KINDS), "accuracy_all_questions"]
    print("| features | " + " | ".join((*KINDS, "all questions")) + " | nats a token | training, s |")
    print("|---|" + "---|" * (len(figures) + 2))
    for name, row in summary["rows"].items():
        cells = [spread([100 * value for value in row[figure]], digits=1) for figure in figures]
        cells += [spread(row["nats_per_token"], digits=3), spread(row["training_seconds"], digits=0)]
        print(f"| {TITLES[name]} | " + " | ".join(cells) + " |")
    print("| majority answer | " + " | ".join(f"{100 * summary['majority'][f]:.1f}" for f in figures) + " | | |")


def draw(summary: dict[str, Any]) -> None:
    """Bars per kind of question."""
    rows = {TITLES[name]: row for name, row in summary["rows"].items()}
    columns = {f"accuracy_{kind}": kind for kind in KINDS}
    draw_bars(HERE / "understanding.svg", rows, columns, summary["majority"], what="right answers, %")


def main() -> None:
    """Train what is missing, or draw."""
    parser = study_parser(__doc__, steps=1000)
    parser.add_argument("--scenes", type=int, default=1000, help="held-out scenes to ask about")
    options = parser.parse_args()
    if options.one:
        train_one(options.out, options.one[0], int(options.one[1]), steps=options.steps, scenes=options.scenes)
        return
    if not options.draw:
        make_conversations(options.out)
        jobs = [(name, seed) for seed in range(options.seeds) for name in SETTINGS]
        more = ["--steps", str(options.steps), "--scenes", str(options.scenes)]
        train_in_processes(options.out, jobs, parallel=options.parallel, options=more)
    summary = summarise(options.out)
    (HERE / "understanding.json").write_text(json.dumps(summary, indent=1) + "\n")
    print_table(summary)
    draw(summary)


if __name__ == "__main__":
    main()
