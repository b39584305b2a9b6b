"""Files of texts of every kind, and streams over them, for the tests of reading them."""

import gzip
import itertools
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from shard_files import write_tar

from qlip.data.ledger import Ledger
from qlip.data.text_files import read_documents
from qlip.data.text_stream import TextStream

TEXTS = [f"document {number}" for number in range(23)]


def lines_of(texts: list[str], *, field: str = "text") -> bytes:
    return b"".join(json.dumps({field: text}).encode() + b"\n" for text in texts)


def write_zst(path: Path, content: bytes) -> Path:
    with pa.CompressedOutputStream(str(path), "zstd") as file:
        file.write(content)
    return path


def write_text_shard(path: Path, texts: list[str]) -> Path:
    members: list[tuple[str | tarfile.TarInfo, bytes]] = []
    for number, text in enumerate(texts):
        members.append((f"{number:04d}.json", json.dumps({"scene": {"story": text}}).encode()))
        members.append((f"{number:04d}.txt", f"caption {text}".encode()))
    return write_tar(path, members)


def write(folder: Path, name: str, texts: list[str]) -> Path:
    """A file of any kind, its documents in field `text`, of shards in `scene.story`."""
    path = folder / name
    if name.endswith(".zst"):
        return write_zst(path, lines_of(texts))
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), path, row_group_size=5)
    elif name.endswith(".tar"):
        return write_text_shard(path, texts)
    else:
        path.write_bytes(gzip.compress(lines_of(texts)) if name.endswith(".gz") else lines_of(texts))
    return path


def write_lines(folder: Path, content: bytes) -> Path:
    (folder / "a.jsonl").write_bytes(content)
    return folder / "a.jsonl"


def entries_of(file: Path, *, text_field: str = "text", first: int = 0) -> list[tuple[int, str]]:
    """What a file holds; in place of texts that cannot be used their reasons, in brackets."""
    entries = read_documents(file, text_field=text_field, first=first, wanted=lambda number: number >= first)
    return [(number, found if isinstance(found, str) else f"<{found.reason}>") for number, found in entries]


def stream_of(spec: Path | str, *, rank: int = 0, num_ranks: int = 1, **options) -> TextStream:
    settings: dict[str, Any] = {
        "text_field": "text",
        "shuffle_window": 4,
        "ledger": Ledger(None, max_skip_share=0.05),
        "seed": 0,
    }
    return TextStream(str(spec), rank=rank, num_ranks=num_ranks, **(settings | options))


def taken(stream: TextStream, num: int) -> list[str]:
    return list(itertools.islice(stream, num))


def cut(file: Path, kept: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept)])


def damage_parquet(file: Path, *, group: int) -> None:
    """Overwrite the text of one row group; the footer stays."""
    column = pq.ParquetFile(file).metadata.row_group(group).column(1)
    content, start = bytearray(file.read_bytes()), column.dictionary_page_offset or column.data_page_offset
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    file.write_bytes(content)
