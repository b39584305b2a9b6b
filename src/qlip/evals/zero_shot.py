"""Zero-shot classification: class prompts -> text embeddings -> accuracy (CLIP's protocol).

Each class has one weight vector: its prompts from every template are embedded, normalised, averaged and normalised
again; a picture gets the class of the highest cosine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qlip.core.errors import UserError
from qlip.data.sources import require_classes
from qlip.evals.card import card_of, sha256_in_order, sha256_of_names, sha256_of_truth
from qlip.evals.collect import Batch
from qlip.evals.inputs import EvalInput, picture_side, require_ability
from qlip.evals.protocols import Protocol, ZeroShotSettings
from qlip.models.measured import MeasuredModel

Template = Callable[[str], str]
TEXTS_AT_ONCE = 256


@torch.inference_mode()
def class_weights(model: MeasuredModel, class_names: Sequence[str], templates: Sequence[Template]) -> Tensor:
    """(classes, e) on the CPU, norm 1: the mean over templates of each class's normalised embeddings, normalised."""
    texts = [template(name) for name in class_names for template in templates]
    embeds = torch.cat(
        [model.text_embeds(texts[i : i + TEXTS_AT_ONCE]).cpu() for i in range(0, len(texts), TEXTS_AT_ONCE)]
    )
    total = embeds.view(len(class_names), len(templates), -1).sum(1)  # (classes, e)
    return total / total.norm(dim=-1, keepdim=True)


def topk_hits(scores: Tensor, labels: Tensor, *, k: int) -> Tensor:
    """(n, classes) scores and (n,) labels -> (n,) bool: whether the label is among the k highest scores."""
    return (scores.topk(min(k, scores.shape[1])).indices == labels[:, None]).any(-1)


def share(hits: Tensor) -> float:
    """Share of True, NaN for an empty set."""
    return float(hits.double().mean())


class ZeroShotEvaluator:
    """Accuracy over the classes of ImageNet, or over the data's own."""

    def __init__(self, protocol: Protocol, data: EvalInput) -> None:
        assert isinstance(protocol.settings, ZeroShotSettings)
        self.protocol, self.settings, self.data = protocol, protocol.settings, data
        self.details: dict[str, Any] = {}
        self._card: dict[str, Any] = {}

    @torch.inference_mode()
    def run(self, model: MeasuredModel, device: torch.device) -> dict[str, float]:
        """Shares in [0, 1]; `<figure>_baseline` is chance. `mean_class` weighs every class alike.

        Raises `UserError` before any work for data without the classes of the protocol.
        """
        started = time.monotonic()
        require_ability(model, "match_text", self.protocol)
        size = picture_side(model, self.protocol)
        require_classes(self.data.source, self.protocol.num_classes)
        names, templates = self._class_names(), named_templates(self.settings.templates)
        collected = self.data.collect(
            self.protocol,
            lambda batch: {"embeds": model.image_embeds(batch["pictures"]), "labels": _labels(batch)},
            model=model,
            device=device,
            wanted=lambda item: item.label is not None,
        )
        rows = collected.rows("embeds", "labels")
        scores, labels = rows["embeds"] @ class_weights(model, names, templates).T, rows["labels"]
        right = scores.argmax(-1) == labels
        present = labels.unique()
        per_class = {names[c]: share(right[labels == c]) for c in present.tolist()}
        self.details = {"top1_by_class": per_class}
        self._card = card_of(
            self.protocol,
            model,
            data=self.data,
            collected=collected,
            size=size,
            baseline="chance",
            device=device,
            started=started,
        )
        self._card |= {
            "num_classes": len(names),
            "num_classes_present": len(present),
            "class_names_sha256": sha256_in_order(names),
            "labels_sha256": sha256_of_truth(collected.keys, labels.tolist()),
            "num_templates": len(templates),
            "templates_sha256": sha256_of_names([template("{}") for template in templates]),
        }
        return {
            "top1": share(right),
            "top1_baseline": 1 / len(names),
            "top5": share(topk_hits(scores, labels, k=5)),
            "top5_baseline": min(5, len(names)) / len(names),
            "mean_class": sum(per_class.values()) / len(per_class),
            "mean_class_baseline": 1 / len(names),
        }

    def card(self) -> dict[str, Any]:
        """The protocol of the last run."""
        return self._card

    def _class_names(self) -> Sequence[str]:
        if self.settings.class_names == "imagenet":
            from open_clip import IMAGENET_CLASSNAMES  # takes seconds

            return IMAGENET_CLASSNAMES
        return [name.replace("_", " ") for name in self.data.source.class_names]


def _labels(batch: Batch) -> Tensor:
    return torch.tensor([item.label for item in batch["items"]])


def named_templates(name: str) -> list[Template]:
    """open_clip's templates: `openai80` or `simple7`."""
    import open_clip  # takes seconds

    known = {"openai80": open_clip.OPENAI_IMAGENET_TEMPLATES, "simple7": open_clip.SIMPLE_IMAGENET_TEMPLATES}
    if name not in known:
        raise UserError(f"templates {name!r} are unknown: give {' or '.join(known)}")
    return list(known[name])
