"""What the files of GenEval and DPG-Bench share: seeds, pictures on disk, settings beside them, lines of json.

Shapes: `b` pictures, `S` their side.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from qlip.core.errors import UserError

Generate = Callable[[list[str], list[int]], Tensor]
"""b prompts and as many seeds -> (b, 3, S, S) uint8; a picture depends on its own prompt and seed alone."""
PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
UNFINISHED = ".part"  # no benchmark takes such a file for a picture
KIND_NAMES = {str: "text", bool: "true or false", int: "whole number", list: "list", dict: "object"}


def picture_seed(seed: int, *, prompt_index: int, sample_index: int) -> int:
    """The seed of one picture, in [0, 2^63): the first 63 bits of sha256 over `seed/prompt_index/sample_index`.

    A pure function of the three, so a picture is the same in any batch, on any rank and after any kill, and no two
    runs of neighbouring seeds share pictures.
    """
    digest = hashlib.sha256(f"{seed}/{prompt_index}/{sample_index}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


@dataclass(kw_only=True, slots=True, frozen=True)
class Wanted:
    """The pictures of one prompt."""

    index: int
    """Place of the prompt in the benchmark."""
    prompt: str
    seeds: tuple[int, ...]
    """One per picture."""


def want(prompts: Sequence[str], *, seed: int, num_samples: int) -> list[Wanted]:
    """All pictures of all prompts, with their seeds."""
    return [
        Wanted(
            index=index,
            prompt=prompt,
            seeds=tuple(picture_seed(seed, prompt_index=index, sample_index=i) for i in range(num_samples)),
        )
        for index, prompt in enumerate(prompts)
    ]


def pictures_of(generate: Generate, wanted: Sequence[Wanted], *, batch_size: int) -> Iterator[tuple[Wanted, Tensor]]:
    """Each prompt with its pictures (num_samples, 3, S, S) uint8 on the CPU, in order; batches go across prompts."""
    queue = [(entry.prompt, seed) for entry in wanted for seed in entry.seeds]
    held: list[Tensor] = []
    finished = 0
    for start in range(0, len(queue), batch_size):
        batch = queue[start : start + batch_size]
        pictures = generate([prompt for prompt, _ in batch], [seed for _, seed in batch])
        assert pictures.dtype == torch.uint8 and pictures.shape[:2] == (len(batch), 3), "not what `Generate` promises"
        held.extend(pictures.cpu())
        while finished < len(wanted) and len(held) >= len(wanted[finished].seeds):
            num = len(wanted[finished].seeds)
            yield wanted[finished], torch.stack(held[:num])
            del held[:num]
            finished += 1


def tiled(pictures: Tensor, *, columns: int) -> Tensor:
    """(b, 3, S, S) -> one picture (3, rows S, columns S), left to right and top to bottom, white where none is left."""
    missing = -len(pictures) % columns
    padded = F.pad(pictures, (0, 0, 0, 0, 0, 0, 0, missing), value=255)
    return rearrange(padded, "(rows columns) c h w -> c (rows h) (columns w)", columns=columns)


def save_png(path: Path, picture: Tensor) -> None:
    """Write (3, h, w) uint8 whole or not at all. Raises `UserError` when the folder cannot be written."""
    unfinished = path.with_name(f".{path.stem}{UNFINISHED}")
    pixels = rearrange(picture, "c h w -> h w c").contiguous().numpy()
    try:
        Image.fromarray(pixels).save(unfinished, format="PNG")
        unfinished.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free disk space or choose another --out") from None


def is_whole_png(path: Path) -> bool:
    """Whether a PNG begins and ends there as it should: a crash of the machine leaves files without their end."""
    try:
        with path.open("rb") as file:
            start = file.read(len(PNG_START))
            file.seek(-len(PNG_END), 2)
            return start == PNG_START and file.read() == PNG_END
    except OSError:
        return False


def claim(out: Path, settings: dict[str, Any], *, record: Path) -> None:
    """Begin or go on: `record` keeps the settings that the pictures in `out` are made with.

    Raises `UserError` for pictures of other settings, naming the first that differs, and for a folder with files in it
    that no record explains.
    """
    settings = json.loads(json.dumps(settings, default=str))
    remedy = "choose another --out, or remove it"
    if record.exists():
        try:
            found = json.loads(record.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise UserError(f"{record} is broken, so what made the pictures is not known; {remedy} with them")
        for name in {**found, **settings}:
            if found.get(name) != settings.get(name):
                change = f"{name} {found.get(name)!r:.60} -> {settings.get(name)!r:.60}"
                raise UserError(f"{out} holds pictures of other settings ({change}); {remedy}")
        return
    strange = sorted(entry.name for entry in out.iterdir() if entry != record and not entry.name.endswith(UNFINISHED))
    if strange:
        raise UserError(f"{out} holds other files ({strange[0]!r:.60}), which the scorer would meet; {remedy}")
    try:
        temporary = record.with_name(f".{record.stem}{UNFINISHED}")
        temporary.write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(record)
    except OSError as error:
        raise UserError(f"cannot write {record}: {error.strerror}; choose another --out") from None


@dataclass(kw_only=True, slots=True, frozen=True)
class Line:
    """One line of a file, and how to refuse it."""

    path: Path
    number: int
    """From 1."""
    text: str
    """Without the end of the line."""
    remedy: str

    def refusal(self, problem: str) -> UserError:
        """The error that names file, line and problem and ends with the remedy."""
        return UserError(f"{self.path} line {self.number}: {problem}; {self.remedy}")

    def json(self) -> dict[str, Any]:
        """The object in it. Raises `UserError` for anything else."""
        if not self.text.strip():
            raise self.refusal("empty")
        try:
            content = json.loads(self.text)
        except (ValueError, RecursionError) as error:
            reason = str(error) if isinstance(error, json.JSONDecodeError) else "too deep or too long a number"
            raise self.refusal(f"not json ({reason})") from None
        if not isinstance(content, dict):
            raise self.refusal("no json object")
        return content

    def value(self, entry: dict[str, Any], name: str, kind: type, *, within: str = "") -> Any:
        """A field of that kind; `within` is where it stands. Raises `UserError` when it is missing or another kind."""
        where = f"{within}.{name}" if within else name
        if name not in entry:
            raise self.refusal(f"no field {where}")
        value = entry[name]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.refusal(f"{where} is {json.dumps(value):.40}, no {KIND_NAMES[kind]}")
        if isinstance(value, str) and not value.strip():
            raise self.refusal(f"{where} is empty")
        return value


def read_lines(path: Path, *, remedy: str) -> list[Line]:
    """The lines of a text file. Raises `UserError` for one that is missing, empty, or not UTF-8, naming the line."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {remedy}") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path} line {number}: not UTF-8; {remedy}") from None
    if not text.strip():
        raise UserError(f"{path} is empty; {remedy}")
    lines = text.removesuffix("\n").split("\n")  # not splitlines: json may hold U+2028
    return [
        Line(path=path, number=number, text=line.removesuffix("\r"), remedy=remedy)
        for number, line in enumerate(lines, start=1)
    ]
