"""Tables with pictures in them, whatever file holds them: which column is what, and how a row becomes an item.

`data/parquet.py` and `data/arrow_folder.py` read the files. Rows come a few at a time; damage is lost alone. Columns
without a meaning become `record` where json can hold them.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from qlip.core.errors import UserError
from qlip.data.folders import CAPTION_COLUMNS, caption_texts, checked_label, sha256_of, stamp_of
from qlip.data.items import Item
from qlip.data.tar_reader import Skip

PICTURE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
ROWS_AT_ONCE = 32  # with pictures
TEXTS_AT_ONCE = 8192  # of the column `split` alone
ALIASES = {"val": "validation", "valid": "validation", "dev": "validation"}
Pieces = tuple[int, int | None]
"""Row groups or record batches of a file: the first, and the one behind the last (None: to the end)."""
WHOLE: Pieces = (0, None)


@dataclass(kw_only=True, slots=True, frozen=True)
class Columns:
    """Which column is what; empty where there is none."""

    picture: str
    """Encoded pictures, as binary or as struct{bytes, path}."""
    label: str
    caption: str
    key: str
    """img2dataset's names of samples; otherwise they are named by file and row."""
    split: str
    """Several splits may lie in one file."""
    record: tuple[str, ...]
    """What json can hold of the others."""

    @property
    def read(self) -> list[str]:
        """All of them."""
        return [n for n in (self.picture, self.label, self.caption, self.key, self.split, *self.record) if n]


class TableReader(Protocol):
    """How one kind of file is read. Without state: it travels to worker processes with its source."""

    def schema(self, file: Path) -> Any:
        """pyarrow's schema of the file. Raises `UserError` for a file of something else."""

    def piece_rows(self, file: Path) -> list[int]:
        """Rows of each piece (row group, record batch), which are read from its header alone."""

    def rows(
        self, file: Path, *, pieces: Pieces, columns: list[str], at_once: int
    ) -> Iterator[tuple[int, dict[str, Any]] | Skip]:
        """Rows of these pieces, each with its number in the file; what cannot be read is a skip that counts it."""


@dataclass(kw_only=True, slots=True)
class TableSource:
    """Rows of files that all have the same columns."""

    reader: TableReader
    files: dict[str, Path]
    """By what their rows' keys begin with: the path below the folder that holds all, without the ending."""
    pieces: Pieces = WHOLE
    """What is read of every file; part of one where there is one."""
    columns: Columns
    split: str
    """Rows of this split, where a column says."""
    name: str
    class_names: tuple[str, ...]
    num_items: int | None
    has_labels: bool = field(init=False)

    def __post_init__(self) -> None:
        self.has_labels = bool(self.columns.label)

    def identity(self) -> str:
        """sha256 over names, sizes and times of the files, the split, and the pieces where some are left out."""
        pieces = [] if self.pieces == WHOLE else [f"pieces {self.pieces}"]
        stamps = (f"{name}\0{stamp_of(file)}" for name, file in self.files.items())
        return sha256_of([self.split, *pieces, *stamps])

    def items(self) -> Iterator[Item | Skip]:
        """File by file, row by row. Raises `UserError` for a key that comes twice, and for labels beyond the names."""
        keys = set[str]()
        for prefix, file in self.files.items():
            for found in self._items_of(prefix, file):
                if self.columns.key and found.key:
                    if found.key in keys:
                        raise UserError(f"{file}: key {found.key} comes twice; results are told apart by key: mend it")
                    keys.add(found.key)
                yield found

    def _items_of(self, prefix: str, file: Path) -> Iterator[Item | Skip]:
        found = self.reader.rows(file, pieces=self.pieces, columns=self.columns.read, at_once=ROWS_AT_ONCE)
        for entry in found:
            if isinstance(entry, Skip):
                yield entry
                continue
            number, row = entry
            if not self.columns.split or row[self.columns.split] in split_names(self.split):
                yield self._item(row, key=f"{prefix}/{number:08d}", file=file)

    def _item(self, row: dict[str, Any], *, key: str, file: Path) -> Item | Skip:
        columns = self.columns
        if columns.key:
            key = row[columns.key] or key
        picture = row[columns.picture]
        if isinstance(picture, dict):
            if picture.get("bytes") is None and picture.get("path"):
                return Skip(key=key, reason="missing image: only its path is in the file", shard=str(file))
            picture = picture.get("bytes")
        captions = caption_texts(row[columns.caption] if columns.caption else None)
        if picture is None or captions is None:
            return Skip(key=key, reason="bad caption" if picture is not None else "missing image", shard=str(file))
        label = row[columns.label] if columns.label else None
        label = None if label is None or label < 0 else label  # -1: Hugging Face's test sets without labels
        return Item(
            key=key,
            image=picture,
            captions=captions,
            label=checked_label(label, class_names=self.class_names, key=key, source=str(file)),
            record={name: row[name] for name in columns.record},
        )


