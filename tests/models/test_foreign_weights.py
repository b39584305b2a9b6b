"""Weight files of others: floats come in as float32, code is never run, and whatever is no weight file is one line."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from qlip.core.errors import UserError
from qlip.models.qlip.foreign_weights import read_tensors


class Payload:
    """Opens a file for writing when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        read_tensors(path)
    message = str(error.value)
    assert "\n" not in message and str(path) in message and "; " in message and len(message) < 500 + len(str(path))
    return message


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_nothing_runs(tmp_path, capfd, zipped):
    control, marker = tmp_path / "control", tmp_path / "marker"
    pickle.loads(pickle.dumps(Payload(control)))
    assert control.exists()
    state = {"model": {"weight": torch.ones(2)}, "optimizer": Payload(marker)}
    torch.save(state, tmp_path / "evil.pt", _use_new_zipfile_serialization=zipped)
    message = refused(tmp_path / "evil.pt")
    assert "carries code or objects besides tensors" in message and "convert it to .safetensors" in message
    (tmp_path / "plain.bin").write_bytes(pickle.dumps(Payload(marker), protocol=2))
    refused(tmp_path / "plain.bin")
    assert not marker.exists()
    assert capfd.readouterr() == ("", "")


def test_a_torchscript_archive_is_refused(tmp_path, capfd, recwarn):
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "script.pt")
    recwarn.clear()
    assert "carries code" in refused(tmp_path / "script.pt")
    assert capfd.readouterr() == ("", "") and len(recwarn) == 0


def test_wrappers_prefixes_and_types(tmp_path):
    tensors = {"a": torch.ones(2, dtype=torch.float16), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.tensor(3)}
    inner = {f"module.module.{name}": tensor for name, tensor in tensors.items()} | {"note": "x", "version": 2}
    torch.save({"module": {"model": {"state_dict": inner}}, "epoch": 1}, tmp_path / "a.pt")
    torch.save(nn.Linear(2, 3).half().state_dict(), tmp_path / "b.pth")
    save_file(tensors, tmp_path / "c.safetensors")
    for name in ("a.pt", "c.safetensors"):
        read = read_tensors(tmp_path / name)
        assert {key: tensor.dtype for key, tensor in read.items()} == {
            "a": torch.float32,
            "b": torch.float32,
            "c": torch.int64,
        }
    read = read_tensors(tmp_path / "b.pth")
    assert set(read) == {"weight", "bias"} and not read["weight"].requires_grad
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "d.pt")
    assert set(read_tensors(tmp_path / "d.pt")) == {"module.a", "b"}


def saved(content: object, **options) -> Callable[[Path], None]:
    return lambda path: torch.save(content, path, **options)


def cut(content: object, share: float, **options) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        torch.save(content, path, **options)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return write


def looped() -> dict:
    state: dict = {"weight": torch.ones(1)}
    state["model"] = state
    return state


STATE = {"weight": torch.arange(5000.0)}
OLD = {"_use_new_zipfile_serialization": False}


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda path: path.write_bytes(b""), "is no torch file (it is empty)"),
        (lambda path: path.write_text("<!DOCTYPE html><html>"), "is no torch file (it begins with '<!DOCTYPE html>"),
        (
            lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
            "begins with 'version https://git",
        ),
        (lambda path: path.write_bytes(b"\x80\x02garbage\xff"), "is damaged or no plain state dict"),
        (lambda path: path.write_bytes(b"PK\x03\x04garbage"), "is damaged or cut short"),
        (cut(STATE, 0.5), "is damaged or cut short"),
        (cut(STATE, 0.99), "is damaged or cut short"),
        (cut(STATE, 0.5, **OLD), "is damaged or cut short"),
        (cut(STATE, 0.001, **OLD), "is damaged or cut short"),
        (saved([torch.ones(1)]), "holds no tensors"),
        (saved(torch.ones(1)), "holds no tensors"),
        (saved({"epoch": 3}), "holds no tensors"),
        (saved({"model": {}, "weight": torch.ones(1)}), "holds no tensors"),
        (saved({"a": torch.ones(2), "b": torch.tensor([1.0, torch.inf])}), "b holds NaN or infinite values"),
        (saved({"a": torch.tensor([1e300], dtype=torch.float64)}), "a holds NaN or infinite values"),
        (saved({"a": torch.ones(1).expand(10**12)}), "a claims more numbers than the file holds"),
        (saved({"a": torch.eye(3).to_sparse()}), "a is no plain dense tensor"),
        (saved({"a": torch.ones(2, dtype=torch.complex64)}), "a is no plain dense tensor"),
        (saved({"a": torch.ones(2, device="meta")}), "a is no plain dense tensor"),
    ],
)
def test_a_damaged_or_odd_pickle_is_one_line(tmp_path, capfd, write, said):
    path = tmp_path / "weights ü.pt"
    write(path)
    assert said in refused(path)
    assert capfd.readouterr() == ("", "")


def test_a_pickle_that_holds_itself_ends(tmp_path):
    torch.save(looped(), tmp_path / "loop.pt")
    assert set(read_tensors(tmp_path / "loop.pt")) == {"weight"}


def safetensors_bytes(header: str, data: bytes = b"\0" * 8) -> bytes:
    return struct.pack("<Q", len(header)) + header.encode() + data


ENTRY = '{"dtype": "F32", "shape": [1], "data_offsets": [%d, %d]}'
HEADER = f'{{"a": {ENTRY % (0, 4)}, "b": {ENTRY % (4, 8)}}}'


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is no safetensors file"),
        (b"<html></html>", "is no safetensors file"),
        (struct.pack("<Q", 2**62) + b"{}", "is no safetensors file"),
        (safetensors_bytes(HEADER, b"\0" * 7), "is cut off: b ends at"),
        (safetensors_bytes(HEADER, b"\0" * 9), "has 1 bytes behind its last tensor"),
        (safetensors_bytes(HEADER[:-2]), "damaged header"),
        (safetensors_bytes(HEADER.replace("F32", "F33")), "entry of a makes no sense"),
        (safetensors_bytes(f'{{"a": {ENTRY % (0, 4)}, "a": {ENTRY % (4, 8)}}}'), "holds a twice"),
        (safetensors_bytes("{}", b""), "holds no tensors"),
        (safetensors_bytes(HEADER, struct.pack("<ff", 1.0, float("nan"))), "b holds NaN"),
    ],
)
def test_a_damaged_safetensors_file_is_one_line(tmp_path, content, said):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(safetensors_bytes(HEADER))
    assert json.loads(HEADER).keys() == read_tensors(path).keys()
    path.write_bytes(content)
    assert said in refused(path)


def test_paths_that_are_no_weight_file(tmp_path):
    assert "no file at" in refused(tmp_path / "nowhere.pt")
    assert "no file at" in refused(tmp_path)
    (tmp_path / "weights.ckpt").write_bytes(b"x")
    assert "give a .safetensors, .pt, .pth or .bin file" in refused(tmp_path / "weights.ckpt")
