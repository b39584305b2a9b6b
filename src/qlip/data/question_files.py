"""Questions about pictures: files of one JSON object a line (POPE's, LLaVA's), and the `questions` of scene shards.

    {"question_id": 1, "image": "COCO_val2014_000000016631.jpg", "text": "Is there a dog?", "label": "yes"}

`label`, `answer` (a text each) or `answers` (a list of texts) is what is right; `category` sorts questions into groups.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlip.core.errors import UserError
from qlip.data.folders import relative_name, sha256_of, stamp_of
from qlip.data.items import Item
from qlip.data.tar_reader import Skip

ENDINGS = (".jsonl", ".json")
"""POPE's own files are JSON lines that are called .json."""
FIRST_LINE = 65_536  # bytes in which a question file's first line ends
POPE_SPLITS = ("random", "popular", "adversarial")
TRUTHS = ("label", "answer", "answers")
USUAL_PLACES = ("images", "val2014", "train2014", "val2017", "test2015", "train_images")
MISSING = "missing picture"


@dataclass(kw_only=True, slots=True, frozen=True)
class Question:
    """One question about one picture."""

    question_id: int | str
    """As in the file; of a scene, its key and the place of the question."""
    text: str
    """As in the file."""
    kind: str = ""
    """Category or kind; empty where the data name none."""
    answers: tuple[str, ...] = ()
    """What is right: none, one, or as many as people were asked."""
    file: str = ""
    """Stem of the question file; empty for shards."""


@dataclass(kw_only=True, slots=True)
class QuestionFiles:
    """Pictures that question files name, once for each question (`data.items.Source`)."""

    name: str
    found: list[Item | Skip]
    """In the order of the files; a question whose picture is not there is a skip."""
    files_sha256: str
    """Of the files' bytes."""
    class_names: tuple[str, ...] = ()
    num_items: int | None = field(init=False)
    has_labels: bool = field(init=False, default=False)
    """Questions know no classes."""

    def __post_init__(self) -> None:
        self.num_items = len(self.found)

    def identity(self) -> str:
        """sha256 over the files, and names, sizes and times of all pictures."""
        pictures = {item.image for item in self.found if isinstance(item, Item) and isinstance(item.image, Path)}
        return sha256_of([self.files_sha256, *(f"{path.name}\0{stamp_of(path)}" for path in sorted(pictures))])

    def items(self) -> Iterator[Item | Skip]:
        """In the files' order; the key is the question's, after its file's where there are several."""
        yield from self.found


def is_question_file(path: Path) -> bool:
    """Whether the first line is a JSON object with `question_id`; False for what cannot be read."""
    if path.suffix.lower() not in ENDINGS:
        return False
    try:
        with path.open("rb") as file:
            line = file.readline(FIRST_LINE)
        first = json.loads(line)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(first, dict) and "question_id" in first


def open_questions(files: list[Path], *, images: str = "", name: str) -> QuestionFiles:
    """Question files, whose pictures lie below `images`, or else beside the first file or in a usual folder there.

    Of a file without `category` whose name ends in `random`, `popular` or `adversarial` (POPE's splits) that is the
    category. A number may come again with another question (TextVQA's are those of pictures); the second is then keyed
    `number#2`. Raises `UserError` naming file, line and field for what is no question, for a question that comes twice
    in a file, and where none of the pictures is there.
    """
    places = _places(files[0], images)
    digest = hashlib.sha256()
    found: list[Item | Skip] = []
    for file in files:
        content = _read(file)
        digest.update(hashlib.sha256(content).digest())
        prefix = f"{file.stem}/" if len(files) > 1 else ""
        found += _questions(file, content, prefix, places)
    missing = [skip for skip in found if isinstance(skip, Skip)]
    if len(missing) == len(found):
        raise UserError(
            f"{name}: none of its pictures is there, first {missing[0].reason.removeprefix(MISSING + ': ')} "
            f"(looked in {places[0]}); give the folder that holds them with --images FOLDER"
        )
    return QuestionFiles(name=name, found=found, files_sha256=digest.hexdigest())


