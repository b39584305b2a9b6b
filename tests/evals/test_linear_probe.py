"""The linear probe against AdamW written out in NumPy, what probes refuse, and that two ranks equal one."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_sources import Halver, ListSource, random_pictures
from torch import Tensor

from qlip.core.errors import UserError
from qlip.evals import collect as collecting
from qlip.evals import linear_probe
from qlip.evals.card import sha256_of_names
from qlip.evals.inputs import EvalInput
from qlip.evals.knn import KnnEvaluator
from qlip.evals.linear_probe import LinearProbeEvaluator, linear_classifier, lr_factor, scores_of, train_linear
from qlip.evals.probe_features import FeatureReader
from qlip.evals.protocols import KnnSettings, LinearProbeSettings, Preparation, Protocol, RetrievalSettings
from qlip.evals.retrieval import RetrievalEvaluator

CPU = torch.device("cpu")
NAMES = ("a", "b", "c")
QUICK = LinearProbeSettings(epochs=2, batch_size=8, lr=0.02, train_views=0)


def protocol(settings: LinearProbeSettings | KnnSettings | RetrievalSettings = QUICK, **changes) -> Protocol:
    return Protocol(**({"name": "test-v1", "summary": "A test.", "settings": settings} | changes))


def classes(num: int, *, seed: int = 0, names: tuple[str, ...] = NAMES, **options) -> ListSource:
    source = ListSource(random_pictures(num, seed=seed, **options), name=f"list{seed}")
    source.class_names = names
    return source


def data(**changes) -> EvalInput:
    return EvalInput(
        **(
            {"source": classes(11), "train_source": classes(19, seed=1), "batch_size": 4, "max_skip_share": 0.5}
            | changes
        )
    )


def accuracy(scores: Tensor, labels: Tensor) -> float:
    return float((scores.argmax(1) == labels).double().mean())


def test_the_rate_warms_up_and_falls_along_a_cosine():
    factors = [lr_factor(step, steps=10, warmup_steps=2) for step in range(11)]
    half = math.sqrt(0.5) / 2
    assert factors[:3] == [0.5, 1, 1]
    assert [factors[i] for i in (4, 6, 8, 10)] == pytest.approx([0.5 + half, 0.5, 0.5 - half, 0], abs=1e-12)
    assert [lr_factor(step, steps=2, warmup_steps=2) for step in range(2)] == [0.5, 1]
    assert lr_factor(0, steps=5, warmup_steps=0) == 1


def test_the_classifier_starts_near_zero_and_normalises_without_weights():
    norm, linear = linear_classifier(200, 50, batch_norm=True, seed=4)
    assert not list(norm.parameters()) and not linear.bias.any()
    assert float(linear.weight.detach().std()) == pytest.approx(0.01, rel=0.05)
    again = linear_classifier(200, 50, batch_norm=True, seed=4)[1]
    assert torch.equal(again.weight, linear.weight)
    assert not torch.equal(linear_classifier(200, 50, batch_norm=True, seed=5)[1].weight, linear.weight)


def by_hand(x: np.ndarray, y: np.ndarray, settings: LinearProbeSettings, factors: list[float], classes: int) -> tuple:
    """Weight, bias, running mean and variance after AdamW without decay, in float64."""
    weight = linear_classifier(x.shape[1], classes, batch_norm=True, seed=settings.seed)[1].weight.detach().double()
    parameters = [weight.numpy().copy(), np.zeros(classes)]
    first, second = ([np.zeros_like(p) for p in parameters] for _ in range(2))
    running = [np.zeros(x.shape[1]), np.ones(x.shape[1])]
    order = torch.Generator().manual_seed(settings.seed)
    per_epoch, step = len(y) // settings.batch_size, 0
    for _ in range(settings.epochs):
        rows = torch.randperm(len(y), generator=order).numpy()
        for i in range(per_epoch):
            batch = rows[i * settings.batch_size : (i + 1) * settings.batch_size]
            part = x[batch]
            running[0] = 0.9 * running[0] + 0.1 * part.mean(0)
            running[1] = 0.9 * running[1] + 0.1 * part.var(0, ddof=1)
            if settings.batch_norm:
                part = (part - part.mean(0)) / np.sqrt(part.var(0) + 1e-5)
            said = np.exp(part @ parameters[0].T + parameters[1])
            error = (said / said.sum(1, keepdims=True) - np.eye(classes)[y[batch]]) / len(batch)
            step += 1
            for p, m, v, gradient in zip(parameters, first, second, (error.T @ part, error.sum(0)), strict=True):
                m[...] = 0.9 * m + 0.1 * gradient
                v[...] = 0.999 * v + 0.001 * gradient**2
                update = (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
                p -= settings.lr * factors[step - 1] * update
    return *parameters, *running


@pytest.mark.parametrize("batch_norm", [True, False], ids=["normalised", "plain"])
@pytest.mark.parametrize(
    ("epochs", "warmup", "batch_size", "factors"),
    [
        (1, 0, 21, [1.0]),
        (3, 1, 10, [0.5, 1, 1, 0.5 + math.sqrt(0.5) / 2, 0.5, 0.5 - math.sqrt(0.5) / 2]),  # one picture is left over
    ],
    ids=["one-step", "six-steps"],
)
def test_training_equals_adamw_written_out(batch_norm, epochs, warmup, batch_size, factors):
    x, y = torch.randn(21, 5) * torch.tensor([1, 2, 3, 4, 5]) + 1, torch.randint(0, 3, (21,))
    settings = LinearProbeSettings(
        epochs=epochs, warmup_epochs=warmup, batch_size=batch_size, lr=0.2, batch_norm=batch_norm, seed=6
    )
    asked = []

    def features(epoch: int) -> Tensor:
        asked.append(epoch)
        return x

    trained = train_linear(features, y, num_classes=3, settings=settings, device=CPU)
    weight, bias, mean, variance = by_hand(x.double().numpy(), y.numpy(), settings, factors, 3)
    np.testing.assert_allclose(trained[1].weight.detach(), weight, atol=1e-4)
    np.testing.assert_allclose(trained[1].bias.detach(), bias, atol=1e-4)
    assert asked == list(range(epochs))
    normed = (x.double().numpy() - mean) / np.sqrt(variance + 1e-5) if batch_norm else x.double().numpy()
    np.testing.assert_allclose(scores_of(trained, x, device=CPU), normed @ weight.T + bias, atol=1e-3)


def test_separable_features_are_all_right_and_random_labels_stay_at_chance():
    labels = torch.arange(2000) % 4
    features = torch.eye(8)[labels] * 8 + torch.randn(2000, 8)

    def test_accuracy(truth: Tensor, scale: float = 1) -> float:
        x = features * scale + scale
        settings = LinearProbeSettings(epochs=3, batch_size=100)
        classifier = train_linear(lambda _: x[:1000], truth[:1000], num_classes=4, settings=settings, device=CPU)
        return accuracy(scores_of(classifier, x[1000:], device=CPU), truth[1000:])

    assert test_accuracy(labels) == 1
    assert test_accuracy(labels, scale=1000) == 1  # the rate of 0.2 is for normalised features
    assert abs(test_accuracy(torch.randint(0, 4, (2000,))) - 0.25) < 4 * (0.25 * 0.75 / 1000) ** 0.5


def test_figures_have_chance_beside_them_and_the_card_says_what_was_learnt_from():
    given = data(train_source=classes(40, seed=1), max_samples=10)
    evaluator = LinearProbeEvaluator(protocol(replace(QUICK, max_train_samples=33)), given)
    figures = evaluator.run(Halver(), CPU)
    assert list(figures) == [f"linear_{p}{end}" for p in ("cls", "mean", "cls+mean") for end in ("", "_baseline")]
    assert all(figures[f"linear_{p}_baseline"] == pytest.approx(1 / 3) for p in ("cls", "mean", "cls+mean"))
    assert evaluator.details["train_accuracy"].keys() == {"cls", "mean", "cls+mean"}
    card = evaluator.card()
    assert (card["data"], card["count"], card["train_data"], card["train_count"]) == ("list0", 10, "list1", 33)
    assert card["train_keys_sha256"] == sha256_of_names([f"{i:05d}" for i in range(33)])
    assert (card["num_classes"], card["class_names_sha256"]) == (3, sha256_of_names(NAMES))
    assert card["selection"].startswith("none") and card["protocol_settings"]["lr"] == 0.02


def test_each_position_is_trained_on_its_features_and_scored_on_those_of_the_test_pictures():
    model, given = Halver(), data()
    evaluator = LinearProbeEvaluator(protocol(), given)
    figures = evaluator.run(model, CPU)
    reader = FeatureReader(protocol(), given, model, CPU)
    train, test = reader.train(), reader.test()
    rows = {name: (train.collected.rows(name)[name], test.collected.rows(name)[name]) for name in ("cls", "mean")}
    rows["cls+mean"] = tuple(torch.cat(sides, 1) for sides in zip(rows["cls"], rows["mean"], strict=True))
    for position, (x, x_test) in rows.items():
        classifier = train_linear(lambda _, x=x: x, train.labels(), num_classes=3, settings=QUICK, device=CPU)
        expected = accuracy(scores_of(classifier, x_test, device=CPU), torch.arange(11) % 3)
        assert figures[f"linear_{position}"] == pytest.approx(expected), position
        on_train = accuracy(scores_of(classifier, x, device=CPU), torch.arange(19) % 3)
        assert evaluator.details["train_accuracy"][position] == pytest.approx(on_train), position


def test_top5_is_scored_from_ten_classes_on():
    names = tuple("abcdefghij")
    given = data(source=classes(11, names=names), train_source=classes(19, seed=1, names=names))
    figures = LinearProbeEvaluator(protocol(), given).run(Halver(), CPU)
    assert figures["linear_top5_cls"] >= figures["linear_cls"] and figures["linear_top5_cls_baseline"] == 0.5


def test_every_epoch_trains_on_its_view(monkeypatch):
    seen = []

    def watched(features, labels, **options):
        seen.extend(features(epoch) for epoch in range(3))
        return train_linear(features, labels, **options)

    monkeypatch.setattr(linear_probe, "train_linear", watched)
    settings = replace(QUICK, epochs=3, train_views=2, positions=("mean",), seed=5)
    model, given = Halver(), data(source=classes(11, side=40), train_source=classes(19, seed=1, side=40))
    LinearProbeEvaluator(protocol(settings), given).run(model, CPU)
    assert len(model.batches) == 3 + 2 * 5  # test pictures once, training pictures once per view
    reader = FeatureReader(protocol(settings), given, model, CPU)
    first, second = (reader.train(view=view, seed=5).at("mean") for view in (0, 1))
    assert not torch.equal(first, second)
    for features, expected in zip(seen, (first, second, first), strict=True):
        assert torch.equal(features, expected)


class Untouchable(ListSource):
    """Fails the test when a picture is asked for."""

    class_names = NAMES

    def items(self):
        raise AssertionError("no picture may be read before the refusal")


BLIND = Halver()
BLIND.abilities = frozenset(("reconstruct",))


@pytest.mark.parametrize("evaluator", [LinearProbeEvaluator, KnnEvaluator])
@pytest.mark.parametrize(
    ("changes", "protocol_changes", "model", "message"),
    [
        ({"train_source": None}, {}, Halver(), "test-v1 learns from training pictures: add --train-data PATH"),
        ({"train_source": classes(9, names=("a", "b", "x"))}, {}, Halver(), r"list0 has other classes \(3\) than list"),
        ({"train_source": classes(9, names=("c", "b", "a"))}, {}, Halver(), "with the same class folders"),
        ({"source": ListSource([])}, {}, Halver(), "0 classes found, some needed"),
        ({}, {"num_classes": 1000}, Halver(), "3 classes found, 1000 needed"),
        ({}, {"preparation": Preparation(size=256)}, Halver(), "for pictures of 256 pixels, the model takes 16"),
        ({}, {}, BLIND, "a Halver gives no features: leave test-v1 out of --evals"),
    ],
    ids=["no-train", "other-classes", "other-order", "no-classes", "not-imagenet", "size", "ability"],
)
def test_mistakes_are_one_line_before_any_work(evaluator, changes, protocol_changes, model, message):
    given = data(**({"source": Untouchable([])} | changes))
    settings = QUICK if evaluator is LinearProbeEvaluator else KnnSettings()
    with pytest.raises(UserError, match=message) as error:
        evaluator(protocol(settings, **protocol_changes), given).run(model, CPU)
    assert "\n" not in str(error.value)


def test_too_few_pictures_and_data_without_scenes_are_one_line():
    with pytest.raises(UserError, match=r"test-v1 cls: 1 usable training picture; give --train-data with at least 2"):
        LinearProbeEvaluator(protocol(), data(train_source=classes(1))).run(Halver(), CPU)
    broken = classes(3)
    broken.found = [replace(item, image=b"") for item in broken.found]
    with pytest.raises(UserError, match="3 of 3 pictures cannot be used"):
        LinearProbeEvaluator(protocol(), data(train_source=broken)).run(Halver(), CPU)
    with pytest.raises(UserError, match=r"needs scene shards .*`qlip data scenes`"):
        LinearProbeEvaluator(protocol(replace(QUICK, label="shape")), data()).run(Halver(), CPU)


def all_evaluations(folder: str) -> list[dict[str, float]]:
    """Linear probe with views, nearest neighbours and retrieval, in memory and with a shared folder."""
    collecting.PART = 4
    figures = []
    views = replace(QUICK, train_views=2)
    for place in (None, Path(folder)):
        given = data(source=classes(11, side=24), train_source=classes(19, seed=1, side=24), folder=place)
        figures.append(LinearProbeEvaluator(protocol(views), given).run(Halver(), CPU))
        figures.append(KnnEvaluator(protocol(KnnSettings(neighbours=3)), given).run(Halver(), CPU))
        captioned = [replace(item, captions=("ae" * i, "a" * i + "b")) for i, item in enumerate(random_pictures(13))]
        pictures = EvalInput(source=ListSource(captioned), batch_size=3, folder=place)
        two_captions = protocol(RetrievalSettings(captions_per_image=2))
        figures.append(RetrievalEvaluator(two_captions, pictures).run(Halver(), CPU))
    return figures
