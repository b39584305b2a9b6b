"""What every part of `benchmarks/train.py` writes down, and how."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from qlip.apps.demo import machine
from qlip.engine.run_folder import git_commit, versions


def header(part: str, *, device: str, tiny: bool) -> dict[str, Any]:
    """When, by which command, on what, with which versions."""
    words = ["benchmarks/train.py", "--parts", part, "--device", device, *(["--tiny"] if tiny else [])]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(words),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "machine": machine(),
        "versions": versions(),
        "git_commit": git_commit(),
        "tiny": tiny,
    }


def write_record(path: Path, record: dict[str, Any]) -> None:
    """As JSON with four digits, NaN as null; the file appears whole or not at all, since a part may be stopped."""
    rounded = json.loads(
        json.dumps(record), parse_float=lambda digits: float(f"{float(digits):.4g}"), parse_constant=lambda _: None
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(rounded, indent=1) + "\n")
    temporary.replace(path)


def read_record(path: Path) -> dict[str, Any] | None:
    """What a part wrote; None when it has not got so far."""
    return json.loads(path.read_text()) if path.exists() else None


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0))
