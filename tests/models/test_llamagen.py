"""LlamaGen's VQGAN through diffusers equals a plain implementation of that network, and other files are refused."""

from __future__ import annotations

import argparse
import math
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from qlip.core.errors import UserError
from qlip.models.measured import MeasuredModel
from qlip.models.opening import open_measured
from qlip.quantizers.ids import bits_to_ids

BASE, CODES, CODE_WIDTH, LATENT = 32, 21, 8, 16
DS4, DS8 = (1, 2, 2), (1, 1, 2, 2)
Weights = dict[str, Tensor]


def random_weights(multipliers: tuple[int, ...], *, num_res: int = 2, seed: int = 0) -> Weights:
    """Every tensor of such a file, in LlamaGen's names."""
    generator = torch.Generator().manual_seed(seed)
    weights: Weights = {}

    def convolution(name: str, inputs: int, outputs: int, side: int) -> None:
        scale = 1 / math.sqrt(inputs * side * side)
        weights[f"{name}.weight"] = torch.randn(outputs, inputs, side, side, generator=generator) * scale
        weights[f"{name}.bias"] = torch.randn(outputs, generator=generator) * 0.1

    def norm(name: str, width: int) -> None:
        weights[f"{name}.weight"] = 1 + torch.randn(width, generator=generator) * 0.2
        weights[f"{name}.bias"] = torch.randn(width, generator=generator) * 0.2

    def residual(name: str, inputs: int, outputs: int) -> None:
        norm(f"{name}.norm1", inputs)
        convolution(f"{name}.conv1", inputs, outputs, 3)
        norm(f"{name}.norm2", outputs)
        convolution(f"{name}.conv2", outputs, outputs, 3)
        if inputs != outputs:
            convolution(f"{name}.nin_shortcut", inputs, outputs, 1)

    def attention(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            convolution(f"{name}.{part}", width, width, 1)

    lowest = BASE * multipliers[-1]
    for side, levels in (("encoder", multipliers), ("decoder", multipliers[::-1])):
        width = BASE if side == "encoder" else lowest
        convolution(f"{side}.conv_in", 3 if side == "encoder" else LATENT, width, 3)
        for level, multiplier in enumerate(levels):
            block = f"{side}.conv_blocks.{level}"
            is_lowest = level == (len(levels) - 1 if side == "encoder" else 0)
            for i in range(num_res + (side == "decoder")):
                residual(f"{block}.res.{i}", width, BASE * multiplier)
                width = BASE * multiplier
                if is_lowest:
                    attention(f"{block}.attn.{i}", width)
            if level < len(levels) - 1:
                convolution(f"{block}.{'downsample' if side == 'encoder' else 'upsample'}.conv", width, width, 3)
        residual(f"{side}.mid.0", lowest, lowest)
        attention(f"{side}.mid.1", lowest)
        residual(f"{side}.mid.2", lowest, lowest)
        norm(f"{side}.norm_out", width)
        convolution(f"{side}.conv_out", width, LATENT if side == "encoder" else 3, 3)
    convolution("quant_conv", LATENT, CODE_WIDTH, 1)
    convolution("post_quant_conv", CODE_WIDTH, LATENT, 1)
    lengths = torch.rand(CODES, 1, generator=generator) + 0.5  # far from norm 1, so that leaving it out shows
    directions = torch.randn(CODES, CODE_WIDTH, generator=generator)
    weights["quantize.embedding.weight"] = directions * lengths
    weights["quantize.codebook_used"] = torch.zeros(64)
    return weights


class PlainVQGAN:
    """The same network, written out: a picture in [-1, 1] to ids, ids to a picture."""

    def __init__(self, weights: Weights, multipliers: tuple[int, ...], *, num_res: int = 2) -> None:
        self.weights, self.num_levels, self.num_res = weights, len(multipliers), num_res

    def conv(self, name: str, x: Tensor, *, stride: int = 1) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        padding = weight.shape[-1] // 2 if stride == 1 else 0
        return F.conv2d(x, weight, self.weights[f"{name}.bias"], stride=stride, padding=padding)

    def norm(self, name: str, x: Tensor) -> Tensor:
        groups = x.reshape(len(x), 32, -1)
        centred = groups - groups.mean(-1, keepdim=True)
        unit = (centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()).reshape(x.shape)
        return unit * self.weights[f"{name}.weight"][:, None, None] + self.weights[f"{name}.bias"][:, None, None]

    def residual(self, name: str, x: Tensor) -> Tensor:
        h = self.norm(f"{name}.norm1", x)
        h = self.norm(f"{name}.norm2", self.conv(f"{name}.conv1", h * h.sigmoid()))
        h = self.conv(f"{name}.conv2", h * h.sigmoid())
        return h + (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.weights else x)

    def attention(self, name: str, x: Tensor) -> Tensor:
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h).flatten(2) for part in "qkv")  # (b, c, hw)
        shares = torch.einsum("bci,bcj->bij", q, k).div(math.sqrt(x.shape[1])).softmax(-1)
        mixed = torch.einsum("bij,bcj->bci", shares, v).reshape(x.shape)
        return x + self.conv(f"{name}.proj_out", mixed)

    def level(self, name: str, x: Tensor, num_res: int) -> Tensor:
        for i in range(num_res):
            x = self.residual(f"{name}.res.{i}", x)
            if f"{name}.attn.{i}.q.weight" in self.weights:
                x = self.attention(f"{name}.attn.{i}", x)
        return x

    def middle(self, side: str, x: Tensor) -> Tensor:
        x = self.attention(f"{side}.mid.1", self.residual(f"{side}.mid.0", x))
        return self.residual(f"{side}.mid.2", x)

    def end(self, side: str, x: Tensor) -> Tensor:
        x = self.norm(f"{side}.norm_out", x)
        return self.conv(f"{side}.conv_out", x * x.sigmoid())

    def codebook(self, *, unit_codes: bool) -> Tensor:
        codes = self.weights["quantize.embedding.weight"]
        return codes / codes.norm(dim=-1, keepdim=True) if unit_codes else codes

    def ids(self, x: Tensor, *, unit_codes: bool = True) -> Tensor:
        """(b, 3, S, S) -> (b, n)."""
        x = self.conv("encoder.conv_in", x)
        for i in range(self.num_levels):
            x = self.level(f"encoder.conv_blocks.{i}", x, self.num_res)
            if i < self.num_levels - 1:
                x = self.conv(f"encoder.conv_blocks.{i}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        z = self.conv("quant_conv", self.end("encoder", self.middle("encoder", x))).flatten(2).mT  # (b, n, d)
        z = z / z.norm(dim=-1, keepdim=True) if unit_codes else z
        return (z[:, :, None] - self.codebook(unit_codes=unit_codes)).pow(2).sum(-1).argmin(-1)

    def picture(self, ids: Tensor, *, unit_codes: bool = True) -> Tensor:
        """(b, n) -> (b, 3, S, S)."""
        side = math.isqrt(ids.shape[1])
        codes = self.codebook(unit_codes=unit_codes)[ids].mT.reshape(len(ids), CODE_WIDTH, side, side)
        x = self.middle("decoder", self.conv("decoder.conv_in", self.conv("post_quant_conv", codes)))
        for i in range(self.num_levels):
            x = self.level(f"decoder.conv_blocks.{i}", x, self.num_res + 1)
            if i < self.num_levels - 1:
                doubled = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
                x = self.conv(f"decoder.conv_blocks.{i}.upsample.conv", doubled)
        return self.end("decoder", x)


def pictures(num: int = 2, *, side: int = 32) -> Tensor:
    return torch.randint(0, 256, (num, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def written(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


@torch.inference_mode()
def assert_same(model: Any, plain: PlainVQGAN, *, unit_codes: bool = True) -> None:
    """Ids exactly, pixels to 1e-4."""
    found = model.reconstruct(pictures())
    ids = plain.ids(pictures().float() / 127.5 - 1, unit_codes=unit_codes)
    assert torch.equal(bits_to_ids(found.bits), ids) and ids.unique().numel() > 5
    wanted = (plain.picture(ids, unit_codes=unit_codes) + 1) / 2
    assert torch.allclose(found.unit_pixels, wanted, atol=1e-4, rtol=0) and wanted.std() > 0.05


@pytest.mark.parametrize(
    ("multipliers", "num_res", "patch"), [(DS4, 2, 4), (DS8, 2, 8), (DS4, 1, 4)], ids=["ds4", "ds8", "one residual"]
)
def test_it_is_the_network_that_the_plain_implementation_is(tmp_path, multipliers, num_res, patch):
    weights = random_weights(multipliers, num_res=num_res)
    model = open_measured(written(tmp_path / "vq_c2i.pt", {"model": weights}))
    assert isinstance(model, MeasuredModel)
    assert (model.name, model.image_size, model.patch_size, model.num_bits) == ("LlamaGenVQ", 0, patch, 5)
    assert model.bits_per_token == math.log2(CODES) and model.abilities == {"reconstruct"}
    assert_same(model, PlainVQGAN(weights, multipliers, num_res=num_res))
    identity = model.identity()
    assert (identity["source_family"], identity["weights"], identity["dtype"]) == ("LlamaGen", "model", "float32")
    computing = sum(tensor.numel() for name, tensor in weights.items() if name != "quantize.codebook_used")
    assert sum(identity["parameters"].values()) == computing


def test_averaged_weights_of_a_training_checkpoint_are_taken(tmp_path):
    averaged, last = random_weights(DS4, seed=1), random_weights(DS4, seed=2)
    content = {
        "model": last,
        "ema": averaged,
        "optimizer": {"state": {0: torch.ones(2)}, "param_groups": [{"lr": 1e-4}]},
        "discriminator": {"weight": torch.ones(3)},
        "steps": 7,
        "args": argparse.Namespace(codebook_l2_norm=True, vq_model="VQ-16", codebook_size=CODES),
    }
    model = open_measured(written(tmp_path / "0000007.pt", content))
    assert model.identity()["weights"] == "ema"
    assert_same(model, PlainVQGAN(averaged, DS4))


def test_codes_keep_their_length_when_the_training_says_so(tmp_path):
    weights = random_weights(DS4)
    content = {"model": weights, "args": argparse.Namespace(codebook_l2_norm=False)}
    assert_same(open_measured(written(tmp_path / "a.pt", content)), PlainVQGAN(weights, DS4), unit_codes=False)


def test_the_other_places_of_the_same_weights(tmp_path):
    weights = random_weights(DS4)
    (tmp_path / "folder").mkdir()
    save_file(weights, tmp_path / "a.safetensors")
    sources = {
        "bare": written(tmp_path / "bare.pth", weights),
        "folder": written(tmp_path / "folder" / "vq_ds16_c2i.pt", {"model": weights}).parent,
        "safetensors": tmp_path / "a.safetensors",
    }
    models = {name: open_measured(source) for name, source in sources.items()}
    fingerprints = {model.identity()["model_fingerprint"] for model in models.values()}
    assert len(fingerprints) == 1
    assert models["bare"].identity()["weights"] == "state dict"
    shutil.copy(sources["bare"], tmp_path / "folder")
    with pytest.raises(UserError, match=r"holds 2 weight files, no .*: give one of them"):
        open_measured(tmp_path / "folder")


class Payload:
    """Opens a file for writing when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def test_code_in_the_file_is_refused_and_nothing_runs(tmp_path):
    content = {"model": random_weights(DS4), "args": argparse.Namespace(evil=Payload(tmp_path / "marker"))}
    with pytest.raises(UserError, match="carries code or objects besides tensors"):
        open_measured(written(tmp_path / "a.pt", content))
    assert not (tmp_path / "marker").exists()
    pickle.loads(pickle.dumps(Payload(tmp_path / "marker"))).close()
    assert (tmp_path / "marker").exists()


def changed(**changes: Any) -> Callable[[Weights], Weights]:
    """Tensors put in, or taken out where they are None; `__` stands for a dot."""

    def change(weights: Weights) -> Weights:
        weights = weights | {name.replace("__", "."): tensor for name, tensor in changes.items()}
        return {name: tensor for name, tensor in weights.items() if tensor is not None}

    return change


def without_prefix(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: tensor for name, tensor in weights.items() if not name.startswith(prefix)}


def narrow(weights: Weights) -> Weights:
    """Of a width that 32 groups do not divide."""
    return weights | {"encoder.conv_blocks.0.res.0.conv1.weight": torch.ones(33, 32, 3, 3)}


def of_both_names(weights: Weights) -> Weights:
    return weights | {"encoder.conv_norm_out.bias": weights["encoder.norm_out.bias"]}


DAMAGE = {
    "lacks a bias": (changed(quant_conv__bias=None), "1 missing keys, first quant_conv.bias"),
    "one tensor more": (changed(encoder__extra=torch.ones(1)), "1 unexpected keys, first encoder.extra"),
    "a discriminator": (changed(main__0__weight=torch.ones(1)), "1 unexpected keys, first main.0.weight"),
    "one name twice": (of_both_names, "1 unexpected keys, first encoder.conv_norm_out.bias"),
    "misshapen": (changed(encoder__mid__1__q__bias=torch.ones(3)), "1 mismatched keys, first encoder.mid.1.q.bias"),
    "flat weight": (changed(encoder__conv_in__weight=torch.ones(3)), "1 mismatched keys, first encoder.conv_in.weight"),
    "flat codebook": (changed(quantize__embedding__weight=torch.ones(3)), "it has no weight quantize.embedding.weight"),
    "another base": (narrow, "cannot load"),
    "one level less": (without_prefix("encoder.conv_blocks.2"), "keys, first"),
    "no encoder": (without_prefix("encoder"), "is no VQGAN of LlamaGen: it has no weight encoder.conv_blocks.0.res.0"),
    "no output": (changed(decoder__conv_out__weight=None), "1 missing keys, first decoder.conv_out.weight"),
    "no codebook": (changed(quantize__embedding__weight=None), "it has no weight quantize.embedding.weight"),
    "not finite": (changed(quant_conv__bias=torch.full((8,), math.nan)), "quant_conv.bias holds NaN"),
    "nothing": (lambda weights: {}, "is no VQGAN of LlamaGen"),
    "a list": (lambda weights: [1, 2], "holds no state dict"),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGE.values(), ids=DAMAGE)
def test_what_does_not_fit_is_one_line(tmp_path, damage, said):
    path = written(tmp_path / "a.pt", damage(random_weights(DS4)))
    with pytest.raises(UserError) as error:
        open_measured(path)
    message = str(error.value)
    assert said in message and str(path) in message and "; " in message and "\n" not in message


def test_what_is_no_such_file(tmp_path):
    (tmp_path / "page.pt").write_text("<html>")
    with pytest.raises(UserError, match="is no torch file"):
        open_measured(tmp_path / "page.pt")
    whole = written(tmp_path / "whole.pt", {"model": random_weights(DS4)}).read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is damaged or cut short; download it again"):
        open_measured(tmp_path / "cut.pt")
