"""Retrieval against sorted lists written out by hand: ties, several right answers, chance, captions, refusals."""

from __future__ import annotations

import io
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_sources import Halver, ListSource, png
from torch import Tensor

from qlip.core.errors import UserError
from qlip.data.items import Item
from qlip.evals import retrieval
from qlip.evals.card import sha256_of_names
from qlip.evals.inputs import EvalInput
from qlip.evals.protocols import Protocol, RetrievalSettings
from qlip.evals.retrieval import RetrievalEvaluator, chance_of_recall, ranks_of_right

CPU = torch.device("cpu")
NUM = 23


class Painter:
    """A picture's embedding is its mean colour, that of `12 200 7` the colour it says. Counts pictures and texts."""

    name = "Painter"
    image_size, patch_size, num_bits = 16, 8, 0
    bits_per_token: float | None = None
    abilities = frozenset(("match_text",))

    def __init__(self, *, broken: float | None = None) -> None:
        self.broken = broken
        self.num_pictures = 0
        self.texts: list[str] = []

    def identity(self) -> dict[str, Any]:
        return {"model_fingerprint": "painter", "dtype": "float32"}

    def to(self, device: torch.device) -> None:
        pass

    def image_embeds(self, pictures: Tensor) -> Tensor:
        self.num_pictures += len(pictures)
        return self._unit(pictures.float().mean((2, 3)))

    def text_embeds(self, texts: list[str]) -> Tensor:
        self.texts += texts
        return self._unit(torch.tensor([[float(word) for word in text.split()] for text in texts]))

    def _unit(self, colours: Tensor) -> Tensor:
        if self.broken is not None:
            return torch.full_like(colours, self.broken)
        return colours / colours.norm(dim=-1, keepdim=True)


def painted(num: int = NUM, *, num_captions: int = 3, noise: int = 25) -> list[Item]:
    """Pictures of one colour whose captions are that colour, about."""
    random = np.random.default_rng(3)
    items = []
    for i in range(num):
        colour = random.integers(30, 220, 3)
        said = [np.clip(colour + random.integers(-noise, noise + 1, 3), 1, 255) for _ in range(num_captions)]
        captions = tuple(" ".join(map(str, words)) for words in said)
        picture = np.broadcast_to(colour.astype(np.uint8), (16, 16, 3))
        items.append(Item(key=f"{i:03d}", image=png(np.ascontiguousarray(picture)), captions=captions))
    return items


def protocol(captions: int = 2) -> Protocol:
    return Protocol(name="test-v1", summary="A test.", settings=RetrievalSettings(captions_per_image=captions))


def evaluate(items: list[Item], model: Painter, *, captions: int = 2, **options) -> tuple[dict[str, float], dict]:
    evaluator = RetrievalEvaluator(protocol(captions), EvalInput(source=ListSource(items), batch_size=5, **options))
    return evaluator.run(model, CPU), evaluator.card()


