"""DPG-Bench's files: prompts in, pictures out as its scorer reads them, the scorer's results in (arXiv 2403.05135).

One PNG per prompt holds four pictures of R x R pixels in a square; the scorer is told R. Facts:
TencentQQGYLab/ELLA, dpg_bench.

    OUT/<item_id>.png          top left, top right, bottom left, bottom right: samples 0, 1, 2, 3
    OUT.generation.json        what made the pictures (ours), beside the folder: the scorer takes all files in it
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from qlip.core import distributed
from qlip.core.errors import UserError
from qlip.core.log import console, progress
from qlip.engine.run_folder import make_writable
from qlip.evals.benchmark_files import (
    UNFINISHED,
    Generate,
    Line,
    claim,
    is_whole_png,
    pictures_of,
    read_lines,
    save_png,
    tiled,
    want,
)

NUM_PROMPTS = 1065
NUM_TILES = 4
COLUMNS = 2
PROMPTS_REMEDY = "give DPG-Bench's folder of prompts, one ITEM.txt each"
RESULTS_REMEDY = "give the dpg-bench_..._results.txt that compute_dpg_bench.py wrote at its end"
QUIRKS = (
    "the scorer skips the first row of its table of questions",
    "pictures that it fails on are printed and left out of the mean: compare the number of pictures",
    "categories are scored on the last tile alone, and a question counts there even when its parent was answered no",
    "category scores are unreliable when several processes scored: each goes through them in an order of its own",
    "without --res-path the result file lands among the pictures: move it away before another run",
)
"""To be printed beside the scorer's numbers."""


def read_prompts(folder: Path) -> dict[str, str]:
    """Item -> prompt, sorted by item; white space around a prompt is dropped, other files are named and left out.

    Raises `UserError` for a folder without prompts, a prompt that is empty or not UTF-8, and an item with a dot in its
    name, of which the scorer would take what stands before.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; {PROMPTS_REMEDY}")
    files = sorted(file for file in folder.iterdir() if file.suffix == ".txt" and not file.name.startswith("."))
    others = sorted(file.name for file in folder.iterdir() if file not in files)
    if not files:
        raise UserError(f"{folder} holds no .txt files; {PROMPTS_REMEDY}")
    prompts = {}
    for file in files:
        if "." in file.stem:
            raise UserError(f"{file}: DPG-Bench takes {file.stem.split('.')[0]!r} for its item; rename it without dots")
        try:
            prompt = file.read_text(encoding="utf-8-sig").strip()
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}; {PROMPTS_REMEDY}") from None
        except UnicodeDecodeError:
            raise UserError(f"{file} is not UTF-8; fetch it again") from None
        if not prompt:
            raise UserError(f"{file} is empty; fetch it again")
        prompts[file.stem] = prompt
    if others:
        console.print(f"{folder}: {len(others)} other files left out, first {others[0]}", markup=False)
    return prompts


@dataclass(kw_only=True, slots=True, frozen=True)
class Written:
    """What there is for the scorer."""

    num_prompts: int
    """Pictures, one for each."""
    resolution: int
    """R, pixels: the scorer's --resolution."""
    num_tiles: int = NUM_TILES
    """The scorer's --pic-num."""


def write_dpg(
    generate: Generate,
    prompts_folder: Path,
    out: Path,
    *,
    seed: int = 0,
    batch_size: int = 16,
    settings: dict[str, Any] | None = None,
) -> Written:
    """Four pictures of every prompt in one PNG; those that are there already are kept.

    `settings` is what else the pictures depend on (model, sampling), for `OUT.generation.json`. A picture's seed is
    `picture_seed(seed, place of the item in sorted order, tile)`. Under torchrun the ranks share the prompts.

    Raises `UserError` for malformed prompts and for a folder that holds anything that the scorer must not meet, or
    pictures of other settings.
    """
    if batch_size < 1:
        raise UserError(f"batch size is {batch_size}: give at least 1")
    prompts = read_prompts(prompts_folder)
    text = "\n".join(f"{item}\0{prompt}" for item, prompt in prompts.items())
    settings = {
        "benchmark": "dpg_bench",
        "prompts": prompts_folder.resolve().name,
        "prompts_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "num_prompts": len(prompts),
        "seed": seed,
        "seeds": "63 bits of sha256(seed/prompt/tile)",
        **(settings or {}),
    }
    distributed.on_first_rank(partial(_begin, out, settings, prompts))
    distributed.on_all_ranks(lambda: _write_own(generate, prompts, out, seed, batch_size))
    distributed.wait_for_all()
    return Written(num_prompts=len(prompts), resolution=_resolution(out, prompts))


def record_of(out: Path) -> Path:
    """Where the settings of a folder of pictures are kept."""
    out = out.resolve()  # so that `.` and `..` have a name
    return out.with_name(f"{out.name}.generation.json")


def _begin(out: Path, settings: dict[str, Any], prompts: dict[str, str]) -> None:
    make_writable(out)
    claim(out, settings, record=record_of(out))
    for file in sorted(out.iterdir()):
        if file.name.startswith(".") and file.name.endswith(UNFINISHED):
            file.unlink(missing_ok=True)  # of a run that was killed
        elif file.suffix != ".png" or file.stem not in prompts:
            raise UserError(f"{file} is no picture of this run, but DPG-Bench would try to score it: move it away")


def _write_own(generate: Generate, prompts: dict[str, str], out: Path, seed: int, batch_size: int) -> None:
    """The missing pictures of this rank."""
    items = list(prompts)
    wanted = want(list(prompts.values()), seed=seed, num_samples=NUM_TILES)
    own = [entry for entry in wanted if entry.index % distributed.world_size() == distributed.rank()]
    left = [entry for entry in own if not is_whole_png(out / f"{items[entry.index]}.png")]
    done = NUM_TILES * (len(own) - len(left))
    with progress("DPG-Bench", NUM_TILES * len(own), start=done) as bar:
        for entry, pictures in pictures_of(generate, left, batch_size=batch_size):
            save_png(out / f"{items[entry.index]}.png", tiled(pictures, columns=COLUMNS))
            done += NUM_TILES
            bar.update(done)


