"""Model folders: what is saved comes back to the last bit, and a damaged folder is one line that names the damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from qlip.apps.export import export_model
from qlip.core.errors import UserError
from qlip.models.qlip.loading import load_model, load_processor, save_model
from qlip.models.qlip.modeling import QLIPModel
from qlip.models.qlip.processing import QLIPProcessor
from qlip.recipes.model import ModelConfig, TowerSize


@pytest.fixture(scope="module")
def processor() -> QLIPProcessor:
    return QLIPProcessor.for_size(16, context_length=8)


@pytest.fixture(scope="module")
def model() -> QLIPModel:
    tower = TowerSize(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24)
    sizes = ModelConfig(
        image_size=16, patch_size=8, encoder=tower, decoder=tower, text=tower, context_length=8, projection_dim=16
    )
    return QLIPModel(sizes.build_config()).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory, model, processor) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "export"
    save_model(model, folder=folder, processor=processor, step=12)
    return folder


@torch.inference_mode()
def test_a_saved_model_returns_the_same_bits_and_pixels(saved, model):
    again = load_model(saved)
    assert not again.training
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    pixel_values = torch.randn(3, 3, 16, 16)
    bits = model.encode(pixel_values)
    assert torch.equal(again.encode(pixel_values), bits)
    assert torch.equal(again.decode(bits), model.decode(bits))


def test_the_folder_is_what_from_pretrained_reads(saved):
    assert {path.name for path in saved.iterdir()} >= {
        "config.json",
        "model.safetensors",
        "processor_config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    }
    assert isinstance(AutoModel.from_pretrained(saved), QLIPModel)
    assert isinstance(QLIPModel.from_pretrained(str(saved)), QLIPModel)
    card = (saved / "README.md").read_text()
    assert "16 px pictures, 4 tokens of 28 bits each, trained for 12 steps" in card


def test_the_folder_appears_whole_or_not_at_all(tmp_path, model, processor, monkeypatch):
    folder = tmp_path / "a" / "export"
    seen = []

    def killed(image_processor: CLIPImageProcessorPil, path: Path) -> None:
        seen.append((folder.exists(), (folder.with_name("export.tmp") / "model.safetensors").exists()))
        raise KeyboardInterrupt

    monkeypatch.setattr(CLIPImageProcessorPil, "save_pretrained", killed)
    with pytest.raises(KeyboardInterrupt):
        save_model(model, folder=folder, processor=processor, step=1)
    assert seen == [(False, True)] and not folder.exists()
    monkeypatch.undo()
    save_model(model, folder=folder, processor=processor, step=1)
    (folder / "stale").write_text("of the first export")
    save_model(model, folder=folder, processor=processor, step=2)
    assert not (folder / "stale").exists() and not folder.with_name("export.tmp").exists()
    assert "for 2 steps" in (folder / "README.md").read_text()


def test_foreign_folders_and_files_are_not_replaced(tmp_path, model, processor):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "dear.jpg").write_bytes(b"dear")
    (tmp_path / "file").write_bytes(b"dear")
    for folder in (tmp_path / "photos", tmp_path / "file"):
        with pytest.raises(UserError, match="exists and is no export of ours"):
            save_model(model, folder=folder, processor=processor, step=1)
    with pytest.raises(UserError, match=r"cannot write to .*choose another folder"):
        save_model(model, folder=tmp_path / "file" / "export", processor=processor, step=1)
    assert (tmp_path / "photos" / "dear.jpg").read_bytes() == (tmp_path / "file").read_bytes() == b"dear"


def tensors(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def cut(name: str, num_bytes: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:num_bytes])


def with_config(**changes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        for part, values in changes.items():
            config[part] |= values
        (folder / "config.json").write_text(json.dumps(config))

    return damage


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            tensors(lambda state: (state.pop("logit_scale"), state.pop("vision_decoder.norm.bias"))),
            "2 missing keys, first logit_scale",
        ),
        (tensors(lambda state: state.update(zebra=torch.zeros(2), ape=torch.zeros(2))), "2 unexpected keys, first ape"),
        (
            tensors(lambda state: state.update({"visual_projection.weight": torch.zeros(2, 3)})),
            "1 mismatched keys, first visual_projection.weight",
        ),
        (cut("model.safetensors", 100_000), "is cut off: text_model.embeddings.token_embedding.weight ends at byte"),
        (cut("model.safetensors", 20), "is no safetensors file, or cut off in its header (20 bytes)"),
        (cut("model.safetensors", 0), "is no safetensors file, or cut off in its header (0 bytes)"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
        (cut("config.json", 50), "not a valid JSON file"),
        (with_config(vision_config={"image_size": 17}), "image_size 17 is not a multiple of patch_size 8"),
        (with_config(vision_config={"quantizer": "rvq"}), "quantizer 'rvq' is unknown; known: none, bsq"),
        (with_config(vision_config={"num_bit": 14}), "vision_config.num_bit is unknown: did you mean 'num_bits'?"),
        (
            lambda folder: [path.unlink() for path in folder.iterdir()],
            "it is not a model folder; give the `export` folder",
        ),
        (lambda folder: shutil.rmtree(folder), "is not a model folder: there is nothing at that path"),
    ],
)
def test_damage_to_the_model_is_one_line(saved, tmp_path, capfd, damage, said):
    folder = tmp_path / "damaged"
    shutil.copytree(saved, folder)
    damage(folder)
    with pytest.raises(UserError) as error:
        load_model(folder)
    message = str(error.value)
    assert said in message and str(folder) in message and "\n" not in message
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["processor_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_damage_to_the_processor_is_one_line(saved, tmp_path, name):
    folder = tmp_path / "damaged"
    shutil.copytree(saved, folder)
    cut(name, 30)(folder)
    with pytest.raises(UserError) as error:
        load_processor(folder)
    message = str(error.value)
    assert str(folder) in message and "\n" not in message
    assert name in message or "cannot load the processor of" in message


def test_an_export_that_has_become_more_than_one_is_kept(tmp_path, model, processor):
    """A folder of transformers' own `save_pretrained`, and an export with a run's or a clone's folders beside it."""
    model.save_pretrained(tmp_path / "theirs")
    save_model(model, folder=tmp_path / "ours", processor=processor, step=1)
    (tmp_path / "ours" / ".git").mkdir()
    for folder in (tmp_path / "theirs", tmp_path / "ours"):
        with pytest.raises(UserError, match="exists and is no export of ours"):
            save_model(model, folder=folder, processor=processor, step=1)
    save_model(model, folder=tmp_path / "again", processor=processor, step=None)
    for out in (tmp_path / "again", tmp_path):
        with pytest.raises(UserError, match="which would be replaced; choose another OUT"):
            export_model(tmp_path / "again", out, layout="onnx", step=None)
    assert (tmp_path / "again" / "model.safetensors").exists()
