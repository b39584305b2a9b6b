"""LLaVA's conversation files: a JSON list, or JSON Lines, of `{"id", "image"?, "conversations": [{"from", "value"}]}`.

A record that cannot be used is kept as rejected with its reason; only broken JSON stops the reading. The rest lies in
one buffer of bytes, not in millions of Python objects: worker processes share it after a fork.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qlip.core.errors import UserError
from qlip.data.image_files import leaves_folder
from qlip.data.shard_list import split_sources
from qlip.data.tar_reader import SampleRejected, Skip

IMAGE_MARK = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
WHITESPACE = re.compile(r"[ \t\n\r]*")
Message = dict[str, Any]
"""`{"role": "system" | "user" | "assistant", "content": [{"type": "image"} | {"type": "text", "text": ...}, ...]}`."""
Part = str | int
"""A text, or 0 for a picture: how messages are stored."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Conversation:
    """One record."""

    key: str
    """Its `id`, else its number in the file; not unique in LLaVA's own files."""
    images: tuple[str, ...]
    """Names of its pictures, in the order of their places in the messages."""
    messages: list[Message]
    """In transformers' part form, texts stripped: system first if there is one, then user and assistant in turn."""


class Conversations:
    """The usable records of some files, by number."""

    def __init__(
        self, *, buffer: np.ndarray, offsets: np.ndarray, num_words: np.ndarray, has_image: np.ndarray
    ) -> None:
        """`buffer` (bytes,) uint8 holds the records as JSON, `offsets` (n + 1,) int64 where each begins."""
        self._buffer, self._offsets = buffer, offsets
        self.num_words = num_words
        """(n,) int32, words of all turns: what batches are grouped by."""
        self.has_image = has_image
        """(n,) bool."""
        self.rejected: list[Skip] = []
        """Records that cannot be used; `shard` names the file and the record, or the line of JSON Lines."""
        self.num_leading_answers = 0
        """Records whose first turn was an answer and was dropped."""
        self.identity = ""
        """sha256 of the files."""

    def __len__(self) -> int:
        """How many usable records."""
        return len(self._offsets) - 1

    def __iter__(self) -> Iterator[Conversation]:
        """All of them, in the files' order."""
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Conversation:
        """The record."""
        first, end = (int(self._offsets[place]) for place in (number, number + 1))
        key, images, turns = json.loads(self._buffer[first:end].tobytes())
        messages = [{"role": role, "content": [_part(part) for part in parts]} for role, parts in turns]
        return Conversation(key=key, images=tuple(images), messages=messages)


@dataclass(slots=True)
class _Growing:
    """Records on their way into `Conversations`."""

    data: bytearray = field(default_factory=bytearray)
    ends: list[int] = field(default_factory=lambda: [0])
    num_words: list[int] = field(default_factory=list)
    has_image: list[bool] = field(default_factory=list)
    rejected: list[Skip] = field(default_factory=list)
    num_leading_answers: int = 0

    def add(self, record: object, *, number: int, place: str) -> None:
        """`number` is the record's key when it has none."""
        key = str(number)
        try:
            if not isinstance(record, dict):
                raise SampleRejected("not an object")
            key = _key(record, number=number)
            images = _images(record)
            turns, led_by_answer = _turns(record)
            messages = _messages(turns, num_images=len(images))
        except SampleRejected as rejected:
            self.rejected.append(Skip(key=key, reason=str(rejected), shard=place))
            return
        self.num_leading_answers += led_by_answer
        line = json.dumps([key, images, messages], ensure_ascii=False, separators=(",", ":"))
        self.data += line.encode("utf-8", "backslashreplace")  # a lone surrogate becomes the JSON escape that it was
        self.ends.append(len(self.data))
        self.num_words.append(sum(len(text.split()) for _, text in turns))
        self.has_image.append(bool(images))


def open_conversations(path: str | Path) -> Conversations:
    """The records of a .json list or a .jsonl file, or of several files joined by `::`, in their order.

    Human turns alternate with those of gpt, and may open with one of system; a first turn of gpt is dropped. The one
    picture of a record comes first in its first human turn, as LLaVA moves it; several stay where `<image>` stands.
    Raises `UserError` for a file that is not there, broken JSON (with line and column), and no usable record.
    """
    growing, digest = _Growing(), hashlib.sha256()
    names = split_sources(str(path))
    if not names:
        raise UserError("no conversations given: pass LLaVA's .json or .jsonl, or several joined by ::")
    for name in names:
        file = Path(name).expanduser()
        content = _read(file)
        digest.update(content)
        for number, (record, place) in enumerate(_records(content, file), start=1):
            growing.add(record, number=number, place=f"{file} {place}")
    if not growing.num_words:
        first = f", the first ({growing.rejected[0].shard}): {growing.rejected[0].reason}" if growing.rejected else ""
        raise UserError(f"{path} has no usable conversation{first}; give a file of LLaVA's format")
    conversations = Conversations(
        buffer=np.frombuffer(bytes(growing.data), dtype=np.uint8),
        offsets=np.array(growing.ends, dtype=np.int64),
        num_words=np.array(growing.num_words, dtype=np.int32),
        has_image=np.array(growing.has_image, dtype=bool),
    )
    conversations.rejected = growing.rejected
    conversations.num_leading_answers = growing.num_leading_answers
    conversations.identity = digest.hexdigest()
    return conversations


