"""Run protocols by name on a model: figures beside their baselines, written with their cards, resumed when stopped.

OUT/results.json            every finished protocol of the model, earlier ones too; replaced whole after each
OUT/<protocol>.csv          a row per picture, for reconstructions
OUT/<protocol>_worst.png    the twenty pictures of the lowest PSNR
OUT/<protocol>_answers.jsonl  answers to questions, in LLaVA's form
OUT/<protocol>_captions.json  captions, in COCO's results form
OUT/.parts                  what a stopped evaluation goes on from; its own go when all is finished
OUT/features                what probes learn from, kept for the next run
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import nn

from qlip.core import distributed
from qlip.core.errors import UserError
from qlip.core.log import console
from qlip.data.sources import open_source
from qlip.engine.parallel import pick_device
from qlip.engine.run_folder import make_writable
from qlip.evals import protocols
from qlip.evals.captioning import CaptionEvaluator
from qlip.evals.compare import read_results
from qlip.evals.generation_networks import IN_CLIP
from qlip.evals.inputs import EvalInput
from qlip.evals.knn import KnnEvaluator
from qlip.evals.linear_probe import LinearProbeEvaluator
from qlip.evals.networks import Networks
from qlip.evals.picture_metrics import FRECHET
from qlip.evals.protocols import ReconstructionSettings, TextToImageSettings, find_protocol
from qlip.evals.questions import QuestionEvaluator
from qlip.evals.reconstruction import ReconstructionEvaluator
from qlip.evals.results import write_results
from qlip.evals.retrieval import RetrievalEvaluator
from qlip.evals.scene_captions import SceneCaptionEvaluator
from qlip.evals.scene_generation import SceneGenerationEvaluator
from qlip.evals.scene_zero_shot import SceneZeroShotEvaluator
from qlip.evals.stories import StoryEvaluator
from qlip.evals.text_to_image import TextToImageEvaluator
from qlip.evals.zero_shot import ZeroShotEvaluator
from qlip.models.assistant import is_assistant, open_assistant
from qlip.models.generator import is_generator, open_generator
from qlip.models.measured import MeasuredModel, MeasuredQLIP
from qlip.models.opening import open_measured
from qlip.models.qlip.modeling import QLIPModel
from qlip.models.qlip.processing import QLIPProcessor
from qlip.models.unified_model import is_unified, open_unified

FROM_OUTSIDE = ("rfid", "lpips_alex", "lpips_vgg", "gfid")
LEFT_OUT = (*FROM_OUTSIDE, *IN_CLIP)


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
    """Pictures: a folder, shards, a COCO or Karpathy json, parquet, question files."""
    evals: tuple[str, ...] = protocols.SCENES
    """Protocols by name."""
    images: str = ""
    """Folder of the pictures that a COCO or Karpathy json or question files name."""
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
    """Pictures per forward pass, questions answered together."""
    leave_out: tuple[str, ...] = ()
    """Metrics that are not to be measured."""
    networks: Path | None = None
    """Folder of the weights of Inception and LPIPS."""
    caption_encoder: str = ""
    """Folder of a generator's T5, if it lies elsewhere than in training."""
    clip: Path | None = None
    """Model that scores generated pictures against captions."""
    folder: Path | None = None
    """Work and result folder; None keeps all in memory and writes nothing."""

    def _refuse_misplaced(self) -> None:
        """Raise `UserError` for a result folder inside the pictures, and one that cannot be written."""
        if self.folder is None:
            return
        place = self.folder.expanduser().resolve()
        for data in (self.data, self.train_data, self.reference):
            if data and Path(data).is_dir() and place.is_relative_to(Path(data).resolve()):
                raise UserError(f"--out {self.folder} lies in {data}, whose pictures it would join: choose another")
        make_writable(self.folder)

    def open(self) -> EvalInput:
        """The data behind the words. Raises `UserError` for impossible numbers, names and missing data."""
        for name, least in (("max_samples", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}: give at least {least}")
        if not self.evals:
            raise UserError("no protocol to measure: add --evals NAME (`qlip eval protocols` lists them)")
        if len(set(self.evals)) < len(self.evals):
            raise UserError(f"--evals {' '.join(self.evals)}: a protocol stands there twice; leave one out")
        self._refuse_misplaced()
        for name in self.leave_out:
            if name not in LEFT_OUT:
                raise UserError(f"--leave-out {name}: only {', '.join(LEFT_OUT)} can be left out")
        if not self.data:
            raise UserError("no data to score: add --data PATH (docs/data.md says what it may be and where to get it)")
        return EvalInput(
            source=open_source(self.data, images=self.images, split=self.split, labels=self.labels),
            train_source=open_source(self.train_data, split="train", labels=self.labels) if self.train_data else None,
            reference=open_source(self.reference, images=self.images, split=self.split) if self.reference else None,
            split=self.split,
            max_samples=self.max_samples,
            batch_size=self.batch_size,
            leave_out=self.leave_out,
            networks=Networks(self.networks),
            folder=self.folder,
        )


def warn_of_unused(request: EvalRequest) -> None:
    """Say which options have no effect on the protocols that were asked for."""
    asked = [find_protocol(name) for name in request.evals]
    with_metrics = (ReconstructionSettings, TextToImageSettings)
    metrics = {metric for p in asked if isinstance(p.settings, with_metrics) for metric in p.settings.metrics}
    measured = metrics - set(request.leave_out)
    unused = {
        "--reference": request.reference and not measured & {*FRECHET, "gfid", "fd_clip"},
        "--train-data": request.train_data and not any(p.kind in ("linear_probe", "knn") for p in asked),
        "--networks": request.networks and not measured & set(FROM_OUTSIDE),
        "--clip": request.clip and not measured & set(IN_CLIP),
        "--labels": request.labels and not any(p.kind in ("zero_shot", "linear_probe", "knn") for p in asked),
    }
    unused |= {f"--leave-out {name}": name not in metrics for name in request.leave_out}
    for option, idle in unused.items():
        if idle:
            console.print(f"{option} has no effect on {', '.join(request.evals)}")


def result_folder(model: str | Path, *, root: str = "runs/eval") -> Path:
    """`runs/demo/stage2/export` -> `runs/eval/demo-stage2`: where results go unless told."""
    parts = [part for part in Path(model).parts if part not in ("/", "..", ".", "runs", "export")]
    return Path(root) / "-".join(parts[-2:] or ["model"])


def default_evals(model: str | Path) -> tuple[str, ...]:
    """The protocols on scenes that fit a model."""
    if is_assistant(model):
        return protocols.SCENES_ASKED
    if is_unified(model):
        return protocols.SCENES_UNIFIED
    return protocols.SCENES_GENERATED if is_generator(model) else protocols.SCENES


def default_batch_size(model: str | Path) -> int:
    """Pictures per forward pass; questions or pictures that are written for together hold a context each in memory."""
    return 8 if is_assistant(model) else 32 if is_unified(model) else 100


def build_evaluator(name: str, data: EvalInput, *, clip: Path | None = None) -> MeasuredEvaluator:
    """The evaluation of that name; `clip` is what generators are scored with.

    Raises `UserError` naming the nearest one when there is none.
    """
    protocol = find_protocol(name)
    if name == "scenes-zeroshot-v1":
        return SceneZeroShotEvaluator(protocol, data)
    kinds: dict[str, Callable[[protocols.Protocol, EvalInput], MeasuredEvaluator]] = {
        "reconstruction": ReconstructionEvaluator,
        "zero_shot": ZeroShotEvaluator,
        "retrieval": RetrievalEvaluator,
        "linear_probe": LinearProbeEvaluator,
        "knn": KnnEvaluator,
        "text_to_image": partial(TextToImageEvaluator, clip=clip),
        "scene_prompts": SceneGenerationEvaluator,
        "questions": QuestionEvaluator,
        "captions": CaptionEvaluator,
        "scene_captions": SceneCaptionEvaluator,
        "stories": StoryEvaluator,
    }
    return kinds[protocol.kind](protocol, data)


def run_evals(model: Path | str, request: EvalRequest, *, device: str = "auto") -> list[dict[str, Any]]:
    """One result per protocol: `eval` (its kind), `figures`, `details`, `card`.

    Under torchrun all processes call it and share the pictures. Raises `UserError` for an unknown protocol, a folder
    that is no model, data that are not there, and as the evaluations do.
    """
    warn_of_unused(request)
    place = pick_device(device)
    distributed.start(device_type=place.type)
    data, measured = distributed.on_all_ranks(lambda: (request.open(), _opened(model, request.caption_encoder)))
    measured.to(place)
    results: list[dict[str, Any]] = []
    for name in request.evals:
        evaluator = build_evaluator(name, data, clip=request.clip)
        figures = evaluator.run(measured, place)
        card = {"model": str(model), **evaluator.card()}
        kind = find_protocol(name).kind
        results.append({"eval": kind, "figures": figures, "details": evaluator.details, "card": card})
        if request.folder is not None:
            distributed.on_first_rank(partial(_write, request.folder, results, evaluator, measured, place))
    distributed.on_first_rank(data.clean_up)
    return results


def _opened(model: Path | str, caption_encoder: str) -> MeasuredModel:
    """A model to be measured, a generator, an assistant or all in one; evaluations refuse what they cannot measure."""
    if is_assistant(model):
        assistant = open_assistant(model)
        assistant.identity()  # of the weights as they were saved: a GPU computes in another dtype
        return cast(MeasuredModel, assistant)
    if is_unified(model):
        unified = open_unified(model)
        unified.identity()
        return cast(MeasuredModel, unified)
    generator = open_generator(model, caption_encoder=caption_encoder) if is_generator(model) else None
    return open_measured(model) if generator is None else cast(MeasuredModel, generator)


def _write(
    folder: Path,
    results: list[dict[str, Any]],
    evaluator: MeasuredEvaluator,
    model: MeasuredModel,
    device: torch.device,
) -> None:
    """All results so far beside earlier ones of the same model, and what the last evaluation has to look at."""
    path = folder / "results.json"
    write_results(path, [*_earlier(path, results), *results])
    if isinstance(evaluator, ReconstructionEvaluator):
        evaluator.write_looks(folder, model, device)
    if isinstance(evaluator, QuestionEvaluator | CaptionEvaluator | SceneCaptionEvaluator):
        evaluator.write_answers(folder)


def _earlier(path: Path, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the file holds of this model under other protocols; nothing of another model or of a broken file."""
    try:
        found = read_results(path) if path.exists() else []
    except UserError:
        found = []
    protocols_now = {result["card"]["protocol"] for result in results}
    model = results[0]["card"]["model_fingerprint"]
    return [
        result
        for result in found
        if result["card"].get("model_fingerprint") == model and result["card"].get("protocol") not in protocols_now
    ]


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
