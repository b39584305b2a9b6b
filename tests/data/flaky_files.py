"""A remote file system in memory, `flaky://`, whose connections break on demand."""

from __future__ import annotations

import io
from pathlib import Path

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

from qlip.data.shard_cache import _remote_sizes


class FlakyFileSystem(MemoryFileSystem):
    """The memory file system as `flaky://`, whose connections break as `faults` says."""

    protocol = "flaky"
    faults: list[int] = []
    """Bytes after which the next connections break; without any left they hold."""
    opened: list[str] = []
    """Every path that was opened."""
    is_stream = False
    """Whether its files can be read forwards only and do not tell their size."""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("flaky://").strip("/")

    def _open(self, path: str, mode: str = "rb", **options) -> FlakyFile:
        self.opened.append(path)
        data = super()._open(path, mode).getvalue()
        return FlakyFile(data, self.faults.pop(0) if self.faults else None, is_stream=self.is_stream)


class FlakyFile(io.BytesIO):
    def __init__(self, data: bytes, num_bytes: int | None, *, is_stream: bool) -> None:
        super().__init__(data)
        self.num_bytes, self.is_stream = num_bytes, is_stream
        self.size = None if is_stream else len(data)

    def read(self, size: int | None = -1) -> bytes:
        if self.num_bytes is not None:
            if self.num_bytes == 0:
                raise RuntimeError("connection reset by peer")  # not an OSError: so do several file systems
            size = self.num_bytes if size is None or size < 0 else min(size, self.num_bytes)
            self.num_bytes -= size
        return super().read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        if self.is_stream:
            raise ValueError("cannot seek a stream")
        return super().seek(offset, whence)


def clean_memory(monkeypatch) -> None:
    """Nothing stored, nothing broken, no waiting, and no counts remembered from earlier tests."""
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    FlakyFileSystem.faults, FlakyFileSystem.opened, FlakyFileSystem.is_stream = [], [], False
    _remote_sizes.cache_clear()
    monkeypatch.setattr("qlip.data.remote.RETRY_SECONDS", (0.0, 0.0))


def upload(folder: Path, name: str = "pool") -> None:
    for file in folder.iterdir():
        if file.is_file():
            MemoryFileSystem().pipe_file(f"/{name}/{file.name}", file.read_bytes())
