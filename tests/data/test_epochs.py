"""Epochs over ranks and workers: every sample once, fixed lengths, uneven shards, and the old order unchanged.

Workers are simulated here, one reader after another in this process; tests/data/test_loader.py starts real ones.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from shard_files import dataset, pair, write_shards, write_tar, write_uneven

from qlip.core.errors import UserError
from qlip.data.shards import ShardDataset

SPLITS = [(ranks, workers) for ranks in (1, 2, 3) for workers in (1, 2)]


def readers_of(folder: Path, monkeypatch, *, ranks: int, workers: int, **options):
    """One data set per (rank, worker), each with the worker it runs in set for as long as it is in use."""
    for rank, worker in itertools.product(range(ranks), range(workers)):
        info = SimpleNamespace(id=worker, num_workers=workers)
        monkeypatch.setattr("qlip.data.shards.get_worker_info", lambda info=info: info)
        yield dataset(folder, repeat=True, rank=rank, num_ranks=ranks, **options)


def epochs_of(data: ShardDataset, num_epochs: int) -> dict[int, list[str]]:
    """The keys of the first epochs."""
    keys = defaultdict[int, list[str]](list)
    for sample in data:
        if data.position.epoch >= num_epochs:
            return keys
        keys[data.position.epoch].append(sample["key"])
    raise AssertionError("training does not end")


@pytest.mark.parametrize(
    ("options", "num", "expected"),
    [
        ({"repeat": True, "shuffle_buffer": 6, "seed": 3}, 90, "036734311101db69"),
        ({"repeat": True, "caption_weights": {"captions.short": 0.25, "captions.dense": 0.75}}, 90, "92ba65bf27ae4a85"),
        ({"repeat": True, "shuffle_buffer": 0, "seed": 1}, 60, "959f08298797e030"),
        ({"repeat": True, "shuffle_buffer": 6, "seed": 3, "rank": 1, "num_ranks": 3}, 60, "b21b5a853ae52b22"),
        ({"repeat": False, "shuffle_buffer": 6, "seed": 3}, 60, "1c72f2ffb19cff30"),
    ],
)
def test_the_order_is_that_of_the_first_release(tmp_path, options, num, expected):
    write_shards(tmp_path, num_shards=5, per_shard=7)
    write_tar(tmp_path / "00001.tar", [*pair("a"), ("b.jpg", b"broken"), ("b.txt", b"b"), ("c.pkl", b""), *pair("d")])
    samples = itertools.islice(dataset(tmp_path, max_skip_share=0.9, **options), num)
    text = "\n".join(f"{sample['key']} {sample['draw']!r} {sample['caption']}" for sample in samples)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == expected


@pytest.mark.parametrize(("ranks", "workers"), SPLITS)
@pytest.mark.parametrize("shuffle_buffer", [0, 4])
def test_every_sample_once_per_epoch_over_uneven_shards(tmp_path, monkeypatch, ranks, workers, shuffle_buffer):
    keys = write_uneven(tmp_path)
    seen = defaultdict[int, Counter](Counter)
    for data in readers_of(tmp_path, monkeypatch, ranks=ranks, workers=workers, shuffle_buffer=shuffle_buffer):
        for epoch, mine in epochs_of(data, 3).items():
            assert mine
            seen[epoch].update(mine)
    assert dict(seen) == {epoch: Counter(keys) for epoch in range(3)}


@pytest.mark.parametrize(("ranks", "workers"), SPLITS)
@pytest.mark.parametrize("train_num_samples", [1, 10, 36, 100])
def test_fixed_epochs_have_the_share_of_every_reader(tmp_path, monkeypatch, ranks, workers, train_num_samples):
    keys = write_uneven(tmp_path)  # 36 samples
    share = -(-train_num_samples // (ranks * workers))
    options = {"shuffle_buffer": 4, "train_num_samples": train_num_samples}
    whole = defaultdict[int, Counter](Counter)  # which samples each epoch would hold without an end
    seen = defaultdict[int, list](list)
    split = {"ranks": ranks, "workers": workers}
    natural = [epochs_of(data, 3) for data in readers_of(tmp_path, monkeypatch, shuffle_buffer=4, **split)]
    for number, data in enumerate(readers_of(tmp_path, monkeypatch, **split, **options)):
        for epoch, mine in epochs_of(data, 3).items():
            own = natural[number][epoch]
            assert len(mine) == share
            assert mine[: len(own)] == own[:share]  # begins as the epoch without a fixed length
            counts = Counter(mine)
            assert set(counts) <= set(own) and max(counts.values()) - min(counts[key] for key in own) <= 1
            if share >= 2 * len(own) and len(own) > 3:
                assert mine[len(own) : 2 * len(own)] != own  # in a new order
            seen[epoch].append(counts)
            whole[epoch].update(own)
    assert all(whole[epoch] == Counter(keys) and len(seen[epoch]) == ranks * workers for epoch in range(3))


def test_a_sample_read_again_in_an_epoch_is_augmented_anew(tmp_path):
    write_shards(tmp_path, num_shards=1, per_shard=3)
    data = dataset(tmp_path, repeat=True, train_num_samples=9)
    draws = [(sample["key"], sample["draw"]) for sample in itertools.islice(data, 18)]
    assert len({key for key, _ in draws}) == 3 and len(set(draws)) == 18
    assert draws[:3] == [(s["key"], s["draw"]) for s in itertools.islice(dataset(tmp_path, repeat=True), 3)]


def test_shards_read_again_in_an_epoch_come_in_a_new_order(tmp_path):
    keys = write_shards(tmp_path, num_shards=6, per_shard=1)
    data = dataset(tmp_path, repeat=True, shuffle_buffer=1, train_num_samples=18)  # blocks of one: shards alone move
    order = [sample["key"] for sample in itertools.islice(data, 18)]
    rounds = [order[:6], order[6:12], order[12:]]
    assert all(sorted(one) == keys for one in rounds) and len({tuple(one) for one in rounds}) == 3


@pytest.mark.parametrize("train_num_samples", [0, 5, 7, 40])
def test_resume_at_every_sample_of_three_epochs(tmp_path, train_num_samples):
    write_shards(tmp_path, num_shards=3, per_shard=4)
    write_tar(tmp_path / "00009.tar", [("x.txt", b"no image"), *pair("y"), ("z.pth", b"")])
    options = {"repeat": True, "shuffle_buffer": 5, "max_skip_share": 0.9, "train_num_samples": train_num_samples}
    whole = dataset(tmp_path, **options)
    history = []
    for sample in whole:
        history.append(((sample["key"], sample["draw"]), json.loads(json.dumps(whole.state_dict()))))
        if len(history) == 100 or whole.position.epoch == 3:
            break
    assert any(state["position"]["round"] for _, state in history) == (train_num_samples == 40)
    for (_, before), (expected, after) in itertools.pairwise(history):
        again = dataset(tmp_path, **options)
        again.load_state_dict(before)
        sample = next(iter(again))
        assert (sample["key"], sample["draw"]) == expected and again.state_dict() == after


def test_impossible_lengths_and_changed_ones_are_refused(tmp_path):
    write_shards(tmp_path, num_shards=2, per_shard=2)
    with pytest.raises(UserError, match="train_num_samples -1"):
        dataset(tmp_path, repeat=True, train_num_samples=-1)
    state = dataset(tmp_path, repeat=True, train_num_samples=5).state_dict()
    for now, message in ((6, "train_num_samples 5 -> 6"), (0, "train_num_samples 5 -> None")):
        with pytest.raises(UserError, match=message):
            dataset(tmp_path, repeat=True, train_num_samples=now).load_state_dict(state)


def test_a_position_of_the_first_release_is_still_read(tmp_path):
    write_shards(tmp_path, num_shards=2, per_shard=5)
    data = dataset(tmp_path, repeat=True, shuffle_buffer=4)
    samples = iter(data)
    for _ in range(13):
        next(samples)
    state = data.state_dict()
    del state["position"]["round"], state["position"]["before_round"]
    again = dataset(tmp_path, repeat=True, shuffle_buffer=4)
    again.load_state_dict(state)
    assert next(iter(again))["key"] == next(samples)["key"]
