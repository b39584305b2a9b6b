"""One shard, wherever it is, as an open file with its promised number of samples; remote ones optionally kept here."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import time
import uuid
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from qlip.core.errors import UserError
from qlip.data.remote import CHUNK_BYTES, RemoteReadError, RemoteShard, Shard, open_remote, remote_json

STALE_SECONDS = 24 * 3600  # a half copy this old belongs to a process that was killed


def open_shard(shard: Shard, *, cache: Path | None) -> BinaryIO:
    """The shard's bytes from the start, seekable. With `cache` a remote shard is copied there first and read locally.

    Raises `OSError` for what cannot be read, `UserError` for a cache that cannot be written.
    """
    if isinstance(shard, Path):
        return shard.open("rb")
    return open_remote(shard) if cache is None else cached_copy(shard, cache).open("rb")


def promised_samples(shard: Shard, *, cache: Path | None = None) -> int | None:
    """Samples the shard should hold, by DataComp's `sizes.json` or img2dataset's `<stem>_stats.json`; None unknown.

    Of a remote shard `sizes.json` is fetched once per folder and process, `_stats.json` with one request per shard.
    Nothing is asked twice: a count that cannot be had is unknown, and the tar's end mark is checked all the same.
    """
    if isinstance(shard, Path):
        count = _local_json(shard.with_name("sizes.json")).get(shard.name)
        if not isinstance(count, int):
            count = _local_json(shard.with_name(f"{shard.stem}_stats.json")).get("successes")
    elif cache is not None and (copy := cached_path(shard, cache)).exists():
        return promised_samples(copy)
    else:
        count = _remote_sizes(shard.neighbour("sizes.json")).get(shard.name)
        if not isinstance(count, int):
            count = remote_json(shard.neighbour(f"{shard.stem}_stats.json")).get("successes")
    return count if isinstance(count, int) else None


def cached_path(shard: RemoteShard, folder: Path) -> Path:
    """Where the copy of a shard is or would be: named by the sha256 of its whole address, then its own name."""
    safe = re.sub(r"[^\w.-]", "_", shard.name)[-100:]
    return folder / f"{hashlib.sha256(shard.url.encode()).hexdigest()[:16]}_{safe}"


def cached_copy(shard: RemoteShard, folder: Path) -> Path:
    """Copy a shard into `folder` unless it is there, whole or not at all; several processes may do so at once.

    Its promised number of samples is kept beside it as `<stem>_stats.json`, so that a copy is read without a request.
    Raises `RemoteReadError`, or `UserError` for a folder that cannot be written.
    """
    target = cached_path(shard, folder)
    if target.exists():
        return target
    temporary = folder / f".{target.name}.{uuid.uuid4().hex}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder)
        count = promised_samples(shard)
        if count is not None:
            temporary.write_text(json.dumps({"successes": count}))
            temporary.replace(target.with_name(f"{target.stem}_stats.json"))
        with open_remote(shard) as source, temporary.open("wb") as copy:
            shutil.copyfileobj(source, copy, CHUNK_BYTES)
        temporary.replace(target)  # last: a shard in its place is whole and has its count
    except RemoteReadError:
        raise
    except OSError as error:
        raise UserError(f"cannot write the shard cache {folder}: {error.strerror}; free space or move it") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return target


def _remove_stale(folder: Path) -> None:
    for old in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):  # another process may be doing the same
            if time.time() - old.stat().st_mtime > STALE_SECONDS:
                old.unlink()


@lru_cache(maxsize=64)
def _remote_sizes(sizes: RemoteShard) -> dict[str, Any]:
    return remote_json(sizes)


def _local_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
