"""Token files: pictures as packed bits in Parquet, one row a picture, and which encoder made them.

Columns: `key` string, `bits` fixed_size_binary[ceil(n L / 8)], `caption` string or null, `captions` list<string> (all
texts of a picture that has several, the first of them is `caption`; else null), `width`, `height` int32 of the picture
before it was resized. Other columns are ignored. The schema's metadata has one key, `qlip.tokens`: `TokenStoreInfo` as
JSON. Tokens come row by row of the grid, within a token bit 0 first, packed most significant bit first.

Shapes: `r` rows, `n` tokens, `L` bits of a token.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlip.core.config import from_json, to_json
from qlip.core.errors import UserError

METADATA_KEY = b"qlip.tokens"
FORMAT_VERSION = 1
ROW_GROUP_ROWS = 2048  # 1.8 MB of bits at 256 tokens of 28 bits: what training reads at a time
REMEDY = "remove it and run qlip tokenize again, which makes what is missing"
COMPRESSION = {"bits": "none", "width": "zstd", "height": "zstd"}  # bits do not compress
TEXT_COLUMNS = ("key", "caption", "captions.list.element")


@dataclass(kw_only=True, slots=True, frozen=True)
class TokenStoreInfo:
    """What a token file says of its bits."""

    encoder_fingerprint: str
    """sha256 over everything that can change a bit (`ImageTokenizer.encoder_fingerprint`)."""
    num_bits: int
    """L."""
    grid: tuple[int, int]
    """Rows and columns of tokens; their product is n."""
    decoder: dict[str, str] = field(default_factory=dict)
    """`name` and `fingerprint` of the model it came from: a hint, any decoder of that encoder will do."""
    transform: dict[str, Any] = field(default_factory=dict)
    """`size`, `filter`, `antialias`, `crop`, `mean`, `std`."""
    picture_decoder: dict[str, str] = field(default_factory=dict)
    """`library` and `version` that read the pictures."""
    encoding: dict[str, Any] = field(default_factory=dict)
    """`dtype`, `device` kind, `batch_invariant`, `batch_size`."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of qlip, torch, transformers, pillow, pyarrow."""
    source: dict[str, Any] = field(default_factory=dict)
    """Which data, and how captions were taken from them."""
    created: str = ""
    """Time in UTC, ISO 8601."""
    format_version: int = FORMAT_VERSION
    """Of these files."""
    token_order: str = "raster"
    """Row by row of the grid."""
    bit_order: str = "bit 0 first, packed most significant bit first"
    """Within a token, and within a byte."""

    @property
    def num_tokens(self) -> int:
        """n."""
        return self.grid[0] * self.grid[1]

    @property
    def row_bytes(self) -> int:
        """Bytes of one picture: ceil(n L / 8)."""
        return (self.num_tokens * self.num_bits + 7) // 8


@dataclass(kw_only=True, slots=True)
class TokenRows:
    """Some rows of a store."""

    keys: list[str]
    """Names of the pictures."""
    packed: np.ndarray
    """(r, ceil(n L / 8)) uint8."""
    captions: list[tuple[str, ...]]
    """Texts of each picture, none if it has none."""
    sizes: list[tuple[int, int] | None]
    """Width and height before the transform."""


def pack_bits(bits: Tensor) -> np.ndarray:
    """(r, n, L) bool -> (r, ceil(n L / 8)) uint8, zeros behind the last bit."""
    return np.packbits(bits.flatten(1).cpu().numpy(), axis=1, bitorder="big")


def unpack_bits(packed: np.ndarray, *, num_tokens: int, num_bits: int) -> Tensor:
    """(r, ceil(n L / 8)) uint8 -> (r, n, L) bool."""
    flat = np.unpackbits(packed, axis=1, count=num_tokens * num_bits, bitorder="big").astype(bool)
    return torch.from_numpy(flat.reshape(len(packed), num_tokens, num_bits))


class TokenWriter:
    """One token file: written under a temporary name and renamed when it is whole, so what exists is finished."""

    def __init__(self, path: Path, info: TokenStoreInfo, *, row_group_rows: int = ROW_GROUP_ROWS) -> None:
        """Use as a context manager: an error inside leaves no file. Raises `UserError` when it cannot be written."""
        self.path, self.info, self.row_group_rows = path, info, row_group_rows
        self._temporary = path.with_suffix(".tmp")
        self._waiting: list[tuple[str, bytes, tuple[str, ...], tuple[int, int] | None]] = []
        self._schema = _schema(info)
        try:
            self._writer = _parquet_writer(self._temporary, self._schema)
        except OSError as error:
            raise self._cannot_write(error) from None

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
        """Append. Raises `UserError` for bits of another width, or when the disk is full."""
        if rows.packed.shape[1:] != (self.info.row_bytes,):
            raise UserError(f"{self.path}: rows of {rows.packed.shape[1:]} bytes; pack (r, n, L) with pack_bits")
        self._waiting += zip(rows.keys, map(bytes, rows.packed), rows.captions, rows.sizes, strict=True)
        while len(self._waiting) >= self.row_group_rows:
            self._write_group()

    def _finish(self) -> None:
        if self._waiting:
            self._write_group()
        try:
            self._writer.close()
            self._temporary.replace(self.path)
        except OSError as error:
            self._discard()
            raise self._cannot_write(error) from None

    def _write_group(self) -> None:
        import pyarrow

        group, self._waiting = self._waiting[: self.row_group_rows], self._waiting[self.row_group_rows :]
        keys, bits, captions, sizes = zip(*group, strict=True)
        columns = {
            "key": keys,
            "bits": bits,
            "caption": [texts[0] if texts else None for texts in captions],
            "captions": [list(texts) if len(texts) > 1 else None for texts in captions],
            "width": [None if size is None else size[0] for size in sizes],
            "height": [None if size is None else size[1] for size in sizes],
        }
        try:
            self._writer.write_table(pyarrow.table(columns, schema=self._schema), row_group_size=len(group))
        except OSError as error:
            raise self._cannot_write(error) from None

    def _discard(self) -> None:
        with contextlib.suppress(OSError):  # the disk is full, which is being said already
            self._writer.close()
        self._temporary.unlink(missing_ok=True)

    def _cannot_write(self, error: OSError) -> UserError:
        return UserError(f"cannot write {self.path}: {_one_line(error)}; free disk space or choose another OUT")


