"""Zero-shot classification: class prompts -> text embeddings -> accuracy (CLIP's protocol).

Each class has one weight vector: its prompts from every template are embedded, normalised, averaged and normalised
again; a picture gets the class of the highest cosine. On scenes the classes are all colour x shape pairs, colours
alone and shapes alone, and pairs never seen in training are reported apart.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlip.core.errors import UserError
from qlip.core.log import progress
from qlip.data.batches import Tokenize
from qlip.data.loaders import StatefulDataLoader
from qlip.data.scenes import COLOUR_NAMES, HELD_OUT_PAIRS, SHAPE_NAMES
from qlip.evals.card import data_card_fields, model_card_fields, num_skipped, run_card_fields, sha256_of_names
from qlip.evals.reconstruction import EvalData
from qlip.models.qlip.modeling import QLIPModel, unit_norm

PROTOCOL = "scenes-zeroshot-v1"
TEMPLATES = ("{}", "a {}", "a picture of a {}")
COLOUR_TEMPLATES = ("something {}", "a {} shape")
PAIRS = tuple(f"{colour} {shape}" for colour in COLOUR_NAMES for shape in SHAPE_NAMES)


@torch.inference_mode()
def class_weights(model: QLIPModel, tokenize: Tokenize, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """(classes, e), norm 1: the mean over templates of each class's normalised text embeddings, normalised."""
    device = model.logit_scale.device
    total = torch.zeros(len(class_names), model.config.projection_dim, device=device)
    for template in templates:
        texts = tokenize([template.format(name) for name in class_names])
        features = model.get_text_features(texts["input_ids"].to(device), texts["attention_mask"].to(device))
        total += unit_norm(features.pooler_output)
    return unit_norm(total)


class SceneZeroShotEvaluator:
    """Accuracy on held-out scenes with exactly one object."""

    def __init__(self, data: EvalData, tokenize: Tokenize) -> None:
        self.data = data
        self.tokenize = tokenize
        self._card: dict[str, Any] = {}
        self.details: dict[str, Any] = {}

    @torch.inference_mode()
    def run(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Shares in [0, 1]; `<figure>_baseline` is chance."""
        assert isinstance(model, QLIPModel)
        started = time.monotonic()
        loader = self.data.loader(model)
        keys, image_embeds, names = self._embed(loader, model, device)
        colour = torch.tensor([COLOUR_NAMES.index(c) for c, _ in names])
        shape = torch.tensor([SHAPE_NAMES.index(s) for _, s in names])
        unseen = torch.tensor([pair in HELD_OUT_PAIRS for pair in names])
        pair = colour * len(SHAPE_NAMES) + shape
        scores = image_embeds @ class_weights(model, self.tokenize, PAIRS, TEMPLATES).T.cpu()
        top5 = (scores.topk(5).indices == pair[:, None]).any(-1)
        right = scores.argmax(-1) == pair
        colour_weights = class_weights(model, self.tokenize, COLOUR_NAMES, COLOUR_TEMPLATES)
        shape_weights = class_weights(model, self.tokenize, SHAPE_NAMES, TEMPLATES)
        colour_said = (image_embeds @ colour_weights.T.cpu()).argmax(-1)
        shape_said = (image_embeds @ shape_weights.T.cpu()).argmax(-1)
        figures = {
            "top1": _share(right),
            "top1_baseline": 1 / len(PAIRS),
            "top5": _share(top5),
            "top5_baseline": 5 / len(PAIRS),
            "top1_seen_pairs": _share(right[~unseen]),
            "top1_seen_pairs_baseline": 1 / len(PAIRS),
            "top1_unseen_pairs": _share(right[unseen]),
            "top1_unseen_pairs_baseline": 1 / len(PAIRS),
            "colour_top1": _share(colour_said == colour),
            "colour_top1_baseline": 1 / len(COLOUR_NAMES),
            "shape_top1": _share(shape_said == shape),
            "shape_top1_baseline": 1 / len(SHAPE_NAMES),
        }
        self.details = {
            "colour_confusion": _confusion(colour, colour_said, len(COLOUR_NAMES)),
            "shape_confusion": _confusion(shape, shape_said, len(SHAPE_NAMES)),
            "colours": list(COLOUR_NAMES),
            "shapes": list(SHAPE_NAMES),
        }
        self._card = {
            "protocol": PROTOCOL,
            "baseline": "chance",
            "scenes": "exactly one object",
            "classes_sha256": sha256_of_names(PAIRS),
            "templates": list(TEMPLATES),
            "colour_templates": list(COLOUR_TEMPLATES),
            "count_unseen_pairs": int(unseen.sum()),
            **data_card_fields(
                self.data.shards,
                keys=keys,
                image_size=model.config.vision_config.image_size,
                skipped=num_skipped(loader),
            ),
            **model_card_fields(model, device=device),
            **run_card_fields(seconds=time.monotonic() - started),
        }
        return figures

    def card(self) -> dict[str, Any]:
        """The protocol of the last run."""
        return self._card

    def _embed(
        self, loader: StatefulDataLoader, model: QLIPModel, device: torch.device
    ) -> tuple[list[str], Tensor, list[tuple[str, str]]]:
        """Keys, image embeddings (n, e) and (colour, shape) of every scene with one object."""
        keys: list[str] = []
        names: list[tuple[str, str]] = []
        embeds = []
        with progress("zero-shot", self.data.max_samples) as bar:
            for batch in loader:
                single = [i for i, record in enumerate(batch["record"]) if len(_objects(record)) == 1]
                single = single[: self.data.max_samples - len(keys)]
                if single:
                    features = model.get_image_features(batch["pixel_values"][single].to(device))
                    embeds.append(unit_norm(features.pooler_output).cpu())
                for i in single:
                    only = _objects(batch["record"][i])[0]
                    keys.append(batch["key"][i])
                    names.append((only["colour"], only["shape"]))
                bar.update(len(keys))
                if len(keys) >= self.data.max_samples:
                    break
        if not keys:
            raise UserError(f"{self.data.shards} holds no scene with one object; make some with `qlip data scenes`")
        return keys, torch.cat(embeds), names


def _objects(record: dict) -> list[dict]:
    if "scene" not in record:
        raise UserError("zero-shot evaluation needs scene shards (json with `scene`); make some: `qlip data scenes`")
    return record["scene"]["objects"]


def _share(hits: Tensor) -> float:
    """Share of True, NaN for an empty set."""
    return float(hits.double().mean())


def _confusion(truth: Tensor, said: Tensor, num_classes: int) -> list[list[int]]:
    """Counts, row = true class, column = answer."""
    counts = torch.bincount(truth * num_classes + said, minlength=num_classes**2)
    return counts.view(num_classes, num_classes).tolist()
