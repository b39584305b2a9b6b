"""Copies of remote shards, whole or not at all, and the numbers of samples that remote shards promise."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest
from flaky_files import FlakyFileSystem, clean_memory, upload
from fsspec.implementations.memory import MemoryFileSystem
from shard_files import dataset, pair, write_shards, write_tar

from qlip.core.errors import UserError
from qlip.data.remote import RemoteReadError, RemoteShard
from qlip.data.shard_cache import _remote_sizes, cached_copy, promised_samples
from qlip.data.tar_reader import RawSample, iterate_tar


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    clean_memory(monkeypatch)


def samples_of(shards, **options) -> list[tuple[str, float]]:
    return [(sample["key"], sample["draw"]) for sample in dataset(shards, **options)]


def test_promised_counts_of_remote_shards(tmp_path):
    write_shards(tmp_path, num_shards=2, per_shard=2)
    (tmp_path / "00000_stats.json").write_text(json.dumps({"successes": 5}))
    upload(tmp_path)
    first, second = (RemoteShard(f"memory://pool/0000{i}.tar") for i in range(2))
    assert (promised_samples(first), promised_samples(second)) == (5, None)
    *_, skip = iterate_tar(first)
    assert skip.reason.startswith("samples missing: 2 of the 5") and skip.count == 3
    _remote_sizes.cache_clear()  # a process asks once per folder
    MemoryFileSystem().pipe_file("/pool/sizes.json", json.dumps({"00001.tar": 9}).encode())
    assert (promised_samples(first), promised_samples(second)) == (5, 9)
    _remote_sizes.cache_clear()
    MemoryFileSystem().pipe_file("/pool/sizes.json", b"[" * 5000)
    assert (promised_samples(first), promised_samples(second)) == (5, None)


def test_a_cached_pool_is_read_without_a_request(tmp_path):
    (tmp_path / "pool").mkdir()
    write_shards(tmp_path / "pool", num_shards=3, per_shard=4)
    (tmp_path / "pool" / "00001_stats.json").write_text(json.dumps({"successes": 6}))
    upload(tmp_path / "pool")
    spec, cache = "flaky://pool/{00000..00002}.tar", tmp_path / "a cache" / "here"
    options = {"shard_cache": str(cache), "max_skip_share": 0.5}
    expected = samples_of(tmp_path / "pool", max_skip_share=0.5)
    data = dataset(spec, **options)
    assert [(s["key"], s["draw"]) for s in data] == expected and data.ledger.skipped == {"samples missing": 2}
    assert len(list(cache.glob("*.tar"))) == 3 and not list(cache.glob(".*"))
    MemoryFileSystem.store.clear()
    FlakyFileSystem.opened.clear()
    again = dataset(spec, **options)
    assert [(s["key"], s["draw"]) for s in again] == expected and again.ledger.skipped == {"samples missing": 2}
    assert FlakyFileSystem.opened == []


def test_two_processes_may_copy_one_shard_and_half_copies_do_not_stay(tmp_path):
    data = os.urandom(3_000_000)
    MemoryFileSystem().pipe_file("/pool/a.tar", data)
    shard = RemoteShard("flaky://pool/a.tar")
    start = threading.Barrier(4)
    copies: list[Path] = []

    def copy() -> None:
        start.wait()
        copies.append(cached_copy(shard, tmp_path))

    threads = [threading.Thread(target=copy) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(copies) == 4 and len(set(copies)) == 1 and copies[0].read_bytes() == data
    stale, young = tmp_path / ".x.tar.1.tmp", tmp_path / ".x.tar.2.tmp"
    for file in (stale, young):
        file.touch()
    os.utime(stale, (time.time() - 100_000,) * 2)
    MemoryFileSystem().pipe_file("/pool/b.tar", data)
    FlakyFileSystem.faults = [2_000_000, 0, 0, 0]
    with pytest.raises(RemoteReadError):
        cached_copy(RemoteShard("flaky://pool/b.tar"), tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([young.name, copies[0].name])


def test_a_cache_that_cannot_be_written_stops_the_run_in_one_line(tmp_path):
    write_shards(tmp_path, num_shards=1, per_shard=1)
    upload(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write the shard cache .*/file/x: Not a directory"):
        next(iter(dataset("memory://pool", shard_cache=str(tmp_path / "file" / "x"))))


def test_equal_names_of_two_pools_are_two_copies(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "0.tar", pair(name))
        upload(tmp_path / name, name)
    found = samples_of("memory://one::memory://two", shard_cache=str(tmp_path / "cache"))
    assert [key for key, _ in found] == ["one", "two"]
    assert isinstance(next(iterate_tar(next((tmp_path / "cache").glob("*.tar")))), RawSample)
