"""A token store: the rows of a folder of token files (`token_files.py`), counted, read at any place, verified.

Shapes: `r` rows, `n` tokens, `L` bits of a token.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from qlip.core.errors import UserError
from qlip.core.log import console
from qlip.data.token_files import (
    REMEDY,
    TokenRows,
    TokenStoreInfo,
    num_null_captions,
    open_tokens,
    read_row_group,
    unpack_bits,
)
from qlip.data.token_keys import KeyCheck, read_column

NORM_TOLERANCE = 0.01  # of embeddings, which are float16


@dataclass(kw_only=True, slots=True)
class TokenRow:
    """One picture of a store."""

    key: str
    """Its name."""
    bits: Tensor
    """(n, L) bool."""
    captions: tuple[str, ...]
    """Its texts, empty without."""
    size: tuple[int, int] | None
    """Width and height before the transform, where the store says them."""
    label: int | None
    """Its class (`TokenStoreInfo.class_names`)."""


class TokenStore:
    """The rows of a folder of token files, or of one file, in the order of file names."""

    def __init__(self, path: str | Path) -> None:
        """Reads footers only.

        Raises `UserError` for what is no token store, and for files whose encoder, bits, grid or views differ, or whose
        embeddings are of different models.
        """
        self.path = Path(path).expanduser()
        self.files = _token_files(self.path)
        opened = [open_tokens(file) for file in self.files]
        self.info = opened[0][0]
        self.infos = [info for info, _ in opened]
        """What each file says; `info` is that of the first."""
        _require_one_kind(self.files, self.infos)
        self.footers = [footer for _, footer in opened]
        """pyarrow's metadata of each file."""
        self.row_groups = [
            (file, group, footer.row_group(group).num_rows)
            for file, footer in enumerate(self.footers)
            for group in range(footer.num_row_groups)
        ]
        """File, row group in it, and its rows."""
        self._ends = list(itertools.accumulate(rows for _, _, rows in self.row_groups))
        self._last: tuple[int, TokenRows] | None = None

    def __len__(self) -> int:
        """Pictures."""
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> TokenRow:
        """Picture number `index`; neighbours are fast, since the last row group stays in memory."""
        index = index + len(self) if index < 0 else index
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number = bisect.bisect_right(self._ends, index)
        file, group, num_rows = self.row_groups[number]
        if self._last is None or self._last[0] != number:
            self._last = number, self.read_rows(file, group)
        rows, place = self._last[1], index - (self._ends[number] - num_rows)
        bits = self.unpack(rows.packed[place : place + 1])[0]
        label = rows.labels[place] if rows.labels else None
        return TokenRow(
            key=rows.keys[place], bits=bits, captions=rows.captions[place], size=rows.sizes[place], label=label
        )

    def __iter__(self) -> Iterator[TokenRow]:
        """All rows in order."""
        return (self[index] for index in range(len(self)))

    def unpack(self, packed: np.ndarray) -> Tensor:
        """(r, ceil(n L / 8)) uint8 -> (r, n, L) bool."""
        return unpack_bits(packed, num_tokens=self.info.num_tokens, num_bits=self.info.num_bits)

    def read_rows(self, file: int, row_group: int, *, with_embeddings: bool = False) -> TokenRows:
        """One row group of file number `file`, with checksums. Raises `UserError`, naming the file, for damage."""
        return read_row_group(
            self.files[file],
            self.infos[file],
            self.footers[file],
            row_group,
            with_embeddings=with_embeddings,
        )

    def identity(self) -> str:
        """sha256 over encoder, file names and row groups: which position in it may be resumed."""
        digest = hashlib.sha256(self.info.encoder_fingerprint.encode())
        for file, group, num_rows in self.row_groups:
            digest.update(f"{self.files[file].name}/{group}/{num_rows}\n".encode())
        return digest.hexdigest()

    @property
    def num_parts(self) -> int:
        """Files that the store will have when it is finished; those it has where that is not recorded.

        Part of a store, one file of it, is taken as it is.
        """
        parts = self.info.source.get("parts")
        if not self.path.is_dir() or not isinstance(parts, int):
            return len(self.files)
        return max(parts, len(self.files))

    @property
    def num_missing_parts(self) -> int:
        """Files that `qlip tokenize` has still to make."""
        return self.num_parts - len(self.files)

    def warn_of_missing_parts(self) -> None:
        """Print a line if the store is not finished."""
        if self.num_missing_parts:
            console.print(
                f"warning: {self.path} has {len(self.files)} of {self.num_parts} parts, and only these are taken; "
                "to make the others start the same qlip tokenize again",
                markup=False,
            )

    def num_without_captions(self) -> int:
        """Rows without any caption, as the footers count them; rows of files that do not count have one."""
        return sum(num_null_captions(footer) for footer in self.footers)

    def require(self, encoder_fingerprint: str) -> None:
        """Raise `UserError` unless this encoder made the tokens."""
        if encoder_fingerprint != self.info.encoder_fingerprint:
            raise UserError(
                f"{self.path} was made by encoder {self.info.encoder_fingerprint}, this model's is "
                f"{encoder_fingerprint}: give the model that made it, or make tokens with this one (qlip tokenize)"
            )

    def refuse_repeated_keys(self) -> None:
        """Raise `UserError` naming the first key that two rows have; 8 bytes of each key are held in memory."""
        keys = KeyCheck(num_views=len(self.info.views))
        for file in self.files:
            for group in read_column(file, "key"):
                keys.add(file, group)
        again = keys.repeated()
        if again is not None:
            raise UserError(
                f"key {again.key} is in {again.first.name} and in {again.again.name} of {self.path}: pictures are told "
                "apart by their keys; give sets of pictures whose keys repeat stores of their own"
            )

    def verify(self, *, on_rows: Callable[[TokenRows], None] = lambda rows: None) -> int:
        """Read everything; returns the number of rows. `on_rows` is given each row group, embeddings among it.

        Raises `UserError`, naming the file, for damage, missing rows, bits behind the last token, embeddings whose
        norm is not 1, unknown classes, views that do not follow each other, or a key that came before. Memory grows by
        8 bytes a row.
        """
        keys = KeyCheck(num_views=len(self.info.views))
        padding = self.info.row_bytes * 8 - self.info.num_tokens * self.info.num_bits
        for file, group, num_rows in self.row_groups:
            rows = self.read_rows(file, group, with_embeddings=True)
            where = f"{self.files[file]} row group {group}"
            if len(rows.keys) != num_rows:
                raise UserError(f"{where} has {len(rows.keys)} rows, its footer says {num_rows}; {REMEDY}")
            if np.any(rows.packed[:, -1] & ((1 << padding) - 1)):
                raise UserError(f"{where} has bits behind the last token, so they are packed otherwise; {REMEDY}")
            _check_values(rows, where, num_classes=len(self.info.class_names))
            keys.add(self.files[file], rows.keys)
            on_rows(rows)
        again = keys.repeated()
        if again is not None:
            where = f"{again.again} row group {again.group}"
            raise UserError(f"{where}: key {again.key} came before, in {again.first.name}; {REMEDY}")
        return len(self)


