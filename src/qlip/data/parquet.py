"""Parquet files with pictures in them: Hugging Face's layout, img2dataset's, or any with a column of encoded pictures.

Rows are read in small batches; a damaged row group is lost alone. Other columns become `record` where json can hold
them.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlip.core.errors import UserError
from qlip.data.folders import CAPTION_COLUMNS, caption_texts, card_name, checked_label, sha256_of, stamp_of
from qlip.data.items import Item
from qlip.data.tar_reader import Skip

PICTURE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
BATCH_ROWS = 32
BUFFER_BYTES = 1 << 20  # read ahead per column, so that no whole row group need be in memory, only a page
ALIASES = {"val": "validation", "valid": "validation", "dev": "validation"}
SPLIT_FILE = re.compile(r"(.+?)-\d+-of-\d+(-[0-9a-f]+)?")  # Hugging Face's: test-00000-of-00003.parquet


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


@dataclass(kw_only=True, slots=True)
class ParquetSource:
    """Rows of parquet files that all have the same columns."""

    files: dict[str, Path]
    """By what their rows' keys begin with: the path below the folder that holds all, without the ending."""
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
        """sha256 over names, sizes and times of the files, and the split."""
        return sha256_of([self.split, *(f"{name}\0{stamp_of(file)}" for name, file in self.files.items())])

    def items(self) -> Iterator[Item | Skip]:
        """File by file, row by row. Raises `UserError` for a key that comes twice, and for labels beyond the names."""
        keys = set[str]()
        for prefix, file in self.files.items():
            for found in self._rows(prefix, file):
                if self.columns.key and found.key:
                    if found.key in keys:
                        raise UserError(f"{file}: key {found.key} comes twice; results are told apart by key: mend it")
                    keys.add(found.key)
                yield found

    def _rows(self, prefix: str, file: Path) -> Iterator[Item | Skip]:
        number = 0  # of the row in the file
        with _opened(file) as table:
            for group in range(table.num_row_groups):
                end = number + table.metadata.row_group(group).num_rows
                for rows in _batches(table, group, self.columns.read):
                    if isinstance(rows, str):
                        yield Skip(key="", reason=rows, shard=str(file), count=max(1, end - number))
                        break
                    for row in rows:
                        if self._is_wanted(row):
                            yield self._item(row, key=f"{prefix}/{number:08d}", file=file)
                        number += 1
                number = end

    def _is_wanted(self, row: dict[str, Any]) -> bool:
        return not self.columns.split or row[self.columns.split] in _split_names(self.split)

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


def open_parquet(files: list[Path], *, name: str, split: str) -> ParquetSource:
    """Rows of the files in this order. A column `split` chooses rows; a column `label` of whole numbers are classes.

    Captions are in `text`, `caption`, `captions` or `sentences`; class names in Hugging Face's metadata of the schema.
    Raises `UserError` for files that are no parquet, without pictures, of different columns, or without the split.
    """
    prefixes = _prefixes(files)
    found: dict[tuple[Columns, tuple[str, ...]], Path] = {}
    num_items = 0
    splits = Counter[str]()
    for file in files:
        with _opened(file) as table:
            columns = _columns(file, table.schema_arrow)
            found.setdefault((columns, _class_names(table.schema_arrow)), file)
            num_items += table.metadata.num_rows
            if columns.split:
                splits.update(table.read(columns=[columns.split])[columns.split].to_pylist())
    if len(found) > 1:
        first, second, *_ = found.values()
        raise UserError(f"{first} and {second} have different columns or classes; score the files one set at a time")
    columns, class_names = next(iter(found))
    if columns.split:
        num_items = sum(splits[name] for name in _split_names(split))
        if not num_items:
            raise UserError(f"{files[0]} has no rows of split {split!r}: give --split {_either(splits)}")
    return ParquetSource(
        files=dict(zip(prefixes, files, strict=True)),
        columns=columns,
        split=split,
        name=f"{name} {split}" if columns.split and split not in name else name,
        class_names=class_names,
        num_items=num_items,
    )


def open_parquet_folder(folder: Path, *, split: str) -> ParquetSource | None:
    """The `*.parquet` of a folder or its `data/`, those of one split where names say so; None without any.

    Raises `UserError` as `open_parquet` does.
    """
    for place in (folder, folder / "data"):
        files = sorted(file for file in place.glob("*.parquet") if not file.name.startswith("."))
        if not files:
            continue
        named = {file: SPLIT_FILE.fullmatch(file.stem) for file in files}
        if not all(named.values()):
            return open_parquet(files, name=card_name(folder), split=split)
        of_split = [file for file, name in named.items() if name is not None and name[1] in _split_names(split)]
        if not of_split:
            raise UserError(
                f"{place} has no parquet files of split {split!r}: give --split "
                f"{_either(name[1] for name in named.values() if name is not None)}"
            )
        return open_parquet(of_split, name=f"{card_name(folder)} {split}", split=split)
    return None


def _opened(file: Path) -> Any:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(file, page_checksum_verification=True, pre_buffer=False, buffer_size=BUFFER_BYTES)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{file} is no whole parquet file ({_one_line(error)}); fetch it again") from None


def _batches(table: Any, group: int, columns: list[str]) -> Iterator[list[dict[str, Any]] | str]:
    """Rows of a row group, a few at a time; last, why the rest of it cannot be read."""
    import pyarrow

    batches = table.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns)
    while True:
        try:
            batch = next(batches, None)
            rows = None if batch is None else batch.to_pylist()
        except (OSError, ValueError, pyarrow.ArrowException) as error:  # ValueError: text that is not UTF-8
            yield f"damaged parquet: row group {group}, {_one_line(error)}"
            return
        if rows is None:
            return
        yield rows


def _columns(file: Path, schema: Any) -> Columns:
    from pyarrow import types

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
        raise UserError(f"{files[0].parent}: a parquet file is given twice; give every file once")
    common = os.path.commonpath([file.parent for file in absolute])
    return [file.relative_to(common).with_suffix("").as_posix() for file in absolute]


def _split_names(split: str) -> set[str]:
    """`val` is `validation` elsewhere, and Karpathy's restval belongs to train."""
    same = {name for name, plain in ALIASES.items() if plain == ALIASES.get(split, split)}
    return {split, ALIASES.get(split, split), *same} | ({"restval"} if split == "train" else set())


def _either(names: Iterable[object]) -> str:
    return " or ".join(sorted({str(name) for name in names}))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
