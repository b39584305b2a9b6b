"""From one picture with its caption to a training batch: what a shard reader's samples become (engine contract).

Shapes: `b` samples, `S` side of the square pictures, `t` text tokens, padded to the longest of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from qlip.core.images import ImageLimits
from qlip.data.loaders import TrainingLoader
from qlip.data.mixture import MixedShards
from qlip.data.sample_parts import ShardConfig, captions_of
from qlip.data.shards import ShardDataset, seeded_random
from qlip.data.tar_reader import RawSample
from qlip.data.transforms import random_resized_crop, resize_and_crop

Tokenize = Callable[[list[str]], dict[str, Tensor]]
"""Texts -> `input_ids` and `attention_mask` (b, t), padded and truncated."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Which captioned image shards to train on, and how they become batches."""

    train: str = ""
    """Tar shards: a folder, `PATH/{00000..00009}.tar`, or several joined by `::`; PATH may be remote: `s3://bucket`."""
    train_data_upsampling_factors: tuple[float, ...] = ()
    """Mix the sources that `::` joins: the next sample comes from each with a chance of its factor times its shards.
    Every source then needs a shard per rank and worker. Empty reads all shards as one source."""
    train_num_samples: int = 0
    """Samples of an epoch over all ranks and workers, each of which reads its shards again if they hold too few; 0:
    every shard once. Without `shuffle_buffer` a shorter epoch always holds the same first samples."""
    shard_cache: str = ""
    """Folder that keeps whole copies of remote shards; empty reads them as streams, anew in every epoch."""
    batch_size: int = 512
    """Pairs per process that are in memory at once."""
    global_batch_size: int = 0
    """Pairs per optimizer step over all processes, in as many parts as it takes; 0 is batch_size x processes."""
    num_workers: int = 2
    """Decoding processes per rank; 0 decodes in the training process. Needs a shard for each."""
    pin_memory: bool = True
    """Copy batches to page-locked memory where CUDA is available, which makes their way to the GPU faster."""
    shuffle_buffer: int = 2000
    """Samples shuffled together by every worker, held as encoded bytes; 0 keeps the order of the shards."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Area share of RandomResizedCrop (EVA-CLIP's); (1, 1) crops the centre instead."""
    caption_field: str = "txt"
    """Member that holds the caption."""
    caption_weights: dict[str, float] = field(default_factory=dict)
    """Draw the caption from these json fields instead, by weight; samples without them have `caption_field`."""
    caption_per_batch: bool = False
    """Draw the json field once per batch: its captions then differ in the same attributes, a sharper contrast."""
    max_skip_share: float = 0.05
    """Stop when a larger share of the samples cannot be used."""
    limits: ImageLimits = field(default_factory=ImageLimits)
    """Pictures beyond these are skipped from their header, samples of more bytes without being read."""


@dataclass(kw_only=True, slots=True)
class CaptionedImages:
    """Makes samples and batches. Picklable, so that worker processes can have it."""

    image_size: int
    """S in pixels."""
    tokenize: Tokenize
    """The text side of the processor."""
    crop_scale: tuple[float, float] | None
    """Random crops; None resizes and crops the centre."""
    reading: ShardConfig
    """How captions are found."""
    caption_per_batch: bool = False
    """Draw the caption field once per batch instead of once per sample."""

    def decode(self, image: Image.Image, caption: str, sample: RawSample, random: Random) -> dict[str, Any]:
        """One picture and caption -> `pixel_values` (3, S, S), `caption`, and `captions` where a batch draws one."""
        if self.crop_scale is None:
            pixel_values = resize_and_crop(image, size=self.image_size)
        else:
            pixel_values = random_resized_crop(image, size=self.image_size, scale=self.crop_scale, random=random)
        captions = captions_of(sample, config=self.reading) if self.caption_per_batch else {}
        return {"pixel_values": pixel_values, "caption": caption, "captions": captions}

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Samples -> a batch of the engine's contract."""
        captions = self._captions(samples)
        return {
            "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
            **self.tokenize(captions),
            "key": [sample["key"] for sample in samples],
            "sample_index": torch.arange(len(samples)),
            "caption": captions,
        }

    def _captions(self, samples: list[dict[str, Any]]) -> list[str]:
        """One caption per sample; with `caption_per_batch` all from one field, drawn by a hash of the batch's keys."""
        shared = [name for name in self.reading.caption_weights if all(name in s["captions"] for s in samples)]
        if not shared:
            return [sample["caption"] for sample in samples]
        random = seeded_random(self.reading.seed, *(sample["key"] for sample in samples))
        name = random.choices(shared, [self.reading.caption_weights[name] for name in shared])[0]
        return [sample["captions"][name] for sample in samples]


def shard_config(config: DataConfig, *, seed: int) -> ShardConfig:
    """The reader's part of a data config."""
    return ShardConfig(
        shards=config.train,
        shard_cache=config.shard_cache,
        train_num_samples=config.train_num_samples,
        shuffle_buffer=config.shuffle_buffer,
        seed=seed,
        caption_field=config.caption_field,
        caption_weights=config.caption_weights,
        max_skip_share=config.max_skip_share,
        limits=config.limits,
    )


def training_loader(
    config: DataConfig,
    *,
    image_size: int,
    tokenize: Tokenize,
    seed: int,
    ledger: Path,
    rank: int = 0,
    num_ranks: int = 1,
) -> TrainingLoader:
    """Endless batches of one rank, whose order is a pure function of the seed and whose position can be saved.

    All ranks must be given the same config and seed. Raises `UserError` before the first batch, the same on every
    rank, for missing shards, fewer shards than ranks x workers, and impossible weights.
    """
    reading = shard_config(config, seed=seed)
    samples = CaptionedImages(
        image_size=image_size,
        tokenize=tokenize,
        crop_scale=None if config.crop_scale == (1.0, 1.0) else config.crop_scale,
        reading=reading,
        caption_per_batch=config.caption_per_batch,
    )
    dataset: ShardDataset | MixedShards
    if config.train_data_upsampling_factors:
        factors = config.train_data_upsampling_factors
        dataset = MixedShards(
            reading, factors=factors, decode=samples.decode, rank=rank, num_ranks=num_ranks, ledger=ledger
        )
    else:
        dataset = ShardDataset(
            reading, decode=samples.decode, repeat=True, rank=rank, num_ranks=num_ranks, ledger=ledger
        )
    dataset.check_split(num_workers=config.num_workers)
    return TrainingLoader(
        dataset,
        collate=samples.collate,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        rank=rank,
        num_ranks=num_ranks,
        pin_memory=config.pin_memory,
    )
