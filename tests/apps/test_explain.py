"""Every variant changes one thing, its figures are those of its own protocol, and nothing is left out unsaid."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qlip.apps.explain import explain, variants
from qlip.core.errors import UserError
from qlip.data.sources import open_source
from qlip.evals.inputs import EvalInput
from qlip.evals.reconstruction import ReconstructionEvaluator
from qlip.models.opening import open_measured
from qlip.models.qlip.loading import save_model
from qlip.models.qlip.modeling import QLIPModel
from qlip.models.qlip.processing import QLIPProcessor
from qlip.recipes.model import ModelConfig, TowerSize


def test_each_variant_differs_from_the_base_in_one_thing():
    base, *others = variants(size=0, metrics=("psnr",), reference=True)
    assert not base.reference and len(others) == 6
    for variant in others:
        cards = [found.protocol.card() for found in (base, variant)]
        parts = [{**card["preparation"], **card["protocol_settings"]} for card in cards]
        changed = [name for name in parts[0] if parts[0][name] != parts[1][name]]
        assert len(changed) + variant.reference == 1, variant.changes


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    tower = TowerSize(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24)
    sizes = ModelConfig(
        image_size=16, patch_size=8, encoder=tower, decoder=tower, text=tower, context_length=16, projection_dim=16
    )
    folder = tmp_path_factory.mktemp("model") / "export"
    processor = QLIPProcessor.for_size(16, context_length=16)
    save_model(QLIPModel(sizes.build_config()), folder=folder, processor=processor, step=1)
    return folder


def make_pictures(folder: Path, *, seed: int) -> Path:
    folder.mkdir()
    noise = np.random.default_rng(seed)
    for i in range(9):
        pixels = noise.integers(0, 255, (40, 70, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def test_figures_are_those_of_each_protocol_alone(model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    pictures, reference = make_pictures(tmp_path / "one", seed=0), make_pictures(tmp_path / "two", seed=1)
    options = {"max_samples": 0, "networks": None, "batch_size": 4, "device": "cpu"}
    explain(str(model_folder), data=str(pictures), reference=str(reference), out=tmp_path / "out", **options)
    said = capsys.readouterr().out
    assert "lpips_alex is left out: no AlexNet weights" in said and "rfid is left out: 9 pictures are fewer" in said
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [result["card"]["changes"] for result in results][:2] == [
        "bicubic, centre crop, rounded",
        "resize filter bilinear",
    ]
    model, base = open_measured(model_folder), results[0]["figures"]
    for variant, result in zip(
        variants(size=0, metrics=("psnr", "ssim", "fd_encoder"), reference=True), results, strict=True
    ):
        data = EvalInput(source=open_source(str(pictures)))
        if variant.reference:
            data.reference = open_source(str(reference))
        figures = ReconstructionEvaluator(variant.protocol, data).run(model, torch.device("cpu"))
        assert result["figures"] == pytest.approx(figures, rel=1e-6), variant.changes
        assert variant is not None and (variant.changes.startswith("bicubic") or figures != base)
    difference = results[2]["figures"]["psnr"] - base["psnr"]
    assert f"{results[2]['figures']['psnr']:.3f}" in said and f"{difference:+.3f}" in said


def test_mistakes_are_one_line(model_folder, tmp_path):
    options = {"max_samples": 0, "networks": None, "reference": "", "out": tmp_path / "out", "batch_size": 4}
    with pytest.raises(UserError, match="nowhere is not there"):
        explain(str(model_folder), data=str(tmp_path / "nowhere"), device="cpu", **options)