def _read(file: Path) -> bytes:
    try:
        if not file.is_file():
            raise UserError(f"conversations {file} is not there; give LLaVA's .json or .jsonl")
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"conversations {file} cannot be read: {error.strerror}; mend its permissions") from None


def _records(content: bytes, file: Path) -> Iterator[tuple[object, str]]:
    """Every record with its place in words; only one is a Python object at a time."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file} line {line} is not UTF-8 text; save the file as UTF-8") from None
    start = WHITESPACE.match(text).end()  # type: ignore[union-attr] # matches the empty text too
    listed = text.startswith("[", start)
    try:
        yield from _list_items(text, start + 1) if listed else _lines(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise UserError(
            f"{file} {where}: broken JSON, {error.msg[0].lower()}{error.msg[1:]}; mend or fetch it again"
        ) from None
    except (RecursionError, ValueError):  # ValueError: a number of thousands of digits
        raise UserError(
            f"{file}: JSON nested too deeply, or a number too long, for a conversation; fetch it again"
        ) from None


def _list_items(text: str, place: int) -> Iterator[tuple[object, str]]:
    decoder, number = json.JSONDecoder(), 0
    place = _skip_space(text, place)
    while not (number == 0 and text.startswith("]", place)):
        record, place = decoder.raw_decode(text, place)
        number += 1
        yield record, f"record {number}"
        place = _skip_space(text, place)
        if text.startswith("]", place):
            break
        if not text.startswith(",", place):
            raise json.JSONDecodeError("Expecting ',' or the end of the list", text, place)
        place = _skip_space(text, place + 1)
    place = _skip_space(text, place + 1)
    if place < len(text):
        raise json.JSONDecodeError("Text behind the list", text, place)


def _lines(text: str) -> Iterator[tuple[object, str]]:
    place = line = 0
    while place < len(text):  # not split: a copy of every line at once would double the memory
        end = text.find("\n", place)
        end = len(text) if end < 0 else end
        line += 1
        if _skip_space(text, place) < end:
            try:
                yield json.loads(text[place:end]), f"line {line}"
            except json.JSONDecodeError as error:
                raise json.JSONDecodeError(error.msg, text, place + error.pos) from None
        place = end + 1


def _skip_space(text: str, place: int) -> int:
    return WHITESPACE.match(text, place).end()  # type: ignore[union-attr] # matches the empty text too


def _key(record: dict[str, Any], *, number: int) -> str:
    key = record.get("id")
    return str(key) if isinstance(key, str | int) and key != "" else str(number)


def _images(record: dict[str, Any]) -> list[str]:
    images = record.get("image")
    names = [] if images is None else [images] if isinstance(images, str) else images
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SampleRejected(f"image of a wrong type: {type(images).__name__}, expected a name or a list of names")
    for name in names:
        if leaves_folder(name):
            raise SampleRejected(f"image path leaves the folder: {name!r}")
    return names


def _turns(record: dict[str, Any]) -> tuple[list[tuple[str, str]], bool]:
    """Role and stripped text of every turn, and whether an answer in front was dropped."""
    listed = record.get("conversations")
    if not isinstance(listed, list) or not listed:
        raise SampleRejected("no conversation: `conversations` is not a list of turns")
    turns = []
    for turn in listed:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise SampleRejected("turn without text: expected `from` and `value`")
        role = turn.get("from")
        if not isinstance(role, str) or role not in ROLES:
            raise SampleRejected(f"unknown role: {role!r}, known: {', '.join(ROLES)}")
        turns.append((ROLES[role], turn["value"].strip()))
    first = 1 if turns[0][0] == "system" else 0
    led_by_answer = len(turns) > first and turns[first][0] == "assistant"
    if led_by_answer:
        del turns[first]
    for number, (role, text) in enumerate(turns[first:]):
        if role != ("user", "assistant")[number % 2]:
            raise SampleRejected(f"no alternation: turn {first + number + led_by_answer + 1} is of {role}")
        if role == "assistant" and not text:
            raise SampleRejected(f"empty answer: turn {first + number + led_by_answer + 1}")
    if len(turns) < first + 2:
        raise SampleRejected("no assistant turn")
    return turns, led_by_answer


def _messages(turns: list[tuple[str, str]], *, num_images: int) -> list[tuple[str, list[Part]]]:
    num_marks = sum(text.count(IMAGE_MARK) for role, text in turns if role == "user")
    if num_marks != num_images:
        raise SampleRejected(f"wrong {IMAGE_MARK} count: {num_marks} in the human turns for {num_images} images")
    messages, at_front = list[tuple[str, list[Part]]](), num_images == 1
    for role, text in turns:
        if role != "user":
            messages.append((role, [text]))
            continue
        pieces = [piece.strip() for piece in text.split(IMAGE_MARK)]
        if num_images == 1:  # LLaVA's own files have it in front or at the end
            parts: list[Part] = [0] if at_front else []
            text = "\n".join(piece for piece in pieces if piece)
            messages.append((role, [*parts, text] if text else parts))
            at_front = False
            continue
        parts = []
        for number, piece in enumerate(pieces):
            parts += [0] if number else []
            parts += [piece] if piece else []
        messages.append((role, parts))
    return messages


def _part(part: Part) -> dict[str, str]:
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
