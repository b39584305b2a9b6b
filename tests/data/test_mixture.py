"""Weighted mixtures: shares, each source in its own order, exact resume, and what is refused."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from math import ceil
from pathlib import Path
from types import SimpleNamespace

import pytest
from shard_files import dataset, decode, pair, write_tar
from torchdata.stateful_dataloader import StatefulDataLoader

from qlip.core.errors import UserError
from qlip.data.mixture import MixedShards, mixed_sources
from qlip.data.sample_parts import ShardConfig


def write_pools(folder: Path, *, num_shards: tuple[int, ...] = (2, 6, 4), per_shard: int = 5) -> str:
    """Pools a, b, c, ... whose keys begin with their letter; returns them joined."""
    pools = []
    for name, num in zip("abcdef", num_shards, strict=False):
        (folder / name).mkdir(parents=True)
        for shard in range(num):
            keys = [f"{name}{shard:05d}{i:04d}" for i in range(per_shard)]
            write_tar(folder / name / f"{shard:05d}.tar", [member for key in keys for member in pair(key)])
        pools.append(str(folder / name))
    return "::".join(pools)


def mixture(spec: str, factors: tuple[float, ...], *, rank: int = 0, num_ranks: int = 1, **options) -> MixedShards:
    config = ShardConfig(shards=spec, **({"shuffle_buffer": 9} | options))
    return MixedShards(config, factors=factors, decode=decode, rank=rank, num_ranks=num_ranks, ledger=None)


def take(data, num: int) -> list[tuple[str, float]]:
    return [(sample["key"], sample["draw"]) for sample in itertools.islice(data, num)]


@pytest.mark.parametrize("factors", [(1.0, 1.0, 1.0), (5.0, 1.0, 0.5), (0.1, 2.0, 30.0)])
def test_a_share_is_the_factor_times_the_shards(tmp_path, factors):
    spec = write_pools(tmp_path)
    weights = [factor * num for factor, num in zip(factors, (2, 6, 4), strict=True)]
    num_draws = 1500
    counts = Counter(key[0] for key, _ in take(mixture(spec, factors), num_draws))
    for name, weight, source in zip("abc", weights, mixed_sources(spec, factors), strict=True):
        share = weight / sum(weights)
        assert source.share == pytest.approx(share)
        assert abs(counts[name] / num_draws - share) <= 4 * (share * (1 - share) / num_draws) ** 0.5


def test_each_source_keeps_the_order_it_has_alone(tmp_path):
    spec = write_pools(tmp_path)
    samples = take(mixture(spec, (3.0, 1.0, 1.0), seed=7), 200)
    for name, share in zip("abc", (6 / 16, 6 / 16, 4 / 16), strict=True):
        mine = [sample for sample in samples if sample[0].startswith(name)]
        alone = dataset(tmp_path / name, repeat=True, shuffle_buffer=ceil(9 * share), seed=7)
        assert mine == take(alone, len(mine)) and len(mine) > 20


def test_choices_depend_on_seed_and_reader_alone(tmp_path, monkeypatch):
    spec = write_pools(tmp_path)

    def choices(**options) -> str:
        return "".join(key[0] for key, _ in take(mixture(spec, (1.0, 1.0, 1.0), **options), 100))

    assert choices() == choices(shuffle_buffer=0) == choices()
    assert len({choices(), choices(seed=1), choices(rank=1, num_ranks=2)}) == 3
    info = SimpleNamespace(id=1, num_workers=2)
    with monkeypatch.context() as patched:
        patched.setattr("qlip.data.shards.get_worker_info", lambda: info)
        second_worker = choices()
    before = choices()
    assert second_worker != before
    write_tar(tmp_path / "a" / "00001.tar", [*pair("a1"), ("a2.txt", b"no picture"), *pair("a3")])
    assert choices(max_skip_share=1.0) == before


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("train_num_samples", [0, 30])
def test_resume_equals_the_uninterrupted_mixture(tmp_path, num_workers, train_num_samples):
    spec = write_pools(tmp_path, per_shard=3)

    def loader(state: dict | None = None) -> StatefulDataLoader:
        data = mixture(spec, (1.0, 0.5, 2.0), train_num_samples=train_num_samples)
        loader = StatefulDataLoader(data, batch_size=3, num_workers=num_workers, collate_fn=list)
        if state is not None:
            loader.load_state_dict(json.loads(json.dumps(state)))
        return loader

    def keys(loader: StatefulDataLoader, num: int) -> list[list[str]]:
        return [[sample["key"] for sample in batch] for batch, _ in zip(loader, range(num), strict=False)]

    uninterrupted = keys(loader(), 40)
    for num_done in (0, 1, 7, 26):
        interrupted = loader()
        stream = iter(interrupted)
        for _ in range(num_done):
            next(stream)
        assert keys(loader(interrupted.state_dict()), 40 - num_done) == uninterrupted[num_done:]


@pytest.mark.parametrize("train_num_samples", [0, 16])
def test_resume_at_every_sample(tmp_path, train_num_samples):
    spec = write_pools(tmp_path, num_shards=(1, 2), per_shard=3)
    options = {"shuffle_buffer": 4, "train_num_samples": train_num_samples}
    whole = mixture(spec, (2.0, 1.0), **options)
    history = [
        (sample["key"], sample["draw"], json.dumps(whole.state_dict())) for sample in itertools.islice(whole, 50)
    ]
    for (*_, before), (key, draw, after) in itertools.pairwise(history):
        again = mixture(spec, (2.0, 1.0), **options)
        again.load_state_dict(json.loads(before))
        assert take(again, 1) == [(key, draw)] and json.loads(json.dumps(again.state_dict())) == json.loads(after)


def test_fixed_epochs_of_the_sources_end_together(tmp_path):
    spec = write_pools(tmp_path)
    data = mixture(spec, (1.0, 1.0, 1.0), train_num_samples=24)
    assert [source.config.train_num_samples for source in data.sources] == [4, 12, 8]
    assert len(take(data, 480)) == 480
    for source in data.sources:  # 20 epochs of the mixture, four standard deviations of a binomial count
        share = source.config.train_num_samples / 24
        spread = 4 * (480 * share * (1 - share)) ** 0.5 / source.config.train_num_samples
        assert abs(source.position.epoch - 20) <= spread + 1


@pytest.mark.parametrize(
    "factors", [(1.0,), (1.0, 1.0, 1.0, 1.0), (1.0, 0.0, 1.0), (1.0, -1.0, 1.0), (1, float("nan"), 1)]
)
def test_impossible_factors_are_refused(tmp_path, factors):
    with pytest.raises(UserError, match="for 3 sources: give one positive number for each"):
        mixture(write_pools(tmp_path), factors)


def test_every_source_needs_a_shard_per_reader(tmp_path):
    spec = write_pools(tmp_path)
    with pytest.raises(UserError, match=r"source .*/a: 2 shards for 3 ranks x 1 workers"):
        mixture(spec, (1.0, 1.0, 1.0), num_ranks=3)
    with pytest.raises(UserError, match=r"source .*/a: 2 shards for 2 ranks x 2 workers"):
        mixture(spec, (1.0, 1.0, 1.0), num_ranks=2).check_split(num_workers=2)


def test_resume_refuses_other_sources_and_factors(tmp_path):
    spec = write_pools(tmp_path)
    data = mixture(spec, (1.0, 2.0, 1.0))
    take(data, 5)
    state = data.state_dict()
    for changed, message in (
        (mixture(spec, (1.0, 3.0, 1.0)), r"train_data_upsampling_factors \[1.0, 2.0, 1.0\] -> \[1.0, 3.0, 1.0\]"),
        (mixture(spec, (1.0, 2.0, 1.0), seed=1), "seed 0 -> 1"),
        (dataset(spec, repeat=True), r"train_data_upsampling_factors \[1.0, 2.0, 1.0\] -> None"),
    ):
        with pytest.raises(UserError, match=message):
            changed.check_states([state])
    write_tar(tmp_path / "b" / "00006.tar", pair("b6"))
    with pytest.raises(UserError, match=r"shards 6 files.* -> 7 files"):
        mixture(spec, (1.0, 2.0, 1.0)).check_states([state])
