"""Run protocols by name on a model: figures beside their baselines, written with their cards, resumed when stopped.

OUT/results.json            every finished protocol; replaced whole after each
OUT/<protocol>.csv          a row per picture, for reconstructions
OUT/<protocol>_worst.png    the twenty pictures of the lowest PSNR
OUT/parts  OUT/reference    what a stopped evaluation goes on from; gone when all is finished
OUT/features                what probes learn from, kept for the next run
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.table import Table
from torch import nn

from qlip.core import distributed
from qlip.core.errors import UserError
from qlip.core.log import console
from qlip.data.sources import open_source
from qlip.engine.parallel import pick_device
from qlip.evals import protocols
from qlip.evals.inputs import EvalInput
from qlip.evals.knn import KnnEvaluator
from qlip.evals.linear_probe import LinearProbeEvaluator
from qlip.evals.networks import Networks
from qlip.evals.protocols import find_protocol
from qlip.evals.reconstruction import ReconstructionEvaluator
from qlip.evals.retrieval import RetrievalEvaluator
from qlip.evals.scene_zero_shot import SceneZeroShotEvaluator
from qlip.evals.zero_shot import ZeroShotEvaluator
from qlip.models.measured import MeasuredModel, MeasuredQLIP
from qlip.models.opening import open_measured
from qlip.models.qlip.modeling import QLIPModel
from qlip.models.qlip.processing import QLIPProcessor

SUFFIX = "_baseline"
LEFT_OUT = ("rfid", "lpips_alex", "lpips_vgg")


class MeasuredEvaluator(Protocol):
    """What an evaluation is: one protocol on one data set."""

    details: dict[str, Any]
    """What figures leave out: confusions, shares of bits, accuracies per class."""

    def run(self, model: MeasuredModel, device: torch.device) -> dict[str, float]:
        """Named figures of the model."""

    def card(self) -> dict[str, Any]:
        """How they were measured."""


@dataclass(kw_only=True, slots=True)
class EvalRequest:
    """What to measure on which data."""

    data: str
    """Pictures: a folder, shards, a COCO or Karpathy json, parquet."""
    evals: tuple[str, ...] = protocols.SCENES
    """Protocols by name."""
    images: str = ""
    """Folder of the pictures that a COCO or Karpathy json names."""
    split: str = "test"
    """Of a Karpathy json."""
    labels: Path | None = None
    """File of class names."""
    train_data: str = ""
    """What probes learn from."""
    reference: str = ""
    """Pictures to take Frechet distances against instead of the originals."""
    max_samples: int = 0
    """Score the first so many pictures; 0 scores all."""
    batch_size: int = 100
    """Pictures per forward pass."""
    leave_out: tuple[str, ...] = ()
    """Metrics that are not to be measured."""
    networks: Path | None = None
    """Folder of the weights of Inception and LPIPS."""
    folder: Path | None = None
    """Work and result folder; None keeps all in memory and writes nothing."""

    def open(self) -> EvalInput:
        """The data behind the words. Raises `UserError` for impossible numbers, names and missing data."""
        for name, least in (("max_samples", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}: give at least {least}")
        for name in self.leave_out:
            if name not in LEFT_OUT:
                raise UserError(f"--leave-out {name}: only {', '.join(LEFT_OUT)} can be left out")
        if not self.data:
            raise UserError("no data to score: add --data PATH (docs/data.md says what it may be and where to get it)")
        return EvalInput(
            source=open_source(self.data, images=self.images, split=self.split, labels=self.labels),
            train_source=open_source(self.train_data, split="train", labels=self.labels) if self.train_data else None,
            reference=open_source(self.reference) if self.reference else None,
            max_samples=self.max_samples,
            batch_size=self.batch_size,
            leave_out=self.leave_out,
            networks=Networks(self.networks),
            folder=self.folder,
        )


def result_folder(model: str | Path, *, root: str = "runs/eval") -> Path:
    """`runs/demo/stage2/export` -> `runs/eval/demo-stage2`: where results go unless told."""
    parts = [part for part in Path(model).parts if part not in ("/", "..", ".", "runs", "export")]
    return Path(root) / "-".join(parts[-2:] or ["model"])


def build_evaluator(name: str, data: EvalInput) -> MeasuredEvaluator:
    """The evaluation of that name. Raises `UserError` naming the nearest one when there is none."""
    protocol = find_protocol(name)
    if name == "scenes-zeroshot-v1":
        return SceneZeroShotEvaluator(protocol, data)
    kinds: dict[str, Callable[[protocols.Protocol, EvalInput], MeasuredEvaluator]] = {
        "reconstruction": ReconstructionEvaluator,
        "zero_shot": ZeroShotEvaluator,
        "retrieval": RetrievalEvaluator,
        "linear_probe": LinearProbeEvaluator,
        "knn": KnnEvaluator,
    }
    return kinds[protocol.kind](protocol, data)


def run_evals(model: Path | str, request: EvalRequest, *, device: str = "auto") -> list[dict[str, Any]]:
    """One result per protocol: `eval` (its kind), `figures`, `details`, `card`.

    Under torchrun all processes call it and share the pictures. Raises `UserError` for an unknown protocol, a folder
    that is no model, data that are not there, and as the evaluations do.
    """
    for name in request.evals:
        find_protocol(name)
    place = pick_device(device)
    distributed.start(device_type=place.type)
    data, measured = distributed.on_all_ranks(lambda: (request.open(), open_measured(model)))
    measured.to(place)
    results: list[dict[str, Any]] = []
    for name in request.evals:
        evaluator = build_evaluator(name, data)
        figures = evaluator.run(measured, place)
        card = {"model": str(model), **evaluator.card()}
        kind = find_protocol(name).kind
        results.append({"eval": kind, "figures": figures, "details": evaluator.details, "card": card})
        distributed.on_first_rank(partial(_write, request.folder, results, evaluator, measured, place))
    if request.folder is not None and distributed.rank() == 0:
        for parts in ("parts", "reference"):
            shutil.rmtree(request.folder / parts, ignore_errors=True)
    return results


def _write(
    folder: Path | None,
    results: list[dict[str, Any]],
    evaluator: MeasuredEvaluator,
    model: MeasuredModel,
    device: torch.device,
) -> None:
    """All results so far, and what the last evaluation has to look at."""
    if folder is not None:
        write_results(folder / "results.json", results)
        if isinstance(evaluator, ReconstructionEvaluator):
            evaluator.write_looks(folder, model, device)


class TrainingEvaluator:
    """An evaluation inside training (`engine.interfaces.Evaluator`): the model comes as the network that is trained."""

    def __init__(self, name: str, data: EvalInput, processor: QLIPProcessor) -> None:
        """Raises `UserError` as `build_evaluator` does."""
        self.evaluator = build_evaluator(name, data)
        self.processor = processor

    def run(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Named figures of the model."""
        assert isinstance(model, QLIPModel)
        return self.evaluator.run(MeasuredQLIP(model, self.processor), device)

    def card(self) -> dict[str, Any]:
        """How they were measured."""
        return self.evaluator.card()


