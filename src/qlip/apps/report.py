"""A demo folder -> one self-contained page: headline, pictures, curves, figures, confusions, bits, times, commands.

    OUT/{data,stage1,stage2,results}  ->  OUT/report.html, OUT/samples/reconstructions.png

Whatever is missing is left out with a sentence that says so. `report.html.j2` lays the page out, `report_folder.py`
reads the runs, `report_words.py` explains figures, `report_plots.py` draws, `report_pictures.py` runs the models.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from qlip.apps.report_folder import Stage, read_json, read_stages, run_facts
from qlip.apps.report_generation import generation_of
from qlip.apps.report_pictures import data_uri, look, write_grid
from qlip.apps.report_plots import accuracy_bars, bit_bars, confusion, curve
from qlip.apps.report_words import Words, figure_words, format_duration, format_figure, term_words
from qlip.apps.table import Shape, table_rows
from qlip.apps.table_formats import PlainTable
from qlip.core.errors import UserError

TEMPLATE = "report.html.j2"
BASELINE = "_baseline"
EVALUATIONS = {
    "reconstruction": "Reconstruction",
    "zero_shot": "Zero-shot classification",
    "linear_probe": "Linear probe on frozen features",
    "knn": "Nearest neighbours of frozen features",
}
ACCURACIES = {
    "top1": "colour and shape",
    "top1_seen_pairs": "\N{EN DASH} pairs seen in training",
    "top1_unseen_pairs": "\N{EN DASH} pairs never seen",
    "colour_top1": "colour alone",
    "shape_top1": "shape alone",
}


class Headline(NamedTuple):
    """One of the large numbers on top."""

    label: str
    value: str
    baseline: str


class Row(NamedTuple):
    """One line of a figures table; `cells` holds (value, baseline) per stage."""

    name: str
    words: Words
    cells: list[tuple[str, str]]


class Curve(NamedTuple):
    """One training term."""

    term: str
    meaning: str
    last: str
    svg: Markup


def write_report(folder: Path) -> Path:
    """Write `report.html` and `samples/reconstructions.png` from what the demo folder holds; returns the page's path.

    Raises `UserError` for a folder without a run, for results that cannot be read, or when it cannot be written.
    """
    stages = read_stages(folder)
    test_data = folder / "data" / "test"
    exports = {stage.title: stage.export for stage in stages if stage.export is not None}
    looks = look(exports, shards=str(test_data)) if exports and any(test_data.glob("*.tar")) else None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # captions and class names are foreign text
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    generation = generation_of(folder)
    timings = read_json(folder / "results" / "timings.json", default={})
    page = environment.get_template(TEMPLATE).render(
        folder=folder.resolve().name,
        stages=stages,
        headlines=headlines(stages),
        looks=looks,
        data_uri=data_uri,
        curves={stage.title: curves(stage) for stage in stages},
        tables={title: figure_rows(stages, name) for name, title in EVALUATIONS.items()},
        baselines={title: baseline_name(stages, name) for name, title in EVALUATIONS.items()},
        paper_tables=paper_tables(folder, stages),
        zero_shot=zero_shot_plots(stages),
        generation=generation,
        bits=bit_plots(stages),
        runs=[run_facts(stage) for stage in stages],
        parts={name: format_duration(value) for name, value in timings.items() if is_seconds(name, value)},
        total=format_duration(sum(value for name, value in timings.items() if is_seconds(name, value))),
        peak_memory_gb=timings.get("peak_memory_gb"),
        machine=timings.get("machine", {}),
        commands=commands(folder.resolve(), stages),
        cards=protocol_cards(stages) + ([("text to image", generation.card)] if generation and generation.card else []),
    )
    path = folder / "report.html"
    try:
        if looks is not None and looks.scenes:
            write_grid(folder / "samples" / "reconstructions.png", looks.scenes)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; make the folder writable") from None
    return path


def headlines(stages: list[Stage]) -> list[Headline]:
    """The three figures a reader wants first, as far as they were measured."""
    by_title = {stage.title: stage for stage in stages}
    first, second = by_title.get("stage 1"), by_title.get("stage 2")
    found = []
    for label, evaluation, name in (
        ("PSNR after stage 1", "reconstruction", "psnr"),
        ("zero-shot top-1", "zero_shot", "top1"),
    ):
        value = first.figure(evaluation, name) if first else None
        if first and value is not None:
            baseline = format_figure(name, first.figure(evaluation, name + BASELINE))
            found.append(
                Headline(
                    label, format_figure(name, value), f"{first.results[evaluation]['card']['baseline']}: {baseline}"
                )
            )
    before = first.figure("reconstruction", "encoder_distance") if first else None
    after = second.figure("reconstruction", "encoder_distance") if second else None
    if before and after is not None:
        gain = f"{100 * (1 - after / before):.1f} %"
        found.append(
            Headline("encoder distance lowered by stage 2", gain, f"stage 1: {before:.4g}, stage 2: {after:.4g}")
        )
    return found


def curves(stage: Stage) -> dict[str, list[Curve]]:
    """One small plot per term: the losses that are summed, then what was only watched."""
    names = sorted({name for line in stage.lines for name in line} - {"step", "card"})
    groups: dict[str, list[Curve]] = {"Loss terms, as weighted in the sum": [], "Watched beside them": []}
    losses, watched = groups.values()
    for name in names:
        points = [(line["step"], line[name]) for line in stage.lines if isinstance(line.get(name), int | float)]
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        words = term_words(name)
        svg = curve(steps, values, term=f"{stage.title} {name}", unit=words.unit)
        short = name.split("/")[-1]
        group = losses if short == "loss" or short.endswith("_loss") else watched
        group.append(Curve(name, words.meaning, f"{values[-1]:.4g}", svg))
    return {title: found for title, found in groups.items() if found}


def figure_rows(stages: list[Stage], evaluation: str) -> list[Row]:
    """A line per figure, with value and baseline of every stage."""
    figures = [stage.results.get(evaluation, {}).get("figures", {}) for stage in stages]
    names = dict.fromkeys(name for found in figures for name in found if not name.endswith(BASELINE))
    return [
        Row(
            name,
            figure_words(name),
            [
                (
                    format_figure(name, found[name]) if name in found else "",
                    format_figure(name, found[name + BASELINE]) if name + BASELINE in found else "",
                )
                for found in figures
            ],
        )
        for name in names
    ]


def baseline_name(stages: list[Stage], evaluation: str) -> str:
    """What the baseline of an evaluation is, from its card."""
    cards = [stage.results[evaluation]["card"] for stage in stages if evaluation in stage.results]
    return cards[0].get("baseline", "baseline") if cards else ""


def paper_tables(folder: Path, stages: list[Stage]) -> list[PlainTable]:
    """Tables 2 and 10 with these models below the paper's rows, as far as their figures were measured."""
    files = [folder / "results" / f"{stage.name}.json" for stage in stages if stage.results]
    shapes: list[Shape] = []
    if any("reconstruction" in stage.results for stage in stages):
        shapes.append("2")
    if any("linear_probe" in stage.results for stage in stages):
        shapes.append("10")
    return [table_rows(files, shape=shape) for shape in shapes]


