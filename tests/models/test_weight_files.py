"""Hostile and damaged weight files: refused in one line that names the tensor, before memory is filled, no code run."""

from __future__ import annotations

import json
import os
import pickle
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import assert_same, tiny_config, tiny_model
from transformers import AutoModel

from qlip.core.errors import UserError
from qlip.models import QLIPModel, QLIPVisionModel
from qlip.models.qlip.weight_files import find_weight_files, read_headers, tensor_names

FIRST = "visual_projection.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def refusal(folder: Path, model: type = QLIPModel) -> str:
    with pytest.raises(UserError) as error:
        model.from_pretrained(folder)
    said = str(error.value)
    assert "\n" not in said and str(folder) in said
    return said


def rewrite_header(folder: Path, change: Callable[[dict], object], *, data: Callable[[bytes], bytes] = bytes) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    changed = change(header)
    text = (changed if isinstance(changed, str) else json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data(content[8 + length :]))


def test_headers_say_what_the_library_reads(saved):
    stored = read_headers(find_weight_files(saved))
    tensors = load_file(saved / "model.safetensors")
    assert {name: tensor.shape for name, tensor in stored.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    assert {tensor.dtype for tensor in stored.values()} == {"F32"}
    assert tensor_names(saved) == set(tensors)
    assert tensor_names(saved / "nowhere") == set()


def duplicate(header: dict) -> str:
    entry = json.dumps(header[FIRST])
    return json.dumps(header)[:-1] + f', "{FIRST}": {entry}' + "}"


def overlapping(header: dict) -> None:
    start, end = header[FIRST]["data_offsets"]
    header[FIRST]["data_offsets"] = [start - 4, end - 4]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda header: header[FIRST].update(shape=[2**40, 2**40]), FIRST),
        (lambda header: header[FIRST].update(shape=[-16, -32]), FIRST),
        (lambda header: header[FIRST].update(shape="large"), FIRST),
        (lambda header: header[FIRST].update(dtype="F1024"), FIRST),
        (lambda header: header[FIRST].pop("data_offsets"), FIRST),
        (overlapping, FIRST),
        (duplicate, FIRST),
        (lambda header: header.update({FIRST: "nothing"}), "damaged header"),
        (lambda header: "[" * 10_000, "damaged header"),
        (lambda header: "\x00" * 50, "damaged header"),
        (lambda header: "[1, 2]", "damaged header"),
    ],
)
def test_an_impossible_header_is_one_line(folder, change, said):
    rewrite_header(folder, change)
    assert said in refusal(folder)


def test_bytes_behind_the_last_tensor_are_refused(folder):
    rewrite_header(folder, lambda header: None, data=lambda data: data + b"and more")
    assert "has 8 bytes behind its last tensor" in refusal(folder)


@pytest.mark.parametrize("length", [0, 2**40, 2**63])
def test_an_absurd_header_length_is_refused(folder, length):
    path = folder / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    assert "is no safetensors file, or cut off in its header" in refusal(folder)


def test_a_cut_file_names_the_first_tensor_that_is_not_whole(folder):
    path = folder / "model.safetensors"
    ends = sorted((tensor.end, name) for name, tensor in read_headers([path]).items())
    whole, first_cut = ends[10], ends[11]
    path.write_bytes(path.read_bytes()[: whole[0] + 1])
    assert f"is cut off: {first_cut[1]} ends at byte {first_cut[0]}, the file at {whole[0] + 1}" in refusal(folder)


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def nan_in(name: str, value: float = float("nan")) -> Callable[[dict], object]:
    return lambda state: state[name].view(-1)[3:4].fill_(value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop(FIRST), f"1 missing keys, first {FIRST}"),
        (
            lambda state: [state.pop(name) for name in list(state) if "vision" in name],
            "missing keys, first vision_decoder",
        ),
        (lambda state: state.update({"a.b": torch.zeros(1)}), "1 unexpected keys, first a.b"),
        (
            lambda state: state.update({FIRST: torch.zeros(16, 31)}),
            f"1 mismatched keys, first {FIRST}: shape (16, 31) in the file, (16, 32) by config.json",
        ),
        (
            lambda state: state.update({FIRST: torch.zeros(16, 32, dtype=torch.int32)}),
            f"{FIRST} has dtype I32, no float",
        ),
        (nan_in(FIRST), f"{FIRST} holds NaN or infinite values"),
        (nan_in("text_projection.weight", float("inf")), "text_projection.weight holds NaN or infinite values"),
    ],
)
def test_tensors_that_do_not_belong_are_named(folder, change, said):
    change_tensors(folder, change)
    assert said in refusal(folder)


def test_the_nan_of_another_part_does_not_concern_the_vision_model(folder):
    change_tensors(folder, nan_in("text_projection.weight"))
    assert isinstance(QLIPVisionModel.from_pretrained(folder), QLIPVisionModel)
    change_tensors(folder, nan_in("vision_model.embeddings.class_embedding"))
    assert "vision_model.embeddings.class_embedding holds NaN" in refusal(folder, QLIPVisionModel)


