"""Nearest neighbours against an explicit loop, closed forms of the vote; and the features that all probes share.

Of the features: what a view depends on, labels of scenes, and what makes the cache embed anew.
"""

from __future__ import annotations

import io
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_sources import Halver, ListSource, png, random_pictures
from torch import Tensor

from qlip.data.items import Item
from qlip.data.scenes import SHAPE_NAMES
from qlip.evals import knn
from qlip.evals.card import sha256_of_names
from qlip.evals.inputs import EvalInput
from qlip.evals.knn import KnnEvaluator, knn_votes
from qlip.evals.linear_probe import LinearProbeEvaluator
from qlip.evals.probe_features import CENTRE, FeatureReader
from qlip.evals.protocols import KnnSettings, LinearProbeSettings, Preparation, Protocol

CPU = torch.device("cpu")
NAMES = ("a", "b", "c")
QUICK = LinearProbeSettings(epochs=2, batch_size=8, lr=0.02, train_views=0)


def protocol(settings: LinearProbeSettings | KnnSettings, **changes) -> Protocol:
    return Protocol(**({"name": "test-v1", "summary": "A test.", "settings": settings} | changes))


def classes(num: int, *, seed: int = 0, name: str = "list") -> ListSource:
    source = ListSource(random_pictures(num, seed=seed), name=name)
    source.class_names = NAMES
    return source


def data(**changes) -> EvalInput:
    return EvalInput(**({"source": classes(11), "train_source": classes(19, seed=1), "batch_size": 4} | changes))


def votes_by_hand(queries, train, labels, *, num_classes: int, neighbours: int, temperature: float) -> np.ndarray:
    votes = np.zeros((len(queries), num_classes))
    for i, query in enumerate(queries):
        cosines = [(query @ row) / np.sqrt((query @ query) * (row @ row)) for row in train]
        for j in sorted(range(len(train)), key=lambda j: -cosines[j])[:neighbours]:
            votes[i, labels[j]] += math.exp(cosines[j] / temperature)
    return votes


@pytest.mark.parametrize("at_once", [1, 4, 200], ids=["one-by-one", "chunks", "whole"])
@pytest.mark.parametrize("neighbours", [1, 5, 100], ids=["one", "five", "more-than-there-are"])
def test_votes_are_those_of_a_loop(monkeypatch, at_once, neighbours):
    monkeypatch.setattr(knn, "QUERIES_AT_ONCE", at_once)
    queries, train, labels = torch.randn(11, 6) * 7, torch.randn(31, 6) - 0.3, torch.randint(0, 4, (31,))
    options = {"num_classes": 4, "neighbours": neighbours, "temperature": 0.07}
    expected = votes_by_hand(queries.double().numpy(), train.double().numpy(), labels.tolist(), **options)
    np.testing.assert_allclose(knn_votes(queries, train, labels, **options), expected, rtol=1e-4)


def test_one_close_neighbour_outweighs_two_when_the_temperature_is_low():
    """cosines 1, 0.8, 0.8: exp(1/t) > 2 exp(0.8/t) as long as t < 0.2 / ln 2."""
    train = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]])
    threshold = 0.2 / math.log(2)
    for temperature, winner in ((0.99 * threshold, 0), (1.01 * threshold, 1)):
        votes = knn_votes(
            torch.tensor([[3.0, 0.0]]),
            train,
            torch.tensor([0, 1, 1]),
            num_classes=2,
            neighbours=3,
            temperature=temperature,
        )
        assert int(votes.argmax()) == winner
        assert float(votes[0, 0]) == pytest.approx(math.exp(1 / temperature), rel=1e-4)


def test_separable_features_are_all_right_and_random_labels_stay_at_chance():
    labels = torch.arange(800) % 4
    features = torch.eye(4)[labels] * 8 + torch.randn(800, 4)
    options = {"num_classes": 4, "neighbours": 20, "temperature": 0.07}

    def accuracy(truth: torch.Tensor) -> float:
        votes = knn_votes(features[400:], features[:400], truth[:400], **options)
        return float((votes.argmax(1) == truth[400:]).double().mean())

    assert accuracy(labels) == 1
    assert abs(accuracy(torch.randint(0, 4, (800,))) - 0.25) < 4 * (0.25 * 0.75 / 400) ** 0.5


