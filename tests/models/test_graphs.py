"""Encoder and decoder as graphs: torch.export and ONNX give the bits and pixels of the model, for any batch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from tiny_models import pictures, tiny_model

from qlip.core.errors import UserError
from qlip.models import QLIPProcessor
from qlip.models.qlip import graphs
from qlip.models.qlip.loading import save_model

PROCESSOR = QLIPProcessor.for_size(32, context_length=20)


def write(folder: Path, layout: str, **vision: object) -> Path:
    save_model(tiny_model(**vision), folder=folder, processor=PROCESSOR, step=None, layout=layout)
    return folder


@pytest.mark.parametrize("vision", [{}, {"rope": False, "subln": False, "swiglu": False}], ids=["as released", "plain"])
@torch.inference_mode()
def test_onnxruntime_returns_the_bits_and_pixels_of_the_model(tmp_path, vision):
    folder = write(tmp_path / "onnx", "onnx", **vision)
    model = tiny_model(**vision)
    encoder, decoder = (onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in ("encoder", "decoder"))
    for num in (1, 2, 5):
        pixels = pictures(num)
        (bits,) = encoder.run(None, {"pixel_values": pixels.numpy()})
        assert bits.dtype == np.bool_ and bits.shape == (num, 16, 28)
        assert np.array_equal(bits, model.encode(pixels).numpy())
        (returned,) = decoder.run(None, {"bits": bits})
        np.testing.assert_allclose(returned, model.decode(torch.from_numpy(bits)).numpy(), rtol=0, atol=1e-4)
    assert "onnxruntime.InferenceSession" in (folder / "README.md").read_text()


WITHOUT_QLIP = """
import sys, torch
folder, given, returned = sys.argv[1:]
encoder, decoder = (torch.export.load(f"{folder}/{name}.pt2").module() for name in ("encoder", "decoder"))
pixels = torch.load(given, weights_only=True)
with torch.inference_mode():
    bits = encoder(pixels)
    torch.save({"bits": bits, "pixels": decoder(bits)}, returned)
assert "qlip" not in sys.modules
"""


@torch.inference_mode()
def test_exported_programs_run_without_qlip(tmp_path):
    folder = write(tmp_path / "pt2", "pt2")
    model, pixels = tiny_model(), pictures(3)
    torch.save(pixels, tmp_path / "given.pt")
    command = [sys.executable, "-c", WITHOUT_QLIP, folder, tmp_path / "given.pt", tmp_path / "returned.pt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    returned = torch.load(tmp_path / "returned.pt", weights_only=True)
    assert torch.equal(returned["bits"], model.encode(pixels))
    torch.testing.assert_close(returned["pixels"], model.decode(returned["bits"]), rtol=0, atol=1e-5)


def test_a_graph_holds_the_tensors_it_needs_and_no_others():
    programs = graphs.export_programs(tiny_model())
    assert not any("decoder" in name or "text" in name for name in programs["encoder"].state_dict)
    assert not any("vision_model.encoder" in name or "text" in name for name in programs["decoder"].state_dict)
    constants = {name: program.constants for name, program in programs.items()}
    assert sum(tensor.numel() for held in constants.values() for tensor in held.values()) < 1000


@torch.inference_mode()
def test_encode_and_decode_compile_without_a_graph_break():
    model, pixels = tiny_model(), pictures(2)
    torch._dynamo.reset()
    encode = torch.compile(model.encode, fullgraph=True, backend="aot_eager")
    decode = torch.compile(model.decode, fullgraph=True, backend="aot_eager")
    bits = encode(pixels)
    assert torch.equal(bits, model.encode(pixels))
    torch.testing.assert_close(decode(bits), model.decode(bits), rtol=0, atol=1e-5)


def test_what_cannot_be_exported_is_one_line(tmp_path, monkeypatch):
    for layout in ("onnx", "pt2"):
        with pytest.raises(UserError, match="this model has no quantizer, so it has no bits to export"):
            write(tmp_path / layout, layout, quantizer="none")
    monkeypatch.setattr(graphs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'qlip\[onnx\]'"):
        write(tmp_path / "onnx", "onnx")
    assert list(tmp_path.iterdir()) == []
