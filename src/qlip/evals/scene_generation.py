"""GenEval's six categories on scenes: pictures of prompts, read back by classical vision, with chance beside them.

Prompts and judgement are those of `evals/scenes.py`; chance is what scenes of the data get that were drawn without
regard to the prompt.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import torch

from qlip.core import distributed
from qlip.core.errors import UserError
from qlip.core.log import progress
from qlip.data.items import Item
from qlip.evals.benchmark_files import pictures_of, want
from qlip.evals.card import run_card_fields, sha256_in_order, sha256_of_names
from qlip.evals.geneval import TAGS
from qlip.evals.inputs import EvalInput, objects_of_scene
from qlip.evals.protocols import Protocol, ScenePromptSettings
from qlip.evals.scene_reader import read_scenes
from qlip.evals.scenes import chance, has_unseen_pair, judge, scene_prompts
from qlip.evals.text_to_image import generator_card, require_generator
from qlip.models.measured import MeasuredGenerator, MeasuredModel

REASONS_KEPT = 3  # per prompt; the rest says the same


class SceneGenerationEvaluator:
    """Share of pictures that show what their prompt says, by category."""

    def __init__(self, protocol: Protocol, data: EvalInput) -> None:
        assert isinstance(protocol.settings, ScenePromptSettings)
        self.protocol, self.settings, self.data = protocol, protocol.settings, data
        self.details: dict[str, Any] = {}
        self._card: dict[str, Any] = {}

    @torch.inference_mode()
    def run(self, model: MeasuredModel | MeasuredGenerator, device: torch.device) -> dict[str, float]:
        """A share in [0, 1] for each of `geneval.TAGS`, and `overall`, their mean; `<figure>_baseline` is chance.

        Ranks share the prompts. Raises `UserError` before any work for a model that generates nothing and for data that
        are no scenes.
        """
        started = time.monotonic()
        generator = require_generator(model, self.protocol)
        keys, records = distributed.on_all_ranks(self._records)
        prompts = scene_prompts(num_per_category=self.settings.num_per_category, seed=self.settings.seed)
        own = distributed.on_all_ranks(lambda: self._judge_own(generator, prompts))
        found = dict(entry for ranks in distributed.gather_objects(own) for entry in ranks)
        self.details = {"prompts": [found[index] for index in range(len(prompts))]}
        figures: dict[str, float] = {}
        by_chance = chance(prompts, records)
        for tag in TAGS:
            counts = [entry["correct"] for entry in self.details["prompts"] if entry["tag"] == tag]
            figures[tag] = sum(counts) / (self.settings.num_samples * len(counts))
            figures[f"{tag}_baseline"] = by_chance[tag]
        for suffix in ("", "_baseline"):
            figures[f"overall{suffix}"] = sum(figures[tag + suffix] for tag in TAGS) / len(TAGS)
        self._card = {
            **generator_card(self.protocol, generator, data=self.data, device=device),
            "complete": True,
            "baseline": "chance",
            "count": self.settings.num_samples * len(prompts),
            "num_prompts": len(prompts),
            "prompts_sha256": sha256_in_order(prompt["prompt"] for prompt in prompts),
            "image_size": generator.image_size,
            "keys_sha256": sha256_of_names(keys),
            "num_scenes": len(keys),
            **run_card_fields(seconds=time.monotonic() - started),
        }
        return figures

    def card(self) -> dict[str, Any]:
        """The protocol of the last run."""
        return self._card

    def _records(self) -> tuple[list[str], list[dict[str, Any]]]:
        """Keys and ground truth of the first scenes of the data."""
        most = min(filter(None, (self.settings.num_records, self.data.max_samples)))
        keys, records = [], []
        for item in self.data.source.items():
            if isinstance(item, Item):
                objects_of_scene(item)  # refuses what is no scene
                keys.append(item.key)
                records.append(item.record["scene"])
            if len(keys) == most:
                break
        if not keys:
            raise UserError(f"{self.data.source.name} holds no scenes; make some: `qlip data scenes`")
        return keys, records

    def _judge_own(
        self, generator: MeasuredGenerator, prompts: list[dict[str, Any]]
    ) -> list[tuple[int, dict[str, Any]]]:
        """Place and judgement of every prompt of this rank."""
        num = self.settings.num_samples
        wanted = want([prompt["prompt"] for prompt in prompts], seed=self.settings.seed, num_samples=num)
        own = wanted[distributed.rank() :: distributed.world_size()]
        judged = []
        with progress(self.protocol.name, num * len(own)) as bar:
            for entry, pictures in pictures_of(
                lambda texts, seeds: generator.generate(texts, seeds=seeds), own, batch_size=self.data.batch_size
            ):
                prompt = prompts[entry.index]
                verdicts = [judge(prompt, objects) for objects in read_scenes(pictures)]
                reasons = Counter(verdict.reason for verdict in verdicts if not verdict.correct)
                counts = {
                    "tag": prompt["tag"],
                    "prompt": prompt["prompt"],
                    "correct": sum(verdict.correct for verdict in verdicts),
                    "pictures": num,
                    "unseen_pair": has_unseen_pair(prompt),
                    "reasons": [reason for reason, _ in reasons.most_common(REASONS_KEPT)],
                }
                judged.append((entry.index, counts))
                bar.update(num * len(judged))
        return judged
