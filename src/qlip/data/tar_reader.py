"""Samples out of one tar shard from anyone: members are read, never extracted, and nothing in them is executed.

WebDataset's convention: a sample is a run of neighbouring members that share a key; the key is the folder part plus
the base name up to the **first** dot, the field is the rest in lower case. Whatever cannot be used comes out as a
`Skip` with its reason, and the samples around it survive.
"""

from __future__ import annotations

import json
import re
import struct
import tarfile
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from qlip.core.errors import UserError
from qlip.data.remote import RemoteReadError, Shard
from qlip.data.shard_cache import open_shard, promised_samples

MAX_SAMPLE_BYTES = 50_000_000
UNSAFE_FIELDS = frozenset({"pkl", "pyd", "pth", "pickle"})  # webdataset decodes these by running what they hold
TAR_ERRORS = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, struct.error, RecursionError)
CUT_SHORT = "cut short: the file ends inside this sample"


@dataclass(kw_only=True, slots=True)
class RawSample:
    """One sample as bytes."""

    key: str
    """Unique within its shard."""
    fields: dict[str, bytes]
    """Content by field: `jpg`, `txt`, `json`, `seg.png`, ..."""
    shard: str
    """Path or address of the tar."""


@dataclass(kw_only=True, slots=True)
class Skip:
    """A sample, or with an empty key a piece of a shard, that cannot be used."""

    key: str
    """The sample's key; empty when the shard itself is at fault."""
    reason: str
    """`kind` or `kind: detail`; ledgers count by kind."""
    shard: str
    """Path or address of the tar."""
    count: int = 1
    """How many samples are lost by it."""


class SampleRejected(ValueError):  # noqa: N818 - a verdict on the data, not a fault of the program
    """A sample that cannot be used. One line `kind` or `kind: detail`."""


def iterate_tar(
    path: Shard, *, max_sample_bytes: int = MAX_SAMPLE_BYTES, cache: Path | None = None
) -> Iterator[RawSample | Skip]:
    """Samples and skips of one shard in file order; raises nothing for what the file holds.

    Damage (truncated, gzip, HTML, zero bytes) and fewer samples than `sizes.json` or `<stem>_stats.json` promise come
    last, as skips of the shard. All of it holds for remote shards too: they are read as a stream that is continued
    after a lost connection, or with `cache` copied there first; one that stays out of reach is a skip as well. Their
    promised counts are asked for once (`promised_samples`). Raises `UserError` for a cache that cannot be written.
    """
    shard, keys = str(path), set[str]()
    sample: _Sample | None = None
    damage = None
    try:
        with open_shard(path, cache=cache) as file, tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
            for key, name, member, problem in _members(tar):
                if sample is None or key != sample.key:
                    if sample is not None:
                        yield sample.close(shard)
                    returned = f"key returns: {key} appears again after other samples" if key in keys else None
                    sample = _Sample(key=key, problem=returned)
                    keys.add(key)
                sample.take(tar, name, member, problem, max_bytes=max_sample_bytes)
            damage = _unclean_end(file, tar.offset)
    except UserError:
        raise
    except TAR_ERRORS as error:
        damage = _damage(path, error, cache=cache)
    if sample is not None:
        yield sample.close(shard)
    if damage is not None:
        yield Skip(key="", reason=damage, shard=shard)
    elif not keys:
        yield Skip(key="", reason="empty shard: no sample in it", shard=shard)
    promised = promised_samples(path, cache=cache)
    if promised is not None and promised > len(keys):
        reason = f"samples missing: {len(keys)} of the {promised} that sizes.json or _stats.json promise"
        yield Skip(key="", reason=reason, shard=shard, count=promised - len(keys))


def json_record(sample: RawSample) -> dict[str, Any]:
    """The sample's `json` field as a dictionary. Raises `SampleRejected` when it is missing or not one."""
    if "json" not in sample.fields:
        raise SampleRejected("missing json")
    try:
        record = json.loads(sample.fields["json"])
    except (ValueError, RecursionError):
        raise SampleRejected("broken json") from None
    if not isinstance(record, dict):
        raise SampleRejected("broken json: not an object")
    return record


@dataclass(kw_only=True, slots=True)
class _Sample:
    """A sample whose members are being read; the first problem spoils it."""

    key: str
    problem: str | None
    fields: dict[str, bytes] = field(default_factory=dict)
    num_bytes: int = 0

    def take(
        self, tar: tarfile.TarFile, name: str, member: tarfile.TarInfo, problem: str | None, *, max_bytes: int
    ) -> None:
        """Read one member, or note why not. Raises one of TAR_ERRORS when the file ends inside it."""
        if name in self.fields:
            problem = problem or f"field twice: {name}"
        self.num_bytes += member.size
        if self.num_bytes > max_bytes:
            problem = problem or f"sample too large: over {max_bytes} bytes"
        self.problem = self.problem or problem
        if self.problem is None:
            self.problem = CUT_SHORT  # stands if the read below fails
            content = tar.extractfile(member)
            assert content is not None, "only regular members get here"
            self.fields[name] = content.read()
            self.problem = None

    def close(self, shard: str) -> RawSample | Skip:
        """The finished sample."""
        if self.problem is not None:
            return Skip(key=self.key, reason=self.problem, shard=shard)
        return RawSample(key=self.key, fields=self.fields, shard=shard)


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo, str | None]]:
    """Key, field, member and what is wrong with it; folders and hidden names are left out as webdataset does."""
    end = 0
    while (member := tar.next()) is not None:
        if member.size < 0 or member.offset < end:
            raise tarfile.ReadError("members run backwards")  # a crafted size would loop for ever
        end = member.offset_data
        tar.members = []  # type: ignore[attr-defined] # tarfile would keep every header of the shard
        name = member.name.removeprefix("./")
        parts = re.split(r"[/\\]", name)
        unsafe = name.startswith("/") or ".." in parts or any(unicodedata.category(c) in ("Cc", "Cs") for c in name)
        if member.isdir() or (not unsafe and any(re.match(r"\.|__meta__", part) for part in parts)):
            continue
        folder, slash, base = name.rpartition("/")
        stem, dot, name_of_field = base.partition(".")
        if not dot and not unsafe and member.isreg():
            continue
        name_of_field = name_of_field.lower()
        problem = None
        if unsafe:
            problem = "unsafe name: it leaves the folder or holds control characters"
        elif not member.isreg() or member.issparse():
            problem = "not a regular file: link, device or sparse"
        elif name_of_field.rpartition(".")[2] in UNSAFE_FIELDS:
            problem = f"unsafe field: .{name_of_field} can run code"
        yield folder + slash + stem, name_of_field, member, problem


def _unclean_end(file: BinaryIO, offset: int) -> str | None:
    """Some cuts raise nothing in tarfile; a whole tar goes on with a block of zeros after its last member."""
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if block == bytes(tarfile.BLOCKSIZE):
        return None
    return "truncated tar: no end mark" if not block else "truncated tar: broken header after the last sample"


def _damage(path: Shard, error: Exception, *, cache: Path | None) -> str:
    try:
        if isinstance(error, RemoteReadError):
            raise error
        with open_shard(path, cache=cache) as file:
            start = file.read(512)
    except OSError as unreadable:
        return f"unreadable tar: {unreadable.strerror or unreadable}"
    if not start:
        return "not a tar: zero bytes"
    if start.startswith(b"\x1f\x8b"):
        return "not a tar: gzip; unpack it with gunzip"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "not a tar: a web page"
    return f"truncated tar: {' '.join(str(error).split())}"
