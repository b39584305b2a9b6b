"""Documents out of one file of texts: lines of json, a column of parquet, or members of a tar shard.

Everything is read as a stream, and what cannot be used comes out as a `Skip` with its reason: documents, and the rest
of a file behind damage. Documents are numbered by their place in the file, so that reading may go on anywhere: what
lies before is neither parsed nor, of parquet, read. Which documents come when is in `text_stream.py`.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from qlip.core.errors import UserError
from qlip.data.shard_list import expand_shards, split_sources
from qlip.data.tar_reader import RawSample, SampleRejected, Skip, iterate_tar, json_record

LINES = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".json.zst", ".json.gz")
ENDINGS = (*LINES, ".parquet", ".tar")
MAX_DOCUMENT_BYTES = 50_000_000  # a file without line ends must not fill the memory
BATCH_ROWS = 64  # of parquet: documents may be long
READ_BYTES = 1 << 16  # of zstandard: what damage takes along at most
TEXT_KINDS = ("string", "large_string", "binary", "large_binary")
DAMAGE = (OSError, EOFError, zlib.error)
Wanted = Callable[[int], bool]
"""Whether the document of this number in its file is one to read."""
Entry = tuple[int, "str | Skip"]
"""A document's number in its file, and its text or why it has none."""


def text_files(spec: str) -> list[Path]:
    """The files that a folder (all below it), a glob, `PATH/{00..09}.jsonl.zst`, or several joined by `::` mean, each
    once; of folders of img2dataset the tar shards without the parquet files of their metadata.

    Raises `UserError` for addresses, what is not there, folders without texts, and endings other than `ENDINGS`.
    """
    files: list[Path] = []
    for source in split_sources(spec):
        if "://" in source.removeprefix("file://"):
            raise UserError(f"text {source!r}: texts are read from files only; copy them to a disk and give its path")
        folder = Path(source.removeprefix("file://")).expanduser()
        if folder.is_dir():
            below = (path for path in sorted(folder.rglob("*")) if path.name.endswith(ENDINGS) and path.is_file())
            found = _without_metadata([path for path in below if not _is_hidden(path.relative_to(folder))])
            if not found:
                raise UserError(f"folder {folder} holds no texts; give one with files {', '.join(ENDINGS)}")
            files += found
        else:
            files += (cast(Path, file) for file in expand_shards(source))
    if not files:
        raise UserError("no texts given: set data.text to a folder, a glob, or PATH/{00..09}.jsonl.zst")
    found_once: dict[Path, Path] = {}
    for file in files:
        if not file.name.endswith(ENDINGS):
            raise UserError(f"{file} is no file of texts that is read here; give {', '.join(ENDINGS)}")
        found_once.setdefault(file.resolve(), file)
    return list(found_once.values())


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def _without_metadata(files: list[Path]) -> list[Path]:
    shards = {file.with_suffix("") for file in files if file.suffix == ".tar"}
    return [file for file in files if file.suffix != ".parquet" or file.with_suffix("") not in shards]


def read_documents(file: Path, *, text_field: str, first: int, wanted: Wanted) -> Iterator[Entry]:
    """The documents of one file from number `first` on that are wanted, in order, with those that cannot be used.

    Raises nothing for what the file holds: where it is cut short or damaged, empty or gone, a `Skip` with an empty key
    comes last.
    """
    if file.name.endswith(".tar"):
        yield from _shard_documents(file, text_field, wanted)
        return
    read = _parquet_documents if file.name.endswith(".parquet") else _line_documents
    progress = _Progress()
    try:
        yield from read(file, text_field, first, wanted, progress)
    except DAMAGE as error:
        if progress.number + 1 == first:
            return  # the position lies behind this damage, so it was handed out before
        reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
        lost = sum(map(wanted, range(progress.number, progress.num_rows)))
        skip = Skip(key="", reason=f"unreadable file: {reason}", shard=str(file), count=max(1, lost))
        yield max(progress.number, first), skip


@dataclass(slots=True)
class _Progress:
    """How far a file was read, wanted or not."""

    number: int = 0
    """Of the document that comes next."""
    num_rows: int = 0
    """Documents of the file, where it says so itself."""


