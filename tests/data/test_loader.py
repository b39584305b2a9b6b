"""The training loader with real workers: its order, exact resume, and other numbers of ranks."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from shard_files import loader_of, pair, write_shards, write_tar, write_uneven

from qlip.core.config import from_json, to_json
from qlip.core.errors import UserError
from qlip.data.batches import DataConfig
from qlip.data.loaders import TrainingLoader
from qlip.data.shards import ShardDataset

SPLITS = [(ranks, workers) for ranks in (1, 2, 3) for workers in (0, 1, 2)]


def position_of(state: dict[str, Any], worker: int) -> dict[str, Any]:
    """Where one reader is, out of the state of a loader."""
    loader = state["loader"]
    if not state["num_workers"]:
        return loader["dataset_state"]["position"]
    return loader["_snapshot"]["_worker_snapshots"][f"worker_{worker}"]["dataset_state"]["position"]


def epochs_of(loader: TrainingLoader, *, stop: int) -> dict[int, Counter]:
    """Keys by epoch until every reader of a loader with single-sample batches has reached epoch `stop`."""
    seen: dict[int, Counter] = {}
    num_workers = max(1, loader.num_workers)
    reached: set[int] = set()
    for number, batch in enumerate(loader):
        worker = number % num_workers  # workers hand out batches in turn
        epoch = position_of(loader.state_dict(), worker)["epoch"]
        if epoch >= stop:
            reached.add(worker)
        else:
            seen.setdefault(epoch, Counter()).update(batch["key"])
        if len(reached) == num_workers:
            break
    return seen


def saved(loaders: list[TrainingLoader], num_batches: list[int]) -> list[dict[str, Any]]:
    """The states of all ranks, as a checkpoint holds them, after so many batches of each."""
    for loader, num in zip(loaders, num_batches, strict=True):
        list(zip(range(num), loader, strict=False))
    return json.loads(json.dumps([loader.state_dict() for loader in loaders]))


def contents(loader, num: int) -> list[tuple[list[str], torch.Tensor]]:
    return [(batch["key"], batch["pixel_values"]) for batch in itertools.islice(loader, num)]


def same(a, b) -> bool:
    return len(a) == len(b) and all(k == m and torch.equal(x, y) for (k, x), (m, y) in zip(a, b, strict=True))


@pytest.mark.parametrize(("ranks", "workers"), SPLITS)
def test_ranks_and_workers_share_every_epoch(tmp_path, ranks, workers):
    keys = write_uneven(tmp_path)
    seen: dict[int, Counter] = {0: Counter(), 1: Counter()}
    for rank in range(ranks):
        loader = loader_of(tmp_path, rank=rank, num_ranks=ranks, num_workers=workers, batch_size=1)
        for epoch, mine in epochs_of(loader, stop=2).items():
            seen[epoch] += mine
    assert seen == {0: Counter(keys), 1: Counter(keys)}


@pytest.mark.parametrize(("ranks", "workers"), SPLITS)
def test_resume_on_equal_ranks_is_exact(tmp_path, ranks, workers):
    write_uneven(tmp_path)
    rank, options = ranks - 1, {"num_ranks": ranks, "num_workers": workers, "crop_scale": (0.5, 1.0)}
    whole = contents(loader_of(tmp_path, rank=rank, **options), 30)
    for num_done in (1, 4, 13):
        loaders = [loader_of(tmp_path, rank=r, **options) for r in range(ranks)]
        states = saved(loaders[:rank], [0] * rank) + saved(loaders[rank:], [num_done])
        again = loader_of(tmp_path, rank=rank, **options)
        again.resume(states)
        assert same(contents(again, 30 - num_done), whole[num_done:])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_of_fixed_epochs_and_of_mixtures_is_exact(tmp_path, num_workers):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_uneven(tmp_path / name, num_shards=2)
    options = {
        "num_workers": num_workers,
        "train_num_samples": 11,
        "train_data_upsampling_factors": (1.0, 3.0),
    }
    spec = f"{tmp_path / 'a'}::{tmp_path / 'b'}"
    whole = contents(loader_of(spec, **options), 24)
    again = loader_of(spec, **options)
    again.resume(saved([loader_of(spec, **options)], [9]))
    assert same(contents(again, 15), whole[9:])


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 2), (2, 0), (3, 1), (3, 2)])
def test_resume_on_other_ranks_begins_a_whole_epoch(tmp_path, capsys, ranks, workers):
    keys = write_uneven(tmp_path)
    options = {"batch_size": 1, "num_ranks": 2, "num_workers": 1}
    states = saved([loader_of(tmp_path, rank=rank, **options) for rank in range(2)], [3, 25])
    largest = max(position_of(state, 0)["epoch"] for state in states)
    assert largest == 1 and position_of(states[0], 0)["epoch"] == 0
    options |= {"num_ranks": ranks, "num_workers": workers}
    seen: Counter[str] = Counter()
    for rank in range(ranks):
        loader = loader_of(tmp_path, rank=rank, **options)
        loader.resume(states)
        assert position_of(loader.state_dict(), 0)["epoch"] == 2  # saved again before the first batch
        epochs = epochs_of(loader, stop=3)
        assert list(epochs) == [2]
        seen += epochs[2]
    assert seen == Counter(keys)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("data: ")]
    assert len(said) == 1 and f"2 ranks x 1 workers, here are {ranks} x {workers}" in said[0] and "epoch 2" in said[0]


def test_a_mixture_on_other_ranks_begins_a_whole_epoch_of_every_source(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_shards(tmp_path / name, num_shards=2, per_shard=4)
    spec = f"{tmp_path / 'a'}::{tmp_path / 'b'}"
    options = {"batch_size": 1, "train_data_upsampling_factors": (1.0, 4.0)}
    states = saved([loader_of(spec, num_workers=0, **options)], [40])
    epochs = [source["position"]["epoch"] for source in states[0]["loader"]["dataset_state"]["sources"]]
    assert epochs[1] > epochs[0]
    loader = loader_of(spec, num_workers=2, **options)
    loader.resume(states)
    next(iter(loader))
    (first, second) = loader.state_dict()["loader"]["_snapshot"]["_worker_snapshots"]["worker_0"]["dataset_state"][
        "sources"
    ]
    assert [first["position"]["epoch"], second["position"]["epoch"]] == [epochs[0] + 1, epochs[1] + 1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_refuses_another_order_before_any_worker_starts(tmp_path, num_workers):
    write_uneven(tmp_path)
    states = saved([loader_of(tmp_path)], [3])
    for options, message in (({"seed": 1}, "seed 0 -> 1"), ({"shuffle_buffer": 6}, "shuffle_buffer 5 -> 6")):
        with pytest.raises(UserError, match=message):
            loader_of(tmp_path, num_workers=num_workers, **options).resume(states)
    with pytest.raises(UserError, match="another version wrote it"):
        loader_of(tmp_path).resume([states[0] | {"loader": {}}])
    write_tar(tmp_path / "00008.tar", pair("new"))
    with pytest.raises(UserError, match="shards 8 files"):
        loader_of(tmp_path, num_workers=num_workers).resume(states)


def test_the_config_survives_json():
    config = DataConfig(
        train="s3://a::b", train_data_upsampling_factors=(1.0, 0.5), train_num_samples=7, shard_cache="c"
    )
    assert from_json(DataConfig, json.loads(json.dumps(to_json(config)))) == config


def test_memory_is_pinned_where_cuda_is(tmp_path, monkeypatch):
    write_shards(tmp_path, num_shards=1, per_shard=2)
    for available, wanted, pinned in ((True, True, True), (True, False, False), (False, True, False)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert loader_of(tmp_path, pin_memory=wanted)._loader.pin_memory is pinned


def test_the_simulated_readers_are_what_real_workers_hand_out(tmp_path, monkeypatch):
    write_uneven(tmp_path)
    loader = loader_of(tmp_path, rank=1, num_ranks=2, num_workers=2)
    real = [batch["key"] for batch in itertools.islice(loader, 20)]
    assert isinstance(loader.dataset, ShardDataset)
    streams = []
    for worker in range(2):
        info = SimpleNamespace(id=worker, num_workers=2)
        monkeypatch.setattr("qlip.data.shards.get_worker_info", lambda info=info: info)
        streams.append([sample["key"] for sample in itertools.islice(loader.dataset, 20)])
    assert real == [streams[i % 2][2 * (i // 2) : 2 * (i // 2) + 2] for i in range(20)]
