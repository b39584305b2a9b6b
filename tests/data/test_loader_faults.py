"""The training loader when something is wrong: limits, worker errors, killed workers, too few shards."""

from __future__ import annotations

import itertools
import os
import signal

import pytest
from shard_files import encoded, loader_of, pair, picture, write_shards, write_tar

from qlip.core.errors import UserError
from qlip.core.images import ImageLimits
from qlip.data.batches import CaptionedImages
from qlip.data.ledger import read_ledger
from qlip.data.loaders import killed_worker


def test_too_few_shards_are_refused_alike_on_every_rank(tmp_path):
    write_shards(tmp_path, num_shards=5, per_shard=1)
    messages = set()
    for rank in range(3):
        with pytest.raises(UserError) as caught:
            loader_of(tmp_path, rank=rank, num_ranks=3, num_workers=2)
        messages.add(str(caught.value))
    assert messages == {"5 shards for 3 ranks x 2 workers: give at least 6 shards, or at most 1 workers"}


def test_every_limit_of_the_config_holds_in_the_loader(tmp_path):
    members = [*pair("good0"), *pair("good1")]
    for key, image in {"wide": picture(40, 4), "many": picture(30, 20)}.items():
        members += [(f"{key}.png", encoded(image)), (f"{key}.txt", b"a caption")]
    members += [("heavy.png", encoded(picture(19, 19))), ("heavy.txt", b"x" * 3000)]
    write_tar(tmp_path / "0.tar", members)
    limits = ImageLimits(max_bytes=3000, max_pixels=500, max_aspect_ratio=5.0)
    config = {"limits": limits, "max_skip_share": 0.9}
    batches = itertools.islice(loader_of(tmp_path, **config), 4)
    assert {key for batch in batches for key in batch["key"]} == {"good0", "good1"}
    assert read_ledger(tmp_path / "skipped.jsonl") == {
        "too elongated": 1,
        "too many pixels": 1,
        "sample too large": 1,
    }
    (tmp_path / "skipped.jsonl").unlink()
    keys = {key for batch in itertools.islice(loader_of(tmp_path), 10) for key in batch["key"]}
    assert keys == {"good0", "good1", "wide", "many", "heavy"} and not (tmp_path / "skipped.jsonl").exists()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_a_worker_raises_is_one_line(tmp_path, num_workers):
    write_shards(tmp_path, num_shards=1, per_shard=1)
    write_tar(tmp_path / "00000.tar", [("a.txt", b"no image")])
    with pytest.raises(UserError) as caught:
        next(iter(loader_of(tmp_path, num_workers=num_workers, batch_size=1)))
    assert str(caught.value).startswith("1 of 1 samples skipped") and "\n" not in str(caught.value)


def test_a_killed_worker_is_one_line_with_the_remedy(tmp_path, monkeypatch):
    write_shards(tmp_path, num_shards=1, per_shard=8)
    tester = os.getpid()

    def die(self, image, caption, sample, random):
        assert os.getpid() != tester
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(CaptionedImages, "decode", die)
    with pytest.raises(UserError, match=r"data worker \d+ was killed .*; lower data.num_workers") as caught:
        next(iter(loader_of(tmp_path, num_workers=1)))
    assert "\n" not in str(caught.value)


def test_only_torchs_words_about_dead_workers_are_taken_so():
    killed = killed_worker(RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. "))
    ended = killed_worker(RuntimeError("DataLoader worker (pid(s) 1, 2) exited unexpectedly"))
    memory = killed_worker(
        RuntimeError("DataLoader worker (pid 3) is killed by signal: Bus error. It is possible that")
    )
    assert killed and "worker 12 was killed" in str(killed) and ended and "worker 1, 2 was killed" in str(ended)
    assert memory and "/dev/shm" in str(memory)
    assert killed_worker(RuntimeError("CUDA error: out of memory")) is None


def test_other_errors_of_the_program_are_not_hidden(tmp_path, monkeypatch):
    write_shards(tmp_path, num_shards=1, per_shard=2)

    def fail(self, *arguments):
        raise RuntimeError("a fault of the program")

    monkeypatch.setattr(CaptionedImages, "decode", fail)
    with pytest.raises(RuntimeError, match="a fault of the program"):
        next(iter(loader_of(tmp_path)))
