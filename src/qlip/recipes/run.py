"""What a recipe returns, and how it becomes a run: model, task, data, trainer, evaluations, export."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro
from torch import Tensor, nn

from qlip.core import distributed, pixels
from qlip.core.config import from_json
from qlip.core.errors import UserError
from qlip.data.batches import DataConfig, training_loader
from qlip.data.loaders import TrainingLoader
from qlip.data.sources import open_source
from qlip.engine.checkpoint import checkpoint_folders, load_module
from qlip.engine.interfaces import Evaluator, Task
from qlip.engine.trainer import TrainerConfig, train
from qlip.evals import protocols
from qlip.evals.collect import first_pictures
from qlip.evals.run import EvalRequest, TrainingEvaluator
from qlip.evals.sample_grid import reconstruction_grid, save_grid
from qlip.models.qlip.loading import save_model
from qlip.models.qlip.modeling import QLIPModel
from qlip.models.qlip.processing import QLIPProcessor
from qlip.models.qlip.tokenizer import text_tokenizer
from qlip.recipes.model import ModelConfig, fresh_model, model_from, with_quantizer
from qlip.recipes.running import (
    LEAST_OF_TRAINER,
    begin,
    prepare_folder,
    refuse_small,
    said_once,
    tracker_of,
)
from qlip.tasks.align import AlignConfig, AlignTask
from qlip.tasks.reconstruct import ReconstructConfig, ReconstructTask

LEAST = {
    "trainer": LEAST_OF_TRAINER,
    "data": {"batch_size": 1, "global_batch_size": 0, "num_workers": 0, "shuffle_buffer": 0},
}
DISCRIMINATOR_WEIGHTS = 28_864_129  # at 256 px; smaller ones need less
NUM_PICTURES = 8  # in a grid of originals and reconstructions


@dataclass(kw_only=True, slots=True)
class EvalsConfig:
    """What to measure during training and at its end; figures go to metrics.jsonl with their cards."""

    data: str = ""
    """Held-out shards; empty measures nothing (`qlip eval` measures any export later)."""
    names: tuple[str, ...] = protocols.SCENES
    """Protocols by name (`qlip eval protocols`)."""
    train_data: str = ""
    """What linear probe and k-NN learn from, where a protocol is one."""
    max_samples: int = 2000
    """Score the first so many pictures; 0 scores all."""


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """Everything that decides a run."""

    recipe: Annotated[str, tyro.conf.Suppress]
    """Name of the recipe this came from."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Sizes of a fresh model."""
    task: AlignConfig | ReconstructConfig = field(default_factory=AlignConfig)
    """Stage 1 or stage 2, with weights and rates."""
    data: DataConfig = field(default_factory=DataConfig)
    """What to train on."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """How long and how often."""
    evals: EvalsConfig = field(default_factory=EvalsConfig)
    """What to measure, on which held-out data."""


@dataclass(kw_only=True, slots=True)
class TrainOptions:
    """What `qlip train RECIPE` takes: the recipe's fields and where to run."""

    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    """The recipe."""
    out: Path
    """Run folder; starting again in it resumes."""
    accept_changes: bool = False
    """Resume although the config differs from the one the run was started with."""


def run_recipe(config: RunConfig, *, folder: Path, accept_changes: bool = False) -> Path:
    """Train what the config describes in `folder`, or resume, and return the export folder.

    Under torchrun all processes call it, and stay together when it returns. Raises `UserError` before training for
    missing data, a batch that the processes cannot share, a folder that cannot be written or holds another config.
    """
    _refuse_impossible(config)
    batch_size, micro_batches = begin(config.trainer, config.data)
    model, processor = distributed.on_all_ranks(partial(_model_and_processor, config))
    export_folder = folder / "export"
    weights = sum(parameter.numel() for parameter in model.parameters())
    extra = _extra_held(config)
    if prepare_folder(folder, config, num_weights=weights, extra_held=extra, accept_changes=accept_changes):
        return export_folder
    loader = distributed.on_all_ranks(partial(_loader, config, model, processor, folder))
    with said_once():
        train(
            _task(model, config),
            loader,
            config.trainer,
            folder=folder,
            title=config.recipe,
            batch_size=batch_size,
            micro_batches=micro_batches,
            evaluators=_evaluators(config, processor),
            tracker=tracker_of(config, folder),
            pictures=_pictures(config, model, folder) if config.trainer.images_every else None,
            export=partial(save_model, folder=export_folder, processor=processor, step=config.trainer.steps),
        )
    return export_folder


