"""Image-text retrieval: R@K both ways among all pictures and captions of the data (COCO, Flickr30k)."""

from __future__ import annotations

import time
from math import comb
from typing import Any

import torch
from torch import Tensor

from qlip.core.errors import UserError
from qlip.data.items import Item
from qlip.evals.card import card_of, sha256_of_truth
from qlip.evals.inputs import EvalInput, picture_side, require_ability
from qlip.evals.protocols import Protocol, RetrievalSettings
from qlip.models.measured import MeasuredModel

QUERIES_AT_ONCE = 500
TEXTS_AT_ONCE = 256


def ranks_of_right(queries: Tensor, candidates: Tensor, right: Tensor) -> Tensor:
    """How many candidates stand before the best right one, for every query: (q,) int64, 0 is found first.

    `queries` (q, e) and `candidates` (c, e) have norm 1; `right` (q, k) holds indices of candidates, any of which is an
    answer. Wrong candidates of the same score stand before the right one: ties count against the model, and so does
    NaN. Queries are gone through in chunks, so that (q, c) never exists.
    """
    found = []
    for rows, answers in zip(queries.split(QUERIES_AT_ONCE), right.split(QUERIES_AT_ONCE), strict=True):
        scores = rows @ candidates.T  # (chunk, c)
        best = scores.gather(1, answers).amax(1, keepdim=True)
        wrong = torch.ones_like(scores, dtype=torch.bool).scatter(1, answers, False)
        found.append((~(scores < best) & wrong).sum(1))  # not `>=`: where a score is NaN, that finds all right
    return torch.cat(found)


def chance_of_recall(num_candidates: int, *, num_right: int, k: int) -> float:
    """The chance that k different candidates drawn at random hold one of `num_right` answers."""
    k = min(k, num_candidates)
    return 1 - comb(num_candidates - num_right, k) / comb(num_candidates, k)


class RetrievalEvaluator:
    """Image to text and text to image."""

    def __init__(self, protocol: Protocol, data: EvalInput) -> None:
        assert isinstance(protocol.settings, RetrievalSettings)
        self.protocol, self.settings, self.data = protocol, protocol.settings, data
        self.details: dict[str, Any] = {}
        self._card: dict[str, Any] = {}

    @torch.inference_mode()
    def run(self, model: MeasuredModel, device: torch.device) -> dict[str, float]:
        """`image_to_text_r<K>` and `text_to_image_r<K>` in [0, 1]; `<figure>_baseline` is chance.

        Pictures are shared by the ranks, captions are embedded by every one. Raises `UserError` for a picture with
        fewer captions than the protocol takes.
        """
        started = time.monotonic()
        require_ability(model, "match_text", self.protocol)
        size = picture_side(model, self.protocol)
        if self.protocol.split and self.data.split not in ("", self.protocol.split):
            wanted = self.protocol.split
            raise UserError(f"{self.protocol.name} is of the {wanted} split: leave out --split {self.data.split}")
        captions: dict[str, tuple[str, ...]] = {}

        def captioned(item: Item) -> bool:
            captions[item.key] = self._captions(item)
            return True

        collected = self.data.collect(
            self.protocol,
            lambda batch: {"embeds": model.image_embeds(batch["pictures"])},
            model=model,
            device=device,
            wanted=captioned,
        )
        images = collected.rows("embeds")["embeds"]
        texts = [caption for key in collected.keys for caption in captions[key]]
        embeds = torch.cat(
            [model.text_embeds(texts[i : i + TEXTS_AT_ONCE]).cpu() for i in range(0, len(texts), TEXTS_AT_ONCE)]
        )
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
            "num_captions": len(texts),
            "captions_sha256": sha256_of_truth(collected.keys, (captions[key] for key in collected.keys)),
            "ties": "against the model",
        }
        return self._figures(images, embeds)

    def card(self) -> dict[str, Any]:
        """The protocol of the last run."""
        return self._card

    def _captions(self, item: Item) -> tuple[str, ...]:
        wanted = self.settings.captions_per_image
        if len(item.captions) < wanted:
            raise UserError(
                f"{self.data.source.name}: {item.key} has {len(item.captions)} captions, {self.protocol.name} takes "
                f"{wanted}: give pictures that have as many" + ("; images-retrieval-v1 takes one" if wanted > 1 else "")
            )
        return item.captions[:wanted]

    def _figures(self, images: Tensor, texts: Tensor) -> dict[str, float]:
        """Recalls of (n, e) pictures and (n * captions, e) texts, those of a picture side by side."""
        each = self.settings.captions_per_image
        place = torch.arange(len(texts))
        directions = {
            "image_to_text": (ranks_of_right(images, texts, place.view(-1, each)), each, len(texts)),
            "text_to_image": (ranks_of_right(texts, images, (place // each)[:, None]), 1, len(images)),
        }
        figures = {}
        for name, (ranks, num_right, num_candidates) in directions.items():
            for k in self.settings.ranks:
                figures[f"{name}_r{k}"] = float((ranks < k).double().mean())
                figures[f"{name}_r{k}_baseline"] = chance_of_recall(num_candidates, num_right=num_right, k=k)
        return figures
