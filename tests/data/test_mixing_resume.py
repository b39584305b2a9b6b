"""Mixed batches resumed bit for bit; other ranks, sizes, options and files."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mixing_files import loader_of, write_both, write_store, write_texts
from shard_files import loader_of as image_loader
from shard_files import write_shards

from qlip.core.errors import UserError
from qlip.data.mixing import MixDataConfig, MixingLoader
from qlip.data.packing import UNFILLED


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> MixDataConfig:
    return write_both(tmp_path_factory.mktemp("data"))


def assert_equal(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


SOURCES: dict[str, dict[str, Any]] = {
    "all": {"text_start": 1.0, "text_end": 0.5, "sequence_length": 40},
    "text only": {"image_to_text": 0.0, "text_to_image": 0.0},
    "pairs only": {"text_start": 0.0, "text_end": 0.0},
    "a pair a row": {"pack_pairs": False},
}


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("source", SOURCES)
def test_resumes_bit_for_bit_behind_every_batch(both: MixDataConfig, source: str, num_ranks: int) -> None:
    config = replace(both, **SOURCES[source])
    whole: list[list[dict]] = []
    states: list[list[dict]] = []
    for rank in range(num_ranks):
        loader = loader_of(config, rank=rank, num_ranks=num_ranks)
        whole.append([])
        states.append([])
        for batch in itertools.islice(loader, 16):
            whole[rank].append(batch)
            states[rank].append(json.loads(json.dumps(loader.state_dict())))
    waiting = [number for number in range(14) if any(found[number]["packer"]["pending"] for found in states)]
    assert bool(waiting) == (source in ("all", "pairs only")), "pairs wait between batches"
    for stop in sorted({1, 6, *(number + 1 for number in waiting[:2])}):
        saved = [found[stop - 1] for found in states]
        for rank in range(num_ranks):
            loader = loader_of(config, rank=rank, num_ranks=num_ranks)
            loader.resume(saved)
            assert loader.state_dict() == saved[rank], "before the first batch too"
            for number, batch in enumerate(itertools.islice(loader, 2), start=stop):
                assert_equal(batch, whole[rank][number])
            assert loader.state_dict() == states[rank][stop + 1]
    if "pairs" not in source:
        offsets = {state["sources"]["text"]["offset"] for found in states for state in found}
        assert len(offsets) > 5, "documents are cut between batches"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_pictures_are_encoded_later_and_resume_bit_for_bit(tmp_path: Path, num_workers: int) -> None:
    (tmp_path / "shards").mkdir()
    write_shards(tmp_path / "shards", num_shards=2, per_shard=5)
    config = MixDataConfig(
        text=write_texts(tmp_path / "texts"), sequence_length=80, batch_size=2, text_end=1.0, calm_down_steps=0
    )

    def loader() -> MixingLoader:
        return loader_of(config, images=image_loader(tmp_path / "shards", num_workers=num_workers, batch_size=3))

    first = loader()
    whole, states = [], []
    for batch in itertools.islice(first, 8):
        whole.append(batch)
        states.append(json.loads(json.dumps(first.state_dict())))
    assert {"input_ids", "labels", "position_ids", "task_ids", "sample_counts", "pixel_values"} == set(whole[0])
    for batch in whole:
        runs = (batch["input_ids"] == UNFILLED).sum() // 4
        assert len(batch["pixel_values"]) == runs == batch["sample_counts"][1:].sum()
        assert torch.equal(batch["labels"] == UNFILLED, batch["input_ids"] == UNFILLED)
    for stop in (1, 2, 5) if num_workers == 0 else (4,):
        again = loader()
        again.resume([states[stop - 1]])
        for number, batch in enumerate(itertools.islice(again, 2), start=stop):
            assert_equal(batch, whole[number])


def test_begins_anew_without_resuming_and_state_before_the_first_batch_is_the_beginning(both: MixDataConfig) -> None:
    loader = loader_of(both)
    state = loader.state_dict()
    batches = list(itertools.islice(loader, 3))
    again = list(itertools.islice(loader, 3))
    other = loader_of(both)
    other.resume([state])
    for first, second, third in zip(batches, again, itertools.islice(other, 3), strict=True):
        assert_equal(first, second)
        assert_equal(first, third)


def test_a_state_that_is_asked_for_first_does_not_outlive_resuming(both: MixDataConfig) -> None:
    loader, other = loader_of(both), loader_of(both)
    list(itertools.islice(loader, 3))
    state = loader.state_dict()
    other.state_dict()
    other.resume([state])
    assert_equal(next(iter(other)), next(iter(loader_resumed(both, state))))
    assert other.num_batches == 4


def test_texts_that_were_mended_since_go_on(tmp_path: Path) -> None:
    """The document that a batch had cut is another, and shorter."""
    config = MixDataConfig(
        text=write_texts(tmp_path), sequence_length=64, batch_size=1, image_to_text=0.0, text_to_image=0.0
    )
    loader = loader_of(config)
    for _ in loader:
        if loader.state_dict()["sources"]["text"]["offset"] > 20:
            break
    state = loader.state_dict()
    (tmp_path / "0.jsonl").write_text('{"text": "short"}\n' * 30)
    batch = next(iter(loader_resumed(config, state)))
    assert batch["input_ids"][0, :7].tolist() == [256, *b"short", 257]


def test_other_numbers_of_ranks_go_on_with_the_next_epochs_and_the_schedule(both: MixDataConfig, capsys) -> None:
    loader = loader_of(both)
    list(itertools.islice(loader, 6))
    other = loader_of(both, rank=0, num_ranks=2)
    other.resume([loader.state_dict()])
    printed = " ".join(capsys.readouterr().out.split())
    assert "position in the texts was saved by 1 ranks, here are 2" in printed
    assert printed.count("saved by 1 ranks") == 3
    next(iter(other))
    assert other.num_batches == 7
    now, before = other.state_dict()["sources"], loader.state_dict()["sources"]
    assert now["text"]["stream"]["position"]["epoch"] == before["text"]["stream"]["position"]["epoch"] + 1
    assert now["text_to_image"]["loader"]["epoch"] == before["text_to_image"]["loader"]["epoch"] + 1


def test_batches_may_change_their_size_and_the_step_goes_on(both: MixDataConfig) -> None:
    loader = loader_of(both, micro_batches=1)
    whole = list(itertools.islice(loader, 4))
    state = loader.state_dict()
    rest = next(iter(loader_resumed(both, state, micro_batches=1)))
    smaller = loader_resumed(replace(both, batch_size=1), state, micro_batches=3)
    assert smaller.num_batches == 12
    parts = list(itertools.islice(smaller, 3))
    assert torch.equal(torch.cat([part["input_ids"] for part in parts]), rest["input_ids"])
    assert len(whole) == 4


def loader_resumed(config: MixDataConfig, state: dict, **options) -> MixingLoader:
    loader = loader_of(config, **options)
    loader.resume([state])
    return loader


@pytest.mark.parametrize(
    "change",
    [
        {"sequence_length": 80},
        {"text_end": 3.0},
        {"caption_dropout": 0.1},
        {"captions": "first"},
        {"shuffle_window": 6},
    ],
    ids=str,
)
def test_changed_options_are_refused(both: MixDataConfig, change: dict) -> None:
    state = loader_of(both).state_dict()
    with pytest.raises(UserError, match=f"cannot be resumed: {next(iter(change))} .*; put it back or start a new run"):
        loader_of(replace(both, **change)).resume([state])


def test_changed_files_and_seeds_are_refused(both: MixDataConfig, tmp_path: Path) -> None:
    state = loader_of(both).state_dict()
    with pytest.raises(UserError, match="seed 0 -> 1"):
        loader_of(both, seed=1).resume([state])
    with pytest.raises(UserError, match="text 1 files"):
        loader_of(replace(both, text=write_texts(tmp_path / "other", num_files=2))).resume([state])
    with pytest.raises(UserError, match="store 24 pictures"):
        loader_of(replace(both, tokens=write_store(tmp_path / "store", rows=13))).resume([state])
