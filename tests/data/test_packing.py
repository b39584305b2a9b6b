"""Rows by hand, nothing lost of any document, shares kept, pairs whole."""

import itertools
from random import Random

import numpy as np
import pytest
import torch
from mixing_files import BEGIN, BOS, END, EOS, LAYOUT

from qlip.data.mixing import MixDataConfig, mixing_ratio
from qlip.data.packing import (
    IGNORED,
    IMAGE_TO_TEXT,
    TEXT,
    TEXT_TO_IMAGE,
    UNFILLED,
    Packer,
    Pair,
    image_to_text,
    text_document,
    text_to_image,
)


class Pieces:
    """Given documents, one after the other."""

    def __init__(self, documents: list[np.ndarray]) -> None:
        self.documents = list(documents)

    def take(self, limit: int) -> np.ndarray:
        piece, rest = self.documents[0][:limit], self.documents[0][limit:]
        self.documents[:1] = [rest] if len(rest) else []
        return piece


class Endless:
    """One document without end."""

    def take(self, limit: int) -> np.ndarray:
        return np.zeros(limit, np.int64)


class Numbered:
    """Pairs of `length` ids, each of them the pair's number."""

    def __init__(self, length: int, *, first: int = 1000, pixels: bool = False) -> None:
        self.length, self.number, self.pixels = length, first, pixels

    def peek(self, task: int) -> Pair:
        picture = torch.full((3, 1, 1), float(self.number)) if self.pixels else None
        return Pair(ids=np.full(self.length, self.number), pixel_values=picture)

    def take(self) -> None:
        self.number += 1


def packer_of(length: int, *, texts: Pieces | Endless | None = None, pairs: dict | None = None, **options) -> Packer:
    settings = {"pack_pairs": True, "padding": EOS, "rank": 0, "num_ranks": 1}
    return Packer(sequence_length=length, texts=texts, pairs=pairs or {}, **(settings | options))


def endless(*, seed: int, mean: float) -> Pieces:
    random = Random(seed)
    return Pieces([np.arange(2 + int(random.expovariate(1 / mean))) for _ in range(3000)])


def test_documents_by_hand() -> None:
    visual = np.array([300, 301])
    assert text_document(LAYOUT, "ab").tolist() == [BOS, 97, 98, EOS]
    assert image_to_text(LAYOUT, [97, 98], visual).tolist() == [BOS, BEGIN, 300, 301, END, 97, 98, EOS]
    assert text_to_image(LAYOUT, [97, 98], visual).tolist() == [BOS, 97, 98, BEGIN, 300, 301, END, EOS]
    assert text_to_image(LAYOUT, [], visual).tolist() == [BOS, BEGIN, 300, 301, END, EOS]
    assert text_document(LAYOUT, "ab").dtype == image_to_text(LAYOUT, [97], visual).dtype == np.int64


def test_rows_of_text_by_hand() -> None:
    packer = packer_of(6, texts=Pieces([text_document(LAYOUT, text) for text in ("ab", "cdef", "g", "hijk")]))
    batch = packer.batch(2, (1.0, 0.0, 0.0))
    a, b, c, d, e, f, g = range(97, 104)
    assert batch["input_ids"].tolist() == [[BOS, a, b, EOS, BOS, c], [d, e, f, EOS, BOS, g]]
    assert batch["labels"].tolist() == [[IGNORED, a, b, EOS, IGNORED, c], [IGNORED, e, f, EOS, IGNORED, g]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 0, 1]]
    assert batch["task_ids"].tolist() == [[TEXT] * 6] * 2
    assert batch["sample_counts"].tolist() == [2, 0, 0]
    assert packer.batch(1, (1.0, 0.0, 0.0))["input_ids"].tolist() == [[EOS, BOS, 104, 105, 106, 107]]