def _resolution(out: Path, prompts: dict[str, str]) -> int:
    """R of all pictures. Raises `UserError` when they differ: the scorer cuts all of them alike."""
    sizes = dict[tuple[int, int], str]()
    for item in prompts:
        with Image.open(out / f"{item}.png") as picture:
            sizes.setdefault(picture.size, item)
    (width, height), *others = sizes
    if others or width != height or width % COLUMNS:
        named = ", ".join(f"{item}.png {width} x {height}" for (width, height), item in sizes.items())
        raise UserError(f"{out} holds pictures of several sizes ({named}): remove them and start again")
    return width // COLUMNS


@dataclass(kw_only=True, slots=True, frozen=True)
class DPGScores:
    """What the scorer found; all scores as shares in [0, 1], where the benchmark prints per cent."""

    overall: float
    """Mean over pictures of the mean over tiles: DPG-Bench's figure."""
    tiles: tuple[float, ...]
    """Mean per tile."""
    num_pictures: int
    """Pictures in the file; fewer than prompts when the scorer failed on some."""
    categories: dict[str, float]
    """global, entity, attribute, relation, other (Table 13), and whatever else stands there; see `QUIRKS`."""
    detailed: dict[str, float]
    """`entity - whole`, `relation - spatial`, ..."""


def read_results(path: Path) -> DPGScores:
    """The scorer's result file: a line per picture, then the scores. Raises `UserError` naming line and field.

    Categories without a question are NaN. The mean over the lines must be the score at the end.
    """
    rows, lines_of = list[list[float]](), dict[str, int]()
    lines = read_lines(path, remedy=RESULTS_REMEDY)
    summary = next((place for place, line in enumerate(lines) if line.text.startswith("Model: ")), len(lines))
    for line in lines[:summary]:
        picture, scores = _picture_line(line)
        if picture in lines_of:
            raise line.refusal(f"{picture!r:.80} stands in line {lines_of[picture]} too")
        if rows and len(scores) != len(rows[0]):
            raise line.refusal(f"{len(scores)} tiles, {len(rows[0])} in the lines before")
        lines_of[picture] = line.number
        rows.append(scores)
    if not rows:
        raise lines[0].refusal("no scores of pictures: the scorer has failed on all of them")
    tables, overall = _summary(lines[summary:])
    if overall is None:
        raise lines[-1].refusal("the file ends without `DPG-Bench score`: the scorer was stopped")
    tiles = tuple(sum(column) / len(rows) for column in zip(*rows, strict=True))
    mean = sum(tiles) / len(tiles)
    if not math.isclose(mean, overall, abs_tol=1e-6):
        raise lines[-1].refusal(f"DPG-Bench score is {100 * overall:.4f}, but the pictures give {100 * mean:.4f}")
    return DPGScores(
        overall=overall, tiles=tiles, num_pictures=len(rows), categories=tables["L1"], detailed=tables["L2"]
    )


def _picture_line(line: Line) -> tuple[str, list[float]]:
    """`path, score of each tile, their mean` -> path, scores of tiles. The path may hold commas."""
    fields = line.text.split(", ")
    first = len(fields)
    while first > 0 and _number(fields[first - 1]) is not None:
        first -= 1
    numbers = [_share(line, field, f"score {place}") for place, field in enumerate(fields[first:], start=1)]
    if first == 0 or not fields[0]:
        raise line.refusal("no path of a picture")
    if not 2 <= len(numbers) <= NUM_TILES + 1:
        raise line.refusal(f"{len(numbers)} scores after the path, wanted those of 1 to {NUM_TILES} tiles and a mean")
    *scores, mean = numbers
    if not math.isclose(mean, sum(scores) / len(scores), abs_tol=1e-6):
        raise line.refusal(f"the mean is {mean:g}, but the tiles give {sum(scores) / len(scores):g}")
    return ", ".join(fields[:first]), scores


def _summary(lines: list[Line]) -> tuple[dict[str, dict[str, float]], float | None]:
    """Categories of both tables, and the score at the end if it is there."""
    tables: dict[str, dict[str, float]] = {"L1": {}, "L2": {}}
    table, overall = "", None
    for line in lines:
        name, colon, value = line.text.rpartition(": ")
        if line.text.endswith(" category scores:") and line.text[:2] in tables:
            table = line.text[:2]
        elif line.text.startswith("\t"):
            if not table or not colon or not name.strip():
                raise line.refusal("no `category: score` below `L1 category scores:`")
            if name.strip() in tables[table]:
                raise line.refusal(f"category {name.strip()!r:.60} stands there twice")
            tables[table][name.strip()] = math.nan if value == "nan" else _share(line, value, name.strip(), per=100)
        elif line.text.startswith("DPG-Bench score: "):
            overall = _share(line, line.text.removeprefix("DPG-Bench score: "), "DPG-Bench score", per=100)
        elif not line.text.startswith(("Model: ", "Image path: ", "Save results to: ")):
            raise line.refusal(f"{line.text!r:.60} is none of the scorer's lines")
    return tables, overall


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _share(line: Line, text: str, name: str, *, per: int = 1) -> float:
    """A number between 0 and `per`, as a share. Raises `UserError` for anything else."""
    value = _number(text)
    if value is None or not 0 <= value <= per:
        raise line.refusal(f"{name:.60} is {text!r:.40}, no number from 0 to {per}")
    return value / per
