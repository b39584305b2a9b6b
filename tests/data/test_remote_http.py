"""Shards from a web server on this machine: ranges, a server without them, lost connections, listings."""

from __future__ import annotations

import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from shard_files import dataset, write_shards, write_tar

from qlip.core.errors import UserError
from qlip.data.remote import RemoteShard, open_remote
from qlip.data.shard_list import expand_shards
from qlip.data.tar_reader import RawSample, Skip, iterate_tar

pytest.importorskip("aiohttp", reason="fsspec reads https:// with aiohttp")


class Handler(BaseHTTPRequestHandler):
    """Files of a folder. `cut` breaks off that many of the first answers to GET of a tar half-way."""

    def __init__(self, *arguments, folder: Path, ranges: bool, cuts: list[int], **options) -> None:
        self.folder, self.ranges, self.cuts = folder, ranges, cuts
        super().__init__(*arguments, **options)

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        path = self.folder / self.path.partition("?")[0].lstrip("/")
        if path.is_dir():
            data = "".join(f'<a href="{file.name}">{file.name}</a>\n' for file in sorted(path.iterdir())).encode()
        elif path.is_file():
            data = path.read_bytes()
        else:
            self.send_error(404)
            return
        start, end = 0, len(data)
        wanted = self.headers.get("Range")
        if self.ranges and wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1 if last else end, end)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(end - start))
        self.send_header("Content-Type", "text/html" if path.is_dir() else "application/x-tar")
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if with_body and path.suffix == ".tar" and self.cuts and self.cuts.pop():
            self.wfile.write(data[start : (start + end) // 2])
            self.connection.close()
        elif with_body:
            self.wfile.write(data[start:end])

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture(params=[True, False], ids=["ranges", "stream"])
def served(request, tmp_path, monkeypatch):
    """Address, folder behind it, and the list of answers still to be cut."""
    monkeypatch.setattr("qlip.data.remote.RETRY_SECONDS", (0.0, 0.0, 0.0))
    folder, cuts = tmp_path / "served", list[int]()
    folder.mkdir()
    handler = partial(Handler, folder=folder, ranges=request.param, cuts=cuts)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", folder, cuts
    server.shutdown()
    server.server_close()


def test_the_same_samples_as_from_the_folder(served):
    address, folder, _ = served
    write_shards(folder, num_shards=3, per_shard=5)
    expected = [(s["key"], s["draw"]) for s in dataset(folder)]
    for spec in (f"{address}/{{00000..00002}}.tar", f"{address}/", f"{address}/0000[0-2].tar"):
        assert [(s["key"], s["draw"]) for s in dataset(spec)] == expected
    assert str(expand_shards(f"{address}/00001.tar?token=secret")[0]) == f"{address}/00001.tar"
    with pytest.raises(UserError, match=r"00009\.tar is not there"):
        expand_shards(f"{address}/{{00000..00009}}.tar")
    with pytest.raises(UserError, match=r"lists no \.tar|cannot be listed"):
        expand_shards(f"{address}/absent/")


def test_a_lost_connection_is_continued_at_the_same_byte(served):
    address, folder, cuts = served
    data = bytes(range(256)) * 20_000
    (folder / "a.tar").write_bytes(data)
    cuts += [1, 1]
    with open_remote(RemoteShard(f"{address}/a.tar")) as file:
        assert file.read() == data
        file.seek(1000)
        assert file.read(100) == data[1000:1100]
    assert not any(cuts)


def test_a_server_that_always_breaks_off_costs_the_shard(served):
    address, folder, cuts = served
    write_tar(folder / "a.tar", [(f"{i:03d}.jpg", bytes(100_000)) for i in range(100)])
    cuts += [1] * 1000
    found = list(iterate_tar(RemoteShard(f"{address}/a.tar?signature=secret")))
    last = found[-1]
    assert isinstance(last, Skip) and last.reason.startswith("unreadable tar: 4 connections failed at byte")
    assert "secret" not in last.reason + last.shard
    assert all(set(sample.fields["jpg"]) == {0} for sample in found if isinstance(sample, RawSample))
