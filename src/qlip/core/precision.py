"""Regions that must compute in float32 whatever the caller has switched on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn


def float32_region(device_type: str) -> AbstractContextManager:
    """Autocast off; where it is not on there is nothing to enter, so that exporters and compilers see no context."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):  # not on meta
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


@contextmanager
def float32_kind(*, products: str = "ieee", convolutions: str = "ieee") -> Iterator[None]:
    """How matrix products and convolutions of float32 are computed inside: `ieee` exactly, `tf32` in TensorFloat-32.

    Through `fp32_precision`, which works whether the process has used that or the older switches.
    """
    backends: Any = torch.backends  # their stubs do not know these attributes
    wanted = [
        (backends.cuda.matmul, products),
        (backends.mkldnn.matmul, products),
        (backends.cudnn.conv, convolutions),
        (backends.mkldnn.conv, convolutions),
    ]
    before = [(backend, backend.fp32_precision) for backend, _ in wanted]
    try:
        for backend, kind in wanted:
            backend.fp32_precision = kind
        yield
    finally:
        for backend, kind in before:
            backend.fp32_precision = kind


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Give the parameters another dtype, in place. Buffers stay: a rotary table in bfloat16 is a wrong table."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
