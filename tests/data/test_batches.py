"""Batches: which captions they hold, that a seed decides them, and that an evaluation sees every sample once."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from qlip.core.errors import UserError
from qlip.data.batches import DataConfig, training_loader

WEIGHTS = {"captions.shape": 0.6, "captions.short": 0.3, "captions.dense": 0.1, "captions.never": 0.0}


def write_tar(path: Path, samples: list[dict[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for fields in samples:
            key = fields["key"].decode()
            for name, data in fields.items():
                if name != "key":
                    member = tarfile.TarInfo(f"{key}.{name}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def sample(key: str, *, with_json: bool = True) -> dict[str, bytes]:
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), (int(key) % 256, 0, 0)).save(picture, "PNG")
    captions = {name: f"{name} {key}" for name in ("shape", "short", "dense", "never")}
    fields = {"key": key.encode(), "png": picture.getvalue(), "txt": f"txt {key}".encode()}
    return fields | ({"json": json.dumps({"captions": captions}).encode()} if with_json else {})


def write_shards(folder: Path, *, with_json: bool = True) -> list[str]:
    """Two shards of 13 samples."""
    folder.mkdir()
    keys = [f"{shard:05d}{i:04d}" for shard in range(2) for i in range(13)]
    for shard in range(2):
        chosen = [sample(key, with_json=with_json) for key in keys if key.startswith(f"{shard:05d}")]
        write_tar(folder / f"{shard:05d}.tar", chosen)
    return keys


def lengths(texts: list[str]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([[len(text)] for text in texts]), "attention_mask": torch.ones(len(texts), 1)}


def batches(folder: Path, num: int, *, seed: int = 0, **options) -> list[dict]:
    defaults = {"batch_size": 4, "num_workers": 0, "shuffle_buffer": 26, "crop_scale": (1.0, 1.0)}
    config = DataConfig(train=str(folder), **(defaults | options))
    loader = training_loader(config, image_size=8, tokenize=lengths, seed=seed, ledger=folder / "skipped.jsonl")
    return list(itertools.islice(loader, num))


def fields_of(batch: dict) -> set[str]:
    for key, caption in zip(batch["key"], batch["caption"], strict=True):
        assert caption.split()[1] == key
    return {caption.split()[0] for caption in batch["caption"]}


def test_a_batchs_captions_come_from_one_field_drawn_by_weight(tmp_path):
    write_shards(tmp_path / "data")
    found = batches(tmp_path / "data", 200, caption_weights=WEIGHTS, caption_per_batch=True)
    assert all(len(fields_of(batch)) == 1 for batch in found)
    counts = Counter(next(iter(fields_of(batch))) for batch in found)
    assert set(counts) == {"shape", "short", "dense"}
    for name in counts:  # four standard deviations of a share of 200 draws
        weight = WEIGHTS[f"captions.{name}"]
        assert counts[name] / 200 == pytest.approx(weight, abs=4 * (weight * (1 - weight) / 200) ** 0.5)


def test_without_it_every_sample_draws_its_own(tmp_path):
    write_shards(tmp_path / "data")
    found = batches(tmp_path / "data", 200, caption_weights=WEIGHTS)
    assert any(len(fields_of(batch)) > 1 for batch in found)
    counts = Counter(caption.split()[0] for batch in found for caption in batch["caption"])
    assert counts["shape"] / 800 == pytest.approx(0.6, abs=0.07) and "never" not in counts


@pytest.mark.parametrize("caption_per_batch", [False, True])
def test_shards_without_json_give_their_txt(tmp_path, caption_per_batch):
    write_shards(tmp_path / "data", with_json=False)
    found = batches(tmp_path / "data", 5, caption_weights=WEIGHTS, caption_per_batch=caption_per_batch)
    assert all(fields_of(batch) == {"txt"} for batch in found)


def test_shards_with_and_without_json_mix(tmp_path):
    (tmp_path / "data").mkdir()
    samples = [sample(f"{i:09d}", with_json=i % 2 == 0) for i in range(12)]
    write_tar(tmp_path / "data" / "00000.tar", samples)
    found = batches(tmp_path / "data", 20, caption_weights={"captions.short": 1.0}, caption_per_batch=True)
    assert set().union(*(fields_of(batch) for batch in found)) == {"txt", "short"}


def test_batches_keep_the_contract(tmp_path):
    write_shards(tmp_path / "data")
    (batch,) = batches(tmp_path / "data", 1)
    assert batch["pixel_values"].shape == (4, 3, 8, 8) and batch["pixel_values"].dtype == torch.float32
    assert batch["input_ids"].tolist() == [[len(caption)] for caption in batch["caption"]]
    assert batch["sample_index"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("crop_scale", [(1.0, 1.0), (0.5, 1.0)])
def test_a_seed_decides_the_batches(tmp_path, crop_scale):
    write_shards(tmp_path / "data")
    options = {"caption_weights": WEIGHTS, "caption_per_batch": True, "crop_scale": crop_scale}
    first, again, other = (batches(tmp_path / "data", 15, seed=seed, **options) for seed in (3, 3, 4))
    for a, b in zip(first, again, strict=True):
        assert a["key"] == b["key"] and a["caption"] == b["caption"]
        assert torch.equal(a["pixel_values"], b["pixel_values"])
    assert [batch["key"] for batch in first] != [batch["key"] for batch in other]


def test_an_epoch_of_training_shows_every_sample_once(tmp_path):
    keys = write_shards(tmp_path / "data")
    found = batches(tmp_path / "data", 26, batch_size=2)
    seen = [key for batch in found for key in batch["key"]]
    assert sorted(seen[:26]) == sorted(seen[26:]) == keys and seen[:26] != seen[26:]


def test_too_few_shards_and_impossible_weights_are_refused_before_the_first_batch(tmp_path):
    write_shards(tmp_path / "data")
    with pytest.raises(UserError, match="2 shards for 1 ranks x 3 workers"):
        batches(tmp_path / "data", 0, num_workers=3)
    with pytest.raises(UserError, match="not all zero"):
        batches(tmp_path / "data", 0, caption_weights={"captions.short": 0.0})
