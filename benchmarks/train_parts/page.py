"""From the records of all parts to one Markdown page, ready for docs/results: tables, verdicts, links to the plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from train_parts.record import read_record
from train_parts.step import verdict

PAGE = "scenes_small.md"
REQUIRED_FALL = 0.15  # of the encoder distance in stage 2, what the recipe says to expect
FIGURES = {  # name -> words, digits
    "psnr": ("PSNR, dB", 2),
    "ssim": ("SSIM", 4),
    "encoder_distance": ("distance in the frozen encoder, lower is better", 4),
    "fd_encoder": ("Frechet distance over it, lower is better", 3),
    "top1": ("zero-shot top-1, 100 colour-shape classes", 4),
    "top1_unseen_pairs": ("... of pairs never trained on", 4),
    "colour_top1": ("... colours alone", 4),
    "shape_top1": ("... shapes alone", 4),
    "bit_entropy": ("entropy per bit, nats (at most 0.693)", 4),
}


def write_page(out: Path, *, device: str, failures: dict[str, str]) -> Path:
    """Write the page from what is in `out`. `failures` says of a part why it did not end."""
    step = read_record(out / f"step_{device}.json")
    memory = read_record(out / f"memory_{device}.json")
    scenes = read_record(out / "scenes_small.json")
    sections = [
        *heading(scenes or step or {}),
        *section("`scenes_small`: both stages on scenes", scenes, scenes_lines, failures.get("scenes")),
        *section("Speed of a training step of B-16-256", step, step_lines, failures.get("step")),
        *section("Memory of a training step", memory, memory_lines, failures.get("memory")),
    ]
    path = out / PAGE
    path.write_text("\n".join(sections).rstrip() + "\n")
    return path


def heading(record: dict[str, Any]) -> list[str]:
    """Title, and what all of it was measured on."""
    lines = ["# scenes_small, and the training step, on one GPU", ""]
    if record:
        machine, versions = record["machine"], record["versions"]
        lines += [
            f"Measured {record['date']} on {record['device']} ({machine['cores']} cores of {machine['cpu']}), "
            f"torch {versions['torch']}, commit {(record['git_commit'] or 'unknown')[:12]}, "
            "by `benchmarks/train.py`.",
            "",
        ]
        if record["tiny"]:
            lines += ["**With small models, to try the script: no figure of this page means anything.**", ""]
    return lines


def section(title: str, record: dict[str, Any] | None, body: Any, failure: str | None) -> list[str]:
    """A part's lines, and what is missing of it."""
    lines = [f"## {title}", ""]
    if failure or record is None:
        lines += [f"Not finished: {failure}." if failure else "Not measured.", ""]
    elif not record.get("finished", True):
        lines += ["Not finished: it was stopped; what follows is what it had measured.", ""]
    if record is not None:
        lines += [*body(record), ""]
    return lines