def place_by_hand(scores: list[float], right: set[int]) -> int:
    """The place of the first right candidate when, among equals, the wrong ones come first."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i in right))
    return next(place for place, i in enumerate(order) if i in right)


@pytest.mark.parametrize("at_once", [1, 4, 500], ids=["one-by-one", "chunks", "whole"])
@pytest.mark.parametrize("num_right", [1, 3])
def test_ranks_are_those_of_a_sorted_list_with_ties_against_the_model(monkeypatch, at_once, num_right):
    monkeypatch.setattr(retrieval, "QUERIES_AT_ONCE", at_once)
    queries = torch.randint(-2, 3, (13, 3)).float()  # whole numbers: products are exact and many are equal
    candidates = torch.randint(-2, 3, (18, 3)).float()
    right = torch.stack([torch.randperm(18)[:num_right] for _ in range(13)])
    scores = queries.numpy() @ candidates.numpy().T
    assert any(len(set(row)) < len(row) for row in scores.tolist())
    expected = [place_by_hand(row, set(found)) for row, found in zip(scores.tolist(), right.tolist(), strict=True)]
    assert ranks_of_right(queries, candidates, right).tolist() == expected


@pytest.mark.parametrize("broken", [1.0, float("nan")], ids=["all-alike", "nan"])
def test_a_collapsed_or_broken_model_finds_nothing(broken):
    figures, _ = evaluate(painted(), Painter(broken=broken))
    assert [value for name, value in figures.items() if not name.endswith("_baseline")] == [0] * 6


def test_one_nan_among_the_candidates_stands_before_the_right_one():
    candidates = torch.eye(4)
    candidates[2, 2] = float("nan")
    assert ranks_of_right(torch.eye(4)[:2], candidates, torch.tensor([[0], [1]])).tolist() == [1, 1]


@pytest.mark.parametrize("num_candidates", [1, 2, 5, 7])
def test_chance_is_the_share_of_all_draws_that_hold_an_answer(num_candidates):
    for num_right in range(1, num_candidates + 1):
        for k in range(1, num_candidates + 3):
            draws = list(combinations(range(num_candidates), min(k, num_candidates)))
            hits = sum(min(draw) < num_right for draw in draws)  # the answers are 0, 1, ...
            found = chance_of_recall(num_candidates, num_right=num_right, k=k)
            assert found == pytest.approx(hits / len(draws), abs=1e-12), (num_right, k)
    assert chance_of_recall(25_000, num_right=5, k=1) == pytest.approx(5 / 25_000)


def test_random_embeddings_stay_at_chance():
    images = torch.nn.functional.normalize(torch.randn(1500, 8), dim=1)
    texts = torch.nn.functional.normalize(torch.randn(3000, 8), dim=1)
    ranks = ranks_of_right(images, texts, torch.arange(3000).view(-1, 2))
    for k in (100, 600):
        chance = chance_of_recall(3000, num_right=2, k=k)
        assert abs(float((ranks < k).double().mean()) - chance) < 4 * (chance * (1 - chance) / 1500) ** 0.5


def test_figures_are_those_of_an_explicit_loop_over_the_first_captions():
    items = painted()
    model = Painter()
    figures, card = evaluate(items, model)
    texts = [caption for item in items for caption in item.captions[:2]]
    assert model.texts == texts and not {item.captions[2] for item in items} <= set(texts)

    reader = Painter()
    pictures = [np.asarray(reader.image_embeds(pixels_of(item)))[0] for item in items]
    sayings = [np.asarray(reader.text_embeds([text]))[0] for text in texts]
    to_text = [place_by_hand([float(p @ s) for s in sayings], {2 * i, 2 * i + 1}) for i, p in enumerate(pictures)]
    to_image = [place_by_hand([float(p @ s) for p in pictures], {i // 2}) for i, s in enumerate(sayings)]
    for k in (1, 5, 10):
        assert figures[f"image_to_text_r{k}"] == pytest.approx(np.mean([place < k for place in to_text])), k
        assert figures[f"text_to_image_r{k}"] == pytest.approx(np.mean([place < k for place in to_image])), k
        assert figures[f"image_to_text_r{k}_baseline"] == chance_of_recall(2 * NUM, num_right=2, k=k)
        assert figures[f"text_to_image_r{k}_baseline"] == pytest.approx(k / NUM)
    assert 0.1 < figures["text_to_image_r1"] < figures["text_to_image_r10"]
    assert len(figures) == 12
    assert (card["count"], card["num_captions"], card["baseline"]) == (NUM, 2 * NUM, "chance")
    pairs = [f"{item.key}\0{item.captions[:2]}" for item in items]
    assert card["captions_sha256"] == sha256_of_names(pairs)


def pixels_of(item: Item) -> Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(item.image)))).permute(2, 0, 1)[None]


def test_captions_of_unusable_pictures_and_of_those_beyond_max_samples_are_no_candidates():
    items = painted(9, num_captions=1)
    items[4] = Item(key="004", image=b"no picture", captions=items[4].captions)
    model = Painter()
    _, card = evaluate(items, model, captions=1, max_samples=7, max_skip_share=0.2)
    assert model.texts == [item.captions[0] for i, item in enumerate(items[:7]) if i != 4]
    assert (card["count"], card["skipped"], card["num_captions"]) == (6, 1, 6)


def test_pictures_are_embedded_once_when_there_is_a_folder(tmp_path):
    model = Painter()
    first, _ = evaluate(painted(), model, folder=tmp_path)
    seen = model.num_pictures
    again, card = evaluate(painted(), model, folder=tmp_path)
    assert model.num_pictures == seen and again == first and card["num_captions"] == 2 * NUM


def test_too_few_captions_and_models_without_texts_are_one_line():
    items = painted(6)
    items[3] = Item(key="003", image=items[3].image, captions=items[3].captions[:1])
    with pytest.raises(
        UserError, match=r"list: 003 has 1 captions, test-v1 takes 2: give .*images-retrieval-v1"
    ) as error:
        evaluate(items, Painter())
    assert "\n" not in str(error.value)
    assert evaluate(items, Painter(), captions=1)[1]["count"] == 6
    model = Halver()
    model.abilities = frozenset(("reconstruct",))
    with pytest.raises(UserError, match="a Halver scores no texts: leave test-v1 out of --evals"):
        RetrievalEvaluator(protocol(), EvalInput(source=ListSource(items))).run(model, CPU)
