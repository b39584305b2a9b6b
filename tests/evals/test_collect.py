"""Every picture once, whatever the batch size, the number of ranks, the skips on the way, and after any stop."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_sources import ListSource, png, random_pictures

from qlip.core.errors import UserError
from qlip.data.items import Item
from qlip.data.tar_reader import Skip
from qlip.evals import collect as collecting
from qlip.evals.collect import PIXEL_DIGEST, Collected, Reading, collect

CPU = torch.device("cpu")


def pixels_of(image: Image.Image, item: Item) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def brightness(batch: dict) -> dict[str, torch.Tensor]:
    return {"mean": batch["pictures"].double().mean((1, 2, 3)), "index": batch["sample_index"]}


def run(source: ListSource, *, batch_size: int = 4, measure=brightness, folder=None, **options) -> Collected:
    reading = Reading(source=source, prepare=pixels_of, batch_size=batch_size, **options)
    return collect(reading, measure, title="test", device=CPU, folder=folder)


def by_hand(items: list[Item]) -> list[float]:
    return [float(np.array(Image.open(io.BytesIO(item.image))).mean()) for item in items]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(collecting, "PART", 7)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_rows_are_those_of_a_loop_and_padding_is_dropped(batch_size):
    items = random_pictures(17)
    collected = run(ListSource(items), batch_size=batch_size)
    rows = collected.rows("mean", "index")
    assert collected.keys == [item.key for item in items]
    np.testing.assert_allclose(rows["mean"], by_hand(items), rtol=1e-12)
    assert rows["index"].tolist() == list(range(17))


def test_every_forward_pass_has_one_shape():
    shapes = []

    def measure(batch: dict) -> dict[str, torch.Tensor]:
        shapes.append(tuple(batch["pictures"].shape))
        return brightness(batch)

    run(ListSource(random_pictures(9)), measure=measure, batch_size=4)
    assert set(shapes) == {(4, 3, 16, 16)}


def test_skips_are_counted_with_their_reasons_and_stop_a_run_when_many():
    items: list[Item | Skip] = list(random_pictures(17))
    items.insert(3, Skip(key="x", reason="missing image", shard="s"))
    items[10] = Item(key="broken", image=b"no picture")
    items[12] = Item(key="bomb", image=png(np.zeros((1, 200, 3), np.uint8)))
    collected = run(ListSource(items), max_skip_share=0.3)
    assert collected.skipped.total() == 3 and set(collected.skipped) >= {"missing image", "too elongated"}
    assert len(collected.keys) == 15 == len(collected.rows("mean")["mean"])
    with pytest.raises(UserError, match=r"3 of 18 pictures cannot be used, .* 10%; the first is x: missing image"):
        run(ListSource(items), max_skip_share=0.1)
    with pytest.raises(UserError, match="1 of 1 pictures cannot be used"):
        run(ListSource([Item(key="broken", image=b"")]))
    with pytest.raises(UserError, match="no picture for this evaluation"):
        run(ListSource([]))


@pytest.mark.parametrize("limit", [1, 7, 8, 16, 50])
def test_max_samples_takes_the_first_wanted_ones(limit):
    items = random_pictures(30)
    collected = run(ListSource(items), max_samples=limit, wanted=lambda item: item.label != 1)
    expected = [item.key for item in items if item.label != 1][:limit]
    assert collected.keys == expected


class StoppedError(Exception):
    pass


def test_a_stopped_evaluation_measures_only_what_is_left(tmp_path):
    items = random_pictures(30)
    whole = run(ListSource(items)).rows("mean")["mean"]
    calls = 0

    def dying(batch: dict) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise StoppedError
        return brightness(batch)

    with pytest.raises(StoppedError):
        run(ListSource(items), measure=dying, folder=tmp_path)
    finished = sorted(path.name for path in tmp_path.iterdir())
    assert finished == ["part_000000.safetensors", "part_000001.safetensors"]
    (tmp_path / "part_000001.safetensors").write_bytes(b"half a file")  # what a crash of the machine may leave
    calls = 10
    resumed = run(ListSource(items), measure=dying, folder=tmp_path)
    assert calls == 10 + 7  # parts 1, 2 and 3 of two batches each, and the last one of two pictures
    torch.testing.assert_close(resumed.rows("mean")["mean"], whole, rtol=0, atol=0)
    assert resumed.keys == [item.key for item in items]
    calls = 100
    assert run(ListSource(items), measure=dying, folder=tmp_path).keys == resumed.keys
    assert calls == 100  # nothing was left to measure


def test_the_digest_is_that_of_the_prepared_pixels():
    items = random_pictures(3)
    digests = run(ListSource(items)).rows(PIXEL_DIGEST)[PIXEL_DIGEST]
    for item, digest in zip(items, digests, strict=True):
        picture = pixels_of(Image.open(io.BytesIO(item.image)), item)
        assert bytes(digest.tolist()) == hashlib.sha256(picture.contiguous().numpy().tobytes()).digest()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*choose another --out"):
        run(ListSource(random_pictures(3)), folder=tmp_path / "file")


def on_two(folder: str, num: int, broken: bool) -> dict:
    collecting.PART = 4
    items: list[Item] = random_pictures(num)
    if broken:
        items[5] = Item(key="broken", image=b"")
    try:
        collected = run(ListSource(items), folder=Path(folder) / f"{num}_{broken}" if num > 4 else None)
    except UserError as error:
        return {"error": str(error)}
    return {"keys": collected.keys, **collected.rows("mean"), "own": sum(len(r["mean"]) for r in collected.own("mean"))}


def ranks_say(folder: str) -> list[dict]:
    return [on_two(folder, 18, False), on_two(folder, 3, False), on_two(folder, 6, True)]
