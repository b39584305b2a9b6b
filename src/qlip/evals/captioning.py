"""Captions of pictures against those that people wrote: BLEU, METEOR, ROUGE-L, CIDEr as in COCO's evaluation."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qlip.core import distributed
from qlip.core.errors import UserError
from qlip.core.log import console
from qlip.data.items import Item
from qlip.evals.caption_scores import caption_scores, require_scorers, tokenized, tokenized_references
from qlip.evals.card import pixel_card_fields, sha256_of_truth
from qlip.evals.inputs import EvalInput
from qlip.evals.protocols import CaptionSettings, Protocol
from qlip.evals.text_to_image import SEED_RULE
from qlip.evals.written import (
    TEXT,
    AnyModel,
    captions_of,
    image_numbers,
    of_its_split,
    require_unified,
    texts_of,
    truths_of,
    write_captions,
    written_card,
)
from qlip.models.unified_model import WritingSettings


class CaptionEvaluator:
    """One caption of every picture, scored against its references."""

    def __init__(self, protocol: Protocol, data: EvalInput) -> None:
        assert isinstance(protocol.settings, CaptionSettings)
        self.protocol, self.settings, self.data = protocol, protocol.settings, data
        self.details: dict[str, Any] = {}
        self._card: dict[str, Any] = {}
        self._captions: list[str] = []
        self._numbers: list[int] = []

    @torch.inference_mode()
    def run(self, model: AnyModel, device: torch.device) -> dict[str, float]:
        """`caption_scores.FIGURES`, times 100; `<figure>_baseline` takes the first reference of the next picture.

        Ranks share the pictures; the first one scores. Raises `UserError` before any work for a model that writes no
        captions, without Java or pycocoevalcap, for data with fewer than two captioned pictures, and another split.
        """
        started = time.monotonic()
        unified = require_unified(model, "caption", self.protocol)
        if self.protocol.split and self.data.split not in ("", self.protocol.split):
            wanted = self.protocol.split
            raise UserError(f"{self.protocol.name} is of the {wanted} split: leave out --split {self.data.split}")
        scorer = distributed.on_all_ranks(require_scorers)
        what = "pictures with captions; give at least 2, for example COCO's captions (docs/data.md)"
        known = truths_of(self.data, _references, least=2, what=what)
        settings = self.settings
        writing = WritingSettings(
            temperature=settings.temperature, top_p=settings.top_p, top_k=0, max_new_tokens=settings.max_new_tokens
        )
        collected = self.data.collect(
            self.protocol,
            captions_of(unified, writing, seed=settings.seed),
            model=unified,  # type: ignore[arg-type]  # whose identity and side alone are used
            device=device,
            wanted=lambda item: item.key in known,
        )
        self._captions = texts_of(collected.rows(TEXT)[TEXT])
        references = [known[key][0] for key in collected.keys]
        numbers = {key: number for key, (_, number) in known.items()}
        self._numbers, numbered_by = image_numbers(collected, numbers)
        scores: list[dict[str, float]] = []
        distributed.on_first_rank(partial(self._score, references, scores))
        scores = distributed.gather_objects(scores)[0]
        self._card = written_card(
            self.protocol,
            unified,
            data=self.data,
            collected=collected,
            baseline="first reference of the next picture",
            device=device,
            started=started,
        )
        self._card |= {**pixel_card_fields(collected), **self._about(collected.keys, references)}
        self._card |= {"scorer": scorer, "image_ids": numbered_by}
        self._warn_of_other_pictures(len(references))
        return scores[0] | {f"{name}_baseline": value for name, value in scores[1].items()}

    def card(self) -> dict[str, Any]:
        """The protocol of the last run."""
        return self._card

    def write_answers(self, folder: Path) -> None:
        """The captions of the last run, as `OUT/<protocol>_captions.json`."""
        write_captions(folder / f"{self.protocol.name}_captions.json", self._numbers, self._captions)

    def _about(self, keys: list[str], references: list[tuple[str, ...]]) -> dict[str, Any]:
        """What the card says of captions, both ours and people's."""
        settings, counts = self.settings, [len(texts) for texts in references]
        return {
            "captions_sha256": sha256_of_truth(keys, references),
            "num_captions": sum(counts),
            "references_per_picture": [min(counts), max(counts)],
            "document_frequencies": "of the references of these pictures",
            "decoding": "sampling" if settings.temperature else "greedy",
            "sampling": {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0},
            "max_new_tokens": settings.max_new_tokens,
            "empty_captions": self._captions.count(""),
            **({"seeds": SEED_RULE} if settings.temperature else {}),
        }

    def _warn_of_other_pictures(self, count: int) -> None:
        """Say that figures are of other pictures than the protocol's."""
        if self._card["complete"]:
            return
        what = f"{count} pictures, not {self.protocol.count}"
        if count == self.protocol.count and not of_its_split(self.protocol, self.data):
            what = f"{self.data.source.name} does not say that it is the {self.protocol.split} split"
        console.print(f"{self.protocol.name}: {what}: CIDEr and BLEU compare only with figures of the same pictures")

    def _score(self, references: list[tuple[str, ...]], scores: list[dict[str, float]]) -> None:
        """Append the figures of the captions, and of the next picture's first reference."""
        right = tokenized_references(references)
        firsts = [texts[0] for texts in right]
        candidates = [tokenized(self._captions), firsts[1:] + firsts[:1]]
        scores += caption_scores(candidates, right, title=self.protocol.name)


def _references(item: Item) -> tuple[tuple[str, ...], Any] | None:
    """Captions, and COCO's number of the picture where there is one."""
    return (item.captions, item.record.get("cocoid")) if item.captions else None