def open_tables(files: list[Path], *, reader: TableReader, name: str, split: str) -> TableSource:
    """Rows of the files in this order. A column `split` chooses rows; a column `label` of whole numbers are classes.

    Captions are in `text`, `caption`, `captions` or `sentences`; class names in Hugging Face's metadata of the schema.
    Raises `UserError` for files of something else, without pictures, of different columns, or without the split.
    """
    prefixes = _prefixes(files)
    found: dict[tuple[Columns, tuple[str, ...]], Path] = {}
    num_items = 0
    splits = Counter[str]()
    for file in files:
        schema = reader.schema(file)
        columns = _columns(file, schema)
        found.setdefault((columns, _class_names(schema)), file)
        num_items += sum(reader.piece_rows(file))
        if columns.split:
            texts = reader.rows(file, pieces=WHOLE, columns=[columns.split], at_once=TEXTS_AT_ONCE)
            splits.update(entry[1][columns.split] for entry in texts if not isinstance(entry, Skip))
    if len(found) > 1:
        first, second, *_ = found.values()
        raise UserError(f"{first} and {second} have different columns or classes; score the files one set at a time")
    columns, class_names = next(iter(found))
    if columns.split:
        num_items = sum(splits[name] for name in split_names(split))
        if not num_items:
            raise UserError(f"{files[0]} has no rows of split {split!r}: give --split {either(splits)}")
    return TableSource(
        reader=reader,
        files=dict(zip(prefixes, files, strict=True)),
        columns=columns,
        split=split,
        name=f"{name} {split}" if columns.split and split not in name else name,
        class_names=class_names,
        num_items=num_items,
    )


def split_names(split: str) -> set[str]:
    """Under which names a split goes: `val` is `validation` elsewhere, and Karpathy's restval belongs to train."""
    same = {name for name, plain in ALIASES.items() if plain == ALIASES.get(split, split)}
    return {split, ALIASES.get(split, split), *same} | ({"restval"} if split == "train" else set())


def either(names: Iterable[object]) -> str:
    """`a or b`, for a line that says what may be given."""
    return " or ".join(sorted({str(name) for name in names}))


def _columns(file: Path, schema: Any) -> Columns:
    from pyarrow import types

    try:
        twice = [name for name, times in Counter(schema.names).items() if times > 1]
    except UnicodeDecodeError:
        raise UserError(f"{file} has a column whose name is not UTF-8; fetch it again or rename the column") from None
    if twice:
        raise UserError(f"{file} has two columns {twice[0]!r}; give a file whose columns have names of their own")

    def named(names: tuple[str, ...], fits: Callable[[Any], bool]) -> str:
        return next((name for name in names if name in schema.names and fits(schema.field(name).type)), "")

    def is_text(kind: Any) -> bool:
        return types.is_string(kind) or types.is_large_string(kind)

    def is_texts(kind: Any) -> bool:
        return is_text(kind) or (_is_list(kind) and is_text(kind.value_type))

    pictures = [name for name in schema.names if _holds_pictures(name, schema.field(name).type)]
    picture = next((name for name in PICTURE_COLUMNS if name in pictures), None)
    if picture is None and len(pictures) != 1:
        raise UserError(
            f"{file} has {'several columns' if pictures else 'no column'} of pictures (columns: "
            f"{', '.join(schema.names)}); give a file with one column `image`, binary or struct{{bytes, path}}"
        )
    picture = picture or pictures[0]
    label, caption = named(("label",), types.is_integer), named(CAPTION_COLUMNS, is_texts)
    key, split = named(("key",), is_text), named(("split",), is_text)
    used = {picture, label, caption, key, split}
    record = tuple(name for name in schema.names if name not in used and _fits_json(schema.field(name).type))
    return Columns(picture=picture, label=label, caption=caption, key=key, split=split, record=record)


def _holds_pictures(name: str, kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_binary(kind.field("bytes").type)
    return name in PICTURE_COLUMNS and _is_binary(kind)


def _is_binary(kind: Any) -> bool:
    from pyarrow import types

    return types.is_binary(kind) or types.is_large_binary(kind)


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _fits_json(kind: Any) -> bool:
    from pyarrow import types

    if _is_list(kind):
        return _fits_json(kind.value_type)
    if types.is_struct(kind):
        return all(_fits_json(kind.field(i).type) for i in range(kind.num_fields))
    plain = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean)
    return any(is_kind(kind) for is_kind in plain)


def _class_names(schema: Any) -> tuple[str, ...]:
    """The names of the ClassLabel `label`; empty without, or with metadata that are something else."""
    try:
        about = json.loads((schema.metadata or {})[b"huggingface"])
        names = about["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return ()
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()


def _prefixes(files: list[Path]) -> list[str]:
    absolute = [file.absolute() for file in files]
    if len(set(absolute)) < len(files):
        raise UserError(f"{files[0].parent}: a file is given twice; give every file once")
    common = os.path.commonpath([file.parent for file in absolute])
    return [file.relative_to(common).with_suffix("").as_posix() for file in absolute]
