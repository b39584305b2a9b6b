"""From a source to rows of measurements: every picture once, shared by all ranks, resumed where it was stopped.

    source -> parts of 500 items -> rank (part modulo ranks) -> decode in threads -> batch -> measure -> rows

Parts are cut before anything is decoded, so which pictures a part holds depends on the data alone. A finished part is
a file when a folder is given; rows of all parts in order are the same for any number of ranks and after any kill.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qlip.core import distributed
from qlip.core.errors import UserError
from qlip.core.images import ImageLimits, ImageRejected, open_image
from qlip.core.log import progress
from qlip.data.items import Item, Source
from qlip.data.ledger import kind_of
from qlip.data.tar_reader import Skip
from qlip.data.transforms import prepared_pixels

ABOUT = ("keys", "skipped", "examples")
PART = 500  # items; a kill loses at most so many per rank
Batch = dict[str, Any]
"""`pictures` (b, 3, S, S) uint8 on the device, `items` list of b, `sample_index` (b,) int64 on the CPU: the place in
the data, -1 for padding."""
Measure = Callable[[Batch], dict[str, Tensor]]
"""A batch -> named rows, each (b, ...); `collect` drops those of padding and moves them to the CPU."""
PIXEL_DIGEST = "pixel_digest"
"""The row that `collect` adds: (b, 32) uint8, sha256 over each prepared picture."""


@dataclass(kw_only=True, slots=True)
class Reading:
    """What is read and how it becomes batches."""

    source: Source
    """The data."""
    prepare: Callable[[Image.Image, Item], Tensor]
    """Upright RGB picture -> (3, S, S) uint8. Runs in threads."""
    wanted: Callable[[Item], bool] = lambda item: True
    """Items that count; the others are passed over without being decoded."""
    max_samples: int = 0
    """Read the first so many wanted items; 0 reads all. What turns out to be unusable is among them, and skipped."""
    batch_size: int = 100
    """Pictures per forward pass; the last batch of a part is padded to it, so every pass has one shape."""
    max_skip_share: float = 0.05
    """Stop when a larger share cannot be used."""
    limits: ImageLimits = field(default_factory=ImageLimits)
    """Pictures beyond these are skipped."""


@dataclass(kw_only=True, slots=True)
class Collected:
    """Rows of measurements, of this rank and of all."""

    keys: list[str]
    """Of all ranks, in the order of the data."""
    skipped: Counter[str]
    """Reason -> how many, over all ranks."""
    parts: list[tuple[int, Path | dict[str, Tensor]]]
    """This rank's: number, and the rows or the file that holds them."""
    num_resumed: int
    """Parts, over all ranks, that an earlier run had finished."""

    def own(self, *names: str) -> Iterator[dict[str, Tensor]]:
        """Rows of this rank, part by part: for sums that are joined afterwards, such as `FeatureStatistics`."""
        for _, rows in self.parts:
            yield _load(rows, names) if isinstance(rows, Path) else {name: rows[name] for name in names}

    def rows(self, *names: str) -> dict[str, Tensor]:
        """Rows of all ranks in the order of the data, on every rank; for what fits into memory."""
        own = [(number, rows) for (number, _), rows in zip(self.parts, self.own(*names), strict=True)]
        ordered = sorted(
            (part for parts in distributed.gather_objects(own) for part in parts), key=lambda part: part[0]
        )
        return {name: torch.cat([rows[name] for _, rows in ordered]) for name in names}


def collect(
    reading: Reading, measure: Measure, *, title: str, device: torch.device, folder: Path | None = None
) -> Collected:
    """Measure every item once; all ranks call it together.

    `folder` keeps finished parts and must belong to this model, data and protocol alone; None keeps them in memory.
    Raises `UserError` on all ranks for no usable picture, too many skips, or a folder that cannot be written.
    """
    parts, own = distributed.on_all_ranks(lambda: _own_parts(reading, measure, title, device, folder))
    found = sorted((part for ranks in distributed.gather_objects(own) for part in ranks), key=lambda part: part.number)
    keys = [key for part in found for key in part.keys]
    skipped = sum((Counter(part.skipped) for part in found), Counter[str]())
    num_seen = len(keys) + skipped.total()
    if skipped.total() > reading.max_skip_share * num_seen:
        first = next(example for part in found for example in part.examples)
        raise UserError(
            f"{reading.source.name}: {skipped.total()} of {num_seen} pictures cannot be used, more than "
            f"{reading.max_skip_share:.0%}; the first is {first}; mend or remove them"
        )
    if not keys:
        raise UserError(f"{reading.source.name}: no picture for this evaluation; give data that have some")
    return Collected(keys=keys, skipped=skipped, parts=parts, num_resumed=sum(part.resumed for part in found))


def first_pictures(source: Source, *, num: int, size: int) -> tuple[list[Item], Tensor]:
    """The first `num` usable items and their pictures (n, 3, S, S) uint8, resized bicubically and cropped.

    Raises `UserError` when there is none.
    """
    items, pictures = list[Item](), list[Tensor]()
    reading = Reading(source=source, prepare=lambda image, _: prepared_pixels(image, size=size))
    for item in source.items():
        if isinstance(item, Item) and not isinstance(picture := _decode(item, reading), str):
            items.append(item)
            pictures.append(picture)
        if len(items) == num:
            break
    if not items:
        raise UserError(f"{source.name}: no usable picture; give data that have some")
    return items, torch.stack(pictures)


