"""The protocol card: everything one must know to compare a figure with another."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from qlip.data.loaders import StatefulDataLoader
from qlip.data.shards import ShardDataset
from qlip.engine.run_folder import git_commit, versions
from qlip.models.qlip.fingerprint import encoder_fingerprint, model_fingerprint
from qlip.models.qlip.modeling import QLIPModel


def sha256_of_names(names: Iterable[str]) -> str:
    """sha256 over sorted names, one per line: the identity of a data set or class list."""
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()


def model_card_fields(model: QLIPModel, *, device: torch.device) -> dict[str, Any]:
    """What identifies a model and where it ran."""
    return {
        "model_fingerprint": model_fingerprint(model),
        "encoder_fingerprint": encoder_fingerprint(model),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": device.type,
    }


def data_card_fields(source: str, *, keys: list[str], image_size: int, skipped: int) -> dict[str, Any]:
    """What identifies the data and how pictures were prepared."""
    return {
        "data": Path(source).name,
        "count": len(keys),
        "skipped": skipped,
        "keys_sha256": sha256_of_names(keys),
        "image_size": image_size,
        "resize_filter": "bicubic (Pillow, antialiased), shortest edge",
        "crop": "centre",
    }


def num_skipped(loader: StatefulDataLoader) -> int:
    """Samples that an evaluation loader has met so far and could not use."""
    assert isinstance(loader.dataset, ShardDataset)
    return loader.dataset.ledger.skipped.total()


def run_card_fields(*, seconds: float) -> dict[str, Any]:
    """When, with what, for how long."""
    return {
        "versions": versions(),
        "git_commit": git_commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(seconds, 1),
    }
