"""A demo that is started again shows figures of the weights that are there, and loses no timing."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from qlip.apps.demo import EVALS, Timings, results_of
from qlip.models.qlip.fingerprint import model_fingerprint
from qlip.models.qlip.loading import load_model, save_model
from qlip.models.qlip.modeling import QLIPModel
from qlip.models.qlip.processing import QLIPProcessor
from qlip.recipes.model import ModelConfig, TowerSize

TOWER = TowerSize(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16)


def test_results_of_other_weights_are_measured_again(tmp_path: Path) -> None:
    sizes = ModelConfig(image_size=16, patch_size=8, encoder=TOWER, decoder=TOWER, text=TOWER, projection_dim=8)
    model, processor = QLIPModel(sizes.build_config()), QLIPProcessor.for_size(16)
    export, file = tmp_path / "export", tmp_path / "stage1.json"
    save_model(model, folder=export, processor=processor, step=1)
    fingerprint = model_fingerprint(load_model(export))
    assert results_of(file, fingerprint, EVALS) is None
    card = {"model_fingerprint": model_fingerprint(model)}
    results = [{"eval": "x", "figures": {}, "card": card | {"protocol": protocol}} for protocol in EVALS]
    file.write_text(json.dumps(results[1:]))
    assert results_of(file, fingerprint, EVALS) is None  # an earlier version measured less
    file.write_text(json.dumps(results))
    assert results_of(file, fingerprint, EVALS) == results
    with torch.no_grad():
        model.vision_decoder.conv_out.bias[0] += 1
    save_model(model, folder=export, processor=processor, step=1)
    assert results_of(file, model_fingerprint(load_model(export)), EVALS) is None


def test_timings_add_up_over_starts_and_the_peak_stays(tmp_path: Path) -> None:
    path = tmp_path / "results" / "timings.json"
    with Timings(path).part("training"):
        pass
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"training": 100.0, "peak_memory_gb": 1000.0}))
    path.with_suffix(".tmp").write_text("{half a fi")  # what a kill may leave
    with Timings(path).part("training"):
        pass
    after = json.loads(path.read_text())
    assert after["training"] >= 100.0 and after["peak_memory_gb"] == 1000.0
