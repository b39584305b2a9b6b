"""The ways of computing the same tokens that `qlip verify` compares: each changes one thing of the reference.

The reference is `QLIPModel.encode(batch_invariant=True)`: float32, picture by picture, on one device.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qlip.core.precision import float32_kind
from qlip.engine.parallel import autocast
from qlip.models.qlip.modeling import QLIPModel

Encode = Callable[[Tensor], Tensor]
"""(b, 3, S, S) pixels on the CPU -> (b, n, L) bool on the CPU."""
Opener = Callable[[QLIPModel, torch.device], AbstractContextManager[Encode]]
"""Sets the model and the process up for a setting and puts everything back afterwards."""


@dataclass(kw_only=True, slots=True)
class Setting:
    """One way of computing the tokens, or why this machine has it not."""

    name: str
    opener: Opener
    batch_size: int = 1
    """Pictures that are encoded together."""
    left_out: str = ""
    """Why it cannot be measured here; empty when it can."""


def settings_for(
    model: QLIPModel, place: torch.device, *, num_pictures: int, batch_sizes: Sequence[int], compile: bool
) -> list[Setting]:
    """Every setting in the order of the table, those that this machine has not with the reason."""
    gpu_only = "" if place.type == "cuda" else "needs a CUDA device"
    no_compiler = "not asked for (--no-compile)" if not compile else _missing_compiler(place)
    other_attention = "eager" if _attention(model) != "eager" else "sdpa"
    settings = [
        Setting(name="again", opener=reference),
        Setting(name="again in one batch", opener=reference, batch_size=num_pictures),
        *_batch_settings(num_pictures, batch_sizes),
        Setting(name=f"{other_attention} attention", opener=partial(_attention_of, implementation=other_attention)),
        Setting(name="one CPU thread", opener=_one_thread, left_out=_why_no_threads(place)),
        Setting(name="TF32 convolutions", opener=partial(_tf32, products=False), left_out=gpu_only),
        Setting(name="TF32 everywhere", opener=partial(_tf32, products=True), left_out=gpu_only),
        Setting(name="bf16 autocast", opener=_autocast),
        Setting(name="bf16 weights", opener=partial(_weights_of, dtype=torch.bfloat16)),
        Setting(name="fp16 weights", opener=partial(_weights_of, dtype=torch.float16), left_out=gpu_only),
        Setting(name="torch.compile", opener=_compiled, left_out=no_compiler),
        Setting(name="torch.compile in bf16", opener=partial(_compiled, bf16=True), left_out=no_compiler or gpu_only),
    ]
    return settings + _device_settings(place)


def _batch_settings(num_pictures: int, batch_sizes: Sequence[int]) -> list[Setting]:
    sizes = sorted(set(batch_sizes))
    few = f"only {num_pictures} picture{'s' if num_pictures > 1 else ''} given"
    return [
        Setting(name=f"batches of {size}", opener=_plain, batch_size=size, left_out=few if size > num_pictures else "")
        for size in sizes
    ]


def _device_settings(place: torch.device) -> list[Setting]:
    kinds = ["cpu"]
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        assert accelerator is not None
        kinds.append(accelerator.type)
    others = [kind for kind in kinds if kind != place.type]
    if not others:
        return [Setting(name="another device", opener=reference, left_out=f"this machine has only its {place.type}")]
    return [Setting(name=f"on {kind}", opener=partial(_on_device, kind=kind)) for kind in others]


def _missing_compiler(place: torch.device) -> str:
    if place.type == "cuda":
        return "" if importlib.util.find_spec("triton") else "triton is not installed"
    default = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    compiler = os.environ.get("CXX", default)  # as torch.compile looks for it
    return "" if shutil.which(compiler) else f"no C++ compiler: {compiler} is not installed"


def _why_no_threads(place: torch.device) -> str:
    if place.type != "cpu":
        return "the CPU computes nothing here"
    return "" if torch.get_num_threads() > 1 else "there is only one anyway"


def _attention(model: QLIPModel) -> str:
    return model.vision_model.config._attn_implementation or "sdpa"


# --- openers -----------------------------------------------------------------------------------------------------


def _encoder(model: QLIPModel, place: torch.device, *, batch_invariant: bool) -> Encode:
    return lambda pixels: model.encode(pixels.to(place), batch_invariant=batch_invariant).cpu()


@contextmanager
def reference(model: QLIPModel, place: torch.device) -> Iterator[Encode]:
    """What everything is compared with."""
    yield _encoder(model, place, batch_invariant=True)


@contextmanager
def _plain(model: QLIPModel, place: torch.device) -> Iterator[Encode]:
    with float32_kind():
        yield _encoder(model, place, batch_invariant=False)


@contextmanager
def _attention_of(model: QLIPModel, place: torch.device, *, implementation: str) -> Iterator[Encode]:
    before = _attention(model)
    model.vision_model.set_attn_implementation(implementation)
    try:
        yield _encoder(model, place, batch_invariant=True)
    finally:
        model.vision_model.set_attn_implementation(before)


@contextmanager
def _one_thread(model: QLIPModel, place: torch.device) -> Iterator[Encode]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield _encoder(model, place, batch_invariant=True)
    finally:
        torch.set_num_threads(before)


@contextmanager
def _tf32(model: QLIPModel, place: torch.device, *, products: bool) -> Iterator[Encode]:
    with float32_kind(convolutions="tf32", products="tf32" if products else "ieee"):
        yield _encoder(model, place, batch_invariant=False)


@contextmanager
def _autocast(model: QLIPModel, place: torch.device) -> Iterator[Encode]:
    with autocast(place, "bf16"):
        yield _encoder(model, place, batch_invariant=False)


@contextmanager
def _weights_of(model: QLIPModel, place: torch.device, *, dtype: torch.dtype) -> Iterator[Encode]:
    vision = copy.deepcopy(model.vision_model).to(dtype)
    yield lambda pixels: vision.quantize(pixels.to(place)).bits.cpu()


@contextmanager
def _compiled(model: QLIPModel, place: torch.device, *, bf16: bool = False) -> Iterator[Encode]:
    def bits_of(pixels: Tensor) -> Tensor:
        return model.vision_model.quantize(pixels).bits

    compiled = torch.compile(bits_of, dynamic=False)
    try:
        with float32_kind(), autocast(place, "bf16" if bf16 else "fp32"):
            yield lambda pixels: compiled(pixels.to(place)).cpu()
    finally:
        torch.compiler.reset()


@contextmanager
def _on_device(model: QLIPModel, place: torch.device, *, kind: str) -> Iterator[Encode]:
    other = torch.device(kind)
    model.vision_model.to(other)
    try:
        yield _encoder(model, other, batch_invariant=True)
    finally:
        model.vision_model.to(place)
