"""Writing a token file: under a temporary name and renamed when it is whole, so what exists is finished.

Shapes: `r` rows, `n` tokens, `L` bits of a token.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from qlip.core.errors import UserError, one_line
from qlip.data.bit_codec import BitModel, range_coding
from qlip.data.token_files import TokenRows, TokenStoreInfo, schema_of, unpack_bits

ROW_GROUP_ROWS = 2048  # 1.8 MB of bits at 256 tokens of 28 bits: what training reads at a time
CODED_GROUP_ROWS = 1024  # fewer, since a row that is looked up costs its group, and codes are slow to read
UNCOMPRESSED = ("bits", "coded", "embedding.list.element")  # as good as random
TEXT_COLUMNS = ("key", "caption", "captions.list.element", "width", "height", "label")


class TokenWriter:
    """One token file."""

    def __init__(self, path: Path, info: TokenStoreInfo, *, row_group_rows: int = 0, compress: bool = False) -> None:
        """Use as a context manager: an error inside leaves no file. `row_group_rows` 0 is a good number.

        `compress` codes the bits under a model that is fitted to all of the file's rows, which stay in memory until
        the end. Raises `UserError` when the file cannot be written, or for `compress` without constriction.
        """
        self.path, self.info, self.compress = path, info, compress
        self.row_group_rows = row_group_rows or (CODED_GROUP_ROWS if compress else ROW_GROUP_ROWS)
        self._temporary = path.with_suffix(".tmp")
        self._waiting: list[TokenRows] = []
        self._num_waiting = 0
        self._writer: Any = None
        if compress:
            range_coding()  # now, not when all rows are there
        else:
            self._open()

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
        else:
            self._discard()

    def write(self, rows: TokenRows) -> None:
        """Append. Raises `UserError` for bits or embeddings of another width, or when the disk is full."""
        if rows.packed.shape[1:] != (self.info.row_bytes,):
            raise UserError(f"{self.path}: rows of {rows.packed.shape[1:]} bytes; pack (r, n, L) with pack_bits")
        width = 0 if rows.embeddings is None else rows.embeddings.shape[1]
        if width != self.info.embedding_width:
            raise UserError(f"{self.path}: embeddings of {width} numbers; its info says {self.info.embedding_width}")
        self._waiting.append(rows)
        self._num_waiting += len(rows.keys)
        if not self.compress and self._num_waiting >= self.row_group_rows:
            self._write_groups(all_rows=False)

    def _open(self) -> None:
        from pyarrow.parquet import ParquetWriter

        self._schema = schema_of(self.info)
        try:
            self._writer = ParquetWriter(
                self._temporary,
                self._schema,
                compression=dict.fromkeys(UNCOMPRESSED, "none") | dict.fromkeys(TEXT_COLUMNS, "zstd"),
                use_dictionary=["caption", "captions.list.element", "label"],  # keys and bits hardly repeat
                write_statistics=["key", "caption", "width", "height", "label"],
                write_page_checksum=True,
            )
        except OSError as error:
            raise self._cannot_write(error) from None

    def _finish(self) -> None:
        try:
            if self.compress:
                self._fit()
            self._write_groups(all_rows=True)
            self._writer.close()
            with self._temporary.open("rb+") as file:
                os.fsync(file.fileno())  # a name must not survive a power cut without its content
            self._temporary.replace(self.path)
        except OSError as error:
            self._discard()
            raise self._cannot_write(error) from None
        except UserError:
            self._discard()
            raise

    def _fit(self) -> None:
        """The model of this file's bits, which goes into its metadata."""
        packed = np.concatenate([rows.packed for rows in self._waiting] or [np.empty((0, self.info.row_bytes), "u1")])
        bits = unpack_bits(packed, num_tokens=self.info.num_tokens, num_bits=self.info.num_bits)
        self._model = BitModel.fit(bits, grid=self.info.grid)
        self.info = replace(self.info, codec=self._model.to_json())
        self._open()

    def _write_groups(self, *, all_rows: bool) -> None:
        """Write what waits in row groups of one size; a smaller rest waits on, or is the last one."""
        if not self._waiting:
            return
        rows, size = _joined(self._waiting), self.row_group_rows
        end = len(rows.keys) if all_rows else len(rows.keys) // size * size
        for start in range(0, end, size):
            self._write_group(rows.between(start, min(start + size, end)))
        rest = rows.between(end, len(rows.keys))
        self._waiting, self._num_waiting = ([rest] if rest.keys else []), len(rest.keys)

    def _write_group(self, group: TokenRows) -> None:
        import pyarrow as pa

        columns: dict[str, Any] = {
            "key": group.keys,
            "caption": [texts[0] if texts else None for texts in group.captions],
            "captions": [list(texts) if len(texts) > 1 else None for texts in group.captions],
            "width": [None if size is None else size[0] for size in group.sizes],
            "height": [None if size is None else size[1] for size in group.sizes],
            "label": group.labels or [None] * len(group.keys),
        }
        if self.compress:
            bits = unpack_bits(group.packed, num_tokens=self.info.num_tokens, num_bits=self.info.num_bits)
            columns["coded"] = self._model.encode(bits, grid=self.info.grid)
        else:
            buffer = pa.py_buffer(np.ascontiguousarray(group.packed))
            columns["bits"] = pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(self.info.row_bytes), len(group.keys), [None, buffer]
            )
        if group.embeddings is not None:
            numbers = pa.array(np.ascontiguousarray(group.embeddings).reshape(-1))
            columns["embedding"] = pa.FixedSizeListArray.from_arrays(numbers, self.info.embedding_width)
        try:
            self._writer.write_table(pa.table(columns, schema=self._schema), row_group_size=len(group.keys))
        except OSError as error:
            raise self._cannot_write(error) from None

    def _discard(self) -> None:
        with contextlib.suppress(OSError):  # the disk is full, which is being said already
            if self._writer is not None:
                self._writer.close()
        self._temporary.unlink(missing_ok=True)

    def _cannot_write(self, error: OSError) -> UserError:
        return UserError(f"cannot write {self.path}: {one_line(error)}; free disk space or choose another OUT")


def _joined(parts: list[TokenRows]) -> TokenRows:
    if len(parts) == 1:
        return parts[0]
    embeddings = [part.embeddings for part in parts if part.embeddings is not None]
    return TokenRows(
        keys=[key for part in parts for key in part.keys],
        packed=np.concatenate([part.packed for part in parts]),
        captions=[texts for part in parts for texts in part.captions],
        sizes=[size for part in parts for size in part.sizes],
        labels=[label for part in parts for label in part.labels or [None] * len(part.keys)],
        embeddings=np.concatenate(embeddings) if embeddings else None,
    )