def test_rows_of_pairs_and_text_by_hand() -> None:
    """A pair that does not fit waits, text fills the rest, and without texts padding does, a document of its own."""
    packer = packer_of(8, texts=Pieces([np.arange(20)]), pairs={IMAGE_TO_TEXT: Numbered(5)})
    batch = packer.batch(2, (0.25, 0.75, 0.0))
    assert batch["input_ids"].tolist() == [[1000] * 5 + [0, 1, 2], [1001] * 5 + [3, 4, 5]]
    assert batch["labels"].tolist() == [
        [IGNORED] + [1000] * 4 + [IGNORED, 1, 2],
        [IGNORED] + [1001] * 4 + [IGNORED, 4, 5],
    ]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]] * 2
    assert batch["task_ids"].tolist() == [[IMAGE_TO_TEXT] * 5 + [TEXT] * 3] * 2
    assert batch["sample_counts"].tolist() == [0.75, 2, 0]
    alone = packer_of(8, pairs={TEXT_TO_IMAGE: Numbered(5)}).batch(2, (0.0, 0.0, 1.0))
    assert alone["input_ids"].tolist() == [[1000] * 5 + [EOS] * 3, [1001] * 5 + [EOS] * 3]
    assert alone["labels"][0].tolist() == [IGNORED] + [1000] * 4 + [IGNORED] * 3
    assert alone["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]] * 2
    assert alone["task_ids"].tolist() == [[TEXT_TO_IMAGE] * 5 + [-1] * 3] * 2


def test_without_packing_every_pair_has_a_row() -> None:
    pairs = {IMAGE_TO_TEXT: Numbered(3), TEXT_TO_IMAGE: Numbered(4, first=2000)}
    packer = packer_of(8, texts=endless(seed=0, mean=5), pairs=pairs, pack_pairs=False)
    batch = packer.batch(40, (0.5, 0.125, 0.375))
    kinds = [sorted(set(row)) for row in batch["task_ids"].tolist()]
    counts = [kinds.count(kind) for kind in ([TEXT], [-1, IMAGE_TO_TEXT], [-1, TEXT_TO_IMAGE])]
    assert counts == batch["sample_counts"].tolist() == [20, 5, 15]


def pieces_of(batch: dict) -> list[tuple[int, list[int]]]:
    """Task and ids of every document, row by row, padding left out."""
    found = []
    for ids, positions, tasks in zip(
        *(batch[k].tolist() for k in ("input_ids", "position_ids", "task_ids")), strict=True
    ):
        starts = [place for place, position in enumerate(positions) if position == 0]
        for start, end in itertools.pairwise([*starts, len(ids)]):
            assert positions[start:end] == list(range(end - start)) and len(set(tasks[start:end])) == 1
            found.append((tasks[start], ids[start:end]))
    return [piece for piece in found if piece[0] >= 0]


@pytest.mark.parametrize("mean", [3, 30, 300])
def test_nothing_of_a_document_is_lost(mean: int) -> None:
    texts = endless(seed=mean, mean=mean)
    documents = [document.copy() for document in texts.documents]
    for number, document in enumerate(documents):
        document += 10_000 * number  # so that ids tell where they are from
    texts.documents = [document.copy() for document in documents]
    packer = packer_of(
        64, texts=texts, pairs={IMAGE_TO_TEXT: Numbered(25, first=-1000), TEXT_TO_IMAGE: Numbered(39, first=-9000)}
    )
    pieces = [piece for _ in range(5) for piece in pieces_of(packer.batch(8, (0.5, 0.125, 0.375)))]
    words = [number for task, ids in pieces if task == TEXT for number in ids]
    assert words == np.concatenate(documents)[: len(words)].tolist()
    for task, length, first in ((IMAGE_TO_TEXT, 25, -1000), (TEXT_TO_IMAGE, 39, -9000)):
        pairs = [ids for kind, ids in pieces if kind == task]
        assert pairs == [[first + number] * length for number in range(len(pairs))]


def test_all_ids_but_the_first_of_a_document_are_learned() -> None:
    packer = packer_of(64, texts=endless(seed=1, mean=20), pairs={TEXT_TO_IMAGE: Numbered(30)})
    batch = packer.batch(30, (0.5, 0.0, 0.5))
    learned = (batch["position_ids"] > 0) & (batch["task_ids"] >= 0)
    assert torch.equal(batch["labels"], torch.where(learned, batch["input_ids"], IGNORED))


@pytest.mark.parametrize("shares", [(60, 1, 3), (12, 1, 3), (1, 1, 1), (2, 5, 9), (0, 1, 3), (1, 0, 3)])
def test_shares_are_kept_within_a_sample_at_every_batch(shares: tuple[float, ...]) -> None:
    """Within 3/4 of a sample (Tijdeman), and what texts that fill rests lead by."""
    shares = tuple(share / sum(shares) for share in shares)
    pairs = {kind: Numbered(8) for kind in (IMAGE_TO_TEXT, TEXT_TO_IMAGE)}
    packer = packer_of(64, texts=endless(seed=2, mean=200) if shares[0] else None, pairs=pairs)
    placed = torch.zeros(3, dtype=torch.float64)
    for _ in range(60):
        placed += packer.batch(4, shares)["sample_counts"].double()
        ideal = torch.tensor(shares, dtype=torch.float64) * placed.sum()
        assert (placed - ideal).abs().max() <= 0.75 + 7 / 64
        assert abs(sum(packer.credits)) < 1e-9


@pytest.mark.parametrize("pack_pairs", [True, False], ids=["packed", "a pair a row"])
def test_the_whole_calming_down_places_what_equation_7_says(pack_pairs: bool) -> None:
    """10,000 steps of a row each; a pair a row, every row is one sample, so the sums are those of Eq 7 alone."""
    config = MixDataConfig(calm_down_steps=2_000 if pack_pairs else 10_000)  # the other is as exact, and slower
    pairs = {kind: Numbered(7) for kind in (IMAGE_TO_TEXT, TEXT_TO_IMAGE)}
    packer = packer_of(16, texts=Endless(), pairs=pairs, pack_pairs=pack_pairs)
    placed, ideal, furthest = np.zeros(3), np.zeros(3), 0.0
    for step in range(config.calm_down_steps):
        shares = mixing_ratio(step, config)
        counts = packer.batch(1, shares)["sample_counts"].numpy()
        placed, ideal = placed + counts, ideal + np.array(shares) * counts.sum()
        furthest = max(furthest, np.abs(placed - ideal).max())
    assert furthest < 1
    if not pack_pairs:
        text = 60 - 48 * np.arange(10_000) / 10_000
        assert np.abs(placed - [(ratio / (text + 4)).sum() for ratio in (text, 1, 3)]).max() < 1
        assert placed.sum() == 10_000


def test_text_that_filled_rests_does_not_stay_away_when_its_share_grows() -> None:
    pairs = {kind: Numbered(9) for kind in (IMAGE_TO_TEXT, TEXT_TO_IMAGE)}
    packer = packer_of(16, texts=Endless(), pairs=pairs)
    few, many = (0.1, 0.3, 0.6), (0.9, 0.025, 0.075)
    before = packer.batch(200, few)["sample_counts"].tolist()
    assert before == [200 * 7 / 16, pytest.approx(200 / 3, abs=1), pytest.approx(400 / 3, abs=1)]
    assert packer.credits[TEXT] >= -1 and abs(sum(packer.credits)) < 1e-9
    after = packer.batch(40, many)["sample_counts"]
    assert (after - torch.tensor(many) * after.sum()).abs().max() < 2
    assert packer.batch(10, many)["sample_counts"][TEXT] > 7


def test_ranks_draw_pairs_at_different_times_and_together_keep_the_shares() -> None:
    shares = (60 / 64, 1 / 64, 3 / 64)
    first, counts = [], torch.zeros(3)
    for rank in range(8):
        pairs = {kind: Numbered(8) for kind in (IMAGE_TO_TEXT, TEXT_TO_IMAGE)}
        packer = packer_of(16, texts=Pieces([np.arange(16)] * 1000), pairs=pairs, rank=rank, num_ranks=8)
        batches = [packer.batch(1, shares)["sample_counts"] for _ in range(256)]
        first.append(next(step for step, counted in enumerate(batches) if counted[2]))
        counts += torch.stack(batches).sum(0)
    assert len(set(first)) >= 6, "the first picture to draw comes at its own step"
    assert (counts - torch.tensor(shares) * counts.sum()).abs().max() < 3, "of 2,100 samples"


def test_pictures_come_in_the_order_of_their_ids() -> None:
    class Unfilled(Numbered):
        def peek(self, task: int) -> Pair:
            ids = image_to_text(LAYOUT, [self.number], np.full(2, UNFILLED))
            return Pair(ids=ids, pixel_values=super().peek(task).pixel_values)

    pairs = Unfilled(0, pixels=True)
    batch = packer_of(17, texts=endless(seed=3, mean=9), pairs={IMAGE_TO_TEXT: pairs}).batch(4, (0.25, 0.75, 0.0))
    captions = batch["input_ids"][batch["input_ids"] >= 1000].tolist()
    assert [int(picture[0, 0, 0]) for picture in batch["pixel_values"]] == captions == list(range(1000, pairs.number))
    assert torch.equal(batch["input_ids"] == UNFILLED, batch["labels"] == UNFILLED)
    assert int((batch["labels"] == UNFILLED).sum()) == 2 * len(captions)
