"""Encoder and decoder as graphs that run without qlip: torch.export programs (.pt2) and ONNX files.

    encoder: pixel_values (b, 3, S, S) float32 -> bits (b, n, L) bool      `QLIPModel.encode`
    decoder: bits (b, n, L) bool -> pixel_values (b, 3, S, S) float32      `QLIPModel.decode`

The batch is free, the size of the pictures is the model's. Pixels are CLIP-normalised on both sides.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from qlip.core.errors import UserError
from qlip.models.qlip.modeling import QLIPModel

ONNX_OPSET = 18


class BitEncoder(nn.Module):
    """`QLIPModel.encode` with the tensors it needs and no others."""

    def __init__(self, model: QLIPModel) -> None:
        super().__init__()
        self.vision_model = model.vision_model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(b, 3, S, S) -> (b, n, L) bool."""
        return self.vision_model.quantize(pixel_values).bits


class BitDecoder(nn.Module):
    """`QLIPModel.decode` with the tensors it needs and no others."""

    def __init__(self, model: QLIPModel) -> None:
        super().__init__()
        self.quantizer = model.vision_model.quantizer
        self.quant_embed_post = model.vision_model.quant_embed_post
        self.vision_decoder = model.vision_decoder

    def forward(self, bits: Tensor) -> Tensor:
        """(b, n, L) bool -> (b, 3, S, S)."""
        return self.vision_decoder(self.quant_embed_post(self.quantizer.decode(bits)))


def export_programs(model: QLIPModel) -> dict[str, ExportedProgram]:
    """`encoder` and `decoder` as torch.export programs with a free batch; moves the model to the CPU and to float32.

    Raises `UserError` for a model without quantizer.
    """
    vision = model.config.vision_config
    if vision.quantizer == "none":
        raise UserError("this model has no quantizer, so it has no bits to export; train one with a quantizer")
    model = model.to("cpu", torch.float32).eval()
    pictures = torch.zeros(2, vision.num_channels, vision.image_size, vision.image_size)
    bits = torch.zeros(2, vision.grid_size**2, vision.num_bits, dtype=torch.bool)
    batch = {0: Dim("batch")}
    with torch.no_grad():
        return {
            "encoder": torch.export.export(BitEncoder(model), (pictures,), dynamic_shapes=(batch,)),
            "decoder": torch.export.export(BitDecoder(model), (bits,), dynamic_shapes=(batch,)),
        }


def write_pt2(model: QLIPModel, folder: Path) -> None:
    """encoder.pt2 and decoder.pt2, for `torch.export.load(file).module()`."""
    for name, program in export_programs(model).items():
        torch.export.save(program, folder / f"{name}.pt2")


def write_onnx(model: QLIPModel, folder: Path) -> None:
    """encoder.onnx and decoder.onnx, for onnxruntime and others.

    Raises `UserError` when the extra `onnx` is not installed.
    """
    if any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript")):
        raise UserError("ONNX files need the extra packages: pip install 'qlip[onnx]'")
    names = {"encoder": ("pixel_values", "bits"), "decoder": ("bits", "pixel_values")}
    for name, program in export_programs(model).items():
        given, returned = names[name]
        with _quiet_exporter():
            exported = torch.onnx.export(
                program, input_names=[given], output_names=[returned], opset_version=ONNX_OPSET, verbose=False
            )
        assert exported is not None
        exported.save(folder / f"{name}.onnx", external_data=False)


class _quiet_exporter(warnings.catch_warnings):  # noqa: N801 - a context manager
    """The exporter logs each of its passes and warns of its own deprecated calls."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
        for name in ("torch.onnx", "onnxscript", "onnx_ir"):
            logging.getLogger(name).setLevel(logging.ERROR)
