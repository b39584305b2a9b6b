"""A source cut into parts that are sources of their own, so that work can be shared out, stopped and taken up again.

Parts hold the same items in the same order, pickle small, and have names for the files that are made of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise

from qlip.core.errors import UserError
from qlip.data.folders import CaptionedFiles, PictureFolder, sha256_of, shuffled_keys
from qlip.data.items import Item, Source
from qlip.data.question_files import QuestionFiles
from qlip.data.shard_source import ShardSource
from qlip.data.table_rows import Pieces, TableSource
from qlip.data.tar_reader import Skip

Part = tuple[str, Source]
"""The stem of the part's file, and what is in it."""
MIN_DIGITS = 5
MAX_STEM = 100  # file systems take 255 bytes, endings and numbers included


@dataclass(kw_only=True, slots=True)
class FirstItems:
    """The beginning of another source (`data.items.Source`)."""

    source: Source
    num: int
    """How many items; skips among them do not count."""
    name: str = field(init=False)
    class_names: tuple[str, ...] = field(init=False)
    num_items: int | None = field(init=False)
    """At most `num`, skips left aside."""

    def __post_init__(self) -> None:
        self.name, self.class_names = self.source.name, self.source.class_names
        self.num_items = self.num if self.source.num_items is None else min(self.num, self.source.num_items)

    def identity(self) -> str:
        """sha256 over the source's identity and the number."""
        return sha256_of([self.source.identity(), f"first {self.num}"])

    def items(self) -> Iterator[Item | Skip]:
        """As far as item number `num`; skips behind it are left out."""
        left = self.num
        for entry in self.source.items():
            yield entry
            left -= isinstance(entry, Item)
            if not left:
                return


def first_items(source: Source, num: int) -> Source:
    """The first `num` (1 or more) pictures of a source, or all when there are fewer; skips do not count."""
    assert num > 0
    return FirstItems(source=source, num=num)


def parts_of(source: Source, *, max_items: int) -> list[Part]:
    """The source's items in their order, cut into sources of their own that pickle; stems sort into that order.

    Stems are file names without an ending: ASCII letters, digits, `-` and `_`. Shards are a part each and keep their
    stems where these sort as the shards do; otherwise a number comes before them. Files of tables are a part each, or
    several cut at row groups or record batches where they have more than `max_items` rows. Of pictures that are files
    every part holds `max_items`. Other sources stay whole. A key in two parts is not found here.

    Raises `UserError` for question files, and for tables that can no longer be read.
    """
    assert max_items > 0
    if isinstance(source, QuestionFiles):
        raise UserError(f"{source.name} are questions, which come once each, not pictures; give the folder of pictures")
    if isinstance(source, FirstItems):
        return limited_parts(parts_of(source.source, max_items=max_items), source.num)
    if isinstance(source, ShardSource):
        return _named([(shard.stem, part) for shard, part in zip(source.shards, _shards(source), strict=True)])
    if isinstance(source, TableSource):
        return _named(list(_tables(source, max_items)))
    if isinstance(source, PictureFolder):
        return _named([("", part) for part in _folders(source, max_items)])
    if isinstance(source, CaptionedFiles):
        return _named([("", part) for part in _captioned(source, max_items)])
    return _named([("", source)])


def limited_parts(parts: list[Part], num: int) -> list[Part]:
    """The parts that hold the first `num` items (1 or more), the last one cut by `first_items`; all when they are few.

    Items are counted by reading them, nothing is decoded.
    """
    assert num > 0
    taken = list[Part]()
    for stem, source in parts:
        held = sum(1 for _ in islice((entry for entry in source.items() if isinstance(entry, Item)), num))
        if held == num:
            return [*taken, (stem, first_items(source, num))]
        taken.append((stem, source))
        num -= held
    return taken


def _shards(source: ShardSource) -> Iterator[Source]:
    single = len(source.shards) == 1
    for shard in source.shards:
        # promised counts are not asked for again: of remote shards each is a request
        yield replace(source, shards=[shard], num_items=source.num_items if single else None)


def _tables(source: TableSource, max_items: int) -> Iterator[Part]:
    for prefix, file in source.files.items():
        rows = source.reader.piece_rows(file)
        cuts = _cuts(rows, source.pieces, max_items)
        for number, (first, stop) in enumerate(cuts):
            # how many rows are of the split only reading tells
            held = None if source.columns.split else sum(rows[first:stop])
            part = replace(source, files={prefix: file}, pieces=(first, stop), num_items=held)
            yield f"{prefix}-{number:0{_digits(len(cuts))}d}" if len(cuts) > 1 else prefix, part


def _cuts(rows: list[int], pieces: Pieces, max_items: int) -> list[Pieces]:
    """Runs of neighbouring pieces with at most `max_items` rows, or one piece where it has more."""
    begin, end = pieces
    starts, held = [begin], 0
    for piece in range(len(rows))[begin:end]:
        if held and held + rows[piece] > max_items:
            starts.append(piece)
            held = 0
        held += rows[piece]
    return list(zip(starts, [*starts[1:], end], strict=True))


def _folders(source: PictureFolder, max_items: int) -> Iterator[Source]:
    keys = shuffled_keys(source.keys)
    for start in range(0, len(keys), max_items):
        part = PictureFolder(root=source.root, folders=source.folders, keys=keys[start : start + max_items])
        part.class_names = source.class_names  # --labels may have changed them
        yield part


def _captioned(source: CaptionedFiles, max_items: int) -> Iterator[Source]:
    for start in range(0, len(source.listed), max_items):
        yield CaptionedFiles(
            name=source.name,
            listed=source.listed[start : start + max_items],
            table_sha256=source.table_sha256,
            class_names=source.class_names,
        )


def _named(parts: list[Part]) -> list[Part]:
    """Parts with names made safe, and numbered where stems or their files would not sort as the parts do."""
    safe = [re.sub(r"[^A-Za-z0-9_-]", "_", name)[:MAX_STEM] for name, _ in parts]
    begin_well = all(name[:1].isalnum() for name in safe)  # many readers pass over files that begin with _
    # `-` comes before the dot of an ending, which turns `a` and `a-b` round
    sort_well = all(first < second and f"{first}." < f"{second}." for first, second in pairwise(safe))
    differ = len({name.lower() for name in safe}) == len(safe)  # not all file systems tell A from a
    if not (begin_well and sort_well and differ):
        digits = _digits(len(parts))
        safe = [f"{number:0{digits}d}" + (f"-{name}" if name else "") for number, name in enumerate(safe)]
    return [(stem, source) for stem, (_, source) in zip(safe, parts, strict=True)]


def _digits(num: int) -> int:
    return max(MIN_DIGITS, len(str(num - 1)))
