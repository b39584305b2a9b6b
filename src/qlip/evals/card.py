"""The protocol card: everything one must know to compare a figure with another."""

from __future__ import annotations

import hashlib
import shlex
import sys
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from qlip.core import distributed
from qlip.engine.run_folder import git_commit, versions
from qlip.evals.collect import PIXEL_DIGEST, Collected
from qlip.evals.inputs import EvalInput
from qlip.evals.protocols import Protocol
from qlip.models.measured import MeasuredModel

METRIC_PACKAGES = ("torch-fidelity", "lpips", "open_clip_torch", "diffusers")


def sha256_of_names(names: Iterable[str]) -> str:
    """sha256 over sorted names, one per line: the identity of a data set or class list."""
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()


def sha256_in_order(names: Iterable[str]) -> str:
    """sha256 over names in their order, one per line: of class names, whose place is their label."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def sha256_of_truth(keys: Iterable[str], truth: Iterable[object]) -> str:
    """sha256 over what is right for each picture: a label, captions."""
    return sha256_of_names(f"{key}\0{right}" for key, right in zip(keys, truth, strict=True))


def sha256_of_pixels(digests: Tensor) -> str:
    """sha256 over the digests (n, 32) of all prepared pictures, whatever their order."""
    rows = sorted(bytes(row.tolist()) for row in digests)
    return hashlib.sha256(b"".join(rows)).hexdigest()


def card_of(
    protocol: Protocol,
    model: MeasuredModel,
    *,
    data: EvalInput,
    collected: Collected,
    size: int,
    baseline: str,
    device: torch.device,
    started: float,
) -> dict[str, Any]:
    """The card of evaluations of a model of pictures: protocol, data, model, machine. All ranks call it together.

    `complete`: all pictures that the protocol names, or, where it names no number, all that the data have. `started` is
    `time.monotonic()` of then.
    """
    return {
        **data_card_fields(protocol, data=data, collected=collected, baseline=baseline),
        **pixel_card_fields(collected),
        "image_size": size,
        "antialias": True,
        "model_name": model.name,
        "patch_size": model.patch_size,
        "bits_per_token": model.bits_per_token,
        **model.identity(),
        **machine_card_fields(data=data, collected=collected, device=device, started=started),
        "metric_versions": {name: version(name) for name in METRIC_PACKAGES if _installed(name)},
    }


def data_card_fields(protocol: Protocol, *, data: EvalInput, collected: Collected, baseline: str) -> dict[str, Any]:
    """What was measured on what, whether on all of it, and what the figures stand beside."""
    count = len(collected.keys)
    cut = bool(data.max_samples) and count + collected.skipped.total() >= data.max_samples
    return {
        **protocol.card(),
        "complete": count == protocol.count if protocol.count else not cut,
        "max_samples": data.max_samples,
        "baseline": baseline,
        "data": data.source.name,
        "count": count,
        "skipped": collected.skipped.total(),
        "skipped_reasons": dict(collected.skipped),
        "keys_sha256": sha256_of_names(collected.keys),
    }


def pixel_card_fields(collected: Collected) -> dict[str, Any]:
    """Which prepared pictures, and how many of them are there again. All ranks call it together."""
    digests = collected.rows(PIXEL_DIGEST)[PIXEL_DIGEST]
    return {"duplicates": len(digests) - len(digests.unique(dim=0)), "pixels_sha256": sha256_of_pixels(digests)}


def machine_card_fields(
    *, data: EvalInput, collected: Collected, device: torch.device, started: float
) -> dict[str, Any]:
    """Where, in which batches, when and for how long; `started` is `time.monotonic()` of then."""
    return {
        "device": device.type,
        "ranks": distributed.world_size(),
        "batch_size": data.batch_size,
        "resumed_parts": collected.num_resumed,
        **run_card_fields(seconds=time.monotonic() - started),
    }


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def run_card_fields(*, seconds: float) -> dict[str, Any]:
    """When, with what, for how long."""
    return {
        "versions": versions(),
        "git_commit": git_commit(),
        "command": shlex.join(["qlip", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(seconds, 1),
    }
