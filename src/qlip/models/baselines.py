"""What models of others share when evaluations measure them: pixel scales, whole weights, what goes onto cards.

The models are in `two_towers.py`, `autoencoders.py` and `llamagen.py`. They are read from local files and computed by
the library they come from. A tensor that is missing, left over or not finite is an error, as it is for our own models:
the libraries would go on with fresh weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlip.core.errors import UserError
from qlip.models.qlip.fingerprint import model_fingerprint
from qlip.models.qlip.loading import LOAD_ERRORS
from qlip.models.qlip.pretrained import one_line
from qlip.models.qlip.weight_files import shown

DOWNLOAD_AGAIN = "download it again"


@dataclass(kw_only=True, slots=True, frozen=True)
class PixelScale:
    """What a model's floats stand for: ``value = (unit - mean) / std`` per channel, unit pixels in [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def from_uint8(self, pictures: Tensor, *, dtype: torch.dtype) -> Tensor:
        """(b, 3, S, S) uint8 -> what the model takes."""
        values = (pictures.float() / 255 - self._column(self.mean, pictures)) / self._column(self.std, pictures)
        return values.to(dtype)

    def to_unit(self, values: Tensor) -> Tensor:
        """(b, 3, S, S) of the model -> float32 unit pixels, not clamped."""
        return values.float() * self._column(self.std, values) + self._column(self.mean, values)

    def _column(self, numbers: tuple[float, float, float], like: Tensor) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float32, device=like.device)[:, None, None]


MINUS_ONE_TO_ONE = PixelScale(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json of a folder holds. Raises `UserError` when it is not there or no JSON object."""
    config = read_json(folder / "config.json")
    if config is None:
        raise UserError(f"{folder} has no config.json; {DOWNLOAD_AGAIN}")
    return config


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file, None when there is no such file. Raises `UserError` when it holds anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path} ({type(error).__name__}); {DOWNLOAD_AGAIN}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold an object, got {type(values).__name__}; {DOWNLOAD_AGAIN}")
    return values


def whole_model(source: Path, load: Callable[[], tuple[Any, Mapping[str, Any]]]) -> Any:
    """What `load` returns with its lists of tensors that did not fit, in evaluation mode, if all of them are empty.

    Raises `UserError` naming the first tensor that is missing, left over, misshapen or not finite.
    """
    try:
        model, info = load()
    except UserError:
        raise
    except (*LOAD_ERRORS, ArithmeticError, AssertionError, ImportError) as error:
        raise UserError(f"cannot load {source}: {one_line(error).split('. ')[0]}; {DOWNLOAD_AGAIN}") from error
    for kind in ("missing", "unexpected", "mismatched"):
        names = sorted(name if isinstance(name, str) else name[0] for name in info[f"{kind}_keys"])
        if names:
            raise UserError(f"{source}: {len(names)} {kind} keys, first {shown(names[0])}; {DOWNLOAD_AGAIN}")
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{source}: {name} holds NaN or infinite values; this model is broken, take another")
    return model.eval()


def identity_of(model: nn.Module, *, source_family: str, parts: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """What all of them say for cards; `parts` are the modules whose parameters are counted together."""
    counts = dict.fromkeys(parts, 0)
    for name, parameter in model.named_parameters():
        for part, modules in parts.items():
            counts[part] += parameter.numel() if name.split(".")[0] in modules else 0
    return {
        "model_fingerprint": model_fingerprint(model),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "parameters": counts,
        "source_family": source_family,
    }