def test_a_misfit_is_found_before_memory_is_filled(tmp_path):
    """A sparse file of 20 GB and a config of as much: refused from the header, in a process that may not have 8 GB."""
    config = tiny_config().to_dict()
    config["text_config"]["vocab_size"] = 16_000_000
    config["text_config"]["hidden_size"] = 320
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "qlip"}))
    entry = {"dtype": "F32", "shape": [16_000_000, 319], "data_offsets": [0, 16_000_000 * 319 * 4]}
    header = json.dumps({"text_model.embeddings.token_embedding.weight": entry}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + entry["data_offsets"][1])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "missing keys, first logit_scale" in refusal(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


# --- pickles ---------------------------------------------------------------------------------------------------


class Payload:
    """Code that runs when a pickle is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors"])
def test_a_pickle_is_refused_and_not_executed(folder, name):
    marker = folder / "executed"
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps({"logit_scale": Payload(marker)}))
    said = refusal(folder)
    assert "pickle" in said or "no safetensors file" in said
    assert not marker.exists()
    pickle.loads((folder / name).read_bytes())  # the payload does work
    assert marker.exists()


def test_files_of_a_distributed_checkpoint_are_not_read_instead(folder):
    """transformers prefers them to the files that were examined."""
    state = {name: tensor * float("nan") for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "shard-99999-model-00001-of-00001.safetensors")
    assert "shard-99999-model-00001-of-00001.safetensors of a distributed checkpoint" in refusal(folder)


@pytest.mark.parametrize("load", [QLIPModel.from_pretrained, AutoModel.from_pretrained])
def test_a_config_cannot_name_other_weights_or_unknown_fields(folder, load):
    config = json.loads((folder / "config.json").read_text())
    for field, value in (("transformers_weights", "adapter_model.bin"), ("projection_dims", 4)):
        (folder / "config.json").write_text(json.dumps(config | {field: value}))
        with pytest.raises(UserError, match=field):
            load(folder)


def test_names_of_tensors_cannot_break_the_line(folder):
    change_tensors(folder, lambda state: state.update({"a\nb\x1b[31m" + "x" * 5000: torch.zeros(1)}))
    said = refusal(folder)
    assert said.isprintable() and len(said) < 600


# --- sources ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["nowhere", "runs/a/b", "./nothing/here", "https://example.org/model"])
def test_what_is_neither_folder_nor_hub_id_is_one_line(source):
    with pytest.raises(UserError, match="there is nothing at that path; give a folder or a hub id") as error:
        QLIPModel.from_pretrained(source)
    assert source in str(error.value)


def test_a_file_is_not_a_folder(folder):
    with pytest.raises(UserError, match="is a file; give the folder"):
        QLIPModel.from_pretrained(folder / "model.safetensors")


def test_a_hub_id_that_cannot_be_had_is_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError) as error:
        QLIPModel.from_pretrained("nobody/nothing", local_files_only=True)
    assert "nobody/nothing" in str(error.value) and "\n" not in str(error.value)


def test_a_hub_id_is_read_from_the_cache(folder, tmp_path):
    """What `huggingface_hub` keeps on disk after a download: blobs, a snapshot, and the name of its commit."""
    cache, commit = tmp_path / "cache", "0" * 40
    snapshot = cache / "models--some-one--tiny-qlip" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).write_bytes((folder / name).read_bytes())
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    loaded = QLIPModel.from_pretrained("some-one/tiny-qlip", cache_dir=cache, local_files_only=True)
    assert_same(loaded, QLIPModel.from_pretrained(folder))
    parent = tmp_path / "parent"
    (parent / "inner").mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (parent / "inner" / name).write_bytes((folder / name).read_bytes())
    assert_same(loaded, QLIPModel.from_pretrained(parent, subfolder="inner"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not a valid JSON file"),
        ("[1]", ""),
        ('{"model_type": "bert"}', "holds a 'bert' model, not 'qlip'"),
        ('{"model_type": "qlip", "projection_dims": 4}', "projection_dims is unknown: did you mean 'projection_dim'?"),
        ('{"model_type": "qlip", "projection_dim": "4"}', "'projection_dim' expected int, got str"),
        ('{"model_type": "qlip", "projection_dim": 99999999}', "projection_dim must be at least 1 and at most 65536"),
        ('{"model_type": "qlip", "text_config": 5}', ""),
        ('{"model_type": "qlip", "dtype": "float33"}', ""),
        ('{"model_type": "qlip", "id2label": "ab"}', ""),
        ('{"model_type": "qlip", "num_labels": 1000000000}', "num_labels is 1000000000; at most"),
        ("[" * 100_000, ""),
    ],
)
def test_a_wrong_config_is_one_line(folder, text, said):
    (folder / "config.json").write_text(text)
    assert said in refusal(folder)
