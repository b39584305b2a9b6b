"""From questions to answers: every question once, shared by all ranks, resumed where it was stopped.

    source -> parts of 100 questions -> rank (part modulo ranks) -> decode -> batch -> answer -> texts

The order is the data's, whatever the number of ranks. A finished part is a file when a folder is given.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from qlip.core import distributed
from qlip.core.errors import UserError
from qlip.core.images import ImageLimits, ImageRejected, open_image
from qlip.core.log import ProgressLine, progress
from qlip.data.items import Item, Source
from qlip.data.ledger import kind_of
from qlip.data.question_files import Question, questions_of
from qlip.data.tar_reader import Skip
from qlip.evals.question_scores import Answered

PART = 100  # questions at least; a kill loses at most so many per rank and those of one more picture
Ask = Callable[[list[Question], list[Image.Image]], list[str]]
"""b questions and their pictures, RGB -> b answers."""


@dataclass(kw_only=True, slots=True)
class Asking:
    """What is asked of whom."""

    source: Source
    """The data."""
    ask: Ask
    """The assistant."""
    check: Callable[[Question], None] = lambda question: None
    """Raises `UserError` for a question that cannot be scored."""
    max_samples: int = 0
    """Ask about the first so many pictures, or of question files the first so many questions; 0 asks all."""
    batch_size: int = 8
    """Questions answered together."""
    max_skip_share: float = 0.05
    """Stop when a larger share of the pictures cannot be used."""
    limits: ImageLimits = field(default_factory=ImageLimits)
    """Pictures beyond these are skipped."""


@dataclass(kw_only=True, slots=True)
class Answers:
    """Of all ranks, in the order of the data."""

    keys: list[str]
    """Of the pictures, one for each question."""
    answered: list[Answered]
    skipped: Counter[str]
    """Reason -> how many pictures."""
    num_resumed: int
    """Parts that an earlier run had finished."""


@dataclass(kw_only=True, slots=True)
class _Part:
    """What a part came to."""

    number: int
    rows: list[tuple[str, Answered]]
    """Key of the picture, question and answer."""
    skipped: dict[str, int]
    examples: list[str]
    """`key: reason` of the first that were skipped."""
    resumed: bool = False


def collect_answers(asking: Asking, *, title: str, folder: Path | None = None) -> Answers:
    """Ask every question once; all ranks call it together.

    `folder` keeps finished parts and must belong to this model, data and protocol alone; None keeps them in memory.
    Raises `UserError` on all ranks for no question, one that cannot be scored, and too many unusable pictures.
    """
    own = distributed.on_all_ranks(lambda: _own_parts(asking, title, folder))
    parts = sorted((part for ranks in distributed.gather_objects(own) for part in ranks), key=lambda part: part.number)
    rows = [row for part in parts for row in part.rows]
    skipped = sum((Counter(part.skipped) for part in parts), Counter[str]())
    num_seen = len({key for key, _ in rows}) + skipped.total()
    if skipped.total() > asking.max_skip_share * num_seen:
        first = next(example for part in parts for example in part.examples)
        raise UserError(
            f"{asking.source.name}: {skipped.total()} of {num_seen} pictures cannot be used, more than "
            f"{asking.max_skip_share:.0%}; the first is {first}; mend them, or give their folder with --images"
        )
    if not rows:
        raise UserError(f"{asking.source.name} holds no questions: give scenes (`qlip data scenes`) or question files")
    return Answers(
        keys=[key for key, _ in rows],
        answered=[answered for _, answered in rows],
        skipped=skipped,
        num_resumed=sum(part.resumed for part in parts),
    )


def _own_parts(asking: Asking, title: str, folder: Path | None) -> list[_Part]:
    parts: list[_Part] = []
    done = 0
    total = min(filter(None, (asking.max_samples, asking.source.num_items)), default=0)
    with progress(title, total) as bar:
        for number, (items, skips) in enumerate(_cut(asking)):
            first, done = done, done + len(items)
            if number % distributed.world_size() != distributed.rank():
                continue
            file = folder / f"answers_{number:06d}.json" if folder is not None else None
            part = _read_part(file, number, items) if file is not None else None
            if part is None:
                part = _ask_part(asking, items, skips, number, bar, first)
                if file is not None:
                    _write_part(file, part)
            parts.append(part)
            bar.update(done)
    return parts


def _cut(asking: Asking) -> Iterator[tuple[list[Item], list[Skip]]]:
    """Pictures with `PART` questions or a few more, with the skips met on the way."""
    items: list[Item] = []
    skips: list[Skip] = []
    num = num_questions = 0
    for found in asking.source.items():
        questions = questions_of(found) if isinstance(found, Item) else []
        for question in questions:
            asking.check(question)
        if isinstance(found, Skip):
            skips.append(found)
        elif questions:
            items.append(found)
            num_questions += len(questions)
        num += isinstance(found, Skip) or bool(questions)
        if num_questions >= PART:
            yield items, skips
            items, skips, num_questions = [], [], 0
        if num == asking.max_samples > 0:
            break
    if items or skips:
        yield items, skips


def _ask_part(
    asking: Asking, items: list[Item], skips: list[Skip], number: int, bar: ProgressLine, first: int
) -> _Part:
    """Answers to one part's questions."""
    skips = list(skips)
    rows: list[tuple[str, Answered]] = []
    waiting: list[tuple[str, Question, Image.Image]] = []

    def flush(most: int) -> None:
        while len(waiting) > most:
            batch = waiting[: asking.batch_size]
            del waiting[: asking.batch_size]
            texts = asking.ask([question for _, question, _ in batch], [picture for _, _, picture in batch])
            for (key, question, _), text in zip(batch, texts, strict=True):
                rows.append((key, Answered(question=question, text=text)))

    opened: tuple[Any, Image.Image] | None = None  # files name a picture several times in a row
    for place, item in enumerate(items):
        try:
            if opened is None or opened[0] != item.image:
                opened = item.image, open_image(item.image, limits=asking.limits)
        except ImageRejected as rejected:
            skips.append(Skip(key=item.key, reason=str(rejected), shard=""))
            continue
        waiting += [(item.key, question, opened[1]) for question in questions_of(item)]
        flush(asking.batch_size - 1)
        bar.update(first + place)
    flush(0)
    reasons = Counter[str]()
    for skip in skips:
        reasons[kind_of(skip.reason)] += skip.count
    examples = [f"{skip.key or skip.shard}: {skip.reason}" for skip in skips[:3]]
    return _Part(number=number, rows=rows, skipped=dict(reasons), examples=examples)


def _write_part(file: Path, part: _Part) -> None:
    """The file appears whole or not at all."""
    rows = [[key, answered.question.question_id, answered.text] for key, answered in part.rows]
    temporary = file.with_suffix(".tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"rows": rows, "skipped": part.skipped, "examples": part.examples}))
        temporary.replace(file)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}; free disk space or choose another --out") from None


def _read_part(file: Path, number: int, items: list[Item]) -> _Part | None:
    """A finished part; None when it is not there, or broken by a crash of the machine."""
    asked = {(item.key, question.question_id): question for item in items for question in questions_of(item)}
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        rows = [(key, Answered(question=asked[key, name], text=text)) for key, name, text in said["rows"]]
        return _Part(number=number, rows=rows, skipped=said["skipped"], examples=said["examples"], resumed=True)
    except (OSError, ValueError, KeyError, TypeError):
        return None
