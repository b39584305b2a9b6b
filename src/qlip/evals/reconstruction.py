"""How well pictures survive the tokens: rFID, PSNR, SSIM, LPIPS, distances in the model's own encoder, code use.

`rfid` is the Frechet distance over Inception's 2,048 pooled features and over nothing else; `fd_encoder` is that over
the model's own frozen encoder. Every picture is measured once and kept as a row (`evals/collect.py`); sums and means
are formed from the rows of all ranks at the end.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlip.core import distributed
from qlip.core.errors import UserError
from qlip.core.log import console
from qlip.data.items import Source
from qlip.evals.card import card_of, sha256_of_names, sha256_of_pixels
from qlip.evals.code_use import code_use
from qlip.evals.collect import PIXEL_DIGEST, Batch, Collected, Measure, collect, read_again
from qlip.evals.inputs import EvalInput, known_count, picture_side, require_ability
from qlip.evals.per_image import PerImage, write_per_image, write_worst
from qlip.evals.picture_metrics import PictureMetrics
from qlip.evals.protocols import Protocol, ReconstructionSettings
from qlip.metrics.frechet import FeatureStatistics, frechet_distance
from qlip.models.measured import MeasuredModel
from qlip.quantizers.ids import bits_to_ids

LEAST_FOR_FID = 2048  # fewer pictures than features: the covariance has no full rank and the distance no meaning
LEAST_SIDE = {"ssim": 11, "lpips_vgg": 16, "lpips_alex": 31}  # pixels: below it a window or a pooling has no place
FEW_FOR_FID = 10_000  # below it the estimate is biased upwards by more than good tokenizers differ


class ReconstructionEvaluator:
    """Encode, decode, make 8-bit pixels, compare."""

    def __init__(self, protocol: Protocol, data: EvalInput) -> None:
        assert isinstance(protocol.settings, ReconstructionSettings)
        self.protocol, self.settings, self.data = protocol, protocol.settings, data
        self.wanted = tuple(name for name in self.settings.metrics if name not in data.leave_out)
        self.details: dict[str, Any] = {}
        self.per_image: PerImage | None = None
        self._card: dict[str, Any] = {}

    @torch.inference_mode()
    def run(self, model: MeasuredModel, device: torch.device) -> dict[str, float]:
        """Figures: dB, SSIM in [-1, 1], LPIPS, encoder distance in [0, 4], Frechet distances, nats and shares.

        Raises `UserError` before any work for missing weights, a model that cannot be measured so, or, as far as the
        count is known, too few pictures for an FID.
        """
        started = time.monotonic()
        require_ability(model, "reconstruct", self.protocol)
        size = picture_side(model, self.protocol)
        self._refuse_few(known_count(self.data), source=self.data.source)
        if self.data.reference is not None:
            self._refuse_few(self.data.reference.num_items, source=self.data.reference)
        self._refuse_small(size)
        metrics = distributed.on_all_ranks(
            lambda: PictureMetrics(self.wanted, networks=self.data.networks, model=model, device=device)
        )
        collected = self.data.collect(
            self.protocol, self._measure(model, metrics), model=model, device=device, **self._identity(metrics)
        )
        self._refuse_few(len(collected.keys), source=self.data.source)
        figures = self._figures(model, collected, metrics)
        reference = self._reference(collected, metrics, model, size, device)
        figures |= metrics.distances(reference, collected)
        if self.settings.mean_picture:
            figures |= self._mean_picture_figures(metrics, collected, device)
        self._card = card_of(
            self.protocol,
            model,
            data=self.data,
            collected=collected,
            size=size,
            baseline="the mean picture of the same samples" if self.settings.mean_picture else "",
            device=device,
            started=started,
        )
        self._card |= {"left_out": sorted(set(self.settings.metrics) - set(self.wanted)), **metrics.card()}
        if reference is not collected:
            assert self.data.reference is not None
            self._card |= {
                "reference": self.data.reference.name,
                "reference_keys_sha256": sha256_of_names(reference.keys),
                "reference_pixels_sha256": sha256_of_pixels(reference.rows(PIXEL_DIGEST)[PIXEL_DIGEST]),
                "reference_count": len(reference.keys),
                "reference_skipped": reference.skipped.total(),
            }
        else:
            self._card["reference"] = "the originals, prepared alike"
        return figures

    def card(self) -> dict[str, Any]:
        """The protocol of the last run."""
        return self._card

    def write_looks(self, folder: Path, model: MeasuredModel, device: torch.device) -> None:
        """`<protocol>.csv`, a row per picture of the last run, and `<protocol>_worst.png`."""
        assert self.per_image is not None, "run first"
        write_per_image(folder / f"{self.protocol.name}.csv", self.per_image)
        reading = self.data.reading(
            self.data.source, preparation=self.protocol.preparation, size=picture_side(model, self.protocol)
        )
        write_worst(
            folder / f"{self.protocol.name}_worst.png",
            self.per_image,
            read=partial(read_again, reading),
            reconstruct=lambda originals: self._rounded(model.reconstruct(originals.to(device)).unit_pixels),
        )

    def _rounded(self, unit_pixels: Tensor) -> Tensor:
        scaled = unit_pixels.float().clamp(0, 1) * 255
        return (scaled if self.settings.rounding == "truncate" else scaled.round()).to(torch.uint8)

    def _refuse_few(self, count: int | None, *, source: Source) -> None:
        """Raise `UserError` when there are too few pictures for what is to be measured; None is not known yet."""
        if count is None:
            return
        if count < 2:
            raise UserError(f"{source.name}: {count} picture; reconstruction is measured on at least 2")
        if "rfid" in self.wanted and count < LEAST_FOR_FID:
            raise UserError(
                f"{source.name}: rFID of {count} pictures has no meaning, its covariance has {LEAST_FOR_FID} "
                f"dimensions; give at least {LEAST_FOR_FID} pictures, or --leave-out rfid"
            )

    def _refuse_small(self, size: int) -> None:
        """Raise `UserError` when pictures are smaller than a metric's window or network."""
        for name in self.wanted:
            if size < LEAST_SIDE.get(name, 1):
                raise UserError(
                    f"{self.protocol.name}: {name} needs pictures of at least {LEAST_SIDE[name]} pixels, these have "
                    f"{size}; use a larger size" + (f" or --leave-out {name}" if name.startswith("lpips") else "")
                )

    def _identity(self, metrics: PictureMetrics) -> dict[str, Any]:
        """What the rows of this evaluation depend on besides model, data and protocol."""
        return {**metrics.card(), "metrics": self.wanted}

    def _measure(self, model: MeasuredModel, metrics: PictureMetrics) -> Measure:
        def measure(batch: Batch) -> dict[str, Tensor]:
            output = model.reconstruct(batch["pictures"])
            rows = metrics.compare(batch["pictures"], self._rounded(output.unit_pixels))
            if output.bits is not None:
                rows["ids"] = bits_to_ids(output.bits)
            if self.settings.mean_picture:
                rows["original"] = batch["pictures"]
            return rows

        return measure

    def _figures(self, model: MeasuredModel, collected: Collected, metrics: PictureMetrics) -> dict[str, float]:
        """What the rows of single pictures give, and the code."""
        columns = collected.rows(*metrics.per_image)
        self.per_image = PerImage(keys=collected.keys, columns=columns)
        figures = {name: float(column.double().mean()) for name, column in columns.items()}
        self.details = {}
        if "psnr" in columns:
            self.details["identical_pictures"] = int(columns["psnr"].isinf().sum())
        if model.bits_per_token is not None:
            bits_per_pixel = model.bits_per_token / model.patch_size**2
            figures |= {"bits_per_pixel": bits_per_pixel, "compression_ratio": 24 / bits_per_pixel}
        if model.num_bits:
            used = code_use(collected.rows("ids")["ids"], num_bits=model.num_bits)
            figures |= used.figures
            self.details |= {"bit_share": used.bit_share, "bit_entropies": used.bit_entropies}
        return figures

    def _reference(
        self, collected: Collected, metrics: PictureMetrics, model: MeasuredModel, size: int, device: torch.device
    ) -> Collected:
        """Features of what the Frechet distances are taken against: the originals, or all pictures of `reference`."""
        if "rfid" in metrics.frechet and len(collected.keys) < FEW_FOR_FID:
            console.print(
                f"{self.protocol.name}: rFID of {len(collected.keys)} pictures is biased upwards; compare it only with "
                "figures of as many"
            )
        if self.data.reference is None or not metrics.frechet:
            return collected
        source = self.data.reference
        found = collect(
            self.data.reading(source, preparation=self.protocol.preparation, size=size, max_samples=0),
            lambda batch: metrics.features(batch["pictures"], "original"),
            title=f"{self.protocol.name} reference",
            device=device,
            folder=self.data.work_folder(
                "parts",
                model=model,
                device=device,
                source=source,
                max_samples=0,
                role="reference",
                **self.protocol.card(),
                **self._identity(metrics),
            ),
        )
        self._refuse_few(len(found.keys), source=source)
        return found

    def _mean_picture_figures(
        self, metrics: PictureMetrics, collected: Collected, device: torch.device
    ) -> dict[str, float]:
        """`<metric>_baseline`: what the mean picture scores in place of every reconstruction. On all ranks alike."""
        originals = collected.rows("original")["original"]
        mean = originals.float().mean(0, keepdim=True).round().to(torch.uint8).to(device)
        rows = []
        for pictures in originals.split(self.data.batch_size):
            pictures = pictures.to(device)
            rows.append({name: row.cpu() for name, row in metrics.compare(pictures, mean.expand_as(pictures)).items()})
        joined = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        figures = {name: float(joined[name].double().mean()) for name in metrics.per_image}
        for name in metrics.frechet:
            sides = []
            for side in ("original", "reconstruction"):
                features = joined[f"{name}_{side}"]
                sides.append(FeatureStatistics(features.shape[1]))
                sides[-1].update(features)
            figures[name] = frechet_distance(*sides)
        return {f"{name}_baseline": value for name, value in figures.items()}
