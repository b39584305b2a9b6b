"""The protocol card: everything one must know to compare a figure with another."""

from __future__ import annotations

import hashlib
import shlex
import sys
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from qlip.core import distributed
from qlip.data.items import Source
from qlip.engine.run_folder import git_commit, versions
from qlip.evals.collect import PIXEL_DIGEST, Collected
from qlip.evals.protocols import Protocol
from qlip.models.measured import MeasuredModel


def sha256_of_names(names: Iterable[str]) -> str:
    """sha256 over sorted names, one per line: the identity of a data set or class list."""
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()


def sha256_of_pixels(digests: Tensor) -> str:
    """sha256 over the digests (n, 32) of all prepared pictures, whatever their order."""
    rows = sorted(bytes(row.tolist()) for row in digests)
    return hashlib.sha256(b"".join(rows)).hexdigest()


def card_of(
    protocol: Protocol,
    model: MeasuredModel,
    *,
    source: Source,
    collected: Collected,
    size: int,
    baseline: str,
    device: torch.device,
    batch_size: int,
    seconds: float,
) -> dict[str, Any]:
    """The card that all evaluations share: protocol, data, model, machine. All ranks call it together."""
    count = len(collected.keys)
    return {
        **protocol.card(),
        "complete": not protocol.count or count == protocol.count,
        "baseline": baseline,
        "data": source.name,
        "count": count,
        "skipped": collected.skipped.total(),
        "skipped_reasons": dict(collected.skipped),
        "keys_sha256": sha256_of_names(collected.keys),
        "pixels_sha256": sha256_of_pixels(collected.rows(PIXEL_DIGEST)[PIXEL_DIGEST]),
        "image_size": size,
        "antialias": True,
        "model_name": model.name,
        "patch_size": model.patch_size,
        "bits_per_token": model.bits_per_token,
        **model.identity(),
        "device": device.type,
        "ranks": distributed.world_size(),
        "batch_size": batch_size,
        **run_card_fields(seconds=seconds),
    }


def run_card_fields(*, seconds: float) -> dict[str, Any]:
    """When, with what, for how long."""
    return {
        "versions": versions(),
        "git_commit": git_commit(),
        "command": shlex.join(["qlip", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(seconds, 1),
    }
