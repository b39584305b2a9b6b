"""`qlip verify` as a user runs it: what it prints, what --json holds, and every mistake in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qlip.models.qlip.configuration import QLIPConfig
from qlip.models.qlip.fingerprint import encoder_fingerprint
from qlip.models.qlip.loading import load_model, load_processor, save_model
from qlip.models.qlip.modeling import QLIPModel
from qlip.models.qlip.processing import QLIPProcessor

FAST = ("--no-compile", "--device", "cpu")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five pictures at two depths, and a file that only looks like one."""
    folder = tmp_path / "photos, täglich"
    (folder / "more").mkdir(parents=True)
    noise = np.random.default_rng(0)
    for i in range(5):
        pixels = noise.integers(0, 256, (24, 20 + i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / ("more" if i % 2 else "") / f"{i}.png")
    (folder / "broken.jpg").write_bytes(b"<!doctype html>")
    return folder


def test_it_prints_and_writes_the_same_figures(qlip, model_folder, photos, tmp_path):
    file = tmp_path / "results" / "verify.json"
    said = qlip.works("verify", model_folder, photos, *FAST, "--batch-sizes", "2", "4", "9", "--json", file)
    assert "560 bits in 20 tokens of 5 pictures" in said
    assert f"not used: {photos / 'broken.jpg'}: not an image: a web page" in said
    assert "left out: batches of 9 (only 5 pictures given)" in said
    assert said.rstrip().endswith("batch-invariant encoding is exact here")
    (result,) = json.loads(file.read_text())
    card, details = result["card"], result["details"]
    assert result["eval"] == card["protocol"].removesuffix("-v1") == "verify"
    assert (card["count"], card["files_found"], card["unusable"]) == (5, 6, 1)
    assert card["encoder_fingerprint"] == encoder_fingerprint(load_model(model_folder))
    assert card["model"] == str(model_folder) and card["stored_dtype"] == "float32"
    assert card["versions"]["torch"] and card["date"] and card["threads"] and card["device_name"]
    assert details["unusable"] == {str(photos / "broken.jpg"): "not an image: a web page"}
    rows = {row["name"]: row for row in details["settings"]}
    assert rows["again"]["bits_flipped"] == rows["again in one batch"]["bits_flipped"] == 0
    assert rows["torch.compile"]["left_out"] == "not asked for (--no-compile)"
    measured = {name: row for name, row in rows.items() if not row["left_out"]}
    assert set(measured) >= {
        "again",
        "batches of 2",
        "batches of 4",
        "eager attention",
        "bf16 autocast",
        "bf16 weights",
    }
    assert result["figures"] == {f"bits_flipped/{name}": row["bits_flipped"] for name, row in measured.items()}
    assert sum(details["margins"]["counts"]) == details["bits"] == 560
    processor, model, half = load_processor(model_folder), load_model(model_folder), load_model(model_folder).bfloat16()
    pixels = processor(images=sorted(photos.rglob("*.png")), return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        flipped = [model.encode(picture[None]) != half.encode(picture[None]) for picture in pixels]
    assert rows["bf16 weights"]["bits_flipped"] == sum(int(each.sum()) for each in flipped)


def test_bf16_weights_on_disk_are_compared_as_float32(qlip, model_folder, photos, tmp_path):
    folder, file = tmp_path / "half", tmp_path / "half.json"
    save_model(load_model(model_folder).bfloat16(), folder=folder, processor=load_processor(model_folder), step=None)
    qlip.works("verify", folder, photos / "0.png", *FAST, "--json", file)
    (result,) = json.loads(file.read_text())
    assert result["card"]["stored_dtype"] == "bfloat16"
    assert result["figures"]["bits_flipped/again"] == 0


def test_mistakes_are_one_line(qlip, model_folder, photos, tmp_path):
    picture = photos / "0.png"
    assert "no pictures given" in qlip.refused("verify", model_folder)
    assert "missing" in qlip.refused("verify")
    assert f"no picture or folder at {tmp_path / 'x'}" in qlip.refused("verify", model_folder, picture, tmp_path / "x")
    (tmp_path / "empty").mkdir()
    assert "no pictures under" in qlip.refused("verify", model_folder, tmp_path / "empty")
    refused = qlip.refused("verify", model_folder, photos / "broken.jpg", *FAST)
    assert "none of the 1 files is a usable picture" in refused and "a web page" in refused
    assert "is not a model folder" in qlip.refused("verify", tmp_path, picture, *FAST)
    assert "max_images is 0" in qlip.refused("verify", model_folder, picture, "--max-images", "0")
    assert "batch sizes start at 1" in qlip.refused("verify", model_folder, picture, "--batch-sizes", "2", "0")
    assert "qlip doctor" in qlip.refused("verify", model_folder, picture, "--device", "quantum")
    assert "did you mean '--max-images'" in qlip.refused("verify", model_folder, picture, "--max-image", "3")
    plain = tmp_path / "no quantizer"
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = QLIPConfig(
        text_config=tower,
        vision_config=tower | {"image_size": 16, "patch_size": 8, "quantizer": "none"},
        decoder_config=tower | {"image_size": 16, "patch_size": 8},
    )
    save_model(QLIPModel(config), folder=plain, processor=QLIPProcessor.for_size(16), step=None)
    assert "has no quantizer, so it makes no bits" in qlip.refused("verify", plain, picture, *FAST)
    occupied = photos / "broken.jpg" / "x.json"
    assert "choose another file" in qlip.refused("verify", model_folder, picture, *FAST, "--json", occupied)
