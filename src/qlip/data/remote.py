"""Shards that are not on this machine: found, and read on after a lost connection. The only file that knows fsspec.

Addresses are fsspec's (`s3://`, `gs://`, `https://`, `hf://`, ...); credentials and endpoints come from the environment
or from fsspec's own configuration files, never from ours. File systems are made where they are used, so that worker
processes hold their own connections.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import fsspec

from qlip.core.errors import UserError

RETRY_SECONDS = (0.5, 2.0, 8.0, 30.0)  # waits before another connection; after the last the shard is given up
CHUNK_BYTES = 1 << 20
MAX_JSON_BYTES = 100_000_000  # sizes.json of the largest DataComp pool has about 30 MB
NO_USE_RETRYING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
T = TypeVar("T")


class RemoteReadError(OSError):
    """A remote file that cannot be read, or no further; one line without secrets."""


@dataclass(frozen=True, slots=True)
class RemoteShard:
    """One remote file, named as local paths are: `name`, `stem` and `str()`, which leaves out passwords and queries."""

    url: str
    """Address as fsspec reads it."""

    @property
    def name(self) -> str:
        """The last part of the address, without a query."""
        return _split_query(self.url)[0].rstrip("/").rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The name without its last ending."""
        return self.name.rpartition(".")[0] or self.name

    def neighbour(self, name: str) -> RemoteShard:
        """Another file of the same folder, asked for with the same query."""
        address, question, query = _split_query(self.url)
        return RemoteShard(address.rpartition("/")[0] + "/" + name + question + query)

    def __str__(self) -> str:
        return _without_secrets(self.url)


Shard = Path | RemoteShard


def open_remote(shard: RemoteShard) -> BinaryIO:
    """The shard's bytes from the start, seekable. Raises `RemoteReadError` here and when reading."""
    return io.BufferedReader(_RemoteFile(shard), CHUNK_BYTES)


def remote_json(shard: RemoteShard) -> dict[str, Any]:
    """A small remote json object, asked for once without retrying; {} when there is none to be had."""
    try:
        fs, path = _file_system(shard.url)
        with fs.open(path, "rb") as file:
            values = json.loads(file.read(MAX_JSON_BYTES))
    except Exception:  # absent, forbidden, unreachable, not json: every file system has its own errors
        return {}
    return values if isinstance(values, dict) else {}


def list_remote(url: str) -> list[RemoteShard]:
    """The `*.tar` files of a remote folder, or the files that a pattern matches, by name.

    Raises `UserError` when there are none or the file system cannot be asked.
    """
    pattern = url if has_wildcard(url) else url.rstrip("/") + "/*.tar"
    shown = _without_secrets(url)
    fs, path = _file_system(pattern)
    try:
        found = sorted(fs.unstrip_protocol(name) for name in fs.glob(path))
    except Exception as error:  # every file system has its own errors
        raise UserError(f"{shown} cannot be listed: {_said(error)}; name the shards: {{00000..00009}}.tar") from None
    shards = [RemoteShard(name) for name in found if "::" not in name]
    shards = [shard for shard in shards if not shard.name.startswith(".")]
    if not shards:
        raise UserError(f"{shown} lists no .tar files; mend the address or name them: {{00000..00009}}.tar")
    return shards


def check_reachable(shard: RemoteShard) -> None:
    """Raise `UserError` when a remote shard is not there, or its file system cannot be reached."""
    fs, path = _file_system(shard.url)
    try:
        fs.info(path)
    except FileNotFoundError:
        raise UserError(f"shard {shard} is not there; mend the address or the range") from None
    except Exception as error:  # every file system has its own errors
        raise UserError(
            f"shard {shard} cannot be reached: {_said(error)}; check address, credentials and network"
        ) from None


def has_wildcard(url: str) -> bool:
    """Whether an address is a pattern; a question mark begins the query of a web address."""
    return re.search(r"[*\[]" if _is_web(url) else r"[*?\[]", url) is not None


