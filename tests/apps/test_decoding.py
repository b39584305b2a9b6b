"""Decoders in processes give what threads give, in order, and outlive what kills one of them."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qlip.apps.decoding import DIED, PIECE, DecodeOptions, DecodePool, decode_batch, num_views
from qlip.core.images import ImageLimits, open_image
from qlip.data.items import Item
from qlip.data.tar_reader import Skip
from qlip.data.transforms import prepared_pixels
from qlip.data.views import VIEWS, ViewChoice, view_pixels

OPTIONS = DecodeOptions(image_size=16, views="centre", caption_fields=())


def picture(number: int, *, size: tuple[int, int] = (24, 20)) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def items(num: int) -> list[Item | Skip]:
    return [
        Skip(key="4", reason="missing image", shard="s")
        if number == 4
        else Item(key=str(number), image=b"no picture" if number == 2 else picture(number), label=number)
        for number in range(num)
    ]


def die(marker: str | None) -> bytes:
    """What the kernel does to a process that takes too much memory; with a marker only the first time."""
    if marker is not None:
        if Path(marker).exists():
            return picture(99)
        Path(marker).touch()
    os._exit(9)


class Deadly:
    """Kills the process that unpickles it."""

    def __init__(self, marker: Path | None = None) -> None:
        self.marker = None if marker is None else str(marker)

    def __reduce__(self) -> Any:
        return die, (self.marker,)


def decoded(batches: list[list[Item | Skip]], *, workers: int, views: ViewChoice = "centre") -> list[tuple]:
    options = DecodeOptions(image_size=16, views=views, caption_fields=())
    pool = DecodePool(options, workers=workers)
    try:
        return [
            (tag, batch.keys, batch.labels, batch.sizes, batch.pixels.tolist(), [s.reason for s in batch.skips])
            for tag, batch in pool.decode(enumerate(batches))
        ]
    finally:
        pool.close()


def test_pixels_are_those_of_the_transform() -> None:
    batch = decode_batch(items(6), OPTIONS)
    assert (batch.keys, batch.labels, batch.sizes) == (list("0135"), [0, 1, 3, 5], [(24, 20)] * 4)
    for row, key in zip(batch.pixels, batch.keys, strict=True):
        image = open_image(picture(int(key)), limits=ImageLimits())
        assert torch.equal(row, prepared_pixels(image, size=16))
    assert [skip.key for skip in batch.skips] == ["2", "4"]
    empty = decode_batch([], OPTIONS)
    assert empty.pixels.shape == (0, 3, 16, 16) and not empty.keys


@pytest.mark.parametrize("views", VIEWS)
def test_views_are_crops_of_one_square(views: ViewChoice) -> None:
    image = open_image(picture(1, size=(31, 40)), limits=ImageLimits())
    pixels = view_pixels(image, size=20, views=views)
    assert len(pixels) == len(VIEWS[views]) == num_views(DecodeOptions(image_size=20, views=views, caption_fields=()))
    square = prepared_pixels(image, size=22 if views == "ten-crop" else 20)
    places = {"centre": (1, 1), "top left": (0, 0), "top right": (0, 2), "bottom left": (2, 0), "bottom right": (2, 2)}
    for view, name in zip(pixels, VIEWS[views], strict=True):
        place, _, mirrored = name.partition(", ")
        top, left = places[place] if views == "ten-crop" else (0, 0)
        crop = square[:, top : top + 20, left : left + 20]
        assert torch.equal(view, crop.flip(-1) if mirrored else crop), name


def test_processes_give_what_threads_give_and_replace_the_dead(tmp_path: Path) -> None:
    batches = [items(6), [], items(PIECE * 2 + 7), items(5)]
    expected = decoded(batches, workers=0)
    assert [batch[1] for batch in expected] == [
        [str(n) for n in range(num) if n not in (2, 4)] for num in (6, 0, 71, 5)
    ]
    once = Item(key="once", image=Deadly(tmp_path / "died"))  # type: ignore[arg-type]
    always = Item(key="always", image=Deadly())  # type: ignore[arg-type]
    found = decoded([*batches, [once], [items(1)[0], always, items(2)[1]], batches[0]], workers=2)
    assert found[:4] == expected
    assert found[4][1] == ["once"], "done again by a new process"
    assert found[5][1] == ["0", "1"] and found[5][5] == [DIED], "only the one that kills is left out"
    assert found[6][1:] == expected[0][1:]
