"""Keys of token stores: none comes twice, views of a picture stand together, and names that files may have."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from qlip.core.errors import UserError, one_line
from qlip.data.token_files import REMEDY

LONGEST_NAME = 200  # bytes; file systems allow 255, and an ending and `.tmp` come behind it


class RepeatedKey(NamedTuple):
    """A key that two rows have."""

    key: str
    first: Path
    """File of the first one."""
    again: Path
    """File of the second one."""
    group: int
    """Row group of the second one."""


class KeyCheck:
    """Looks at all keys of some files in order, and remembers 8 bytes of each."""

    def __init__(self, *, num_views: int) -> None:
        """`num_views` rows of every picture follow each other: `key`, `key#1`, `key#2`, ..."""
        self._num_views = num_views
        self._files: list[Path] = []
        self._begun: list[str] = []
        self._hashes: list[np.ndarray] = []

    def add(self, file: Path, keys: list[str]) -> None:
        """The next row group. Raises `UserError`, naming the file, for views that do not stand together."""
        if not self._files or self._files[-1] != file:
            self._end_file()
            self._files.append(file)
        self._hashes.append(_hashes(keys))
        if self._num_views == 1:
            return
        waiting = self._begun + keys
        num_whole = len(waiting) - len(waiting) % self._num_views
        for place in range(0, num_whole, self._num_views):
            key, *others = waiting[place : place + self._num_views]
            if others != [key_of_view(key, view) for view in range(1, self._num_views)]:
                raise UserError(
                    f"{file}: the {self._num_views} views of {key} do not follow each other, after it come "
                    f"{', '.join(others[:3])}; {REMEDY}"
                )
        self._begun = waiting[num_whole:]

    def repeated(self) -> RepeatedKey | None:
        """The first key that came before, once all were added; only then are keys themselves read again."""
        self._end_file()
        hashes = np.sort(np.concatenate([np.empty(0, np.uint64), *self._hashes]))
        twice = hashes[1:][hashes[1:] == hashes[:-1]]
        if not len(twice):
            return None
        suspects, seen = set(twice.tolist()), dict[str, Path]()
        for file in self._files:
            for group, keys in enumerate(read_column(file, "key")):
                for key, number in zip(keys, _hashes(keys).tolist(), strict=True):
                    if key in seen:
                        return RepeatedKey(key, seen[key], file, group)
                    if number in suspects:
                        seen[key] = file
        return None  # two keys with one hash

    def _end_file(self) -> None:
        if self._begun:
            raise UserError(
                f"{self._files[-1]} ends with {len(self._begun)} of the {self._num_views} views of {self._begun[0]}; "
                f"{REMEDY}"
            )


def _hashes(keys: list[str]) -> np.ndarray:
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, np.uint64)


def key_of_view(key: str, view: int) -> str:
    """The key of a picture's row number `view`: its own for the first."""
    return f"{key}#{view}" if view else key


def read_column(file: Path, name: str) -> Iterator[list[Any]]:
    """One column, row group by row group, with checksums; None in every row where there is no such column.

    Raises `UserError`, naming the file, for damage.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file, page_checksum_verification=True, pre_buffer=False) as table:
            has_column = name in table.schema_arrow.names
            for group in range(table.num_row_groups):
                if has_column:
                    yield table.read_row_group(group, columns=[name])[name].to_pylist()
                else:
                    yield [None] * table.metadata.row_group(group).num_rows
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(f"{file} is damaged ({one_line(error)}); {REMEDY}") from None


def file_name_of(key: str) -> str:
    """The name of a file for a key, without ending: unusual characters as %XX, at most 200 bytes, no folder.

    Different keys get different names: `unquote` gives them back, but for long ones, which end with `~` and a digest.
    """
    name = quote(key, safe="#").replace("~", "%7E") or "%"
    if name.startswith("."):
        name = "%2E" + name[1:]
    if len(name) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(key.encode()).hexdigest()[:32]
    return f"{name[: LONGEST_NAME - 33]}~{digest}"


def sample_name_of(key: str) -> str:
    """The key of a WebDataset sample, which readers cut at the first dot and take for a path.

    As `file_name_of` with dots escaped too; slashes stay, except in keys with an empty folder or name. Any length.
    `unquote` gives the key back.
    """
    parts = key.split("/")
    if "" in parts:
        parts = [key]
    names = [quote(part, safe="#").replace(".", "%2E") or "%" for part in parts]
    return "/".join("%5F" + name[1:] if name.startswith("__") else name for name in names)  # readers skip `__meta__`
