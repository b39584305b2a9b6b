"""Generators of pictures: gFID and CLIP scores on captions, GenEval's categories on scenes.

Every picture has a seed of its own (`picture_seed`), so figures depend neither on batches nor on ranks. Shapes: `b`
pictures, `S` their side, `e` width of embeddings.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from qlip.core import distributed
from qlip.core.errors import UserError
from qlip.core.log import console
from qlip.data.items import Item, Source
from qlip.evals.benchmark_files import picture_seed
from qlip.evals.card import run_card_fields, sha256_of_names, sha256_of_pixels, sha256_of_truth
from qlip.evals.collect import PIXEL_DIGEST, Batch, Collected, Measure, collect
from qlip.evals.generation_networks import COSINES, FRECHET, Judges, resized
from qlip.evals.inputs import EvalInput
from qlip.evals.picture_metrics import statistics_of
from qlip.evals.protocols import Protocol, TextToImageSettings
from qlip.evals.reconstruction import FEW_FOR_FID, LEAST_FOR_FID
from qlip.metrics.frechet import frechet_distance
from qlip.models.measured import MeasuredGenerator, MeasuredModel

CLIPSCORE_WEIGHT = 2.5  # arXiv 2104.08718
SEED_RULE = "63 bits of sha256(seed/prompt/sample)"


def require_generator(model: MeasuredModel | MeasuredGenerator, protocol: Protocol) -> MeasuredGenerator:
    """The model as a generator. Raises `UserError` when it generates no pictures."""
    if "generate" not in model.abilities:
        raise UserError(
            f"a {model.name} generates no pictures: leave {protocol.name} out of --evals, or give a text-to-image model"
        )
    return cast(MeasuredGenerator, model)


class Drawn(NamedTuple):
    """The caption that a picture of the data was drawn with."""

    place: int
    """In the draw: what the generated picture's seed depends on."""
    caption: str


def draw_captions(source: Source, *, num: int, seed: int) -> dict[str, Drawn]:
    """Key -> one of its captions, for `num` pictures that have some; 0 takes all.

    Pictures come in the order of sha256 over `seed/key`, whose first 64 bits also choose the caption: the draw of a
    smaller number begins that of a larger one, and the order of the data does not matter.
    """
    found = []
    for item in source.items():
        if isinstance(item, Item) and item.captions:
            digest = hashlib.sha256(f"{seed}/{item.key}".encode()).digest()
            found.append((digest[8:], item.key, item.captions[int.from_bytes(digest[:8]) % len(item.captions)]))
    chosen = sorted(found)[: num or None]
    return {key: Drawn(place=place, caption=caption) for place, (_, key, caption) in enumerate(chosen)}


