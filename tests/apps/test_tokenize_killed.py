"""`kill -9` of a real process, twice: no row is lost or doubled, no worker stays behind, no half file counts."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from qlip.apps.encoding import TokenizeOptions
from qlip.apps.tokenize import tokenize_images
from qlip.data.token_store import TokenStore
from tiny_tokenizer import save_tiny_tokenizer

WAIT = 60.0  # seconds, for anything to happen
NUM_SHARDS, SHARD = 12, 150


def write_shards(folder: Path) -> None:
    folder.mkdir()
    random = np.random.default_rng(0)
    for first in range(0, NUM_SHARDS * SHARD, SHARD):
        with tarfile.open(folder / f"{first // SHARD:05d}.tar", "w") as tar:
            for number in range(first, first + SHARD):
                buffer = io.BytesIO()
                Image.fromarray(random.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(buffer, "PNG")
                for ending, content in (("png", buffer.getvalue()), ("txt", f"picture {number}".encode())):
                    member = tarfile.TarInfo(f"{number:05d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def wait_for(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_two_kills(tmp_path: Path) -> None:
    model, scenes = save_tiny_tokenizer(tmp_path / "model"), tmp_path / "scenes"
    write_shards(scenes)
    options = TokenizeOptions(model=str(model), out=tmp_path / "whole", device="cpu", batch_size=10)
    whole = TokenStore(tokenize_images(str(scenes), options))
    out = tmp_path / "killed"
    command = [Path(sys.executable).parent / "qlip", "tokenize", model, scenes, out, "--device", "cpu"]
    command += ["--batch-size", "10", "--workers", "1"]
    for num_files in (1, 3):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
        wait_for(lambda: len(list(out.glob("*.parquet"))) >= num_files)  # noqa: B023 - called at once
        workers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert workers, "decoders of their own"
        wait_for(lambda: not any(w.is_running() and w.status() != "zombie" for w in workers))  # noqa: B023
    assert len(list(out.glob("*.parquet"))) < NUM_SHARDS, "killed before the end"
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    again = TokenStore(out)
    assert again.verify() == len(whole) == NUM_SHARDS * SHARD and not list(out.glob("*.tmp"))
    for one, other in zip(whole.row_groups, again.row_groups, strict=True):
        first, second = whole.read_rows(*one[:2]), again.read_rows(*other[:2])
        assert (first.keys, first.captions, first.sizes) == (second.keys, second.captions, second.sizes)
        assert (first.packed == second.packed).all()
