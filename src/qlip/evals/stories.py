"""Stories of scenes: how probable they are to a model, and whether it remembers its hero's colour to the end."""

from __future__ import annotations

import io
import math
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from qlip.core import distributed
from qlip.core.errors import UserError
from qlip.data.items import Item, Source
from qlip.data.tar_reader import Skip
from qlip.evals.card import sha256_of_names, sha256_of_truth
from qlip.evals.collect import Batch
from qlip.evals.inputs import EvalInput
from qlip.evals.protocols import Protocol, StorySettings
from qlip.evals.written import AnyModel, require_unified, truths_of, written_card
from qlip.models.unified_model import Unified, WritingSettings

ENDING = re.compile(r"(?P<start>.* stayed) (?P<colour>\w+) for ever\.", re.DOTALL)
"""The last sentence of `data/scene_text.story`."""
WORD = re.compile(r"\w+")


class _WithoutPictures:
    """The same items with one black pixel each: rows are collected of pictures, and stories need none decoded."""

    def __init__(self, source: Source) -> None:
        self.name, self.class_names, self.num_items = source.name, source.class_names, source.num_items
        self.identity, self._source, file = source.identity, source, io.BytesIO()
        Image.new("RGB", (1, 1)).save(file, "PNG")
        self._pixel = file.getvalue()

    def items(self) -> Iterator[Item | Skip]:
        """In the source's order."""
        for item in self._source.items():
            yield replace(item, image=self._pixel) if isinstance(item, Item) else item


class StoryEvaluator:
    """Perplexity of stories, and the share whose last colour the model says.

    Stories are of different lengths and each is scored alone: a batch saves no forward pass. Pictures are not decoded,
    so a scene whose picture is broken counts, and the card names no pixels.
    """

    def __init__(self, protocol: Protocol, data: EvalInput) -> None:
        assert isinstance(protocol.settings, StorySettings)
        self.protocol, self.settings, self.data = protocol, protocol.settings, data
        self.details: dict[str, Any] = {}
        self._card: dict[str, Any] = {}

    @torch.inference_mode()
    def run(self, model: AnyModel, device: torch.device) -> dict[str, float]:
        """`perplexity` of a token, `bits_per_byte` of UTF-8, and `continued`, a share in [0, 1].

        Each story is scored by itself, with the end behind it. Baselines are the frequencies of these stories' own
        tokens, whatever stands before them, and the most frequent colour. Raises `UserError` before any work for a
        model that continues no texts, data without stories, and a story that is longer than the context.
        """
        started = time.monotonic()
        unified = require_unified(model, "continue", self.protocol)
        what = "stories; give scene shards, whose json has `story`: `qlip data scenes` makes some"
        stories = truths_of(self.data, _story, least=1, what=what)
        ids = distributed.on_all_ranks(lambda: self._ids(unified, stories))
        collected = replace(self.data, source=_WithoutPictures(self.data.source)).collect(
            self.protocol,
            lambda batch: self._measure(unified, stories, batch),
            model=unified,  # type: ignore[arg-type]  # whose identity and side alone are used
            device=device,
            wanted=lambda item: item.key in stories,
        )
        rows = collected.rows("nll", "tokens", "continued")
        texts = [stories[key] for key in collected.keys]
        nll, tokens = float(rows["nll"].sum()), int(rows["tokens"].sum())
        num_bytes = sum(len(text.encode()) for text in texts)
        by_frequency = _nll_by_frequency([ids[key] for key in collected.keys])
        figures: dict[str, float] = {}
        for suffix, total in (("", nll), ("_baseline", by_frequency)):
            figures[f"perplexity{suffix}"] = _exp(total / tokens)
            figures[f"bits_per_byte{suffix}"] = total / math.log(2) / num_bytes
        colours = Counter(found["colour"] for found in map(ENDING.fullmatch, texts) if found)
        if colours:
            figures["continued"] = int((rows["continued"] == 1).sum()) / colours.total()
            figures["continued_baseline"] = max(colours.values()) / colours.total()
        self.details = {"nll": nll, "tokens": tokens, "bytes": num_bytes, "colours": dict(colours.most_common())}
        self._card = written_card(
            self.protocol,
            unified,
            data=self.data,
            collected=collected,
            baseline="token frequencies, majority colour",
            device=device,
            started=started,
        )
        self._card |= {
            "truths_sha256": sha256_of_truth(collected.keys, texts),
            "text_tokens_sha256": sha256_of_names(f"{key}\0{ids[key]}" for key in collected.keys),
            "softmax": unified.model.config.softmax,
            "num_tokens": tokens,
            "num_bytes": num_bytes,
            "decoding": "greedy",
        }
        return figures

    def card(self) -> dict[str, Any]:
        """The protocol of the last run."""
        return self._card

    def _ids(self, model: Unified, stories: dict[str, str]) -> dict[str, list[int]]:
        """Key -> tokens of its story and the end behind it."""
        processor, found = model.processor, dict[str, list[int]]()
        for key, text in stories.items():
            found[key] = [*processor.encode_text(text), int(processor.tokenizer.eos_token_id)]
            if len(found[key]) >= model.context_length:
                raise UserError(
                    f"{self.data.source.name}: the story of {key} has {len(found[key])} tokens, the context "
                    f"{model.context_length}: take a model of a longer context, or leave {self.protocol.name} out of "
                    "--evals"
                )
        return found

    def _measure(self, model: Unified, stories: dict[str, str], batch: Batch) -> dict[str, Tensor]:
        """`nll` in nats, `tokens`, and `continued`: 1 right, 0 wrong, -1 for a story of another ending; (b,) each."""
        num = int((batch["sample_index"] != -1).sum())  # nothing is read for padding
        texts = [stories[item.key] for item in batch["items"][:num]]
        scored = model.text_nll(texts)
        return {
            "nll": torch.tensor([nll for nll, _ in scored], dtype=torch.float64),
            "tokens": torch.tensor([count for _, count in scored]),
            "continued": torch.tensor([self._continues(model, text) for text in texts]),
        }

    def _continues(self, model: Unified, text: str) -> int:
        found = ENDING.fullmatch(text)
        if found is None:
            return -1
        settings = WritingSettings(temperature=0.0, max_new_tokens=self.settings.max_new_tokens)
        written = model.continue_from([found["start"]], settings)
        word = WORD.search("".join(part for part in written if isinstance(part, str)))
        return int(word is not None and word[0] == found["colour"])


def _story(item: Item) -> str | None:
    text = item.record.get("story")
    return text if isinstance(text, str) and text.strip() else None


def _nll_by_frequency(texts: list[list[int]]) -> float:
    """-ln p in nats of all ids under their own frequencies."""
    counts = Counter(one for ids in texts for one in ids)
    total = counts.total()
    return -sum(count * math.log(count / total) for count in counts.values())


def _exp(value: float) -> float:
    """e to that power, infinite where floats end."""
    return math.exp(value) if value < 700 else math.inf