def _loader(config: RunConfig, model: QLIPModel, processor: QLIPProcessor, folder: Path) -> TrainingLoader:
    return training_loader(
        config.data,
        image_size=model.config.vision_config.image_size,
        tokenize=text_tokenizer(processor.tokenizer),
        seed=config.trainer.seed,
        ledger=folder / "skipped.jsonl",
        rank=distributed.rank(),
        num_ranks=distributed.world_size(),
    )


def _extra_held(config: RunConfig) -> int:
    """Numbers that a checkpoint holds of the discriminator."""
    adversarial = isinstance(config.task, ReconstructConfig) and config.task.gan_weight
    return 3 * DISCRIMINATOR_WEIGHTS if adversarial else 0


def _task(model: QLIPModel, config: RunConfig) -> Task:
    if isinstance(config.task, AlignConfig):
        return AlignTask(model, config.task)
    return ReconstructTask(model, config.task)


def _pictures(config: RunConfig, model: QLIPModel, folder: Path) -> Callable[[nn.Module, int], Tensor]:
    """What draws samples/step_XXXXXXXX.png: the first pictures of the held-out data, or of the training data."""
    source = open_source(config.evals.data or config.data.train)
    _, found = first_pictures(source, num=NUM_PICTURES, size=model.config.vision_config.image_size)
    pixel_values = pixels.from_uint8(found)

    def paint(model: nn.Module, step: int) -> Tensor:
        grid = reconstruction_grid(model, pixel_values)
        save_grid(folder / "samples" / f"step_{step:08d}.png", grid)
        return grid

    return paint


def _refuse_impossible(config: RunConfig) -> None:
    if not config.data.train:
        raise UserError(
            "no training data: add --data.train 'PATH/{00000..00009}.tar' (img2dataset shards), "
            "or make some with `qlip data scenes PATH --num 20000`"
        )
    refuse_small(config, LEAST)
    if isinstance(config.task, ReconstructConfig) and config.task.r1_every < 1:
        raise UserError(f"task.r1_every is {config.task.r1_every}: give at least 1, and --task.r1-gamma 0 for no R1")
    if config.trainer.eval_every and not config.evals.data:
        raise UserError("trainer.eval_every has nothing to measure: add --evals.data PATH, or set it to 0")


def _evaluators(config: RunConfig, processor: QLIPProcessor) -> dict[str, Evaluator]:
    if not config.evals.data:
        return {}
    request = EvalRequest(
        data=config.evals.data, train_data=config.evals.train_data, max_samples=config.evals.max_samples
    )
    data = request.open()
    return {name: TrainingEvaluator(name, data, processor) for name in config.evals.names}


def _model_and_processor(config: RunConfig) -> tuple[QLIPModel, QLIPProcessor]:
    """Fresh, or from `task.init`; stage 2 needs the latter, and may put a quantizer in."""
    task = config.task
    if isinstance(task, AlignConfig) and not task.init:
        return fresh_model(config.model)
    if not task.init:
        raise UserError("stage 2 starts from a stage-1 model: add --task.init RUN/export")
    model, processor = model_from(task.init)
    if isinstance(task, ReconstructConfig) and task.add_quantizer:
        return with_quantizer(model, config.model, task.add_quantizer), processor
    has = model.config.vision_config.quantizer
    if config.model.quantizer == "none" != has:
        raise UserError(
            f"model.quantizer is none, but {task.init} has {has}, and a model that is given keeps its own: "
            "make a start without one (`qlip import eva ... --quantizer none`)"
        )
    return model, processor


def load_run(run: Path, *, step: int | None) -> tuple[QLIPModel, QLIPProcessor, int]:
    """Model and processor of a run's checkpoint (the newest, or that of `step`), and its step.

    Raises `UserError` for a folder without config or checkpoint.
    """
    if not (run / "config.json").is_file():
        raise UserError(f"{run} is not a run folder (no config.json); give the folder that `qlip train` wrote")
    found = {int(path.name.removeprefix("step_")): path for path in checkpoint_folders(run)}
    if not found or (step is not None and step not in found):
        raise UserError(f"{run} has no checkpoint {'' if step is None else step}; it has {sorted(found) or 'none'}")
    step = max(found) if step is None else step
    config = from_json(RunConfig, json.loads((run / "config.json").read_text())["config"])
    model, processor = _model_and_processor(config)
    load_module(found[step], "model", model, averaged=bool(config.trainer.ema_decay))
    return model.eval(), processor, step
