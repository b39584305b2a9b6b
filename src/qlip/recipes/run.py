"""What a recipe returns, and how it becomes a run: model, task, data, trainer, evaluations, export."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from huggingface_hub.errors import StrictDataclassError

from qlip.core.config import differences, from_json, to_json
from qlip.core.errors import UserError
from qlip.core.log import console
from qlip.data.batches import DataConfig, training_loader
from qlip.engine.checkpoint import checkpoint_folders, load_module
from qlip.engine.interfaces import Evaluator, Task
from qlip.engine.parallel import refuse_several_processes
from qlip.engine.run_folder import prepare_run_folder
from qlip.engine.trainer import TrainerConfig, train
from qlip.evals.reconstruction import EvalData
from qlip.evals.run import EVALUATIONS, build_evaluator
from qlip.models.qlip.configuration import QLIPConfig, QLIPDecoderConfig, QLIPTextConfig, QLIPVisionConfig
from qlip.models.qlip.loading import EXPORT_MARKER, load_model, load_processor, save_model
from qlip.models.qlip.modeling import QLIPModel
from qlip.models.qlip.processing import QLIPProcessor
from qlip.models.qlip.tokenizer import text_tokenizer
from qlip.quantizers.base import check_num_codes
from qlip.recipes import RECIPES, find_recipe
from qlip.tasks.align import AlignConfig, AlignTask
from qlip.tasks.reconstruct import ReconstructConfig, ReconstructTask


@dataclass(kw_only=True, slots=True)
class TowerSize:
    """Size of one transformer."""

    hidden_size: int = 768
    """Width d."""
    num_layers: int = 12
    """Blocks L."""
    num_heads: int = 12
    """Attention heads; the released models have width / heads = 64."""
    intermediate_size: int = 2048
    """Feed-forward width I."""


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Size of a fresh QLIP; defaults are B-16-256. A run that starts from a model (`task.init`) ignores this part."""

    image_size: int = 256
    """Side of the square pictures in pixels."""
    patch_size: int = 16
    """Side of a patch, one token each."""
    quantizer: Literal["bsq", "none", "fsq", "lfq", "vq"] = "bsq"
    """Binary spherical; none (the decoder sees the encoder's states); or one of vector-quantize-pytorch's."""
    num_bits: int = 28
    """Bits per token; for fsq those that its levels make."""
    group_size: int = 1
    """Bits whose joint entropy the codebook term sees (bsq, lfq), or bits of one codebook (vq); at most 16."""
    fsq_levels: tuple[int, ...] = ()
    """Levels of each latent dimension, for fsq alone: seven times 16 make 28 bits."""
    encoder: TowerSize = field(default_factory=TowerSize)
    """Vision encoder."""
    decoder: TowerSize = field(default_factory=TowerSize)
    """Visual decoder."""
    text: TowerSize = field(
        default_factory=lambda: TowerSize(hidden_size=512, num_layers=12, num_heads=8, intermediate_size=2048)
    )
    """Text tower."""
    context_length: int = 77
    """Longest text in tokens; longer ones are cut."""
    projection_dim: int = 512
    """Width of the shared embedding."""
    initializer_range: float = 0.02
    """Standard deviation of fresh weights; narrow towers learn faster from about 1/sqrt(width)."""

    def build_config(self) -> QLIPConfig:
        """The transformers config of this size."""
        check_num_codes(self.group_size)
        grid = {"image_size": self.image_size, "patch_size": self.patch_size}
        text = QLIPTextConfig(max_position_embeddings=self.context_length, **_tower(self.text))
        vision = QLIPVisionConfig(
            quantizer=self.quantizer,
            num_bits=self.num_bits,
            quantizer_group_size=self.group_size,
            fsq_levels=list(self.fsq_levels) or None,
            hidden_size_post_q=self.decoder.hidden_size,
            initializer_range=self.initializer_range,
            **grid,
            **_tower(self.encoder),
        )
        decoder = QLIPDecoderConfig(initializer_range=self.initializer_range, **grid, **_tower(self.decoder))
        text.initializer_range = self.initializer_range
        return QLIPConfig(
            text_config=text,
            vision_config=vision,
            decoder_config=decoder,
            projection_dim=self.projection_dim,
            initializer_range=self.initializer_range,
        )


def _tower(size: TowerSize) -> dict[str, int]:
    return {
        "hidden_size": size.hidden_size,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.num_heads,
        "intermediate_size": size.intermediate_size,
    }


