"""Parquet files with pictures in them: Hugging Face's layout, img2dataset's, or any with a column of encoded pictures.

Rows are read in small batches; a damaged row group is lost alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlip.core.errors import UserError, one_line
from qlip.data.folders import card_name
from qlip.data.table_rows import Pieces, TableSource, either, open_tables, split_names
from qlip.data.tar_reader import Skip

BUFFER_BYTES = 1 << 20  # read ahead per column, so that no whole row group need be in memory, only a page
SPLIT_FILE = re.compile(r"(.+?)-\d+-of-\d+(-[0-9a-f]+)?")  # Hugging Face's: test-00000-of-00003.parquet


@dataclass(slots=True, frozen=True)
class ParquetReader:
    """Parquet for `data.table_rows.TableSource`; a piece is a row group."""

    def schema(self, file: Path) -> Any:
        """pyarrow's schema. Raises `UserError` for what is no whole parquet file."""
        with _opened(file) as table:
            return table.schema_arrow

    def piece_rows(self, file: Path) -> list[int]:
        """Rows of each row group. Raises `UserError` as `schema` does."""
        with _opened(file) as table:
            return _group_rows(table)

    def rows(
        self, file: Path, *, pieces: Pieces, columns: list[str], at_once: int
    ) -> Iterator[tuple[int, dict[str, Any]] | Skip]:
        """Rows with their numbers; of a damaged row group those before the damage, then a skip for the others."""
        first, stop = pieces
        with _opened(file) as table:
            group_rows = _group_rows(table)
            number = sum(group_rows[:first])
            for group in range(len(group_rows))[first:stop]:
                end = number + group_rows[group]
                for rows in _batches(table, group, columns, at_once):
                    if isinstance(rows, str):
                        yield Skip(key="", reason=rows, shard=str(file), count=max(1, end - number))
                        break
                    for row in rows:
                        yield number, row
                        number += 1
                number = end


def open_parquet(files: list[Path], *, name: str, split: str) -> TableSource:
    """Rows of the files in this order, as `open_tables` reads and refuses them."""
    return open_tables(files, reader=ParquetReader(), name=name, split=split)


def open_parquet_folder(folder: Path, *, split: str) -> TableSource | None:
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
        of_split = [file for file, name in named.items() if name is not None and name[1] in split_names(split)]
        if not of_split:
            raise UserError(
                f"{place} has no parquet files of split {split!r}: give --split "
                f"{either(name[1] for name in named.values() if name is not None)}"
            )
        return open_parquet(of_split, name=f"{card_name(folder)} {split}", split=split)
    return None


def _opened(file: Path) -> Any:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(file, page_checksum_verification=True, pre_buffer=False, buffer_size=BUFFER_BYTES)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{file} is no whole parquet file ({one_line(error)}); fetch it again") from None


def _group_rows(table: Any) -> list[int]:
    return [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]


def _batches(table: Any, group: int, columns: list[str], at_once: int) -> Iterator[list[dict[str, Any]] | str]:
    """Rows of a row group, a few at a time; last, why the rest of it cannot be read."""
    import pyarrow

    batches = table.iter_batches(at_once, row_groups=[group], columns=columns)
    while True:
        try:
            batch = next(batches, None)
            rows = None if batch is None else batch.to_pylist()
        except (OSError, ValueError, pyarrow.ArrowException) as error:  # ValueError: text that is not UTF-8
            yield f"damaged parquet: row group {group}, {one_line(error)}"
            return
        if rows is None:
            return
        yield rows
