"""What a result folder keeps, what is never touched in it, and which results may be compared afterwards."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_sources import Halver, ListSource, random_pictures

from qlip.core.errors import UserError
from qlip.evals import run
from qlip.evals.compare import differences
from qlip.evals.inputs import EvalInput
from qlip.evals.protocols import Protocol, ReconstructionSettings, RetrievalSettings, ZeroShotSettings
from qlip.evals.reconstruction import ReconstructionEvaluator
from qlip.evals.retrieval import RetrievalEvaluator
from qlip.evals.run import EvalRequest, run_evals
from qlip.evals.zero_shot import ZeroShotEvaluator
from qlip.models.measured import MeasuredQLIP
from qlip.models.qlip.modeling import QLIPModel
from qlip.models.qlip.processing import QLIPProcessor
from qlip.recipes.model import ModelConfig, TowerSize

CPU = torch.device("cpu")


@pytest.fixture
def pictures(tmp_path) -> Path:
    for i, item in enumerate(random_pictures(6)):
        file = tmp_path / "pets" / f"class{i % 2}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(item.image)
    return tmp_path / "pets"


@pytest.fixture
def halver(monkeypatch) -> Halver:
    model = Halver()
    monkeypatch.setattr(run, "open_measured", lambda source: model)
    return model


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    settings = ReconstructionSettings(metrics=("psnr",))
    given = Protocol(name="images-recon-offline-v1", summary="A test.", settings=settings)
    monkeypatch.setitem(run.protocols.PROTOCOLS, given.name, given)


def protocols_in(folder: Path) -> list[str]:
    return [result["card"]["protocol"] for result in json.loads((folder / "results.json").read_text())]


def test_protocols_gather_in_one_file_until_the_model_is_another(halver, pictures, tmp_path):
    out = tmp_path / "out"
    for name in ("images-recon-offline-v1", "images-zeroshot-v1", "images-recon-offline-v1"):
        run_evals("model", EvalRequest(data=str(pictures), evals=(name,), folder=out), device="cpu")
    assert protocols_in(out) == ["images-zeroshot-v1", "images-recon-offline-v1"]
    halver.identity = lambda: {"model_fingerprint": "another", "dtype": "float32"}
    run_evals("model", EvalRequest(data=str(pictures), evals=("images-zeroshot-v1",), folder=out), device="cpu")
    assert protocols_in(out) == ["images-zeroshot-v1"]


def test_only_own_work_is_removed(halver, pictures, tmp_path):
    out = tmp_path / "out"
    kept = [out / "parts" / "mine.png", out / "reference" / "mine.png", out / ".parts" / "other" / "part_000000"]
    for file in kept:
        file.parent.mkdir(parents=True)
        file.write_bytes(b"not ours")
    request = EvalRequest(data=str(pictures), evals=("images-recon-offline-v1",), folder=out)
    run_evals("model", request, device="cpu")
    assert all(file.read_bytes() == b"not ours" for file in kept)
    assert [path.name for path in (out / ".parts").iterdir()] == ["other"]


def test_results_do_not_become_data(halver, pictures, tmp_path):
    for place in (pictures, pictures / "out", pictures / "class0" / "out"):
        request = EvalRequest(data=str(pictures), evals=("images-zeroshot-v1",), folder=place)
        with pytest.raises(UserError, match="whose pictures it would join"):
            run_evals("model", request, device="cpu")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*choose another folder"):
        run_evals("model", replace(request, folder=tmp_path / "file" / "out"), device="cpu")
    assert halver.batches == []


def test_options_without_effect_are_said(halver, pictures, capsys):
    request = EvalRequest(
        data=str(pictures), evals=("images-zeroshot-v1",), train_data=str(pictures), leave_out=("rfid",)
    )
    run_evals("model", request, device="cpu")
    said = capsys.readouterr().out
    assert "--train-data has no effect on images-zeroshot-v1" in said and "--leave-out rfid has no effect" in said
    assert "--reference" not in said
    for evals, message in (((), "no protocol to measure"), (("images-zeroshot-v1",) * 2, "stands there twice")):
        with pytest.raises(UserError, match=message):
            run_evals("model", replace(request, evals=evals), device="cpu")


def blocking(a: dict, b: dict) -> set[str]:
    return {line.split()[0] for line in differences(a, b).blocking}


def test_names_in_another_order_and_other_labels_do_not_compare():
    given = Protocol(name="test-v1", summary="A test.", settings=ZeroShotSettings())

    def card(names: tuple[str, ...], shift: int = 0) -> dict:
        source = ListSource([replace(item, label=(item.label + shift) % 3) for item in random_pictures(9)])
        source.class_names = names
        evaluator = ZeroShotEvaluator(given, EvalInput(source=source))
        evaluator.run(Halver(), CPU)
        return evaluator.card()

    base = card(("a", "b", "c"))
    assert blocking(base, card(("a", "b", "c"))) == set()
    assert "class_names_sha256" in blocking(base, card(("b", "a", "c")))
    assert "labels_sha256" in blocking(base, card(("a", "b", "c"), shift=1))


def test_captions_of_other_pictures_do_not_compare():
    given = Protocol(name="test-v1", summary="A test.", settings=RetrievalSettings(captions_per_image=1))

    def card(shift: int) -> dict:
        items = random_pictures(9)
        items = [replace(item, captions=(f"text {(i + shift) % 9}",)) for i, item in enumerate(items)]
        evaluator = RetrievalEvaluator(given, EvalInput(source=ListSource(items)))
        evaluator.run(Halver(), CPU)
        return evaluator.card()

    assert blocking(card(0), card(0)) == set() and "captions_sha256" in blocking(card(0), card(1))


def tiny_qlip(**changes) -> MeasuredQLIP:
    torch.manual_seed(0)
    tower = TowerSize(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24)
    sizes = ModelConfig(
        image_size=16, patch_size=8, encoder=tower, decoder=tower, text=tower, context_length=16, projection_dim=16
    )
    config = sizes.build_config()
    for name, value in changes.items():
        setattr(config.vision_config, name, value)
    return MeasuredQLIP(QLIPModel(config).eval(), QLIPProcessor.for_size(16, context_length=16))


def test_references_are_told_apart_by_their_pixels_and_must_be_enough():
    settings = ReconstructionSettings(metrics=("fd_encoder",))
    given = Protocol(name="test-v1", summary="A test.", settings=settings)

    def card(reference: ListSource) -> dict:
        data = EvalInput(source=ListSource(random_pictures(9)), reference=reference)
        evaluator = ReconstructionEvaluator(given, data)
        evaluator.run(tiny_qlip(), CPU)
        return evaluator.card()

    first, second = (card(ListSource(random_pictures(8, seed=seed), name="refs")) for seed in (1, 2))
    assert blocking(first, second) == {"reference_pixels_sha256"} and first["reference_count"] == 8
    with pytest.raises(UserError, match="refs: 1 picture; reconstruction is measured on at least 2"):
        card(ListSource(random_pictures(1), name="refs"))


def test_an_identity_follows_the_config_and_the_tokenizer():
    base = tiny_qlip().identity()
    changed = tiny_qlip(layer_norm_eps=0.1).identity()
    assert (
        base["model_fingerprint"] == changed["model_fingerprint"] and base["config_sha256"] != changed["config_sha256"]
    )
    other = tiny_qlip()
    other.tokenize = lambda texts: {"input_ids": torch.tensor([[len(texts[0])]])}
    assert base["tokens_sha256"] != other.identity()["tokens_sha256"] == other.identity()["tokens_sha256"]
    assert base == tiny_qlip().identity()


def test_duplicates_and_a_cut_are_on_the_card():
    items = random_pictures(6)
    items[4] = replace(items[0], key="again")
    given = Protocol(name="test-v1", summary="A test.", settings=ReconstructionSettings(metrics=("psnr",)))
    for limit, complete in ((0, True), (6, False), (5, False), (9, True)):
        evaluator = ReconstructionEvaluator(given, EvalInput(source=ListSource(items), max_samples=limit))
        evaluator.run(Halver(), CPU)
        card = evaluator.card()
        assert (card["max_samples"], card["complete"], card["duplicates"]) == (limit, complete, 1), limit