class TextToImageEvaluator:
    """Pictures of captions, against all pictures of the data and against their captions."""

    def __init__(self, protocol: Protocol, data: EvalInput, *, clip: Path | None) -> None:
        """`clip` is the folder of the model that scores pictures against captions, where the protocol asks for one."""
        assert isinstance(protocol.settings, TextToImageSettings)
        self.protocol, self.settings, self.data, self.clip = protocol, protocol.settings, data, clip
        self.wanted = tuple(name for name in self.settings.metrics if name not in data.leave_out)
        self.details: dict[str, Any] = {}
        self._card: dict[str, Any] = {}

    @torch.inference_mode()
    def run(self, model: MeasuredModel | MeasuredGenerator, device: torch.device) -> dict[str, float]:
        """Frechet distances; cosines in [-1, 1]; `clip_cosine_baseline` is each picture's with another's caption.

        Raises `UserError` before any work for a model that generates nothing, missing weights and too few captions.
        """
        started = time.monotonic()
        generator = require_generator(model, self.protocol)
        if not self.wanted:
            raise UserError(f"{self.protocol.name}: nothing is left to measure; leave out less")
        judges = distributed.on_all_ranks(
            lambda: Judges(
                self.wanted, protocol=self.protocol, networks=self.data.networks, clip=self.clip, device=device
            )
        )
        side = self.protocol.preparation.size or generator.image_size
        limits = [number for number in (self.settings.num_captions, self.data.max_samples) if number]
        drawn = draw_captions(self.data.source, num=min(limits, default=0), seed=self.settings.seed)
        self._refuse_few(len(drawn), source=self.data.source, what="pictures with captions")
        collected = self._collect(
            self.data.source, self._measure(generator, judges, drawn, side), generator, judges, device, drawn=drawn
        )
        self._refuse_few(len(collected.keys), source=self.data.source, what="usable pictures with captions")
        figures = self._clip_figures(collected)
        self._card = self._card_of(generator, judges, collected, drawn, device, side)
        if set(FRECHET) & set(self.wanted):
            source = self.data.reference or self.data.source
            reference = self._collect(
                source, lambda batch: judges.features(batch["pictures"]), generator, judges, device
            )
            self._refuse_few(len(reference.keys), source=source, what="pictures to compare with")
            figures |= self._distances(reference, collected)
            self._card |= {
                "reference": f"all pictures of {source.name}",
                "reference_count": len(reference.keys),
                "reference_skipped": reference.skipped.total(),
                "reference_keys_sha256": sha256_of_names(reference.keys),
                "reference_pixels_sha256": sha256_of_pixels(reference.rows(PIXEL_DIGEST)[PIXEL_DIGEST]),
            }
        self._card |= run_card_fields(seconds=time.monotonic() - started)
        return figures

    def card(self) -> dict[str, Any]:
        """The protocol of the last run."""
        return self._card

    def _refuse_few(self, count: int, *, source: Source, what: str) -> None:
        least = LEAST_FOR_FID if "gfid" in self.wanted else 2
        if count < least:
            why = ", fewer than its features: gFID has no meaning" if least > 2 else ""
            remedy = ", or --leave-out gfid" if least > 2 else ""
            raise UserError(f"{source.name}: {count} {what}{why}; give at least {least}{remedy}")

    def _collect(
        self,
        source: Source,
        measure: Measure,
        generator: MeasuredGenerator,
        judges: Judges,
        device: torch.device,
        *,
        drawn: dict[str, Drawn] | None = None,
    ) -> Collected:
        """Rows of the pictures that were drawn, or (None) of all; finished parts are kept where there is a folder."""
        size = self.protocol.preparation.size or generator.image_size
        folder = self.data.work_folder(
            "parts",
            model=cast(MeasuredModel, generator),  # whose identity alone is used
            device=device,
            source=source,
            max_samples=0 if drawn is None else len(drawn),
            role="reference" if drawn is None else "generated",
            sampling=generator.sampling,
            wanted=self.wanted,
            **judges.card,
            **self.protocol.card(),
        )
        reading = self.data.reading(
            source,
            preparation=self.protocol.preparation,
            size=size,
            wanted=None if drawn is None else lambda item: item.key in drawn,
            max_samples=0,
        )
        title = self.protocol.name + (" reference" if drawn is None else "")
        return collect(reading, measure, title=title, device=device, folder=folder)

    def _measure(self, generator: MeasuredGenerator, judges: Judges, drawn: dict[str, Drawn], side: int) -> Measure:
        def measure(batch: Batch) -> dict[str, Tensor]:
            num = int((batch["sample_index"] != -1).sum())  # nothing is generated for padding
            chosen = [drawn[item.key] for item in batch["items"][:num]]
            seeds = [picture_seed(self.settings.seed, prompt_index=entry.place, sample_index=0) for entry in chosen]
            generated = generator.generate([entry.caption for entry in chosen], seeds=seeds)
            pictures = resized(generated, size=side, filter=self.protocol.preparation.filter)
            rows = judges.features(pictures)
            if judges.clip is not None and set(COSINES) & set(self.wanted):
                texts = judges.clip.text_embeds([self.settings.prefix + entry.caption for entry in chosen])
                rows |= {"image": judges.embeds(pictures), "text": texts}
                rows["real"] = (judges.embeds(batch["pictures"][:num]) * texts).sum(-1)
            return rows

        return measure

    def _clip_figures(self, collected: Collected) -> dict[str, float]:
        """Cosines of pictures with their captions; with the next picture's as baseline; of the real ones as detail."""
        self.details = {}
        if not set(COSINES) & set(self.wanted):
            return {}
        rows = collected.rows("image", "text", "real")
        images, texts = rows["image"].double(), rows["text"].double()
        figures: dict[str, float] = {}
        for suffix, cosine in (
            ("", (images * texts).sum(-1)),
            ("_baseline", (images * texts.roll(1, 0)).sum(-1)),
            ("_real", rows["real"].double()),
        ):
            values = {
                f"clip_cosine{suffix}": float(cosine.mean()),
                f"clipscore{suffix}": float(CLIPSCORE_WEIGHT * cosine.clamp(min=0).mean()),
            }
            kept = {name: value for name, value in values.items() if name.removesuffix(suffix) in self.wanted}
            (self.details if suffix == "_real" else figures).update(kept)
        return figures

    def _distances(self, reference: Collected, collected: Collected) -> dict[str, float]:
        if "gfid" in self.wanted and len(collected.keys) < FEW_FOR_FID:
            console.print(
                f"{self.protocol.name}: gFID of {len(collected.keys)} pictures is biased upwards; compare it only with "
                "figures of as many"
            )
        return {
            name: frechet_distance(statistics_of(reference, name), statistics_of(collected, name))
            for name in FRECHET
            if name in self.wanted
        }

    def _card_of(
        self,
        generator: MeasuredGenerator,
        judges: Judges,
        collected: Collected,
        drawn: dict[str, Drawn],
        device: torch.device,
        side: int,
    ) -> dict[str, Any]:
        count = len(collected.keys)
        cut = bool(self.data.max_samples) and count + collected.skipped.total() >= self.data.max_samples
        captions = [drawn[key].caption for key in collected.keys]
        return {
            **generator_card(self.protocol, generator, data=self.data, device=device),
            "complete": count == self.protocol.count if self.protocol.count else not cut,
            "baseline": "another caption" if set(COSINES) & set(self.wanted) else "",
            "count": count,
            "skipped": collected.skipped.total(),
            "skipped_reasons": dict(collected.skipped),
            "keys_sha256": sha256_of_names(collected.keys),
            "captions_sha256": sha256_of_truth(collected.keys, captions),
            "num_captions": count,
            "image_size": side,
            "antialias": True,
            "left_out": sorted(set(self.settings.metrics) - set(self.wanted)),
            "resumed_parts": collected.num_resumed,
            **judges.card,
        }


def generator_card(
    protocol: Protocol, generator: MeasuredGenerator, *, data: EvalInput, device: torch.device
) -> dict[str, Any]:
    """What cards of all evaluations of generators share."""
    return {
        **protocol.card(),
        "max_samples": data.max_samples,
        "data": data.source.name,
        "model_name": generator.name,
        **generator.identity(),
        "generated_size": generator.image_size,
        "sampling": generator.sampling,
        "seeds": SEED_RULE,
        "device": device.type,
        "ranks": distributed.world_size(),
        "batch_size": data.batch_size,
    }
