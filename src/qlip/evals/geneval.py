"""GenEval's files: prompts in, pictures out as its scorer reads them, the scorer's results in (arXiv 2310.11513).

The scorer takes every folder of digits below the root and every file in its `samples` whose name begins with digits and
`.png`; it leaves out everything else without a word, and stops at a folder without metadata. Facts: djghosh13/geneval.

    ROOT/generation.json              what made the pictures (ours, left out by the scorer)
    ROOT/00000/metadata.jsonl         line 1 of evaluation_metadata.jsonl, nothing else
    ROOT/00000/samples/0000.png ...   the pictures
    ROOT/00000/grid.png               the same side by side, to look at
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qlip.core import distributed
from qlip.core.errors import UserError, nearest_name
from qlip.core.log import progress
from qlip.engine.run_folder import make_writable
from qlip.evals.benchmark_files import (
    Generate,
    Line,
    Wanted,
    claim,
    is_whole_png,
    pictures_of,
    read_lines,
    save_png,
    tiled,
    want,
)

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
NUM_PROMPTS = 553
RECORD, METADATA, SAMPLES, GRID = "generation.json", "metadata.jsonl", "samples", "grid.png"
PICTURE = re.compile(r"\d+\.png")  # as the scorer matches it: from the start, so `0000.png.tmp` counts too
PROMPTS_REMEDY = "fetch evaluation_metadata.jsonl of GenEval again, or mend the line"
RESULTS_REMEDY = "give the results.jsonl that GenEval's evaluate_images.py wrote"


@dataclass(kw_only=True, slots=True, frozen=True)
class GenEvalPrompt:
    """One line of evaluation_metadata.jsonl."""

    tag: str
    """Of `TAGS`."""
    prompt: str
    line: str
    """The line itself, which the scorer gets back unchanged."""
    content: dict[str, Any]
    """What the line holds: tag, prompt, include, exclude."""


def read_prompts(path: Path) -> list[GenEvalPrompt]:
    """The prompts in their order. Raises `UserError` naming line and field of what the scorer could not judge."""
    return [_prompt(line) for line in read_lines(path, remedy=PROMPTS_REMEDY)]


def _prompt(line: Line) -> GenEvalPrompt:
    content = line.json()
    tag = line.value(content, "tag", str)
    if tag not in TAGS:  # it would be one more category in the mean
        raise line.refusal(f"tag {tag!r:.40} is none of GenEval's: {nearest_name(tag, TAGS)}")
    prompt = line.value(content, "prompt", str)
    include = line.value(content, "include", list)
    if not include:
        raise line.refusal("include is empty, so every picture would be right")
    for place, wanted in enumerate(include):
        _check_clause(line, wanted, f"include[{place}]", place=place)
    exclude = line.value(content, "exclude", list) if "exclude" in content else []
    for place, unwanted in enumerate(exclude):
        _check_clause(line, unwanted, f"exclude[{place}]", place=None)
    return GenEvalPrompt(tag=tag, prompt=prompt, line=line.text, content=content)


def _check_clause(line: Line, clause: Any, where: str, *, place: int | None) -> None:
    """One object of `include`, the `place`-th, or of `exclude` (None)."""
    if not isinstance(clause, dict):
        raise line.refusal(f"{where} is no object")
    line.value(clause, "class", str, within=where)
    count = line.value(clause, "count", int, within=where)
    if count < 1:
        raise line.refusal(f"{where}.count is {count}, give at least 1")
    known = ("class", "count") if place is None else ("class", "count", "color", "position")
    for name in clause:
        if name not in known:  # a `colour` would be left out of the judgement
            raise line.refusal(f"{where}.{name!s:.40} is unknown: {nearest_name(name, known)}")
    if "color" in clause:
        line.value(clause, "color", str, within=where)
    if "position" in clause:
        position = line.value(clause, "position", list, within=where)
        if len(position) != 2 or position[0] not in RELATIONS:
            raise line.refusal(f"{where}.position is no pair of one of {', '.join(RELATIONS)} and a number")
        target = position[1]
        if not isinstance(target, int) or isinstance(target, bool) or not 0 <= target < (place or 0):
            raise line.refusal(f"{where}.position[1] is {json.dumps(target):.40}, give the place of an earlier include")


def write_geneval(
    generate: Generate,
    prompts_path: Path,
    out: Path,
    *,
    num_samples: int = 4,
    seed: int = 0,
    batch_size: int = 16,
    settings: dict[str, Any] | None = None,
) -> LayoutCount:
    """Pictures of all prompts, as the scorer reads them; prompts that are finished are kept. Says what it will see.

    `settings` is what else the pictures depend on (model, sampling), for `generation.json`. A picture's seed is
    `picture_seed(seed, place of the prompt, place of the picture)`. Under torchrun the ranks share the prompts.

    Raises `UserError` for malformed prompts, impossible numbers, a folder that holds something else or pictures of
    other settings, and a layout that the scorer would read otherwise.
    """
    for name, value in (("number of pictures", num_samples), ("batch size", batch_size)):
        if value < 1:
            raise UserError(f"{name} is {value}: give at least 1")
    prompts = read_prompts(prompts_path)
    lines = "\n".join(prompt.line for prompt in prompts)
    settings = {
        "benchmark": "geneval",
        "prompts": prompts_path.name,
        "prompts_sha256": hashlib.sha256(lines.encode()).hexdigest(),
        "num_prompts": len(prompts),
        "num_samples": num_samples,
        "seed": seed,
        "seeds": "63 bits of sha256(seed/prompt/sample)",
        **(settings or {}),
    }
    distributed.on_first_rank(partial(_begin, out, settings, prompts, num_samples))
    distributed.on_all_ranks(
        lambda: _write_own(generate, prompts, out, num_samples=num_samples, seed=seed, batch_size=batch_size)
    )
    distributed.wait_for_all()
    found = count_layout(out)
    if found.stops or any(num != num_samples for num in found.pictures.values()) or len(found.pictures) < len(prompts):
        problem = next(iter(found.stops), f"{found.num_pictures} pictures of {num_samples * len(prompts)}")
        raise UserError(f"{out} is not what GenEval reads ({problem}); somebody changed it meanwhile: start again")
    return found


def _begin(out: Path, settings: dict[str, Any], prompts: list[GenEvalPrompt], num_samples: int) -> None:
    """The folder, checked, with its record. Raises `UserError` for pictures that are not of this run."""
    make_writable(out)
    claim(out, settings, record=out / RECORD)
    names = {f"{i:04d}.png" for i in range(num_samples)}
    folders = {f"{index:05d}" for index in range(len(prompts))}
    for folder in filter(_is_seen, out.iterdir()):
        if folder.name not in folders:
            raise UserError(f"{folder} is of no prompt, but GenEval would score it: move it away")
        strange = [file.name for file in _seen_pictures(folder / SAMPLES) if file.name not in names]
        if strange:
            raise UserError(f"{folder / SAMPLES / strange[0]} is not of this run, but GenEval would score it: move it")


def _write_own(
    generate: Generate, prompts: list[GenEvalPrompt], out: Path, *, num_samples: int, seed: int, batch_size: int
) -> None:
    """The unfinished prompts of this rank."""

    def finished(wanted: Wanted) -> bool:
        folder = out / f"{wanted.index:05d}" / SAMPLES
        return all(is_whole_png(folder / f"{i:04d}.png") for i in range(num_samples))

    wanted = want([prompt.prompt for prompt in prompts], seed=seed, num_samples=num_samples)
    own = [entry for entry in wanted if entry.index % distributed.world_size() == distributed.rank()]
    left = [entry for entry in own if not finished(entry)]
    done = num_samples * (len(own) - len(left))
    for entry in own:
        folder = out / f"{entry.index:05d}"
        try:
            (folder / SAMPLES).mkdir(parents=True, exist_ok=True)
            (folder / METADATA).write_text(prompts[entry.index].line + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error.strerror}; choose another --out") from None
    with progress("GenEval", num_samples * len(own), start=done) as bar:
        for entry, pictures in pictures_of(generate, left, batch_size=batch_size):
            folder = out / f"{entry.index:05d}"
            for i, picture in enumerate(pictures):
                save_png(folder / SAMPLES / f"{i:04d}.png", picture)
            save_png(folder / GRID, tiled(pictures, columns=math.ceil(math.sqrt(num_samples))))
            done += num_samples
            bar.update(done)


@dataclass(kw_only=True, slots=True, frozen=True)
class LayoutCount:
    """What GenEval's scorer will see below a root."""

    pictures: dict[str, int]
    """Prompt folder -> how many pictures."""
    left_out: list[str]
    """Paths below the root, each with why the scorer does not see it."""
    stops: list[str]
    """What would stop it: folders without samples, or without exactly one object of metadata."""

    @property
    def num_pictures(self) -> int:
        """All pictures."""
        return sum(self.pictures.values())