@dataclass(kw_only=True, slots=True)
class EvalsConfig:
    """What to measure during training and at its end; figures go to metrics.jsonl with their cards."""

    data: str = ""
    """Held-out shards; empty measures nothing (`qlip eval` measures any export later)."""
    names: tuple[str, ...] = EVALUATIONS
    """Evaluations to run."""
    max_samples: int = 2000
    """Score at most so many samples."""


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

    Raises `UserError` before training for missing data, a folder that cannot be written or holds another config.
    """
    refuse_several_processes()
    _refuse_impossible(config)
    export_folder = folder / "export"
    torch.manual_seed(config.trainer.seed)
    model, processor = _model_and_processor(config)
    weights = sum(parameter.numel() for parameter in model.parameters())
    checkpoint_bytes = 3 * 4 * weights  # weights and two Adam moments in float32
    finished = is_finished(folder, config)
    base = find_recipe(config.recipe) if config.recipe in RECIPES else config  # a config of one's own has no recipe
    prepare_run_folder(
        folder,
        to_json(config),
        changes=differences(to_json(base), to_json(config)),
        bytes_needed=checkpoint_bytes * (config.trainer.keep_checkpoints + 1) + 4 * weights,
        accept_changes=accept_changes and not finished,  # config.json goes on describing the weights beside it
    )
    if finished:
        console.print(f"{folder} is finished ({config.trainer.steps} steps); its model is {export_folder}")
        return export_folder
    task: Task
    if isinstance(config.task, AlignConfig):
        task = AlignTask(model, config.task)
    else:
        task = ReconstructTask(model, config.task)
    loader = training_loader(
        config.data,
        image_size=model.config.vision_config.image_size,
        tokenize=text_tokenizer(processor.tokenizer),
        seed=config.trainer.seed,
        ledger=folder / "skipped.jsonl",
    )
    train(
        task,
        loader,
        config.trainer,
        folder=folder,
        title=config.recipe,
        batch_size=config.data.batch_size,
        evaluators=_evaluators(config, processor),
        export=partial(save_model, folder=export_folder, processor=processor, step=config.trainer.steps),
    )
    return export_folder


def _refuse_impossible(config: RunConfig) -> None:
    if not config.data.train:
        raise UserError(
            "no training data: add --data.train 'PATH/{00000..00009}.tar' (img2dataset shards), "
            "or make some with `qlip data scenes PATH --num 20000`"
        )
    for name in ("steps", "log_every", "save_every", "keep_checkpoints"):
        if getattr(config.trainer, name) < 1:
            raise UserError(f"trainer.{name} is {getattr(config.trainer, name)}: give at least 1")
    if config.data.batch_size < 1:
        raise UserError(f"data.batch_size is {config.data.batch_size}: give at least 1")
    if config.trainer.eval_every and not config.evals.data:
        raise UserError("trainer.eval_every has nothing to measure: add --evals.data PATH, or set it to 0")


def is_finished(folder: Path, config: RunConfig) -> bool:
    """Whether the run in `folder` has been trained to its last step and exported."""
    marker = folder / "export" / EXPORT_MARKER
    return marker.exists() and int(marker.read_text()) == config.trainer.steps


def _evaluators(config: RunConfig, processor: QLIPProcessor) -> dict[str, Evaluator]:
    if not config.evals.data:
        return {}
    source = EvalData(shards=config.evals.data, max_samples=config.evals.max_samples)
    return {name: build_evaluator(name, source, processor) for name in config.evals.names}


def _model_and_processor(config: RunConfig) -> tuple[QLIPModel, QLIPProcessor]:
    if isinstance(config.task, AlignConfig) and not config.task.init:
        try:
            model = QLIPModel(config.model.build_config())
        except (StrictDataclassError, ValueError) as error:  # transformers' configs wrap theirs in the former
            reason = str(error).splitlines()[-1].strip().removeprefix("ValueError: ")
            raise UserError(f"model: {reason}; change the --model options") from None
        return model, QLIPProcessor.for_size(config.model.image_size, context_length=config.model.context_length)
    if not config.task.init:
        raise UserError("stage 2 starts from a stage-1 model: add --task.init RUN/export")
    model = load_model(config.task.init).float()  # master weights, whatever the file has
    return model, load_processor(config.task.init)


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
