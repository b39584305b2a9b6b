"""Frozen features and labels for probes: embedded once per model and preparation, and kept on disk for the next probe.

A view is one way of cropping a training picture: the centre, or a random crop with flip that is drawn from the seed,
the view's number and the picture's key alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from qlip.core.errors import UserError
from qlip.core.log import console
from qlip.data.items import Item, Source
from qlip.data.scenes import SHAPE_NAMES
from qlip.data.shards import seeded_random
from qlip.data.sources import require_classes
from qlip.data.transforms import random_resized_pixels
from qlip.evals.card import sha256_in_order, sha256_of_names, sha256_of_truth
from qlip.evals.collect import PIXEL_DIGEST, Batch, Collected, collect
from qlip.evals.inputs import EvalInput, holds_one_object, objects_of_scene, picture_side
from qlip.evals.protocols import KnnSettings, LinearProbeSettings, Position, Protocol
from qlip.models.measured import MeasuredModel

CENTRE = -1  # the number of the view that the evaluation uses
CROP_SCALE = (0.08, 1.0)  # ImageNet training's area share


@dataclass(kw_only=True, slots=True)
class ProbeFeatures:
    """Features of one source in one view, of all ranks."""

    collected: Collected

    def labels(self) -> Tensor:
        """(n,) int64, on every rank."""
        return self.collected.rows("labels")["labels"]

    def at(self, position: Position) -> Tensor:
        """(n, d) float32, on every rank: 1.28 million pictures of width 768 are 3.9 GB a rank, and a few times that
        while ranks exchange them. Without a work folder the rows stay in memory besides.
        """
        rows = self.collected.rows(*position.split("+"))
        return torch.cat([rows[name] for name in position.split("+")], dim=1)


def num_overlapping(test: ProbeFeatures, train: ProbeFeatures) -> int:
    """How many test pictures are among the training pictures, pixel for pixel; says so when there are any."""
    digests = [found.collected.rows(PIXEL_DIGEST)[PIXEL_DIGEST].numpy() for found in (test, train)]
    seen = {row.tobytes() for row in digests[1]}
    overlap = sum(row.tobytes() in seen for row in digests[0])
    if overlap:
        console.print(f"{overlap} of {len(digests[0])} test pictures are training pictures too, pixel for pixel")
    return overlap


class FeatureReader:
    """Embeds test and training pictures of a probe."""

    def __init__(self, protocol: Protocol, data: EvalInput, model: MeasuredModel, device: torch.device) -> None:
        """Raises `UserError` without training pictures, and when their classes are not those of the test pictures."""
        assert isinstance(protocol.settings, LinearProbeSettings | KnnSettings)
        self.protocol, self.settings, self.data = protocol, protocol.settings, data
        self.model, self.device = model, device
        self.size = picture_side(model, protocol)
        if data.train_source is None:
            raise UserError(f"{protocol.name} learns from training pictures: add --train-data PATH")
        self.class_names = SHAPE_NAMES if self.settings.label == "shape" else data.source.class_names
        if self.settings.label == "class":
            require_classes(data.source, protocol.num_classes)
            if tuple(data.train_source.class_names) != tuple(self.class_names):
                raise UserError(
                    f"{data.train_source.name} has other classes ({len(data.train_source.class_names)}) than "
                    f"{data.source.name} ({len(self.class_names)}): give both with the same class folders"
                )

    def test(self) -> ProbeFeatures:
        """Of the evaluation's pictures, centre crop."""
        return self._read(self.data.source, view=CENTRE, max_samples=self.data.max_samples, title="test features")

    def train(self, *, view: int = CENTRE, seed: int = 0) -> ProbeFeatures:
        """Of the training pictures: the centre crop, or random view number `view`."""
        assert self.data.train_source is not None
        title = "train features" if view == CENTRE else f"train features, view {view + 1}"
        return self._read(
            self.data.train_source, view=view, max_samples=self.settings.max_train_samples, title=title, seed=seed
        )

    def card(self, test: ProbeFeatures, train: ProbeFeatures, *, labels: Tensor, same_view: bool) -> dict[str, Any]:
        """What a probe's card says besides `card_of`; `labels` are those of `train`.

        Only pictures that were prepared alike (`same_view`) can be found again among the training pictures.
        """
        assert self.data.train_source is not None
        return {
            "train_data": self.data.train_source.name,
            "train_count": len(train.collected.keys),
            "train_keys_sha256": sha256_of_names(train.collected.keys),
            "train_labels_sha256": sha256_of_truth(train.collected.keys, labels.tolist()),
            "train_overlap": num_overlapping(test, train) if same_view else None,
            "num_classes": len(self.class_names),
            "class_names_sha256": sha256_in_order(self.class_names),
            "labels_sha256": sha256_of_truth(test.collected.keys, test.labels().tolist()),
        }

    def _read(self, source: Source, *, view: int, max_samples: int, title: str, seed: int = 0) -> ProbeFeatures:
        preparation = self.protocol.preparation
        prepare = None if view == CENTRE else partial(_random_view, self.size, seed, view)
        shape = self.settings.label == "shape"
        folder = self.data.work_folder(
            "features",
            model=self.model,
            device=self.device,
            source=source,
            preparation=preparation,
            size=self.size,
            label=self.settings.label,
            # remote shards are known by name and count, often alike in both splits: one must not stand for the other
            role=("test" if source is self.data.source else "train", source.name),
            max_samples=max_samples,
            view=(view, seed) if view != CENTRE else "centre",
        )
        return ProbeFeatures(
            collected=collect(
                self.data.reading(
                    source,
                    preparation=preparation,
                    size=self.size,
                    prepare=prepare,
                    wanted=holds_one_object if shape else _has_label,
                    max_samples=max_samples,
                ),
                partial(self._measure, _shape_of if shape else _label_of),
                title=f"{self.protocol.name} {title}",
                device=self.device,
                folder=folder,
            )
        )

    def _measure(self, label: Callable[[Item], int], batch: Batch) -> dict[str, Tensor]:
        return {
            **self.model.features(batch["pictures"]),
            "labels": torch.tensor([label(item) for item in batch["items"]]),
        }


def _has_label(item: Item) -> bool:
    return item.label is not None


def _label_of(item: Item) -> int:
    assert item.label is not None
    return item.label


def _shape_of(item: Item) -> int:
    return SHAPE_NAMES.index(objects_of_scene(item)[0]["shape"])


def _random_view(size: int, seed: int, view: int, image: Image.Image, item: Item) -> Tensor:
    random = seeded_random("probe", seed, view, item.key)
    picture = random_resized_pixels(image, size=size, scale=CROP_SCALE, random=random)
    return picture.flip(-1) if random.random() < 0.5 else picture