def table(names: list[str], rows: list[list[str]]) -> list[str]:
    """Markdown; all columns but the first to the right."""
    return [_row(names), "|---" + "|---:" * (len(names) - 1) + "|", *(_row(row) for row in rows)]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _digits(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def scenes_lines(record: dict[str, Any]) -> list[str]:
    """Data, times, figures after each stage, curves, pictures."""
    stages = record["stages"]
    lines = [
        f"{record['train_scenes']:,} scenes of {record['image_size']} px, and {record['test_scenes']:,} held out.",
        "",
        *table(
            ["stage", "steps", "batch", "images/s", "training, s", "peak GB"],
            [
                [
                    f"`{stage['recipe']}`",
                    f"{stage['steps']:,}",
                    str(stage["batch_size"]),
                    f"{stage['images_per_s']:.0f}",
                    f"{stage['training_s']:.0f}",
                    _digits(stage.get("peak_gb"), 2),
                ]
                for stage in stages.values()
            ],
        ),
        "",
        *table(["figure", *(f"after {name}" for name in stages), "baseline"], _figure_rows(stages)),
        "",
    ]
    if "stage_2" in record:
        lines += [*_changes(record["stage_2"]), ""]
    lines += [
        "Baselines: the mean picture of the same scenes, chance for zero-shot. Cards are in `scenes_small.json`.",
        "",
        "![Curves of both stages](scenes_small.svg)",
    ]
    for name in stages:
        lines += ["", f"![Held-out scenes, reconstructions, differences: {name}](scenes_small_{name}.png)"]
    return lines


def _figure_rows(stages: dict[str, Any]) -> list[list[str]]:
    figures = [stage["figures"] for stage in stages.values()]
    return [
        [
            words,
            *(_digits(one[name], digits) for one in figures),
            _digits(figures[-1].get(f"{name}_baseline"), digits),
        ]
        for name, (words, digits) in FIGURES.items()
    ]


def _changes(found: dict[str, Any]) -> list[str]:
    fall = found["encoder_distance_fall"]
    kind = "reached" if fall >= REQUIRED_FALL else "NOT reached"
    kept = "are the same after it, to the last digit" if found["zero_shot_same"] else "HAVE MOVED"
    return [
        f"- Stage 2 lowers the encoder distance by {fall:.1%} (at least {REQUIRED_FALL:.0%} expected: {kind}).",
        f"- Zero-shot figures {kept}.",
    ]


def step_lines(record: dict[str, Any]) -> list[str]:
    """Rates, shares, the price of accumulation."""
    rows = []
    for row in record["rows"]:
        start = [f"{row['mode']}, {row['micro_batches']} x {row['batch_size']}"]
        if "failed" in row:
            rows.append([*start, row["failed"], "", "", "", ""])
            continue
        memory = f"{row['peak_gb']:.1f} ({row['predicted_gb']:.1f})" if "peak_gb" in row else "-"
        rows.append(
            [
                *start,
                f"{row['images_per_s']:.0f}",
                f"{row['needed_gflop_per_image'] * row['images_per_s'] / 1e3:.1f}",
                f"{row['share_of_peak']:.1%}",
                f"{row['share_of_peak_computed']:.1%}",
                memory,
            ]
        )
    cut = " cut down" if record["tiny"] else ""
    lines = [
        f"Stage 1 (`{record['recipe']}`{cut}) on random pairs in one process. A large bf16 matrix product, the peak",
        f"of the shares, ran at {record['matrix_product_tflop_per_s']:.3g} TFLOP/s.",
    ]
    names = ["blocks, micro-batches x pairs", "images/s", "TFLOP/s", "of peak", "with what is recomputed", "GB (check)"]
    lines += ["", *table(names, rows), "", f"- {verdict(record['best'])}."]
    lines += [
        f"- {one['micro_batches']} micro-batches of {one['batch_size']} ({one['mode']}) take "
        f"{one['time_x_single']:.2f} times as long a picture as one; by their FLOPs {one['flops_x_single']:.2f} times."
        for one in record["best"]["accumulation"]
    ]
    return [
        *lines,
        "",
        "`of peak` counts only what any way of computing a step needs; the column beside it also counts recomputed",
        "activations and the first of two passes, as `qlip check` does. `GB (check)` is the allocator's peak, and its",
        "prediction without reserve.",
    ]


def memory_lines(record: dict[str, Any]) -> list[str]:
    """Every point beside its prediction."""
    rows = [
        [point["variant"], str(point["batch_size"]), f"{point['measured_gb']:.2f}", f"{point['predicted_gb']:.2f}"]
        for point in record["points"]
    ]
    name = "cuda" if "gpu" in record["machine"] else "cpu"
    return [
        f"`{record['recipe']}`, blocks {'compiled' if record['compiled'] else 'not compiled'}, activations "
        f"{'recomputed' if record['activation_checkpointing'] else 'kept'}; peaks of a step with R1.",
        "",
        *table(["", "pictures at once", "GB", "`qlip check`, without reserve"], rows),
        "",
        f"![Peak memory over pictures at once](memory_{name}.svg)",
    ]
