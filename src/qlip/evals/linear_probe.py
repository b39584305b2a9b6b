"""Linear probe: a linear classifier trained on frozen features (Tables 10 and 11).

Affine-free batch normalisation, one linear layer, AdamW without decay, linear warm-up and cosine to zero. Nothing is
chosen on the test pictures: rates and epochs are the protocol's, and the last weights are the ones that are scored.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlip.core.errors import UserError
from qlip.core.log import progress
from qlip.evals.card import card_of
from qlip.evals.inputs import EvalInput, require_ability
from qlip.evals.probe_features import CENTRE, FeatureReader, ProbeFeatures
from qlip.evals.protocols import LinearProbeSettings, Position, Protocol
from qlip.evals.zero_shot import share, topk_hits
from qlip.models.measured import MeasuredModel

BETAS = (0.9, 0.999)
INIT_STD = 0.01
LEAST_FOR_TOP5 = 10  # classes: with fewer, five guesses say little


def lr_factor(step: int, *, steps: int, warmup_steps: int) -> float:
    """What the peak rate is multiplied by: (step + 1) / warmup_steps, then a cosine from 1 to 0 at `steps`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def linear_classifier(num_features: int, num_classes: int, *, batch_norm: bool, seed: int) -> nn.Sequential:
    """(n, d) -> (n, classes): batch normalisation without an affine map, and a linear layer that starts near zero."""
    linear = nn.Linear(num_features, num_classes)
    nn.init.trunc_normal_(linear.weight, std=INIT_STD, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(linear.bias)
    norm = nn.BatchNorm1d(num_features, affine=False) if batch_norm else nn.Identity()
    return nn.Sequential(norm, linear)


def train_linear(
    features: Callable[[int], Tensor],
    labels: Tensor,
    *,
    num_classes: int,
    settings: LinearProbeSettings,
    device: torch.device,
    title: str = "linear probe",
) -> nn.Sequential:
    """The classifier after the last epoch, in evaluation mode.

    `features(epoch)` gives (n, d) float32 on the CPU, `labels` are (n,) int64. The result depends on these and on the
    settings alone: every rank trains the same. Raises `UserError` for fewer than two pictures: they have no variance.
    """
    if len(labels) < 2:
        raise UserError(f"{title}: {len(labels)} usable training picture; give --train-data with at least 2")
    order = torch.Generator().manual_seed(settings.seed)
    num = len(labels)
    batch_size = min(settings.batch_size, num)
    per_epoch = num // batch_size  # the rest of an epoch, less than a batch, waits for the next order
    steps, warmup = settings.epochs * per_epoch, settings.warmup_epochs * per_epoch
    classifier = optimizer = None
    with torch.inference_mode(False), torch.enable_grad(), progress(title, steps, unit="steps") as bar:
        for epoch in range(settings.epochs):
            x = features(epoch)
            if classifier is None or optimizer is None:
                classifier = linear_classifier(
                    x.shape[1], num_classes, batch_norm=settings.batch_norm, seed=settings.seed
                ).to(device)
                optimizer = torch.optim.AdamW(classifier.parameters(), lr=settings.lr, betas=BETAS, weight_decay=0.0)
            rows = torch.randperm(num, generator=order)
            for i in range(per_epoch):
                step = epoch * per_epoch + i
                for group in optimizer.param_groups:
                    group["lr"] = settings.lr * lr_factor(step, steps=steps, warmup_steps=warmup)
                batch = rows[i * batch_size : (i + 1) * batch_size]
                # copies: what was made in inference mode cannot be differentiated through
                loss = F.cross_entropy(classifier(x[batch].clone().to(device)), labels[batch].clone().to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                bar.update(step + 1)
    assert classifier is not None
    return classifier.eval()


@torch.inference_mode()
def scores_of(classifier: nn.Module, features: Tensor, *, device: torch.device) -> Tensor:
    """(n, d) -> (n, classes) on the CPU."""
    return torch.cat([classifier(rows.to(device)).cpu() for rows in features.split(10_000)])


class LinearProbeEvaluator:
    """Accuracy of a linear classifier at every position of the protocol."""

    def __init__(self, protocol: Protocol, data: EvalInput) -> None:
        assert isinstance(protocol.settings, LinearProbeSettings)
        self.protocol, self.settings, self.data = protocol, protocol.settings, data
        self.details: dict[str, Any] = {}
        self._card: dict[str, Any] = {}

    def run(self, model: MeasuredModel, device: torch.device) -> dict[str, float]:
        """`linear_<position>`, and `linear_top5_<position>` from ten classes on; `<figure>_baseline` is chance.

        Raises `UserError` as `FeatureReader` does.
        """
        started = time.monotonic()
        require_ability(model, "features", self.protocol)
        reader = FeatureReader(self.protocol, self.data, model, device)
        with torch.inference_mode():
            test = reader.test()
            views = self.settings.train_views or 1
            train = [self._train_view(reader, view) for view in range(min(views, self.settings.epochs))]
            labels, test_labels = train[0].labels(), test.labels()
        num_classes = len(reader.class_names)
        figures: dict[str, float] = {}
        train_accuracy = {}
        for position in self.settings.positions:
            known: dict[int, Tensor] = {}

            def features(epoch: int, position: Position = position, known: dict[int, Tensor] = known) -> Tensor:
                view = epoch % len(train)
                if view not in known:
                    known.clear()  # one view in memory at a time
                    known[view] = train[view].at(position)
                return known[view]

            classifier = train_linear(
                features,
                labels,
                num_classes=num_classes,
                settings=self.settings,
                device=device,
                title=f"{self.protocol.name} {position}",
            )
            scores = scores_of(classifier, test.at(position), device=device)
            figures[f"linear_{position}"] = share(topk_hits(scores, test_labels, k=1))
            figures[f"linear_{position}_baseline"] = 1 / num_classes
            if num_classes >= LEAST_FOR_TOP5:
                figures[f"linear_top5_{position}"] = share(topk_hits(scores, test_labels, k=5))
                figures[f"linear_top5_{position}_baseline"] = 5 / num_classes
            on_train = scores_of(classifier, features(self.settings.epochs - 1), device=device)
            train_accuracy[position] = share(topk_hits(on_train, labels, k=1))
        self.details = {"train_accuracy": train_accuracy}
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
        same_view = not self.settings.train_views
        self._card |= reader.card(test, train[0], labels=labels, same_view=same_view)
        self._card["selection"] = "none: the protocol's rate, the last epoch"
        return figures

    def card(self) -> dict[str, Any]:
        """The protocol of the last run."""
        return self._card

    def _train_view(self, reader: FeatureReader, view: int) -> ProbeFeatures:
        return reader.train(view=view if self.settings.train_views else CENTRE, seed=self.settings.seed)
