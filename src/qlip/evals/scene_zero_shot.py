"""Zero-shot classification of scenes with one object: colour and shape pairs, colours and shapes alone.

Pairs never seen in training are reported apart.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qlip.data.scenes import COLOUR_NAMES, HELD_OUT_PAIRS, SHAPE_NAMES
from qlip.evals.card import card_of, sha256_in_order, sha256_of_names, sha256_of_truth
from qlip.evals.collect import Batch
from qlip.evals.inputs import EvalInput, holds_one_object, objects_of_scene, picture_side, require_ability
from qlip.evals.protocols import Protocol
from qlip.evals.zero_shot import Template, class_weights, share, topk_hits
from qlip.models.measured import MeasuredModel

TEMPLATES = ("{}", "a {}", "a picture of a {}")
COLOUR_TEMPLATES = ("something {}", "a {} shape")
PAIRS = tuple(f"{colour} {shape}" for colour in COLOUR_NAMES for shape in SHAPE_NAMES)


class SceneZeroShotEvaluator:
    """Accuracy on held-out scenes with exactly one object."""

    def __init__(self, protocol: Protocol, data: EvalInput) -> None:
        self.protocol, self.data = protocol, data
        self.details: dict[str, Any] = {}
        self._card: dict[str, Any] = {}

    @torch.inference_mode()
    def run(self, model: MeasuredModel, device: torch.device) -> dict[str, float]:
        """Shares in [0, 1]; `<figure>_baseline` is chance. Raises `UserError` for data that are no scenes."""
        started = time.monotonic()
        require_ability(model, "match_text", self.protocol)
        size = picture_side(model, self.protocol)
        collected = self.data.collect(
            self.protocol,
            lambda batch: {"embeds": model.image_embeds(batch["pictures"]), **_truth(batch)},
            model=model,
            device=device,
            wanted=holds_one_object,
        )
        rows = collected.rows("embeds", "colour", "shape")
        embeds, colour, shape = rows["embeds"], rows["colour"], rows["shape"]
        figures, unseen = _pair_figures(embeds @ class_weights(model, PAIRS, _filled(TEMPLATES)).T, colour, shape)
        self.details = {"colours": list(COLOUR_NAMES), "shapes": list(SHAPE_NAMES)}
        for name, truth, names, templates in (
            ("colour", colour, COLOUR_NAMES, COLOUR_TEMPLATES),
            ("shape", shape, SHAPE_NAMES, TEMPLATES),
        ):
            said = (embeds @ class_weights(model, names, _filled(templates)).T).argmax(-1)
            figures |= {f"{name}_top1": share(said == truth), f"{name}_top1_baseline": 1 / len(names)}
            self.details[f"{name}_confusion"] = _confusion(truth, said, len(names))
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
            "scenes": "exactly one object",
            "num_classes": len(PAIRS),
            "class_names_sha256": sha256_in_order(PAIRS),
            "labels_sha256": sha256_of_truth(collected.keys, (colour * len(SHAPE_NAMES) + shape).tolist()),
            "templates": list(TEMPLATES),
            "colour_templates": list(COLOUR_TEMPLATES),
            "templates_sha256": sha256_of_names((*TEMPLATES, *COLOUR_TEMPLATES)),
            "count_unseen_pairs": unseen,
        }
        return figures

    def card(self) -> dict[str, Any]:
        """The protocol of the last run."""
        return self._card


def _filled(templates: tuple[str, ...]) -> list[Template]:
    return [partial(str.format, template) for template in templates]


def _truth(batch: Batch) -> dict[str, Tensor]:
    """Indices of colour and shape, (b,) int64 each."""
    objects = [objects_of_scene(item)[0] for item in batch["items"]]
    return {
        "colour": torch.tensor([COLOUR_NAMES.index(found["colour"]) for found in objects]),
        "shape": torch.tensor([SHAPE_NAMES.index(found["shape"]) for found in objects]),
    }


def _pair_figures(scores: Tensor, colour: Tensor, shape: Tensor) -> tuple[dict[str, float], int]:
    """Figures over all pairs, and how many pictures show one that training never showed."""
    pair = colour * len(SHAPE_NAMES) + shape
    names = [(COLOUR_NAMES[c], SHAPE_NAMES[s]) for c, s in zip(colour.tolist(), shape.tolist(), strict=True)]
    unseen = torch.tensor([name in HELD_OUT_PAIRS for name in names])
    right = scores.argmax(-1) == pair
    chance = 1 / len(PAIRS)
    figures = {
        "top1": share(right),
        "top1_baseline": chance,
        "top5": share(topk_hits(scores, pair, k=5)),
        "top5_baseline": 5 * chance,
        "top1_seen_pairs": share(right[~unseen]),
        "top1_seen_pairs_baseline": chance,
        "top1_unseen_pairs": share(right[unseen]),
        "top1_unseen_pairs_baseline": chance,
    }
    return figures, int(unseen.sum())


def _confusion(truth: Tensor, said: Tensor, num_classes: int) -> list[list[int]]:
    """Counts, row = true class, column = answer."""
    counts = torch.bincount(truth * num_classes + said, minlength=num_classes**2)
    return counts.view(num_classes, num_classes).tolist()
