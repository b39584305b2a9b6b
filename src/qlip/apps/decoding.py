"""Encoded pictures -> a batch of pixels, their names and captions; what cannot be used is left out with its reason."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qlip.core.images import ImageLimits, ImageRejected, open_image
from qlip.data.caption_fields import captions_of_item
from qlip.data.items import Item
from qlip.data.tar_reader import Skip
from qlip.data.views import VIEWS, ViewChoice, view_pixels

Entries = list[Item | Skip]
MAX_LABEL = 2**31 - 1  # what the column of a token file holds
NAME_OF_VIEW = re.compile(r"#\d+$")


@dataclass(kw_only=True, slots=True, frozen=True)
class DecodeOptions:
    """How pictures become pixels."""

    image_size: int
    """S."""
    views: ViewChoice
    """What is cut from each; v rows a picture."""
    caption_fields: tuple[str, ...]
    """Of the picture's json; see `captions_of_item`."""


@dataclass(kw_only=True, slots=True)
class DecodedBatch:
    """The usable pictures of a batch, and the others."""

    pixels: Tensor
    """(b v, 3, S, S) uint8, the views of a picture behind each other."""
    keys: list[str] = field(default_factory=list)
    """b names."""
    captions: list[tuple[str, ...]] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """Width and height before the transform."""
    labels: list[int | None] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)

    def with_(self, other: DecodedBatch) -> DecodedBatch:
        """This batch and another one behind it."""
        return DecodedBatch(
            pixels=torch.cat([self.pixels, other.pixels]),
            keys=self.keys + other.keys,
            captions=self.captions + other.captions,
            sizes=self.sizes + other.sizes,
            labels=self.labels + other.labels,
            skips=self.skips + other.skips,
        )


def decode_batch(entries: Entries, options: DecodeOptions) -> DecodedBatch:
    """Open, cut and describe the pictures of a batch, in their order."""
    size = options.image_size
    batch = DecodedBatch(pixels=torch.empty(0, 3, size, size, dtype=torch.uint8))
    pixels = []
    for entry in entries:
        if isinstance(entry, Skip):
            batch.skips.append(entry)
            continue
        try:
            image = open_image(entry.image, limits=ImageLimits())
        except ImageRejected as rejected:
            batch.skips.append(Skip(key=entry.key, reason=str(rejected), shard=""))
            continue
        if entry.label is not None and entry.label > MAX_LABEL:
            batch.skips.append(Skip(key=entry.key, reason=f"bad label: {entry.label}", shard=""))
            continue
        if len(VIEWS[options.views]) > 1 and NAME_OF_VIEW.search(entry.key):
            batch.skips.append(Skip(key=entry.key, reason="bad key: it ends as those of further views do", shard=""))
            continue
        pixels.append(view_pixels(image, size=size, views=options.views))
        batch.keys.append(entry.key.encode("utf-8", "backslashreplace").decode())
        batch.captions.append(captions_of_item(entry, fields=options.caption_fields))
        batch.sizes.append(image.size)
        batch.labels.append(entry.label)
    if pixels:
        batch.pixels = torch.cat(pixels)
    return batch


def num_views(options: DecodeOptions) -> int:
    """v."""
    return len(VIEWS[options.views])
