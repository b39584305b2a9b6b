"""Remote shards: which files an address means, what a lost connection does, and that nothing secret is said."""

from __future__ import annotations

import os

import pytest
from flaky_files import FlakyFileSystem, clean_memory, upload
from fsspec.implementations.memory import MemoryFileSystem
from shard_files import dataset, pair, write_shards, write_tar
from torchdata.stateful_dataloader import StatefulDataLoader

from qlip.core.errors import UserError
from qlip.data.inspect import format_report, inspect_shards
from qlip.data.remote import RemoteReadError, RemoteShard, open_remote
from qlip.data.sample_parts import ShardConfig
from qlip.data.shard_cache import cached_path
from qlip.data.shard_list import expand_shards
from qlip.data.tar_reader import Skip, iterate_tar


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    clean_memory(monkeypatch)


# Which files


def test_addresses_in_the_spec_language(tmp_path):
    write_shards(tmp_path, num_shards=3, per_shard=1)
    (tmp_path / ".hidden.tar").touch()
    upload(tmp_path)

    def names(spec: str) -> list[str]:
        return [str(shard) for shard in expand_shards(spec)]

    whole = [f"memory:///pool/0000{i}.tar" for i in range(3)]
    assert names("memory://pool/{00000..00002}.tar") == [url.replace(":///", "://") for url in whole]
    assert names("memory://pool") == names("memory://pool/") == names("memory://pool/*.tar") == whole
    assert names("memory://pool/0000[12].tar") == whole[1:]
    assert names(f"memory://pool/00001.tar::{tmp_path}/00000.tar::memory://{{pool,pool}}/00002.tar") == [
        "memory://pool/00001.tar",
        str(tmp_path / "00000.tar"),
        "memory://pool/00002.tar",
        "memory://pool/00002.tar",
    ]
    assert names(f"file://{tmp_path}/00001.tar") == [str(tmp_path / "00001.tar")]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pipe:cat memory://pool/0.tar", "commands are not run"),
        ("memory://pool/{0..9}.tar", "memory://pool/0.tar is not there"),
        ("memory://pool/{00000..00009}.tar", "memory://pool/00009.tar is not there"),
        ("memory://empty", r"lists no \.tar files"),
        ("memory://pool/x*.tar", r"lists no \.tar files"),
        ("nosuch://pool/0.tar", "Protocol not known"),
        ("oci://bucket/0.tar", "package that is not installed.*ocifs"),
        ("memory://pool/{0..99999999999}.tar", "mend the range"),
    ],
)
def test_refusals_are_one_line(tmp_path, spec, message):
    write_shards(tmp_path, num_shards=1, per_shard=1)
    upload(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        expand_shards(spec)
    assert "\n" not in str(caught.value)


def test_a_range_costs_two_requests_and_cached_ends_none(tmp_path, monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr("qlip.data.shard_list.check_reachable", lambda shard: asked.append(shard.name))
    assert len(expand_shards("s3://bucket/{00000..09999}.tar")) == 10_000
    assert asked == ["00000.tar", "09999.tar"]
    cached_path(RemoteShard("s3://bucket/00000.tar"), tmp_path).touch()
    expand_shards("s3://bucket/{00000..09999}.tar", shard_cache=str(tmp_path))
    assert asked[2:] == ["09999.tar"]


def test_names_and_texts_hold_no_secrets(monkeypatch):
    shard = RemoteShard("https://user:word@host:80/a/b.c.tar?X-Signature=secret")
    assert (shard.name, shard.stem, str(shard)) == ("b.c.tar", "b.c", "https://host:80/a/b.c.tar")
    assert shard.neighbour("sizes.json").url == "https://user:word@host:80/a/sizes.json?X-Signature=secret"
    assert str(RemoteShard("s3://bucket/odd?name.tar")) == "s3://bucket/odd?name.tar"
    assert str(RemoteShard("abfs://container@account/x.tar")) == "abfs://container@account/x.tar"

    def refuse(self, path: str, **options):
        raise ConnectionError(f"cannot reach {shard.url} now")

    monkeypatch.setattr(FlakyFileSystem, "info", refuse)
    with pytest.raises(UserError, match=r"cannot reach https://host:80/a/b\.c\.tar now; check address") as caught:
        expand_shards("flaky://pool/0.tar")
    assert "secret" not in str(caught.value) and "word" not in str(caught.value)


# Reading


@pytest.mark.parametrize("is_stream", [False, True])
def test_remote_samples_equal_local_ones(tmp_path, is_stream):
    FlakyFileSystem.is_stream = is_stream
    write_shards(tmp_path, num_shards=4, per_shard=6)
    upload(tmp_path)
    local, remote = (
        dataset(shards, repeat=True, shuffle_buffer=7, rank=1, num_ranks=2)
        for shards in (tmp_path, "flaky://pool/{00000..00003}.tar")
    )
    sides = iter(local), iter(remote)
    for _ in range(40):
        here, there = (next(side) for side in sides)
        assert (here["key"], here["draw"]) == (there["key"], there["draw"])
    assert local.state_dict() == remote.state_dict()  # so a pool may move from here to there
    again = dataset("flaky://pool/{00000..00003}.tar", repeat=True, shuffle_buffer=7, rank=1, num_ranks=2)
    again.load_state_dict(local.state_dict())
    assert next(iter(again))["key"] == next(sides[0])["key"]


def test_workers_read_remote_shards(tmp_path):
    keys = write_shards(tmp_path, num_shards=4, per_shard=3)
    upload(tmp_path)
    loader = StatefulDataLoader(dataset("memory://pool"), batch_size=2, num_workers=2, collate_fn=list)
    assert sorted(sample["key"] for batch in loader for sample in batch) == keys


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_lost_connection_goes_on_at_the_same_byte(tmp_path, is_stream):
    FlakyFileSystem.is_stream = is_stream
    write_tar(tmp_path / "a.tar", [(f"{i:03d}.jpg", os.urandom(30_000)) for i in range(60)])
    upload(tmp_path)
    FlakyFileSystem.faults = [0, 100_000, 700_000, 10, 1_500_000]
    expected = [(s.key, s.fields) for s in iterate_tar(tmp_path / "a.tar")]
    found = list(iterate_tar(RemoteShard("flaky://pool/a.tar")))
    assert [(s.key, s.fields) for s in found] == expected and not FlakyFileSystem.faults


def test_a_shard_that_stays_out_of_reach_is_a_skip(tmp_path):
    write_tar(tmp_path / "a.tar", [(f"{i:03d}.jpg", bytes(700_000)) for i in range(9)])
    upload(tmp_path)
    FlakyFileSystem.faults = [1_500_000, 0, 0, 0, 0]
    *good, cut, skip = iterate_tar(RemoteShard("flaky://pool/a.tar"))
    assert [sample.key for sample in good] == ["000", "001"] and isinstance(cut, Skip) and cut.key == "002"
    assert skip.reason.startswith("unreadable tar: 3 connections failed at byte")
    assert "connection reset by peer" in skip.reason and skip.shard == "flaky://pool/a.tar"
    (absent,) = iterate_tar(RemoteShard("flaky://pool/absent.tar"))
    assert isinstance(absent, Skip) and absent.reason.startswith("unreadable tar: FileNotFoundError")
    assert FlakyFileSystem.opened.count("/pool/absent.tar") == 1  # there is no use in asking again


def test_a_file_that_changes_while_it_is_read_is_not_stitched_together(monkeypatch):
    MemoryFileSystem().pipe_file("/pool/a.tar", bytes(3_000_000))
    FlakyFileSystem.faults = [2_000_000]
    with open_remote(RemoteShard("flaky://pool/a.tar")) as file:
        assert len(file.read(1_500_000)) == 1_500_000
        MemoryFileSystem().pipe_file("/pool/a.tar", bytes(3_000_001))
        with pytest.raises(RemoteReadError, match="changed while it was read: 3000000 bytes, then 3000001"):
            file.read()


@pytest.mark.parametrize("is_stream", [False, True])
def test_hostile_bytes_give_what_they_give_locally(tmp_path, is_stream):
    FlakyFileSystem.is_stream = is_stream
    whole = write_tar(tmp_path / "whole.tar", [*pair("a"), ("../evil.jpg", b"x"), ("c.pkl", b""), *pair("d")])
    data = whole.read_bytes()
    big = bytearray(data)
    big[124:136] = b"77777777777\0"  # the size of the first member: eight gigabytes
    big[148:156] = b"%06o\0 " % (256 + sum(big[:148]) + sum(big[156:512]))
    for name, content in {
        "cut": data[:3000],
        "cut_at_block": data[:1024],
        "zero": b"",
        "html": b"<html>404</html>" * 100,
        "big": bytes(big),
        "no_end": data.rstrip(b"\0"),
    }.items():
        (tmp_path / f"{name}.tar").write_bytes(content)
    upload(tmp_path)
    for path in tmp_path.glob("*.tar"):
        local = [f"{found}".replace(str(path), "") for found in iterate_tar(path)]
        url = f"flaky://pool/{path.name}"
        assert [f"{found}".replace(url, "") for found in iterate_tar(RemoteShard(url))] == local, path.name


def test_inspect_reads_remote_shards(tmp_path):
    write_shards(tmp_path, num_shards=2, per_shard=3)
    (tmp_path / "00002.tar").write_bytes(b"<html>")
    upload(tmp_path)
    config = ShardConfig(shards="", shard_cache=str(tmp_path / "cache"))
    report = inspect_shards("memory://pool", limit=None, config=config)
    assert (report.num_shards, report.num_good, report.skipped) == (3, 6, {"not a tar": 1})
    assert "00002.tar  (shard)  'not a tar: a web page'" in format_report(report)