def _line_documents(file: Path, text_field: str, first: int, wanted: Wanted, progress: _Progress) -> Iterator[Entry]:
    with _open_lines(file) as stream:
        for number in itertools.count():
            progress.number = number
            line = stream.readline(MAX_DOCUMENT_BYTES + 1)
            if not line:
                return
            too_long = len(line) > MAX_DOCUMENT_BYTES
            while too_long and line and not line.endswith(b"\n"):
                line = stream.readline(MAX_DOCUMENT_BYTES)
            if not wanted(number) or not (too_long or line.strip()):
                continue
            try:
                if too_long:
                    raise SampleRejected(f"document too large: over {MAX_DOCUMENT_BYTES} bytes")
                yield number, _checked(_field_of(_record(line), text_field))
            except SampleRejected as error:
                yield number, Skip(key=f"line {number + 1}", reason=str(error), shard=str(file))


def _open_lines(file: Path) -> BinaryIO:
    if not file.stat().st_size:
        raise EOFError("zero bytes")
    if file.suffix == ".zst":
        import pyarrow

        stream = pyarrow.CompressedInputStream(pyarrow.OSFile(str(file)), "zstd")
        return cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, stream), READ_BYTES))
    return cast(BinaryIO, gzip.open(file)) if file.suffix == ".gz" else file.open("rb")


def _shard_documents(file: Path, text_field: str, wanted: Wanted) -> Iterator[Entry]:
    for number, sample in enumerate(iterate_tar(file)):
        if not wanted(number):
            continue
        if isinstance(sample, Skip):
            yield number, sample
            continue
        try:
            text = _txt(sample) if text_field == "txt" else _field_of(json_record(sample), text_field)
            yield number, _checked(text)
        except SampleRejected as error:
            yield number, Skip(key=sample.key, reason=str(error), shard=str(file))


def _txt(sample: RawSample) -> str:
    if "txt" not in sample.fields:
        raise SampleRejected("missing text: no member txt")
    return _decoded(sample.fields["txt"])


def _parquet_documents(file: Path, column: str, first: int, wanted: Wanted, progress: _Progress) -> Iterator[Entry]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20) as opened:
            footer = opened.metadata
            progress.num_rows = footer.num_rows
            for group in range(footer.num_row_groups):
                if progress.number + footer.row_group(group).num_rows <= first:
                    progress.number += footer.row_group(group).num_rows
                    continue
                for batch in opened.iter_batches(BATCH_ROWS, row_groups=[group], columns=[column]):
                    for value in batch.column(0).cast(pyarrow.large_binary()):
                        if wanted(progress.number):
                            yield progress.number, _row(value.as_py(), file, progress.number)
                        progress.number += 1
    except pyarrow.ArrowException as error:
        raise OSError(str(error)) from None


def _row(value: bytes | None, file: Path, number: int) -> str | Skip:
    try:
        if value is None:
            raise SampleRejected("missing text: null")
        if len(value) > MAX_DOCUMENT_BYTES:
            raise SampleRejected(f"document too large: over {MAX_DOCUMENT_BYTES} bytes")
        return _checked(_decoded(value))
    except SampleRejected as error:
        return Skip(key=f"row {number}", reason=str(error), shard=str(file))


def check_column(file: Path, column: str) -> None:
    """Raise `UserError` for a parquet file without texts in this column; one that cannot be read is skipped later."""
    import pyarrow
    from pyarrow import parquet

    try:
        schema = parquet.read_schema(file)
    except (OSError, pyarrow.ArrowException):
        return
    if column not in schema.names:
        raise UserError(f"{file} has no column {column!r}; set data.text_field to one of {', '.join(schema.names)}")
    kind = schema.field(column).type
    if str(kind) not in TEXT_KINDS:
        raise UserError(f"{file}: column {column!r} holds {kind}, no texts; set data.text_field to a column that does")


def _record(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise SampleRejected("broken json") from None
    if not isinstance(record, dict):
        raise SampleRejected("broken json: not an object")
    return record


def _field_of(record: dict[str, Any], name: str) -> str:
    value: object = record
    for part in [name] if name in record else name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if not isinstance(value, str):
        raise SampleRejected(f"missing text: no text in field {name}")
    return value


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SampleRejected("undecodable text: not UTF-8") from None


def _checked(text: str) -> str:
    """The text as it is, but for what no tokenizer takes: NUL, and half surrogate pairs, which json can spell."""
    text = text.replace("\0", " ").encode("utf-8", "ignore").decode()
    if not text.strip():
        raise SampleRejected("empty document")
    return text
