"""`qlip import` as a user runs it: a folder that loads, a report of every tensor, and mistakes in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_runs import tiny

from eva_files import CONTEXT_LENGTH, clip_state, mim_state, text_state
from qlip import QLIPModel, QLIPProcessor

OPTIONS = ("--image-size", "64", "--head-dim", "16", "--decoder-layers", "1")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights of others")
    torch.save({"module": mim_state(patch=14)}, folder / "mim.pt")
    torch.save({"state_dict": {name: tensor.half() for name, tensor in clip_state().items()}}, folder / "clip.pt")
    save_file({name: tensor.contiguous() for name, tensor in text_state("").items()}, folder / "text.safetensors")
    return folder


def test_a_clip_file_becomes_a_model_folder(qlip, files, tmp_path):
    out = tmp_path / "my start ü"
    said = qlip.works("import", "eva", files / "clip.pt", out, *OPTIONS)
    lines = [" ".join(line.split()) for line in said.splitlines()]
    assert lines[0].startswith("reading ") and lines[1].startswith("writing ") and "million parameters" in lines[1]
    layers = "vision_model.encoder.layers.{0-1}"
    assert f"{layers}.layer_norm1.weight <- visual.blocks.{{0-1}}.norm1.weight" in lines
    query = "text_model.encoder.layers.{0-1}.self_attn.q_proj.bias"
    assert f"{query} <- text.transformer.resblocks.{{0-1}}.attn.in_proj_bias[0:32]" in lines
    assert "visual.rope.freqs_cos (rotary angles are computed, not stored)" in lines
    assert "vision_decoder.encoder.layers.{0}.mlp.w1.weight" in lines and "resized (0 tensors)" in lines
    report = json.loads((out / "import_report.json").read_text())
    assert report["files"] == ["clip.pt"] and report["options"]["image_size"] == 64
    for group in ("taken", "resized", "fresh", "ignored"):
        assert f"{group} ({len(report[group])} tensors)" in lines
    model, processor = QLIPModel.from_pretrained(out), QLIPProcessor.from_pretrained(out)
    inputs = processor(text=["a cat", "a dog " * 20], return_tensors="pt", padding=True, truncation=True)
    assert inputs["input_ids"].shape == (2, CONTEXT_LENGTH)
    pixel_values = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert model.encode(pixel_values).shape == (2, 16, 28)
        assert model(pixel_values=pixel_values, **inputs).logits_per_image.shape == (2, 2)
    assert (set(report["fresh"]) | {row["target"] for row in report["taken"]}) == set(model.state_dict())


def test_a_second_import_replaces_the_first_whole(qlip, files, tmp_path):
    out = tmp_path / "out"
    arguments = ("import", "eva", files / "mim.pt", out, "--text-from", files / "text.safetensors", *OPTIONS)
    said = " ".join(qlip.works(*arguments).split())
    assert "resized (1 tensors)" in said and "32x3x14x14 -> 32x3x16x16" in said
    assert "text_model.final_layer_norm.bias <- text.safetensors:ln_final.bias" in said
    weights = (out / "model.safetensors").read_bytes()
    (out / "stale").write_text("of the first import")
    qlip.works(*arguments)
    assert (out / "model.safetensors").read_bytes() == weights and not (out / "stale").exists()
    qlip.works(*arguments, "--seed", "1")
    assert (out / "model.safetensors").read_bytes() != weights
    assert json.loads((out / "import_report.json").read_text())["files"] == ["mim.pt", "text.safetensors"]
    (out / "mine.pt").write_bytes((files / "mim.pt").read_bytes())
    said = qlip.refused("import", "eva", out / "mine.pt", out, *OPTIONS)
    assert "lies in" in said and "choose another OUT" in said and (out / "mine.pt").exists()


def test_training_starts_from_an_import(qlip, files, tmp_path):
    start, run = tmp_path / "start", tmp_path / "run"
    qlip.works("import", "eva", files / "clip.pt", start, *OPTIONS)
    qlip.works("data", "scenes", tmp_path / "scenes", "--num", "12", "--image-size", "64")
    options = tiny(task__init=str(start), data__train=str(tmp_path / "scenes"))
    qlip.works("train", "scenes_tiny", "--out", run, *options)
    before, after = QLIPModel.from_pretrained(start), QLIPModel.from_pretrained(run / "export")
    assert after.config.vision_config.to_dict() == before.config.vision_config.to_dict()
    name = "vision_model.encoder.layers.1.mlp.w1.weight"
    change = (after.get_parameter(name) - before.get_parameter(name)).abs().max()
    assert 0 < change < 0.1  # three steps from the imported weights, which have a standard deviation of 0.2


def test_mistakes_are_one_line_and_write_nothing(qlip, files, tmp_path):
    out, clip = tmp_path / "out", files / "clip.pt"
    assert "kind 'evaa' is unknown: did you mean 'eva'?" in qlip.refused("import", "evaa", clip, out)
    assert "kind 'xyzzy' is unknown: known: eva" in qlip.refused("import", "xyzzy", clip, out)
    assert f"no file at {tmp_path / 'nowhere.pt'}" in qlip.refused("import", "eva", tmp_path / "nowhere.pt", out)
    assert "change head_dim" in qlip.refused("import", "eva", clip, out, "--image-size", "64")
    said = qlip.refused("import", "eva", clip, out, "--text-from", files / "mim.pt", *OPTIONS)
    assert "mim.pt has no text tower" in said
    (tmp_path / "page.pt").write_text("<html>Sign in</html>")
    assert "it begins with '<html>Sign in" in qlip.refused("import", "eva", tmp_path / "page.pt", out)
    assert "missing" in qlip.refused("import", "eva", clip)
    assert not out.exists()
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "dear.jpg").write_bytes(b"dear")
    for target in (photos, photos / "dear.jpg"):
        assert "is no export of ours" in qlip.refused("import", "eva", clip, target, *OPTIONS)
    assert (photos / "dear.jpg").read_bytes() == b"dear" and list(photos.iterdir()) == [photos / "dear.jpg"]