def _schema(info: TokenStoreInfo) -> Any:
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("key", pa.string(), nullable=False),
            pa.field("bits", pa.binary(info.row_bytes), nullable=False),
            pa.field("caption", pa.string()),
            pa.field("captions", pa.list_(pa.string())),
            pa.field("width", pa.int32()),
            pa.field("height", pa.int32()),
        ],
        metadata={METADATA_KEY: json.dumps(to_json(info))},
    )


def _parquet_writer(path: Path, schema: Any) -> Any:
    from pyarrow.parquet import ParquetWriter

    return ParquetWriter(
        path,
        schema,
        compression=COMPRESSION | dict.fromkeys(TEXT_COLUMNS, "zstd"),
        use_dictionary=["caption", "captions.list.element"],  # keys and bits hardly repeat
        write_statistics=["key", "caption", "width", "height"],
        write_page_checksum=True,
    )


def open_tokens(file: Path) -> tuple[TokenStoreInfo, Any]:
    """What a file says of itself, and its footer. Raises `UserError` for what is no token file."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file) as table:
            schema, footer = table.schema_arrow, table.metadata
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{file} is no whole parquet file ({_one_line(error)}); {REMEDY}") from None
    info = _info(file, (schema.metadata or {}).get(METADATA_KEY))
    expected = _schema(info)
    for name in ("key", "bits", "caption"):
        kind = schema.field(name).type if name in schema.names else None
        if kind != expected.field(name).type:
            raise UserError(f"{file}: column {name} is {kind or 'missing'}, not {expected.field(name).type}; {REMEDY}")
    return info, footer


def _info(file: Path, text: bytes | None) -> TokenStoreInfo:
    if text is None:
        raise UserError(f"{file} is no token file (no {METADATA_KEY.decode()} in its metadata); give a token store")
    try:
        values = json.loads(text)
        version = values.get("format_version")
    except (ValueError, AttributeError, RecursionError):
        raise UserError(f"{file}: what it says of its tokens is no JSON object; {REMEDY}") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{file} has format version {version}, this qlip reads {FORMAT_VERSION}; update qlip")
    try:
        info = from_json(TokenStoreInfo, values)
    except UserError as error:
        raise UserError(f"{file}: {str(error).partition(';')[0]}; {REMEDY}") from None
    orders = [TokenStoreInfo.__dataclass_fields__[name].default for name in ("token_order", "bit_order")]
    if min(*info.grid, info.num_bits) < 1 or [info.token_order, info.bit_order] != orders:
        raise UserError(f"{file}: no tokens of {info.num_bits} bits on a grid of {info.grid}, or other order; {REMEDY}")
    return info


def read_row_group(file: Path, footer: Any, group: int) -> TokenRows:
    """One row group, with checksums. Raises `UserError`, naming the file, for damage."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    there = footer.schema.to_arrow_schema().names
    names = [name for name in ("key", "bits", "caption", "captions", "width", "height") if name in there]
    try:
        with ParquetFile(file, metadata=footer, page_checksum_verification=True, pre_buffer=False) as table:
            rows = table.read_row_group(group, columns=names).to_pydict()
    except (OSError, ValueError, pyarrow.ArrowException) as error:  # ValueError: text that is not UTF-8
        raise UserError(f"{file} row group {group} is damaged ({_one_line(error)}); {REMEDY}") from None
    none = [None] * len(rows["key"])
    texts = zip(rows["caption"], rows.get("captions", none), strict=True)
    sizes = zip(rows.get("width", none), rows.get("height", none), strict=True)
    packed = np.frombuffer(b"".join(rows["bits"]), np.uint8)
    return TokenRows(
        keys=rows["key"],
        packed=packed.reshape(len(rows["key"]), -1),
        captions=[tuple(many or () if one is None else many or (one,)) for one, many in texts],
        sizes=[None if width is None or height is None else (width, height) for width, height in sizes],
    )


def num_null_captions(footer: Any) -> int:
    """Rows without any caption; those of a row group that does not count them have one."""
    count = 0
    for group in map(footer.row_group, range(footer.num_row_groups)):
        columns = (group.column(number) for number in range(group.num_columns))
        about = next(column.statistics for column in columns if column.path_in_schema == "caption")
        count += about.null_count if about is not None and about.has_null_count else 0
    return count


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
