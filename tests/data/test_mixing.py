"""Eq 7 and what a loader makes of it; ranks apart; sources that are missing or spoilt."""

import itertools
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mixing_files import (
    BEGIN,
    BOS,
    END,
    EOS,
    FINGERPRINT,
    FIRST_VISUAL,
    LAYOUT,
    documents_of,
    loader_of,
    write_both,
    write_store,
)
from shard_files import loader_of as image_loader
from shard_files import write_shards

from qlip.core.errors import UserError
from qlip.data import document_sources
from qlip.data.mixing import MixDataConfig, mixing_ratio
from qlip.data.packing import IMAGE_TO_TEXT, TEXT, TEXT_TO_IMAGE
from qlip.data.token_loader import TokenLoader


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> MixDataConfig:
    return write_both(tmp_path_factory.mktemp("data"))


def test_ratio_is_equation_7() -> None:
    config = MixDataConfig()
    for step in range(0, 12_000, 7):
        text = (12 - 60) / 10_000 * (step - 10_000) + 12 if step <= 10_000 else 12
        ideal = [ratio / (text + 4) for ratio in (text, 1, 3)]
        assert mixing_ratio(step, config) == pytest.approx(ideal, abs=1e-12)
    assert mixing_ratio(0, config) == pytest.approx((480 / 512, 8 / 512, 24 / 512)), "Table 9"
    assert mixing_ratio(10_000, config) == mixing_ratio(10**9, config) == (384 / 512, 32 / 512, 96 / 512)
    assert mixing_ratio(5_000, config)[0] == pytest.approx(36 / 40)
    assert mixing_ratio(0, replace(config, calm_down_steps=0)) == (0.75, 0.0625, 0.1875)
    for end in (0.1, 0.7, 12.0):
        rising = replace(config, text_start=0.0, text_end=end, calm_down_steps=7)
        assert mixing_ratio(0, rising)[0] == pytest.approx(0, abs=1e-12)
        assert all(0 <= mixing_ratio(step, rising)[0] < 1 for step in range(10))


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("pack_pairs", [True, False], ids=["packed", "a pair a row"])
def test_samples_follow_the_schedule_within_one(both: MixDataConfig, micro_batches: int, pack_pairs: bool) -> None:
    config = replace(both, text_start=60.0, text_end=12.0, calm_down_steps=50, batch_size=8, pack_pairs=pack_pairs)
    loader = loader_of(config, micro_batches=micro_batches)
    placed, ideal = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for number, batch in enumerate(itertools.islice(loader, 70 * micro_batches)):
        counts = batch["sample_counts"].double()
        shares = torch.tensor(mixing_ratio(number // micro_batches, config), dtype=torch.float64)
        placed, ideal = placed + counts, ideal + shares * counts.sum()
        assert (placed - ideal).abs().max() < 1
        documents = documents_of([batch])
        for task in (IMAGE_TO_TEXT, TEXT_TO_IMAGE):
            assert sum(kind == task for kind, _ in documents) == counts[task]
        assert counts[TEXT] * 64 == pytest.approx(sum(len(ids) for kind, ids in documents if kind == TEXT))


def test_pairs_are_documents_of_their_picture_and_caption(both: MixDataConfig) -> None:
    tasks: Counter[int] = Counter()
    for task, ids in documents_of(list(itertools.islice(loader_of(replace(both, caption_dropout=0.0)), 30))):
        if task == TEXT:
            continue
        tasks[task] += 1
        picture = ids[ids.index(BEGIN) + 1 : ids.index(END)]
        number = picture[0] - FIRST_VISUAL
        assert picture == [FIRST_VISUAL + number] * 4
        if task == IMAGE_TO_TEXT:
            caption = bytes(ids[7:-1]).decode()
            assert ids[:7] == [BOS, BEGIN, *picture, END] and ids[-1] == EOS
        else:
            caption = bytes(ids[1 : ids.index(BEGIN)]).decode()
            assert ids[0] == BOS and ids[-7:] == [BEGIN, *picture, END, EOS][-7:]
        assert caption in (f"t{number}", f"t-{number}")
    assert tasks[IMAGE_TO_TEXT] > 5 and tasks[TEXT_TO_IMAGE] > 15


def test_captions_are_left_out_as_often_as_asked_for_in_pictures_to_be_drawn_alone(both: MixDataConfig) -> None:
    config = replace(both, text_start=0.0, text_end=0.0, caption_dropout=0.25)
    documents = documents_of(list(itertools.islice(loader_of(config), 15)))
    drawn = [ids for task, ids in documents if task == TEXT_TO_IMAGE]
    share = sum(ids[1] == BEGIN for ids in drawn) / len(drawn)
    assert len(drawn) > 120 and abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / len(drawn))
    assert all(len(ids) > 8 for task, ids in documents if task == IMAGE_TO_TEXT)


def test_every_picture_comes_once_an_epoch_and_both_kinds_in_their_own_order(both: MixDataConfig) -> None:
    config = replace(both, text_start=0.0, text_end=0.0, image_to_text=1.0, text_to_image=1.0)
    documents = documents_of(list(itertools.islice(loader_of(config), 12)))
    orders = []
    for kind in (IMAGE_TO_TEXT, TEXT_TO_IMAGE):
        numbers = [ids[ids.index(BEGIN) + 1] - FIRST_VISUAL for task, ids in documents if task == kind]
        assert sorted(numbers[:24]) == sorted(numbers[24:48]) == list(range(24))
        orders.append(numbers[:24])
    assert orders[0] != orders[1]


def test_long_captions_are_cut_to_what_is_allowed_and_to_what_fits(both: MixDataConfig) -> None:
    wordy = replace(LAYOUT, tokenize=lambda text: [1] * 500)
    config = replace(both, text_start=0.0, text_end=0.0, caption_dropout=0.0)
    for limit, length in ((20, 28), (256, 64)):
        loader = loader_of(replace(config, max_caption_tokens=limit), layout=wordy)
        assert {len(ids) for _, ids in documents_of([next(iter(loader))])} == {length}


def test_two_ranks_share_documents_and_pictures_out(both: MixDataConfig) -> None:
    config = replace(both, text_start=2.0, caption_dropout=0.0)
    texts, pictures = [], []
    for rank in range(2):
        loader = loader_of(config, rank=rank, num_ranks=2)
        batches = []
        for batch in loader:
            texts_at, drawn_at = (loader.state_dict()["sources"][name] for name in ("text", "text_to_image"))
            if texts_at["stream"]["position"]["epoch"] or drawn_at["number"] > 6:
                break
            batches.append(batch)
        documents = documents_of(batches)
        starts = [bytes(ids[1:5]) for task, ids in documents if task == TEXT and ids[0] == BOS and len(ids) > 5]
        texts.append(set(starts))
        assert len(texts[rank]) == len(starts) > 2
        pictures.append({ids[-3] for task, ids in documents if task == TEXT_TO_IMAGE})
    assert not texts[0] & texts[1]
    assert pictures[0] and pictures[1] and not pictures[0] & pictures[1]


def test_captions_may_come_from_another_store(both: MixDataConfig, tmp_path: Path) -> None:
    config = replace(both, captioned_tokens=write_store(tmp_path / "store", name="other"), caption_dropout=0.0)
    for task, ids in documents_of(list(itertools.islice(loader_of(config), 10))):
        text = bytes(number for number in ids if number < 256)
        assert task == TEXT or text.startswith(b"other" if task == IMAGE_TO_TEXT else b"t")


def test_pictures_without_caption_are_left_out_and_counted(both: MixDataConfig, tmp_path: Path) -> None:
    config = replace(both, text_start=0.0, text_end=0.0, tokens=write_store(tmp_path / "store", empty=4))
    loader = loader_of(config, ledger=tmp_path / "skipped.jsonl")
    documents = documents_of(list(itertools.islice(loader, 6)))
    numbers = {ids[ids.index(BEGIN) + 1] - FIRST_VISUAL for _, ids in documents}
    assert numbers == set(range(4, 12))
    assert all(source.state_dict()["loader"]["epoch"] > 1 for source in loader.sources.values())
    entries = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert Counter(entry["key"] for entry in entries) == {f"t{n}": 2 for n in range(4)}, "once for each kind"
    assert {(entry["reason"], entry["epoch"]) for entry in entries} == {("empty caption", 0)}


def test_captions_that_are_rare_are_found_and_told_once(
    both: MixDataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """33 of 34 pictures have none, in batches that reach into the next epoch."""
    monkeypatch.setattr(document_sources, "MAX_WITHOUT_CAPTION", 2)
    store = write_store(tmp_path / "store", rows=34, empty=33)
    config = replace(both, text_start=0.0, text_end=0.0, image_to_text=0.0, caption_dropout=0.0, tokens=store)
    loader = loader_of(config, ledger=tmp_path / "skipped.jsonl")
    documents = documents_of(list(itertools.islice(loader, 2)))
    assert len(documents) > 10 and {ids[ids.index(BEGIN) + 1] - FIRST_VISUAL for _, ids in documents} == {33}
    entries = [json.loads(line)["key"] for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert sorted(entries) == sorted(f"t{number}" for number in range(33))


def test_stores_without_captions_are_refused_and_white_ones_end_the_run(both: MixDataConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no captions: run qlip tokenize on captioned pictures"):
        loader_of(replace(both, tokens=write_store(tmp_path / "none", captions=False)))
    loader = loader_of(replace(both, tokens=write_store(tmp_path / "white", empty=12)))
    with pytest.raises(UserError, match="white: 24 pictures one after the other have no caption; give captioned ones"):
        next(iter(loader))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "negative": ({"image_to_text": -1.0}, "give ratios, none negative"),
    "not a number": ({"text_end": math.nan}, "give ratios, none negative"),
    "infinite": ({"text_start": math.inf}, "give ratios, none negative"),
    "all zero": ({"text_end": 0.0, "image_to_text": 0.0, "text_to_image": 0.0}, "one above 0 at every step"),
    "zero at first": (
        {"text_start": 0.0, "image_to_text": 0.0, "text_to_image": 0.0},
        "one above 0 at every step",
    ),
    "no text": ({"text": ""}, "set data.text to files of documents, or text_start and text_end to 0"),
    "no tokens": ({"tokens": ""}, "no pictures for image_to_text: set data.tokens .* or data.image_to_text to 0"),
    "no tokens to draw": ({"tokens": "", "image_to_text": 0.0}, "no pictures for text_to_image: .*data.text_to_image"),
    "short rows": ({"sequence_length": 15}, "holds no picture of 4 ids with a caption: give at least 16"),
    "steps": ({"calm_down_steps": -1}, "calm_down_steps -1"),
    "rows": ({"batch_size": 0}, "batch_size 0"),
    "dropout": ({"caption_dropout": 1.5}, "caption_dropout 1.5: give a share between 0 and 1"),
    "captions": ({"max_caption_tokens": 0}, "max_caption_tokens 0"),
    "no store": ({"tokens": "nowhere"}, "no token store at nowhere; make one with qlip tokenize"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_impossible_options_are_refused(both: MixDataConfig, name: str) -> None:
    change, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as error:
        loader_of(replace(both, **change))
    assert "\n" not in str(error.value)


def test_tokens_of_another_encoder_and_two_sources_of_pictures_are_refused(both: MixDataConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"made by encoder {FINGERPRINT}, this model's is b+: give the model"):
        loader_of(both, encoder_fingerprint="b" * 64)
    (tmp_path / "shards").mkdir()
    write_shards(tmp_path / "shards", num_shards=1, per_shard=2)
    with pytest.raises(UserError, match=r"leave out data\.tokens and data.captioned_tokens"):
        loader_of(both, images=image_loader(tmp_path / "shards"))


def test_texts_without_a_ratio_are_said_to_be_left_out(both: MixDataConfig, capsys) -> None:
    loader = loader_of(replace(both, text_start=0.0, text_end=0.0))
    assert "data.text is not read" in " ".join(capsys.readouterr().out.split())
    assert not (next(iter(loader))["task_ids"] == TEXT).any()


def test_stores_are_read_in_batches(both: MixDataConfig) -> None:
    for num_ranks, batch_size in ((1, 24), (5, 4)):
        source = loader_of(both, num_ranks=num_ranks).sources["text_to_image"]
        assert isinstance(source, document_sources.PairSource) and isinstance(source.loader, TokenLoader)
        assert source.loader.config.batch_size == batch_size


def test_text_comes_without_pictures(both: MixDataConfig) -> None:
    config = replace(both, tokens="", image_to_text=0.0, text_to_image=0.0, sequence_length=8)
    batch = next(iter(loader_of(config)))
    assert (batch["task_ids"] == TEXT).all() and batch["sample_counts"].tolist() == [3, 0, 0]