def _require_one_kind(files: list[Path], infos: list[TokenStoreInfo]) -> None:
    """Raise `UserError` unless the files are of one store."""
    first = infos[0]
    for file, info in zip(files, infos, strict=True):
        if not info.views:
            raise UserError(f"{file} says that pictures have no views; {REMEDY}")
        for name in ("encoder_fingerprint", "num_bits", "grid", "views", "embedding_width"):
            here, there = getattr(info, name), getattr(first, name)
            if here != there:
                raise UserError(
                    f"{file} has {name} {here}, {files[0].name} has {there}: put the tokens of each "
                    "tokenizer into a folder of its own"
                )
        here, there = info.decoder.get("fingerprint", ""), first.decoder.get("fingerprint", "")
        if info.embedding_width and here != there:
            raise UserError(
                f"{file} has embeddings of model {here or 'unknown'}, {files[0].name} of {there or 'unknown'}: put the "
                "tokens of each model into a folder of its own"
            )


def _check_values(rows: TokenRows, where: str, *, num_classes: int) -> None:
    if rows.embeddings is not None:
        off = np.abs(np.linalg.norm(rows.embeddings.astype(np.float32), axis=1) - 1)
        if not np.all(off < NORM_TOLERANCE):  # NaN is not
            place = int(np.argmax(~(off < NORM_TOLERANCE)))
            raise UserError(f"{where}: the embedding of {rows.keys[place]} has not norm 1; {REMEDY}")
    for key, label in zip(rows.keys, rows.labels or (), strict=False):
        if label is not None and num_classes and not 0 <= label < num_classes:
            raise UserError(f"{where}: {key} is of class {label}, there are {num_classes}; {REMEDY}")


def _token_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"no token store at {path}; make one with qlip tokenize MODEL IMAGES {path}")
    files = sorted(file for file in path.glob("*.parquet") if not file.name.startswith((".", "_")))
    if not files:
        raise UserError(f"{path} holds no token files (*.parquet); make them with qlip tokenize MODEL IMAGES {path}")
    return files
