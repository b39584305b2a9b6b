"""Data sets that Hugging Face's `save_to_disk` wrote, read by pyarrow alone: `datasets` need not be installed.

    pets/                                pets/
      state.json                           dataset_dict.json            {"splits": ["train", "test"]}
      dataset_info.json                    train/state.json ...
      data-00000-of-00002.arrow            test/state.json ...

Files are Arrow's streams of record batches, mapped into memory; state.json lists them in their order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlip.core.errors import UserError, one_line
from qlip.data.folders import card_name, relative_name
from qlip.data.table_rows import Pieces, TableSource, either, open_tables, split_names
from qlip.data.tar_reader import Skip

STATE_FILE, INFO_FILE, DICT_FILE = "state.json", "dataset_info.json", "dataset_dict.json"
END_MARK = b"\xff\xff\xff\xff\0\0\0\0"  # a stream cut between two batches reads well to its end
SAVE_AGAIN = "copy it again or save the data set again with save_to_disk"


@dataclass(slots=True, frozen=True)
class ArrowReader:
    """Arrow streams for `data.table_rows.TableSource`; a piece is a record batch, or damage that ends the file."""

    def schema(self, file: Path) -> Any:
        """pyarrow's schema. Raises `UserError` for what does not begin as an Arrow stream."""
        with _opened(file) as stream:
            return stream.schema

    def piece_rows(self, file: Path) -> list[int]:
        """Rows of each record batch; 1 for damage. Raises `UserError` as `schema` does."""
        with _opened(file) as stream:
            return [1 if isinstance(batch, str) else batch.num_rows for batch in _batches(file, stream)]

    def rows(
        self, file: Path, *, pieces: Pieces, columns: list[str], at_once: int
    ) -> Iterator[tuple[int, dict[str, Any]] | Skip]:
        """Rows with their numbers; a record batch that contradicts itself is a skip, and so is the rest of a cut file.

        How many rows a cut file has lost is not known: its skip counts one.
        """
        first, stop = pieces
        number = 0
        with _opened(file) as stream:
            for piece, batch in enumerate(_batches(file, stream)):
                if stop is not None and piece >= stop:
                    return
                if isinstance(batch, str):
                    yield Skip(key="", reason=batch, shard=str(file))
                    return
                end = number + batch.num_rows
                for rows in _row_lists(batch.select(columns), at_once) if piece >= first else ():
                    if isinstance(rows, str):
                        reason = f"damaged arrow: record batch {piece}, {rows}"
                        yield Skip(key="", reason=reason, shard=str(file), count=max(1, end - number))
                        break
                    for row in rows:
                        yield number, row
                        number += 1
                number = end


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    return (folder / DICT_FILE).is_file() or ((folder / STATE_FILE).is_file() and (folder / INFO_FILE).is_file())


def open_saved_dataset(folder: Path, *, split: str) -> TableSource:
    """A folder of `Dataset.save_to_disk`, or one split of `DatasetDict.save_to_disk`'s; columns as of parquet.

    Raises `UserError` for a split that is not there, files that state.json lists and that are missing or lead out of
    the folder, data sets without rows, and as `open_tables` does.
    """
    if not (folder / DICT_FILE).is_file():
        return open_tables(_listed_files(folder), reader=ArrowReader(), name=card_name(folder), split=split)
    names = _json_object(folder / DICT_FILE).get("splits")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{folder / DICT_FILE} has no list of splits; {SAVE_AGAIN}")
    chosen = [name for name in names if name in split_names(split)]
    if not chosen:
        raise UserError(f"{folder} has no split {split!r}: give --split {either(names)}")
    where = str(folder / DICT_FILE)
    files = [file for name in chosen for file in _listed_files(folder / relative_name(name, where=where))]
    return open_tables(files, reader=ArrowReader(), name=f"{card_name(folder)} {split}", split=split)


def _listed_files(folder: Path) -> list[Path]:
    path = folder / STATE_FILE
    state = _json_object(path)
    if state.get("_indices_data_files"):
        raise UserError(
            f"{folder} keeps the order of its rows in a table of its own; save it again with a newer `datasets`"
        )
    listed = state.get("_data_files")
    entries = [entry if isinstance(entry, dict) else {} for entry in listed] if isinstance(listed, list) else [{}]
    names: list[Any] = [entry.get("filename") for entry in entries]
    if not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{path} has no list _data_files of file names; {SAVE_AGAIN}")
    if not names:
        raise UserError(f"{folder} is a data set without rows; give one that has some")
    files = [folder / relative_name(name, where=str(path)) for name in names]
    missing = [file for file in files if not _is_file(file)]
    if missing:
        raise UserError(
            f"{path} lists {missing[0].name[:100]!r}, which is not there ({len(missing)} of {len(files)} missing); "
            f"{SAVE_AGAIN}"
        )
    return files


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name longer than file systems take
        return False


def _json_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; {SAVE_AGAIN}") from None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{path} is no json object; {SAVE_AGAIN}")
    return values


def _opened(file: Path) -> Any:
    import pyarrow

    try:
        return pyarrow.ipc.open_stream(pyarrow.memory_map(str(file)))
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(f"{file} is no Arrow stream ({one_line(error)}); {SAVE_AGAIN}") from None


def _batches(file: Path, stream: Any) -> Iterator[Any]:
    """Record batches, of which only the headers are read; last, why there are no more where that is damage."""
    import pyarrow

    while True:
        try:
            batch = stream.read_next_batch()
        except StopIteration:
            if not _has_end(file):
                yield "damaged arrow: cut short, its end mark is missing"
            return
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            yield f"damaged arrow: {one_line(error)}"
            return
        yield batch


def _has_end(file: Path) -> bool:
    with file.open("rb") as opened:
        opened.seek(-len(END_MARK), 2)
        return opened.read() == END_MARK


def _row_lists(batch: Any, at_once: int) -> Iterator[list[dict[str, Any]] | str]:
    """Rows, a few at a time; last, why they cannot be read."""
    import pyarrow

    try:
        batch.validate(full=True)  # offsets outside the buffers would be read as if they were inside
        for start in range(0, batch.num_rows, at_once):
            yield batch.slice(start, at_once).to_pylist()
    except (ValueError, pyarrow.ArrowException) as error:  # ValueError: names that are not UTF-8
        yield one_line(error)
