"""Captions of scenes that a model writes, read back and judged against what the scene shows."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from qlip.data.items import Item
from qlip.data.scene_text import dense_caption
from qlip.evals.card import pixel_card_fields, sha256_of_truth
from qlip.evals.inputs import EvalInput, objects_of_scene
from qlip.evals.protocols import Protocol, SceneCaptionSettings
from qlip.evals.scene_sentences import FIGURES, judge_caption, most_frequent_answers, read_caption
from qlip.evals.written import (
    TEXT,
    AnyModel,
    captions_of,
    image_numbers,
    require_unified,
    texts_of,
    truths_of,
    write_captions,
    written_card,
)
from qlip.models.unified_model import WritingSettings

MOST_SHOWN, LONGEST_SHOWN = 10, 200  # wrong captions that details name, and their letters


class SceneCaptionEvaluator:
    """Share of captions that say what is there."""

    def __init__(self, protocol: Protocol, data: EvalInput) -> None:
        assert isinstance(protocol.settings, SceneCaptionSettings)
        self.protocol, self.settings, self.data = protocol, protocol.settings, data
        self.details: dict[str, Any] = {}
        self._card: dict[str, Any] = {}
        self._captions: list[str] = []
        self._numbers: list[int] = []

    @torch.inference_mode()
    def run(self, model: AnyModel, device: torch.device) -> dict[str, float]:
        """Shares in [0, 1] by `scene_sentences.judge_caption`.

        `<figure>_baseline` is the share of the most frequent truth: what one caption for all scenes gets at best.

        Ranks share the scenes. Raises `UserError` before any work for a model that writes no captions and for data that
        are no scenes, or fewer than two.
        """
        started = time.monotonic()
        unified = require_unified(model, "caption", self.protocol)
        what = "scenes; give at least 2: `qlip data scenes` makes some"
        scenes = truths_of(self.data, _scene, least=2, what=what)
        writing = WritingSettings(temperature=0.0, max_new_tokens=self.settings.max_new_tokens)
        collected = self.data.collect(
            self.protocol,
            captions_of(unified, writing),
            model=unified,  # type: ignore[arg-type]  # whose identity and side alone are used
            device=device,
            wanted=lambda item: item.key in scenes,
        )
        self._captions = texts_of(collected.rows(TEXT)[TEXT])
        truths = [scenes[key] for key in collected.keys]
        self._numbers, numbered_by = image_numbers(collected, dict.fromkeys(scenes))
        judged = [judge_caption(caption, truth) for caption, truth in zip(self._captions, truths, strict=True)]
        figures = {name: sum(row[name] for row in judged) / len(judged) for name in FIGURES}
        figures |= {f"{name}_baseline": share for name, share in most_frequent_answers(truths).items()}
        self.details = _details(self._captions, truths)
        self._card = written_card(
            self.protocol,
            unified,
            data=self.data,
            collected=collected,
            baseline="most frequent answer",
            device=device,
            started=started,
        )
        self._card |= {
            **pixel_card_fields(collected),
            "truths_sha256": sha256_of_truth(collected.keys, (json.dumps(truth, sort_keys=True) for truth in truths)),
            "decoding": "greedy",
            "empty_captions": self._captions.count(""),
            "image_ids": numbered_by,
        }
        return figures

    def card(self) -> dict[str, Any]:
        """The protocol of the last run."""
        return self._card

    def write_answers(self, folder: Path) -> None:
        """The captions of the last run, as `OUT/<protocol>_captions.json`."""
        write_captions(folder / f"{self.protocol.name}_captions.json", self._numbers, self._captions)


def _scene(item: Item) -> dict[str, Any]:
    """Ground truth. Raises `UserError` for what is no scene."""
    objects_of_scene(item)
    return item.record["scene"]


def _details(captions: list[str], truths: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures by number of objects, how many captions say colours, and the first that are wrong beside the truth."""
    judged = [judge_caption(caption, truth) for caption, truth in zip(captions, truths, strict=True)]
    by_number: dict[str, dict[str, float]] = {}
    for number in sorted({len(truth["objects"]) for truth in truths}):
        rows = [row for row, truth in zip(judged, truths, strict=True) if len(truth["objects"]) == number]
        shares = {name: sum(row[name] for row in rows) / len(rows) for name in FIGURES}
        by_number[str(number)] = {"scenes": len(rows), **shares}
    understood = [said for said in map(read_caption, captions) if said is not None]
    wrong = [
        {"caption": caption[:LONGEST_SHOWN], "scene": dense_caption(truth)}
        for caption, truth, row in zip(captions, truths, judged, strict=True)
        if not (row["objects"] and row["colours"] and row["counts"])
    ]
    return {
        "by_number_of_objects": by_number,
        "captions_that_say_all_colours": sum(all(obj.colour for obj in said.objects) for said in understood),
        "wrong": wrong[:MOST_SHOWN],
    }
