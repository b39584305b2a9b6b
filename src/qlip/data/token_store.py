"""A token store: the rows of a folder of token files (`token_files.py`), counted, read at any place, verified.

Shapes: `r` rows, `n` tokens, `L` bits of a token.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from qlip.core.errors import UserError
from qlip.data.token_files import REMEDY, TokenRows, num_null_captions, open_tokens, read_row_group, unpack_bits


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


class TokenStore:
    """The rows of a folder of token files, or of one file, in the order of file names."""

    def __init__(self, path: str | Path) -> None:
        """Reads footers only.

        Raises `UserError` for what is no token store, and for files whose encoder, bits or grid differ.
        """
        self.path = Path(path).expanduser()
        self.files = _token_files(self.path)
        opened = [open_tokens(file) for file in self.files]
        self.info = opened[0][0]
        for file, (info, _) in zip(self.files, opened, strict=True):
            for name in ("encoder_fingerprint", "num_bits", "grid"):
                here, first = getattr(info, name), getattr(self.info, name)
                if here != first:
                    raise UserError(
                        f"{file} has {name} {here}, {self.files[0].name} has {first}: put the tokens of each "
                        "tokenizer into a folder of its own"
                    )
        self._footers = [footer for _, footer in opened]
        self.row_groups = [
            (file, group, footer.row_group(group).num_rows)
            for file, footer in enumerate(self._footers)
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
        return TokenRow(key=rows.keys[place], bits=bits, captions=rows.captions[place], size=rows.sizes[place])

    def __iter__(self) -> Iterator[TokenRow]:
        """All rows in order."""
        return (self[index] for index in range(len(self)))

    def unpack(self, packed: np.ndarray) -> Tensor:
        """(r, ceil(n L / 8)) uint8 -> (r, n, L) bool."""
        return unpack_bits(packed, num_tokens=self.info.num_tokens, num_bits=self.info.num_bits)

    def read_rows(self, file: int, row_group: int) -> TokenRows:
        """One row group of file number `file`, with checksums. Raises `UserError`, naming the file, for damage."""
        return read_row_group(self.files[file], self._footers[file], row_group)

    def identity(self) -> str:
        """sha256 over encoder, file names and row groups: which position in it may be resumed."""
        digest = hashlib.sha256(self.info.encoder_fingerprint.encode())
        for file, group, num_rows in self.row_groups:
            digest.update(f"{self.files[file].name}/{group}/{num_rows}\n".encode())
        return digest.hexdigest()

    def num_without_captions(self) -> int:
        """Rows without any caption, as the footers count them; rows of files that do not count have one."""
        return sum(num_null_captions(footer) for footer in self._footers)

    def require(self, encoder_fingerprint: str) -> None:
        """Raise `UserError` unless this encoder made the tokens."""
        if encoder_fingerprint != self.info.encoder_fingerprint:
            raise UserError(
                f"{self.path} was made by encoder {self.info.encoder_fingerprint}, this model's is "
                f"{encoder_fingerprint}: give the model that made it, or make tokens with this one (qlip tokenize)"
            )

    def verify(self) -> int:
        """Read everything; returns the number of rows.

        Raises `UserError`, naming the file, for damage, missing rows, bits behind the last token, or a key that came
        before. All keys are held in memory.
        """
        seen: set[str] = set()
        padding = self.info.row_bytes * 8 - self.info.num_tokens * self.info.num_bits
        for file, group, num_rows in self.row_groups:
            rows = self.read_rows(file, group)
            where = f"{self.files[file]} row group {group}"
            if len(rows.keys) != num_rows:
                raise UserError(f"{where} has {len(rows.keys)} rows, its footer says {num_rows}; {REMEDY}")
            if np.any(rows.packed[:, -1] & ((1 << padding) - 1)):
                raise UserError(f"{where} has bits behind the last token, so they are packed otherwise; {REMEDY}")
            for key in rows.keys:
                if key in seen:
                    raise UserError(f"{where}: key {key} came before; {REMEDY}")
                seen.add(key)
        return len(self)


def _token_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"no token store at {path}; make one with qlip tokenize MODEL IMAGES {path}")
    files = sorted(file for file in path.glob("*.parquet") if not file.name.startswith((".", "_")))
    if not files:
        raise UserError(f"{path} holds no token files (*.parquet); make them with qlip tokenize MODEL IMAGES {path}")
    return files
