"""Rows that compare pictures with their reconstructions, and the networks which that takes.

Shapes: `b` pictures of 8-bit pixels (b, 3, S, S) on the device; every row is (b,) or (b, d).
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor

from qlip.core import distributed, pixels
from qlip.core.errors import UserError
from qlip.evals.collect import Collected
from qlip.evals.networks import Networks
from qlip.losses.perceptual import EncoderDistance
from qlip.metrics.frechet import FeatureStatistics, frechet_distance
from qlip.metrics.image_quality import psnr, ssim
from qlip.models.measured import MeasuredModel, MeasuredQLIP

PER_IMAGE = ("psnr", "ssim", "lpips_alex", "lpips_vgg", "encoder_distance")
FRECHET = ("rfid", "fd_encoder")
Side = Literal["original", "reconstruction"]


class PictureMetrics:
    """Measures what `metrics` names; no network is loaded that none of them needs."""

    def __init__(
        self, metrics: tuple[str, ...], *, networks: Networks, model: MeasuredModel, device: torch.device
    ) -> None:
        """Raises `UserError` for missing weights, and for the model's own encoder when it has none."""
        self.per_image = tuple(name for name in PER_IMAGE if name in metrics)
        self.frechet = tuple(name for name in FRECHET if name in metrics)
        self._card: dict[str, Any] = {}
        self._lpips = {}
        for name in self.per_image:
            if name.startswith("lpips_"):
                net = cast(Literal["alex", "vgg"], name.removeprefix("lpips_"))
                self._lpips[name] = networks.lpips(net, device)
                self._card |= networks.lpips_card(net)
        self._inception = networks.inception(device) if "rfid" in self.frechet else None
        if self._inception is not None:
            self._card |= self._inception.card()
        if {"encoder_distance", "fd_encoder"} & set(metrics):
            if not isinstance(model, MeasuredQLIP):
                raise UserError(f"encoder distances are those of QLIP's own encoder, a {model.name} has none")
            self._vision = model.model.vision_model
            self._encoder_distance = EncoderDistance(self._vision.patch_states)
            self._card["encoder_network"] = "the model's own encoder: patch states of all layers, pooled CLS for fd"

    def card(self) -> dict[str, Any]:
        """Names and hashes of the networks."""
        return self._card

    def compare(self, originals: Tensor, reconstructions: Tensor) -> dict[str, Tensor]:
        """A row per metric of single pictures, and the features of both sides."""
        rows = {}
        for name in self.per_image:
            if name in ("psnr", "ssim"):
                rows[name] = {"psnr": psnr, "ssim": ssim}[name](originals, reconstructions)
                continue
            distance = self._lpips.get(name) or self._encoder_distance
            rows[name] = distance(pixels.from_uint8(originals), pixels.from_uint8(reconstructions)).double()
        return rows | self.features(originals, "original") | self.features(reconstructions, "reconstruction")

    def features(self, pictures: Tensor, side: Side) -> dict[str, Tensor]:
        """`<metric>_<side>` (b, d) for every Frechet distance."""
        rows = {}
        if self._inception is not None:
            rows[f"rfid_{side}"] = self._inception(pictures)
        if "fd_encoder" in self.frechet:
            rows[f"fd_encoder_{side}"] = self._vision(pixels.from_uint8(pictures)).pooler_output
        return rows

    def distances(self, originals: Collected, reconstructions: Collected) -> dict[str, float]:
        """Frechet distances of two collections; all ranks call it together."""
        return {
            name: frechet_distance(
                statistics_of(originals, f"{name}_original"), statistics_of(reconstructions, f"{name}_reconstruction")
            )
            for name in self.frechet
        }


def statistics_of(collected: Collected, name: str) -> FeatureStatistics:
    """Sums over the features of all ranks, on every rank; all ranks call it together."""
    own = next((rows[name].shape[1] for rows in collected.own(name)), 0)
    statistics = FeatureStatistics(max(distributed.gather_objects(own)))  # a rank may have no part at all
    for rows in collected.own(name):
        statistics.update(rows[name])
    return statistics.over_ranks()