def count_layout(root: Path) -> LayoutCount:
    """Walk through a root as the scorer does. Raises `UserError` when it is not there."""
    if not root.is_dir():
        raise UserError(f"{root} is no folder; give the one that holds 00000, 00001, ...")
    pictures, left_out, stops = dict[str, int](), list[str](), list[str]()
    for folder in sorted(root.iterdir()):
        if not _is_seen(folder):
            left_out.append(f"{folder.name}: {'name is not all digits' if folder.is_dir() else 'no folder'}")
            continue
        try:
            metadata = json.loads((folder / METADATA).read_text(encoding="utf-8"))
            if not isinstance(metadata, dict):
                stops.append(f"{folder.name}/{METADATA}: no object")
        except (OSError, ValueError, RecursionError):
            stops.append(f"{folder.name}/{METADATA}: missing, or not exactly one object")
        if not (folder / SAMPLES).is_dir():
            stops.append(f"{folder.name}: no folder {SAMPLES}")
            continue
        seen = _seen_pictures(folder / SAMPLES)
        pictures[folder.name] = len(seen)
        strange = sorted(file.name for file in (folder / SAMPLES).iterdir() if file not in seen)
        left_out += [f"{folder.name}/{SAMPLES}/{name}: no picture by its name" for name in strange]
    return LayoutCount(pictures=pictures, left_out=left_out, stops=stops)


