"""How well pictures survive the tokens: PSNR, SSIM, encoder distance, `fd_encoder`, code use.

Every figure has a baseline beside it, `<figure>_baseline`: what the mean picture of the data set scores. Without
Inception weights there is no rFID here; `fd_encoder` is the Frechet distance over this model's own frozen encoder.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlip.core import pixels
from qlip.core.errors import UserError
from qlip.core.log import progress
from qlip.data.batches import evaluation_loader
from qlip.data.loaders import StatefulDataLoader
from qlip.evals.card import data_card_fields, model_card_fields, num_skipped, run_card_fields
from qlip.losses.perceptual import EncoderDistance
from qlip.metrics.frechet import FeatureStatistics, frechet_distance
from qlip.metrics.image_quality import psnr, ssim
from qlip.models.qlip.modeling import QLIPModel
from qlip.quantizers.bsq import binary_entropy
from qlip.quantizers.ids import bits_to_ids

PROTOCOL = "scenes-reconstruction-v1"


@dataclass(kw_only=True, slots=True)
class EvalData:
    """Which shards to score on."""

    shards: str
    """As for training: a folder, braces, or several joined by `::`."""
    max_samples: int = 2000
    """Score at most so many samples, the first ones in shard order."""
    batch_size: int = 100
    """Pictures per forward pass; no figure depends on it."""
    max_skip_share: float = 0.05
    """Stop when a larger share of the samples cannot be used."""

    def __post_init__(self) -> None:
        """Raises `UserError` for counts that measure nothing."""
        for name in ("max_samples", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: give at least 1")

    def loader(self, model: QLIPModel) -> StatefulDataLoader:
        """Every sample once, in order, prepared for this model; texts stay strings."""
        return evaluation_loader(
            self.shards,
            image_size=model.config.vision_config.image_size,
            tokenize=None,
            batch_size=self.batch_size,
            max_skip_share=self.max_skip_share,
        )


@dataclass(kw_only=True, slots=True)
class _Pictures:
    """Originals and reconstructions of a whole evaluation, as uint8 (n, 3, S, S), and what the encoder said."""

    keys: list[str]
    real: Tensor
    fake: Tensor
    bits: Tensor | None
    """(n, tokens, L) bool; None for a model without quantizer."""
    skipped: int


class ReconstructionEvaluator:
    """Encode, decode, round to uint8, compare."""

    def __init__(self, data: EvalData) -> None:
        self.data = data
        self._card: dict[str, Any] = {}
        self.details: dict[str, Any] = {}

    @torch.inference_mode()
    def run(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Figures: dB, SSIM in [-1, 1], encoder distance in [0, 4], Frechet distance, nats and shares."""
        assert isinstance(model, QLIPModel)
        started = time.monotonic()
        pictures = self._reconstruct(model, device)
        mean_picture = pictures.real.float().mean(0, keepdim=True).round().to(torch.uint8).expand_as(pictures.real)
        figures = self._compare(model, device, pictures.real, pictures.fake)
        baseline = self._compare(model, device, pictures.real, mean_picture)
        figures |= {f"{name}_baseline": value for name, value in baseline.items()}
        vision = model.config.vision_config
        self.details = {}
        if pictures.bits is not None:
            figures |= code_use(pictures.bits)
            bits_per_pixel = vision.num_bits / vision.patch_size**2
            figures |= {"bits_per_pixel": bits_per_pixel, "compression_ratio": 24 / bits_per_pixel}
            self.details = {"bit_share": pictures.bits.float().mean((0, 1)).tolist()}
        self._card = {
            "protocol": PROTOCOL,
            "baseline": "the mean picture of the same samples",
            "rounding": "clamped to [0, 1], rounded to uint8",
            "feature_network": "this model's vision encoder (patch states for encoder distance, pooled CLS for fd)",
            **data_card_fields(
                self.data.shards, keys=pictures.keys, image_size=vision.image_size, skipped=pictures.skipped
            ),
            **model_card_fields(model, device=device),
            **run_card_fields(seconds=time.monotonic() - started),
        }
        return figures

    def card(self) -> dict[str, Any]:
        """The protocol of the last run."""
        return self._card

    def _reconstruct(self, model: QLIPModel, device: torch.device) -> _Pictures:
        keys: list[str] = []
        real, fake = [], []
        bits: list[Tensor] = []
        loader = self.data.loader(model)
        with progress("reconstruction", self.data.max_samples) as bar:
            for batch in loader:
                wanted = self.data.max_samples - len(keys)
                pixel_values = batch["pixel_values"][:wanted].to(device)
                output = model(pixel_values)
                keys += batch["key"][:wanted]
                real.append(pixels.to_uint8(pixel_values).cpu())
                fake.append(pixels.to_uint8(output.reconstructions).cpu())
                if output.bits is not None:
                    bits.append(output.bits.cpu())
                bar.update(len(keys))
                if len(keys) >= self.data.max_samples:
                    break
        if len(keys) < 2:
            raise UserError(f"{self.data.shards}: {len(keys)} sample read; reconstruction is measured on at least 2")
        skipped = num_skipped(loader)
        joined = torch.cat(bits) if bits else None
        return _Pictures(keys=keys, real=torch.cat(real), fake=torch.cat(fake), bits=joined, skipped=skipped)

    def _compare(self, model: QLIPModel, device: torch.device, real: Tensor, fake: Tensor) -> dict[str, float]:
        distance = EncoderDistance(model.vision_model.patch_states)
        width = model.config.vision_config.hidden_size
        real_features, fake_features = FeatureStatistics(width), FeatureStatistics(width)
        totals = {"psnr": 0.0, "ssim": 0.0, "encoder_distance": 0.0}
        for x, y in zip(real.split(self.data.batch_size), fake.split(self.data.batch_size), strict=True):
            x, y = x.to(device), y.to(device)
            totals["psnr"] += float(psnr(x, y).sum())
            totals["ssim"] += float(ssim(x, y).sum())
            x, y = pixels.from_uint8(x), pixels.from_uint8(y)
            totals["encoder_distance"] += float(distance(x, y).double().sum())
            real_features.update(model.vision_model(x).pooler_output.cpu())
            fake_features.update(model.vision_model(y).pooler_output.cpu())
        figures = {name: total / len(real) for name, total in totals.items()}
        return figures | {"fd_encoder": frechet_distance(real_features, fake_features)}


def code_use(bits: Tensor) -> dict[str, float]:
    """How the code is used, from (images, n, L) bits: entropy of each bit (nats), balanced bits, distinct tokens."""
    tokens = bits.flatten(0, 1)
    entropy = binary_entropy(tokens.double().mean(0))
    distinct = bits_to_ids(tokens).unique().numel()
    return {
        "bit_entropy": float(entropy.mean()),
        "bit_entropy_max": float(torch.tensor(2.0).log()),
        "balanced_bits": float((entropy / torch.tensor(2.0, dtype=torch.float64).log() > 0.9).double().mean()),
        "distinct_token_share": distinct / len(tokens),
    }