def zero_shot_plots(stages: list[Stage]) -> list[dict[str, Any]]:
    """Accuracies and confusions; one entry for stages that score alike, as they do when stage 2 froze the encoder."""
    entries: list[dict[str, Any]] = []
    for stage in stages:
        if "zero_shot" not in stage.results:
            continue
        figures, details = (stage.results["zero_shot"][key] for key in ("figures", "details"))
        content = json.dumps([figures, details])  # as text, where NaN equals NaN
        alike = [entry for entry in entries if entry["content"] == content]
        if alike:
            alike[0]["title"] += f" and {stage.title}, which are alike to the last digit"
            continue
        names = [name for name in ACCURACIES if figures.get(name) is not None]
        entry: dict[str, Any] = {"title": stage.title, "content": content, "confusions": {}}
        entry["accuracies"] = accuracy_bars(
            [ACCURACIES[name] for name in names],
            [figures[name] for name in names],
            [figures.get(name + BASELINE) for name in names],
        )
        for kind in ("colour", "shape"):
            if f"{kind}_confusion" in details:
                label = f"{kind} confusion, {stage.title}"
                entry["confusions"][kind] = confusion(details[f"{kind}_confusion"], details[f"{kind}s"], label=label)
        entries.append(entry)
    return entries


def bit_plots(stages: list[Stage]) -> list[dict[str, Any]]:
    """The share of ones per bit, with the entropy in words."""
    plots = []
    for stage in stages:
        shares = stage.results.get("reconstruction", {}).get("details", {}).get("bit_share")
        entropy = stage.figure("reconstruction", "bit_entropy")
        if shares and entropy is not None:
            most = stage.figure("reconstruction", "bit_entropy_max") or entropy
            svg = bit_bars(shares, label=f"share of ones of each bit, {stage.title}")
            plots.append(
                {
                    "title": stage.title,
                    "svg": svg,
                    "entropy": f"{entropy:.4f}",
                    "share": f"{100 * entropy / most:.1f} %",
                }
            )
    return plots


def is_seconds(name: str, value: Any) -> bool:
    """Whether an entry of timings.json is the time of a part."""
    return name != "peak_memory_gb" and isinstance(value, int | float)


def commands(folder: Path, stages: list[Stage]) -> list[tuple[str, list[str]]]:
    """What to do next, ready to paste: heading and shell lines."""
    exports = [stage.export.resolve() for stage in stages if stage.export is not None]
    model = shlex.quote(str(exports[-1] if exports else folder / "stage1" / "export"))
    where = {name: shlex.quote(str(folder / name)) for name in ("looks", "mine", "mine2", "mine.json", "data/test")}
    where["init"] = shlex.quote(str(folder / "mine" / "export"))
    size = stages[0].config.get("config", {}).get("model", {}).get("image_size", 256)
    found: list[tuple[str, list[str]]] = []
    if sys.prefix != sys.base_prefix:
        found.append(("Use this installation", [f"source {shlex.quote(str(Path(sys.prefix, 'bin', 'activate')))}"]))
    return [
        *found,
        ("Reconstruct your own pictures", [f"qlip reconstruct {model} picture.jpg --out {where['looks']}"]),
        ("Classify one", [f'qlip classify {model} picture.jpg --labels "red circle,blue star"']),
        (
            "Make shards from a table of addresses and captions",
            [
                "pip install img2dataset",
                "img2dataset --url_list pairs.csv --input_format csv --url_col url --caption_col caption "
                f"--output_format webdataset --output_folder shards --image_size {size} --resize_mode center_crop",
                "qlip data inspect shards",
            ],
        ),
        (
            "Train on your own shards, both stages",
            [
                f"qlip train scenes_tiny --data.train shards --out {where['mine']}",
                f"qlip train scenes_tiny_stage2 --data.train shards --task.init {where['init']} --out {where['mine2']}",
            ],
        ),
        ("Evaluate", [f"qlip eval {model} --data {where['data/test']} --json {where['mine.json']}"]),
    ]


def protocol_cards(stages: list[Stage]) -> list[tuple[str, str]]:
    """Heading and pretty JSON of the card behind every evaluation."""
    return [
        (f"{stage.title}, {name}", json.dumps(result["card"], indent=2, ensure_ascii=False))
        for stage in stages
        for name, result in stage.results.items()
    ]
