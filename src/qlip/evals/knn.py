"""k nearest neighbours of frozen features: no training, so nothing to tune (arXiv 1805.01978, 2104.14294).

A picture's k most similar training pictures vote for their class with exp(cosine / temperature).
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qlip.evals.card import card_of
from qlip.evals.inputs import EvalInput, require_ability
from qlip.evals.probe_features import FeatureReader
from qlip.evals.protocols import KnnSettings, Protocol
from qlip.evals.zero_shot import share
from qlip.models.measured import MeasuredModel

QUERIES_AT_ONCE = 200


def knn_votes(
    queries: Tensor, train: Tensor, labels: Tensor, *, num_classes: int, neighbours: int, temperature: float
) -> Tensor:
    """(q, d) and (n, d) features of any norm, (n,) int64 labels of the latter -> (q, classes) weights of the votes.

    Queries are gone through in chunks, so that (q, n) never exists. Fewer than `neighbours` training pictures all vote.
    All tensors are on one device.
    """
    train = F.normalize(train.float(), dim=1)
    votes = []
    for rows in F.normalize(queries.float(), dim=1).split(QUERIES_AT_ONCE):
        cosines, nearest = (rows @ train.T).topk(min(neighbours, len(train)), dim=1)
        weights = (cosines / temperature).exp()
        votes.append(weights.new_zeros(len(rows), num_classes).scatter_add_(1, labels[nearest], weights))
    return torch.cat(votes)


class KnnEvaluator:
    """Accuracy of weighted nearest neighbours at every position of the protocol."""

    def __init__(self, protocol: Protocol, data: EvalInput) -> None:
        assert isinstance(protocol.settings, KnnSettings)
        self.protocol, self.settings, self.data = protocol, protocol.settings, data
        self.details: dict[str, Any] = {}
        self._card: dict[str, Any] = {}

    @torch.inference_mode()
    def run(self, model: MeasuredModel, device: torch.device) -> dict[str, float]:
        """`knn_<position>` in [0, 1]; `<figure>_baseline` is chance. Raises `UserError` as `FeatureReader` does."""
        started = time.monotonic()
        require_ability(model, "features", self.protocol)
        reader = FeatureReader(self.protocol, self.data, model, device)
        test, train = reader.test(), reader.train()
        num_classes = len(reader.class_names)
        truth, labels = test.labels(), train.labels()
        figures = {}
        for position in self.settings.positions:
            votes = knn_votes(
                test.at(position).to(device),
                train.at(position).to(device),
                labels.to(device),
                num_classes=num_classes,
                neighbours=self.settings.neighbours,
                temperature=self.settings.temperature,
            )
            figures[f"knn_{position}"] = share(votes.argmax(1).cpu() == truth)
            figures[f"knn_{position}_baseline"] = 1 / num_classes
        self._card = card_of(
            self.protocol,
            model,
            data=self.data,
            collected=test.collected,
            size=reader.size,
            baseline="chance",
            device=device,
            started=started,
        )
        self._card |= reader.card(test, train, labels=labels, same_view=True)
        return figures

    def card(self) -> dict[str, Any]:
        """The protocol of the last run."""
        return self._card
