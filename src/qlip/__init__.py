"""qlip: a visual tokenizer aligned with text. Importing it is light; names load what they need on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlip.models.qlip import QLIPConfig, QLIPModel, QLIPProcessor
    from qlip.quantizers.ids import bits_to_ids, bits_to_subcodes, ids_to_bits, subcodes_to_bits

__version__ = "0.1.0"

_HOMES = {
    "QLIPConfig": "qlip.models.qlip",
    "QLIPModel": "qlip.models.qlip",
    "QLIPProcessor": "qlip.models.qlip",
    "bits_to_ids": "qlip.quantizers.ids",
    "bits_to_subcodes": "qlip.quantizers.ids",
    "ids_to_bits": "qlip.quantizers.ids",
    "subcodes_to_bits": "qlip.quantizers.ids",
}

__all__ = [
    "QLIPConfig",
    "QLIPModel",
    "QLIPProcessor",
    "bits_to_ids",
    "bits_to_subcodes",
    "ids_to_bits",
    "subcodes_to_bits",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qlip' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