def features_by_hand(source: ListSource) -> dict[str, np.ndarray]:
    pictures = np.stack([np.array(Image.open(io.BytesIO(item.image))) for item in source.found]).astype(float)
    return {"cls": pictures.mean((1, 2)), "mean": pictures.std((1, 2), ddof=1)}


def test_figures_are_those_of_a_loop_and_the_card_says_what_was_searched():
    test, train = classes(14, seed=0, name="val"), classes(40, seed=1, name="train")
    settings = KnnSettings(neighbours=3, max_train_samples=25)
    evaluator = KnnEvaluator(
        protocol(settings),
        EvalInput(source=test, train_source=train, batch_size=4),
    )
    figures = evaluator.run(Halver(), CPU)
    queries, rows = features_by_hand(test), features_by_hand(train)
    labels = [item.label for item in train.found]
    for position in ("cls", "mean"):
        votes = votes_by_hand(
            queries[position], rows[position][:25], labels[:25], num_classes=3, neighbours=3, temperature=0.07
        )
        right = [int(vote.argmax()) == item.label for vote, item in zip(votes, test.found, strict=True)]
        assert figures[f"knn_{position}"] == pytest.approx(np.mean(right)), position
        assert figures[f"knn_{position}_baseline"] == pytest.approx(1 / 3)
    assert len(figures) == 4
    card = evaluator.card()
    assert (card["data"], card["count"], card["train_data"], card["train_count"]) == ("val", 14, "train", 25)
    assert card["train_keys_sha256"] == sha256_of_names([item.key for item in train.found[:25]])
    assert (card["num_classes"], card["class_names_sha256"]) == (3, sha256_of_names(NAMES))
    assert card["protocol_settings"]["temperature"] == 0.07
    assert card["train_overlap"] == 0


def test_test_pictures_among_the_training_pictures_are_counted_and_said(capsys):
    test, train = classes(14, seed=0, name="val"), classes(10, seed=1, name="train")
    train.found += [replace(item, key=f"again/{item.key}") for item in test.found[:5]]
    evaluator = KnnEvaluator(protocol(KnnSettings(neighbours=1)), EvalInput(source=test, train_source=train))
    evaluator.run(Halver(), CPU)
    assert evaluator.card()["train_overlap"] == 5
    assert "5 of 14 test pictures are training pictures too, pixel for pixel" in capsys.readouterr().out


def test_splits_of_equal_names_and_sizes_are_told_apart_on_disk(tmp_path):
    """Shards of both splits are called 00000.tar and are often equally large: a test picture must not find itself."""
    test, train = classes(14, seed=0, name="data"), classes(14, seed=1, name="data")
    assert test.identity() == train.identity()
    given = protocol(KnnSettings(neighbours=1))
    in_memory, on_disk = (
        KnnEvaluator(given, data(source=test, train_source=train, folder=folder)).run(Halver(), CPU)
        for folder in (None, tmp_path)
    )
    assert on_disk == in_memory and on_disk["knn_cls"] < 1


def scene(key: str, *shapes: str) -> Item:
    objects = [{"shape": shape, "colour": "red"} for shape in shapes]
    return Item(key=key, image=png(np.zeros((16, 16, 3), np.uint8)), record={"scene": {"objects": objects}})


def test_shapes_are_those_of_scenes_with_one_object():
    shapes = (SHAPE_NAMES[3], SHAPE_NAMES[0], SHAPE_NAMES[9])
    items = [scene("two", *shapes[:2]), *(scene(shape, shape) for shape in shapes), scene("none")]
    given = data(source=ListSource(items), train_source=ListSource(items[::-1]))
    reader = FeatureReader(protocol(KnnSettings(label="shape")), given, Halver(), CPU)
    assert (reader.test().collected.keys, reader.test().labels().tolist()) == (list(shapes), [3, 0, 9])
    assert reader.train().labels().tolist() == [9, 0, 3]
    assert reader.class_names == SHAPE_NAMES