def read_again(reading: Reading, keys: list[str]) -> Tensor:
    """The prepared pictures (n, 3, S, S) uint8 of these keys, in their order; all of them have been read before."""
    wanted, found = set(keys), dict[str, Tensor]()
    for item in reading.source.items():
        if isinstance(item, Item) and item.key in wanted:
            found[item.key] = reading.prepare(open_image(item.image, limits=reading.limits), item)
        if len(found) == len(wanted):
            break
    return torch.stack([found[key] for key in keys])


@dataclass(kw_only=True, slots=True)
class _Part:
    """What all ranks are told of a part."""

    number: int
    keys: list[str]
    skipped: dict[str, int]
    """Reason -> how many."""
    examples: list[str]
    """`key: reason` of the first that were skipped."""
    resumed: bool


def _own_parts(
    reading: Reading, measure: Measure, title: str, device: torch.device, folder: Path | None
) -> tuple[list[tuple[int, Path | dict[str, Tensor]]], list[_Part]]:
    """This rank's rows, by part, and what there is to say of each part."""
    parts: list[tuple[int, Path | dict[str, Tensor]]] = []
    found: list[_Part] = []
    total = min(filter(None, (reading.max_samples, reading.source.num_items)), default=0)
    done = 0
    num_threads = min(16, max(1, (os.cpu_count() or 1) // distributed.world_size()))
    with progress(title, total) as bar, ThreadPoolExecutor(num_threads) as threads:
        for number, (items, skips) in enumerate(_cut(reading)):
            first, done = done, done + len(items)
            if number % distributed.world_size() != distributed.rank():
                continue
            file = folder / f"part_{number:06d}.safetensors" if folder is not None else None
            part = _read_part(file, number) if file is not None else None
            if part is None:
                rows, part = _measure_part(reading, measure, items, skips, number, first, device, threads)
                if file is not None:
                    _write_part(file, rows, part)
            if part.keys:
                parts.append((number, rows if file is None else file))
            found.append(part)
            bar.update(done)
    return parts, found


def _cut(reading: Reading) -> Iterator[tuple[list[Item], list[Skip]]]:
    """Parts of `PART` wanted items, with the skips met on the way."""
    items: list[Item] = []
    skips: list[Skip] = []
    num = 0
    for found in reading.source.items():
        if isinstance(found, Skip):
            skips.append(found)
            continue
        if not reading.wanted(found):
            continue
        items.append(found)
        num += 1
        if len(items) == PART:
            yield items, skips
            items, skips = [], []
        if num == reading.max_samples:
            break
    if items or skips:
        yield items, skips


def _measure_part(
    reading: Reading,
    measure: Measure,
    items: list[Item],
    skips: list[Skip],
    number: int,
    first: int,
    device: torch.device,
    threads: ThreadPoolExecutor,
) -> tuple[dict[str, Tensor], _Part]:
    """Rows of one part, and what there is to say of it."""
    skips = list(skips)
    size = min(reading.batch_size, PART)
    keys: list[str] = []
    batches: list[dict[str, Tensor]] = []
    waiting: list[tuple[Item, int, Tensor]] = []

    def flush() -> None:
        batch = _batch(waiting, size, device)
        real = batch["sample_index"] != -1
        rows = measure(batch) | {PIXEL_DIGEST: torch.stack([_digest(picture) for _, _, picture in waiting])}
        batches.append({name: tensor.cpu()[real[: len(tensor)]] for name, tensor in rows.items()})
        waiting.clear()

    for place, (item, picture) in enumerate(zip(items, threads.map(lambda i: _decode(i, reading), items), strict=True)):
        if isinstance(picture, str):
            skips.append(Skip(key=item.key, reason=picture, shard=""))
            continue
        keys.append(item.key)
        waiting.append((item, first + place, picture))
        if len(waiting) == size:
            flush()
    if waiting:
        flush()
    rows = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]} if batches else {}
    reasons = Counter[str]()
    for skip in skips:
        reasons[kind_of(skip.reason)] += skip.count
    examples = [f"{skip.key or skip.shard}: {skip.reason}" for skip in skips[:3]]
    return rows, _Part(number=number, keys=keys, skipped=dict(reasons), examples=examples, resumed=False)


def _decode(item: Item, reading: Reading) -> Tensor | str:
    """The prepared picture, or why there is none."""
    try:
        return reading.prepare(open_image(item.image, limits=reading.limits), item)
    except ImageRejected as rejected:
        return str(rejected)


def _digest(picture: Tensor) -> Tensor:
    return torch.frombuffer(bytearray(hashlib.sha256(picture.numpy().tobytes()).digest()), dtype=torch.uint8)


def _batch(waiting: list[tuple[Item, int, Tensor]], size: int, device: torch.device) -> Batch:
    """Stacked, and padded to `size` with copies of the last picture."""
    padding = size - len(waiting)
    padded = waiting + waiting[-1:] * padding
    return {
        "pictures": torch.stack([picture for _, _, picture in padded]).to(device),
        "items": [item for item, _, _ in padded],
        "sample_index": torch.tensor([index for _, index, _ in waiting] + [-1] * padding),
    }


def _write_part(file: Path, rows: dict[str, Tensor], part: _Part) -> None:
    """The file appears whole or not at all."""
    temporary = file.with_suffix(".tmp")
    about = {name: json.dumps(getattr(part, name)) for name in ABOUT}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in rows.items()}, temporary, metadata=about)
        temporary.replace(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {file}: {error}; free disk space or choose another --out") from None


def _read_part(file: Path, number: int) -> _Part | None:
    """What there is to say of a finished part; None when it is not there, or broken by a crash of the machine."""
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as part:
            said = part.metadata()
            return _Part(number=number, resumed=True, **{name: json.loads(said[name]) for name in ABOUT})
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def _load(file: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    with safe_open(file, framework="pt") as part:
        return {name: part.get_tensor(name) for name in names}