def print_results(results: list[dict[str, Any]]) -> None:
    """A table per evaluation: figure, value, baseline."""
    for result in results:
        card = result["card"]
        part = "" if card.get("complete", True) else ", NOT the full set"
        title = f"{card['protocol']}  ({card['count']} samples of {card['data']}{part})"
        table = Table(title=title, title_justify="left")
        table.add_column("figure")
        table.add_column("value", justify="right")
        if card["baseline"]:
            table.add_column(card["baseline"], justify="right")
        for name, value in result["figures"].items():
            if not name.endswith(SUFFIX):
                cells = [_shown(value)]
                if card["baseline"]:
                    cells.append(_shown(result["figures"].get(name + SUFFIX, "")))
                table.add_row(name, *cells)
        console.print(table)


def _shown(value: float | str | None) -> str:
    """Four digits; a dash for what could not be measured (NaN here, null in a file)."""
    if isinstance(value, str):
        return value
    return "\N{EN DASH}" if value is None or math.isnan(value) else f"{value:.4f}"


def write_results(path: Path, results: list[dict[str, Any]]) -> None:
    """Write results as JSON, NaN and infinities as null; the file appears whole or not at all."""
    results = [
        {**result, "figures": {k: v if math.isfinite(v) else None for k, v in result["figures"].items()}}
        for result in results
    ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(results, indent=1))
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another file") from None