class _RemoteFile(io.RawIOBase):
    """A remote file as bytes from any position. A lost connection is replaced by a new one at the same byte."""

    def __init__(self, shard: RemoteShard) -> None:
        super().__init__()
        self._shard = shard
        self._position = 0
        self._size: int | None = None
        self._file: Any = None
        self._retrying(self._connect)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence != io.SEEK_END, "a stream's end may be unknown"
        self._position = offset + (self._position if whence == io.SEEK_CUR else 0)
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        if self._size is not None and self._position >= self._size:
            return 0
        data = self._retrying(lambda: self._read(len(view)))
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._disconnect()
        super().close()

    def _read(self, num_bytes: int) -> bytes:
        if self._file is None or not self._at_position():
            self._connect()
            self._at_position()
        data = self._file.read(num_bytes)
        if not data and self._size is not None:
            raise OSError(f"it ended at byte {self._position} of {self._size}")
        return data

    def _connect(self) -> None:
        self._disconnect()
        fs, path = _file_system(self._shard.url)
        file = fs.open(path, "rb")
        size = getattr(file, "size", None)
        if self._size is not None and size != self._size:
            file.close()
            raise RemoteReadError(f"it changed while it was read: {self._size} bytes, then {size}")
        self._file, self._size = file, size

    def _at_position(self) -> bool:
        """Move the open file to the position; False when it is a stream that has gone past it."""
        if self._file.tell() == self._position:
            return True
        try:
            self._file.seek(self._position)
        except (OSError, ValueError):  # a web server without ranges: forwards only, by reading
            while (ahead := self._position - self._file.tell()) > 0 and self._file.read(min(ahead, CHUNK_BYTES)):
                pass
            return self._file.tell() <= self._position
        return True

    def _disconnect(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(Exception):  # it is being given up: what it says on closing helps nobody
                file.close()

    def _retrying(self, action: Callable[[], T]) -> T:
        for wait in (*RETRY_SECONDS, None):
            try:
                return action()
            except (UserError, RemoteReadError):
                raise
            except Exception as error:  # every file system has its own errors for a lost connection
                self._disconnect()
                if isinstance(error, NO_USE_RETRYING):
                    raise RemoteReadError(_said(error)) from None
                if wait is None:
                    tries = len(RETRY_SECONDS) + 1
                    raise RemoteReadError(
                        f"{tries} connections failed at byte {self._position}: {_said(error)}"
                    ) from None
                time.sleep(wait)
        raise AssertionError("the last try returns or raises")


def _file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system and the path inside it. Raises `UserError` for an unknown protocol or a missing package."""
    if "::" in url:  # fsspec would chain file systems, local ones among them
        raise UserError(f"shard {_without_secrets(url)}: addresses with :: are not read; rename it")
    protocol = url.partition("://")[0]
    try:
        return fsspec.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{protocol}:// shards need a package that is not installed: {_said(error)}") from None
    except Exception as error:  # every file system has its own errors
        raise UserError(
            f"shards {_without_secrets(url)}: {_said(error)}; use s3://, gs://, https:// or hf://"
        ) from None


def _said(error: Exception) -> str:
    """What an error says, on one line and without secrets."""
    text = _without_secrets(" ".join(str(error).split()))
    return text if text and not isinstance(error, NO_USE_RETRYING) else f"{type(error).__name__} {text}".strip()


def _without_secrets(text: str) -> str:
    """Without `user:password@` and the query (signatures, tokens) of every web address in it."""
    text = re.sub(r"(://)[^\s/@]*:[^\s/@]*@", r"\1", text)
    return re.sub(r"(\bhttps?://[^\s?'\"]*)\?[^\s'\")]*", r"\1", text)


def _split_query(url: str) -> tuple[str, str, str]:
    return url.partition("?") if _is_web(url) else (url, "", "")


def _is_web(url: str) -> bool:
    return url.startswith(("http://", "https://"))
