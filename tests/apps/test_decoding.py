"""Decoders in processes give what threads give, in order, and outlive what kills one of them."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qlip.apps.decode_pool import DecodePool
from qlip.apps.decoding import DecodeOptions, decode_batch, num_views
from qlip.core.errors import UserError
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


class Deadly(bytes):
    """Kills the process that looks at it, as the kernel does with one that takes too much memory."""

    marker: Path | None = None
    """Where it is noted that it has; then it is harmless."""

    def __len__(self) -> int:
        if self.marker is not None and self.marker.exists():
            return super().__len__()
        if self.marker is not None:
            self.marker.touch()
        os._exit(9)


def deadly(key: str, marker: Path | None = None) -> Item:
    image = Deadly(picture(99))
    image.marker = marker
    return Item(key=key, image=image)


@dataclass
class Listed:
    """Some entries as a source."""

    listed: list[Item | Skip]

    def items(self) -> Iterator[Item | Skip]:
        return iter(self.listed)


def decoded(parts: dict[str, list[Item | Skip]], *, workers: int, size: int = 4) -> dict[str, list[tuple]]:
    """What comes of each part, batch by batch."""
    pool = DecodePool(OPTIONS, workers=workers)
    found: dict[str, list[tuple]] = {name: [] for name in parts}
    try:
        for place, batch in pool.decode([(name, Listed(listed)) for name, listed in parts.items()], size=size):  # type: ignore[misc]
            skips = [(skip.key, skip.reason.partition(":")[0]) for skip in batch.skips]
            assert not found[place.part] or not found[place.part][-1][0], "nothing behind the last"
            found[place.part].append((place.is_last, batch.keys, batch.labels, batch.pixels.tolist(), skips))
    finally:
        pool.close()
    return found


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


PARTS = {"a": items(6), "b": [], "c": items(17), "d": items(4)}


def test_batches_of_a_part_are_in_order_and_reach_no_further() -> None:
    found = decoded(PARTS, workers=0)
    assert [len(batches) for batches in found.values()] == [2, 1, 5, 1]
    assert all([batch[0] for batch in batches] == [False] * (len(batches) - 1) + [True] for batches in found.values())
    for name, entries in PARTS.items():
        good = [entry.key for entry in entries if entry.key not in ("2", "4")]
        assert [key for batch in found[name] for key in batch[1]] == good


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_processes_give_what_a_thread_gives(workers: int) -> None:
    """Also several that share one part."""
    assert decoded(PARTS, workers=workers) == decoded(PARTS, workers=0)
    assert decoded({"c": PARTS["c"]}, workers=workers) == decoded({"c": PARTS["c"]}, workers=0)


def test_the_dead_are_replaced(tmp_path: Path) -> None:
    first, second = items(8), [deadly("once", tmp_path / "died"), items(1)[0], deadly("always"), items(2)[1]]
    found = decoded(PARTS | {"c": [*first, *second, *items(9)]}, workers=2)
    expected = decoded(PARTS | {"c": [*first, *items(9)]}, workers=0)
    assert {name: found[name] for name in ("a", "b", "d")} == {name: expected[name] for name in ("a", "b", "d")}
    keys, skips = found["c"][2][1], found["c"][2][4]
    assert keys == ["once", "0", "1"], "done again by a new process, and its neighbours with it"
    assert skips == [("always", "decoder died")], "only the one that kills is left out"
    assert found["c"][:2] + found["c"][3:] == expected["c"]


class Unshareable(bytes):
    """Fails as a decoder does when /dev/shm is full."""

    def __len__(self) -> int:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


def test_a_small_shared_memory_is_one_line() -> None:
    with pytest.raises(UserError, match=r"no room in /dev/shm.*--shm-size") as caught:
        decoded({"a": [Item(key="0", image=Unshareable(picture(0)))]}, workers=0)
    assert "\n" not in str(caught.value)


def test_what_a_file_cannot_hold_is_left_out() -> None:
    odd = [Item(key="a", image=picture(0), label=2**40), Item(key="a#1", image=picture(0))]
    flipped = DecodeOptions(image_size=16, views="flip", caption_fields=())
    assert [skip.reason.partition(":")[0] for skip in decode_batch(odd, flipped).skips] == ["bad label", "bad key"]
    assert decode_batch(odd, OPTIONS).keys == ["a#1"], "with one view it is a name as any other"