class Watcher(Halver):
    """Keeps the pictures it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.pictures: list[Tensor] = []

    def features(self, pictures: Tensor) -> dict[str, Tensor]:
        self.pictures += list(pictures)
        return super().features(pictures)


def views_of(items: list[Item], *, view: int, seed: int = 0, batch_size: int = 4) -> dict[str, Tensor]:
    """What the model is shown of each picture."""
    model = Watcher()
    source = ListSource(items)
    source.class_names = NAMES
    given = data(train_source=source, batch_size=batch_size)
    keys = FeatureReader(protocol(QUICK), given, model, CPU).train(view=view, seed=seed).collected.keys
    return dict(zip(keys, model.pictures, strict=False))  # the last batch is padded


def test_a_view_depends_on_seed_number_and_key_alone():
    items = random_pictures(9, side=40)
    views = views_of(items, view=1)
    other_order = views_of(items[::-1][:5], view=1, batch_size=3)
    assert all(torch.equal(picture, views[key]) for key, picture in other_order.items()) and len(other_order) == 5
    for changed in (views_of(items, view=2), views_of(items, view=1, seed=1)):
        assert not any(torch.equal(changed[key], views[key]) for key in views)
    renamed = views_of([replace(item, key=f"x{item.key}") for item in items], view=1)
    assert not any(torch.equal(renamed[f"x{key}"], views[key]) for key in views)


def test_views_are_cut_and_half_of_them_flipped():
    ramp = np.broadcast_to(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], (64, 64, 3))
    picture = png(np.ascontiguousarray(ramp))
    items = [Item(key=str(i), image=picture, label=i % 3) for i in range(80)]
    slopes = [int(view[0, 0, -1]) - int(view[0, 0, 0]) for view in views_of(items, view=0).values()]
    assert 25 <= sum(slope < 0 for slope in slopes) <= 55
    widths = sorted(abs(slope) / 255 for slope in slopes)
    assert widths[0] < 0.5 and widths[-1] > 0.9
    centre = views_of(items[:4], view=CENTRE).values()
    assert all(int(view[0, 0, -1]) - int(view[0, 0, 0]) > 230 for view in centre)


TEST_BATCHES, TRAIN_BATCHES = 3, 5  # of 11 and 19 pictures, four at a time
OTHER = Halver()
OTHER.identity = lambda: {"model_fingerprint": "another", "dtype": "float32"}  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("changes", "protocol_changes", "model", "expected"),
    [
        ({}, {}, Halver(), 0),
        ({"batch_size": 3}, {}, Halver(), 0),
        ({}, {"name": "other-v1", "settings": replace(QUICK, lr=0.5, positions=("cls",), seed=3)}, Halver(), 0),
        ({}, {}, OTHER, TEST_BATCHES + TRAIN_BATCHES),
        ({}, {"preparation": Preparation(filter="bilinear")}, Halver(), TEST_BATCHES + TRAIN_BATCHES),
        ({}, {"preparation": Preparation(crop="squash")}, Halver(), TEST_BATCHES + TRAIN_BATCHES),
        ({"max_samples": 4}, {}, Halver(), 1),
        ({"train_source": classes(7, seed=2)}, {}, Halver(), 2),
        ({}, {"settings": replace(QUICK, max_train_samples=4)}, Halver(), 1),
        ({}, {"settings": replace(QUICK, train_views=2)}, Halver(), 2 * TRAIN_BATCHES),
    ],
    ids=[
        "same",
        "batch-size",
        "training-alone",
        "model",
        "filter",
        "crop",
        "fewer-test",
        "other-train",
        "fewer-train",
        "views",
    ],
)
def test_features_are_embedded_anew_only_when_something_they_depend_on_has_changed(
    tmp_path, changes, protocol_changes, model, expected
):
    first = Halver()
    before = LinearProbeEvaluator(protocol(QUICK), data(folder=tmp_path)).run(first, CPU)
    assert len(first.batches) == TEST_BATCHES + TRAIN_BATCHES
    model.batches.clear()
    given = protocol(**({"settings": QUICK} | protocol_changes))
    again = LinearProbeEvaluator(given, data(folder=tmp_path, **changes)).run(model, CPU)
    assert len(model.batches) == expected
    assert protocol_changes or changes or model is OTHER or again == before


def test_neighbours_are_searched_among_the_same_features(tmp_path):
    LinearProbeEvaluator(protocol(QUICK), data(folder=tmp_path)).run(Halver(), CPU)
    model = Halver()
    figures = KnnEvaluator(protocol(KnnSettings()), data(folder=tmp_path)).run(model, CPU)
    assert model.batches == []
    assert figures == KnnEvaluator(protocol(KnnSettings()), data()).run(Halver(), CPU)