def _is_seen(folder: Path) -> bool:
    return folder.is_dir() and folder.name.isdigit()


def _seen_pictures(samples: Path) -> list[Path]:
    if not samples.is_dir():
        return []
    return [file for file in samples.iterdir() if file.is_file() and PICTURE.match(file.name)]


@dataclass(kw_only=True, slots=True, frozen=True)
class GenEvalScores:
    """What the scorer found."""

    overall: float
    """Mean of `tags`: GenEval's figure, in [0, 1]."""
    tags: dict[str, float]
    """Tag -> share of its pictures that are right."""
    pictures: dict[str, int]
    """Tag -> how many pictures."""
    num_prompts: int
    all_right: float
    """Share of prompts whose pictures are all right."""
    any_right: float
    """Share of prompts with at least one right picture, the scorer's `% correct prompts`."""
    missing_tags: tuple[str, ...]
    """Of GenEval's six: `overall` is the mean of the others."""


def read_results(path: Path) -> GenEvalScores:
    """The scorer's file, one json object per picture. Raises `UserError` naming line and field of a malformed one."""
    by_tag, by_prompt = defaultdict[str, list[bool]](list), defaultdict[str, list[bool]](list)
    lines_of: dict[str, int] = {}
    for line in read_lines(path, remedy=RESULTS_REMEDY):
        entry = line.json()
        filename, tag = line.value(entry, "filename", str), line.value(entry, "tag", str)
        if tag not in TAGS:
            raise line.refusal(f"tag {tag!r:.40} is none of GenEval's: {nearest_name(tag, TAGS)}")
        if filename in lines_of:
            raise line.refusal(f"filename {filename!r:.80} stands in line {lines_of[filename]} too")
        lines_of[filename] = line.number
        line.value(entry, "prompt", str)
        correct = line.value(entry, "correct", bool)
        metadata = line.value(entry, "metadata", str)
        by_tag[tag].append(correct)
        by_prompt[metadata].append(correct)
    tags = {tag: sum(by_tag[tag]) / len(by_tag[tag]) for tag in TAGS if tag in by_tag}
    return GenEvalScores(
        overall=sum(tags.values()) / len(tags),
        tags=tags,
        pictures={tag: len(by_tag[tag]) for tag in tags},
        num_prompts=len(by_prompt),
        all_right=sum(map(all, by_prompt.values())) / len(by_prompt),
        any_right=sum(map(any, by_prompt.values())) / len(by_prompt),
        missing_tags=tuple(tag for tag in TAGS if tag not in tags),
    )
