"""Token files: pictures as packed bits in Parquet, one row a picture, and which encoder made them.

Columns: `key` string, `bits` fixed_size_binary[ceil(n L / 8)], `caption` string or null, `captions` list<string> (all
texts of a picture that has several, the first of them is `caption`; else null), `width`, `height` int32 of the picture
before it was resized, `label` int32 or null. Optional: `embedding` fixed_size_list<float16>[e], the text-aligned
embedding; and in compressed files `coded` binary, the bits as `bit_codec.py` codes them, takes the place of `bits`.
Other columns are ignored. The schema's metadata has one key, `qlip.tokens`: `TokenStoreInfo` as JSON. Tokens come row
by row of the grid, within a token bit 0 first, packed most significant bit first.

Shapes: `r` rows, `n` tokens, `L` bits of a token, `e` width of embeddings.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlip.core.config import from_json, to_json
from qlip.core.errors import UserError, one_line
from qlip.data.bit_codec import BitModel

METADATA_KEY = b"qlip.tokens"
FORMAT_VERSION = 1
REMEDY = "remove it and start what made it again (qlip tokenize, qlip tokens merge), which makes what is missing"


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
    views: tuple[str, ...] = ("centre",)
    """What is cut from every picture (`data/views.py`): so many rows of a picture follow each other in a file."""
    class_names: tuple[str, ...] = ()
    """What `label` counts."""
    embedding_width: int = 0
    """e; 0 without embeddings. They belong to the model whose fingerprint `decoder` has."""
    codec: dict[str, Any] = field(default_factory=dict)
    """`BitModel.to_json` of a compressed file; empty where bits are packed."""
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
    labels: list[int | None] | None = None
    """Classes; None is none for every row."""
    embeddings: np.ndarray | None = None
    """(r, e) float16 of norm 1, in a store that has them and when they were asked for."""

    def between(self, start: int, stop: int) -> TokenRows:
        """Rows `start` to `stop`, the last left out."""
        return TokenRows(
            keys=self.keys[start:stop],
            packed=self.packed[start:stop],
            captions=self.captions[start:stop],
            sizes=self.sizes[start:stop],
            labels=None if self.labels is None else self.labels[start:stop],
            embeddings=None if self.embeddings is None else self.embeddings[start:stop],
        )


def pack_bits(bits: Tensor) -> np.ndarray:
    """(r, n, L) bool -> (r, ceil(n L / 8)) uint8, zeros behind the last bit."""
    return np.packbits(bits.flatten(1).cpu().numpy(), axis=1, bitorder="big")


def unpack_bits(packed: np.ndarray, *, num_tokens: int, num_bits: int) -> Tensor:
    """(r, ceil(n L / 8)) uint8 -> (r, n, L) bool."""
    flat = np.unpackbits(packed, axis=1, count=num_tokens * num_bits, bitorder="big").astype(bool)
    return torch.from_numpy(flat.reshape(len(packed), num_tokens, num_bits))


def schema_of(info: TokenStoreInfo) -> Any:
    """The Arrow schema of a file, with `info` in its metadata."""
    import pyarrow as pa

    bits = pa.field("coded", pa.binary(), nullable=False) if info.codec else None
    fields = [
        pa.field("key", pa.string(), nullable=False),
        bits or pa.field("bits", pa.binary(info.row_bytes), nullable=False),
        pa.field("caption", pa.string()),
        pa.field("captions", pa.list_(pa.string())),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("label", pa.int32()),
    ]
    if info.embedding_width:
        fields.append(pa.field("embedding", pa.list_(pa.float16(), info.embedding_width), nullable=False))
    return pa.schema(fields, metadata={METADATA_KEY: json.dumps(to_json(info))})


def open_tokens(file: Path) -> tuple[TokenStoreInfo, Any]:
    """What a file says of itself, and its footer. Raises `UserError` for what is no token file."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file) as table:
            schema, footer = table.schema_arrow, table.metadata
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{file} is no whole parquet file ({one_line(error)}); {REMEDY}") from None
    info = _info(file, (schema.metadata or {}).get(METADATA_KEY))
    expected = schema_of(info)
    for name in ("key", "coded" if info.codec else "bits", "caption", *(["embedding"] if info.embedding_width else [])):
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
    if info.codec:
        try:
            model = BitModel.from_json(info.codec)
        except ValueError as error:
            raise UserError(f"{file}: {one_line(error)}; {REMEDY}") from None
        if model.num_bits != info.num_bits:
            raise UserError(f"{file}: tokens of {info.num_bits} bits, coded as ones of {model.num_bits}; {REMEDY}")
    return info


def read_row_group(
    file: Path, info: TokenStoreInfo, footer: Any, group: int, *, with_embeddings: bool = False
) -> TokenRows:
    """One row group, with checksums. Raises `UserError`, naming the file, for damage."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    there = footer.schema.to_arrow_schema().names
    bits = "coded" if info.codec else "bits"
    names = [name for name in ("key", bits, "caption", "captions", "width", "height", "label") if name in there]
    embedding = ["embedding"] if with_embeddings and info.embedding_width else []
    try:
        with ParquetFile(file, metadata=footer, page_checksum_verification=True, pre_buffer=False) as table:
            columns = table.read_row_group(group, columns=[*names, *embedding])
            rows = columns.select(names).to_pydict()
            embeddings = _embeddings(columns["embedding"], info) if embedding else None
        packed = _packed(rows[bits], info)
    except UserError:  # a package is missing
        raise
    except (OSError, ValueError, pyarrow.ArrowException) as error:  # ValueError: text not UTF-8, bits that cannot be
        raise UserError(f"{file} row group {group} is damaged ({one_line(error)}); {REMEDY}") from None
    none = [None] * len(rows["key"])
    texts = zip(rows["caption"], rows.get("captions", none), strict=True)
    sizes = zip(rows.get("width", none), rows.get("height", none), strict=True)
    return TokenRows(
        keys=rows["key"],
        packed=packed,
        captions=[tuple(many or () if one is None else many or (one,)) for one, many in texts],
        sizes=[None if width is None or height is None else (width, height) for width, height in sizes],
        labels=rows.get("label", none),
        embeddings=embeddings,
    )


def _packed(column: list[bytes], info: TokenStoreInfo) -> np.ndarray:
    """The rows of a column of bits: (r, ceil(n L / 8)) uint8."""
    if not info.codec:
        return np.frombuffer(b"".join(column), np.uint8).reshape(len(column), info.row_bytes)
    return pack_bits(BitModel.from_json(info.codec).decode(column, grid=info.grid))


def _embeddings(column: Any, info: TokenStoreInfo) -> np.ndarray:
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.astype(np.float16, copy=False).reshape(len(column), info.embedding_width)


def num_null_captions(footer: Any) -> int:
    """Rows without any caption; those of a row group that does not count them have one."""
    count = 0
    for group in map(footer.row_group, range(footer.num_row_groups)):
        columns = (group.column(number) for number in range(group.num_columns))
        about = next(column.statistics for column in columns if column.path_in_schema == "caption")
        count += about.null_count if about is not None and about.has_null_count else 0
    return count