def questions_of(item: Item) -> list[Question]:
    """The questions about a picture; none where its json has no `questions`.

    Raises `UserError`, naming the picture, for `questions` of another form than scenes have (kind, question, answer).
    """
    asked = item.record.get("questions", [])
    if isinstance(asked, list) and all(isinstance(entry, Question) for entry in asked):
        return asked
    questions = []
    for number, entry in enumerate(asked if isinstance(asked, list) else [None]):
        fields = [entry.get(name) if isinstance(entry, dict) else None for name in ("kind", "question", "answer")]
        if not all(isinstance(value, str) and value.strip() for value in fields):
            raise UserError(
                f"{item.key}: question {number + 1} of its json is no object of the texts kind, question and answer; "
                "mend the shards, or make some: `qlip data scenes`"
            )
        kind, text, answer = (str(value) for value in fields)
        questions.append(Question(question_id=f"{item.key}/{number}", text=text, kind=kind, answers=(answer,)))
    return questions


def _places(file: Path, images: str) -> list[Path]:
    root = Path(images).expanduser() if images else file.absolute().parent
    if not root.is_dir():
        raise UserError(f"--images {images} is no folder; give the one that holds the pictures of {file.name}")
    return [root, *(root / usual for usual in USUAL_PLACES if (root / usual).is_dir())]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; mend its permissions") from None


def _questions(file: Path, content: bytes, prefix: str, places: list[Path]) -> Iterator[Item | Skip]:
    lines: dict[tuple[str, str], int] = {}
    times = Counter[str]()
    last = next((split for split in POPE_SPLITS if file.stem.endswith(split)), "")
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{file} line {number}"
        row = _row(line, where)
        question = _question(row, where, file=file.stem, kind=last)
        key = str(question.question_id)
        first = lines.setdefault((key, question.text), number)
        if first != number:
            raise UserError(f"{where}: question_id {key[:40]} asks the same in line {first}; leave one of them out")
        times[key] += 1
        key += f"#{times[key]}" if times[key] > 1 else ""
        image = relative_name(_text(row, "image", where), where=where)
        path = next((place / image for place in places if _is_file(place / image)), None)
        if path is None:
            yield Skip(key=prefix + key, reason=f"{MISSING}: {image}", shard=str(file))
        else:
            yield Item(key=prefix + key, image=path, record={"questions": [question], "image": image})


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name longer than file systems take
        return False


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"{where} is not json; give one question a line, or fetch the file again") from None
    if not isinstance(row, dict):
        raise UserError(f"{where} is no json object; give one question a line, or fetch the file again")
    return row


def _text(row: dict[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where} has no {name} (a text that is not empty); mend the line")
    return value


def _question(row: dict[str, Any], where: str, *, file: str, kind: str) -> Question:
    question_id = row.get("question_id")
    if not isinstance(question_id, int | str) or isinstance(question_id, bool) or question_id == "":
        raise UserError(f"{where} has no question_id (a whole number or a text); mend the line")
    given = [name for name in TRUTHS if row.get(name) is not None]
    if len(given) > 1:
        raise UserError(f"{where} has {' and '.join(given)}; leave one of them, the right one")
    answers: tuple[str, ...] = ()
    if given == ["answers"]:
        listed = row["answers"]
        if not isinstance(listed, list) or not listed or not all(isinstance(answer, str) for answer in listed):
            raise UserError(f"{where}: answers is no list of texts; mend the line")
        answers = tuple(listed)
    elif given:
        answers = (_text(row, given[0], where),)
    return Question(
        question_id=question_id,
        text=_text(row, "text", where),
        kind=_text(row, "category", where) if row.get("category") is not None else kind,
        answers=answers,
        file=file,
    )
