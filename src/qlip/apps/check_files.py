"""What `qlip check` can say of a recipe's files: the sizes of the model it starts from, and what is not there yet."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torchvision
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from qlip.core.errors import UserError
from qlip.data.shard_list import check_shard_split, expand_shards
from qlip.data.sources import open_source
from qlip.losses.perceptual import VGG_URL, LpipsDistance
from qlip.models.qlip.configuration import QLIPConfig
from qlip.models.qlip.modeling import QLIPModel
from qlip.models.qlip.pretrained import CONFIG_ERRORS, one_line
from qlip.recipes.model import with_quantizer
from qlip.recipes.run import RunConfig
from qlip.recipes.running import split_batch
from qlip.tasks.reconstruct import ReconstructConfig, ReconstructTask


def meta_model(config: RunConfig) -> tuple[QLIPModel, list[str]]:
    """The run's model on the meta device, and why it may be another than the run will have.

    Of a folder in `task.init` only config.json is read. Raises `UserError` for sizes that do not fit together.
    """
    problems = []
    sizes = None
    if config.task.init:
        try:
            sizes = _config_in(config.task.init)
        except UserError as error:
            problems.append(f"{error}; the sizes below are the recipe's")
    elif isinstance(config.task, ReconstructConfig):
        problems.append("stage 2 starts from a stage-1 model: add --task.init RUN/export; the sizes are the recipe's")
    try:
        with torch.device("meta"):
            model = QLIPModel(sizes or config.model.build_config())
            kind = getattr(config.task, "add_quantizer", "")
            if kind and (sizes is not None or config.model.quantizer == "none"):
                model = with_quantizer(model, config.model, kind)
    except (StrictDataclassError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"model: {one_line(error)}; change the --model options") from None
    return model, problems


def _config_in(source: str) -> QLIPConfig:
    if not Path(source).is_dir():
        raise UserError(f"task.init {source} is no folder here: train or import it first, or mend the path")
    try:
        return QLIPConfig.from_pretrained(source, local_files_only=True)
    except CONFIG_ERRORS as error:
        raise UserError(f"task.init {source}: {one_line(error)}") from None


def not_ready(config: RunConfig, *, num_gpus: int) -> list[str]:
    """One line for everything that would stop the run before its first step, each with its remedy."""
    checks = (_training_data, _held_out_data, _batch, _processes, _vgg_weights)
    problems = []
    for look in checks:
        try:
            look(config, num_gpus)
        except UserError as error:
            problems.append(str(error))
    return problems


def _training_data(config: RunConfig, num_gpus: int) -> None:
    if not config.data.train:
        raise UserError("no training data: add --data.train 'PATH/{00000..00009}.tar' (img2dataset shards)")
    shards = expand_shards(config.data.train, shard_cache=config.data.shard_cache)
    check_shard_split(len(shards), num_ranks=num_gpus, num_workers=config.data.num_workers)


def _held_out_data(config: RunConfig, num_gpus: int) -> None:
    if config.evals.data:
        open_source(config.evals.data)
    elif config.trainer.eval_every:
        raise UserError("trainer.eval_every has nothing to measure: add --evals.data PATH, or set it to 0")


def _batch(config: RunConfig, num_gpus: int) -> None:
    split_batch(config.data, num_ranks=num_gpus)


def _processes(config: RunConfig, num_gpus: int) -> None:
    if config.trainer.parallel == "none" and num_gpus > 1:
        raise UserError(f"trainer.parallel is none with {num_gpus} GPUs: take --trainer.parallel ddp or fsdp")


def _vgg_weights(config: RunConfig, num_gpus: int) -> None:
    if not isinstance(config.task, ReconstructConfig) or config.task.perceptual != "lpips":
        return
    if not config.task.vgg_weights:
        raise UserError(f"LPIPS has no VGG-16 weights: fetch {VGG_URL} and add --task.vgg-weights FILE")
    if not Path(config.task.vgg_weights).is_file():
        raise UserError(f"no VGG-16 weights at {config.task.vgg_weights}: fetch {VGG_URL} and put it there")


class BesideTask:
    """A perceptual distance that the task does not move between devices, as it would a module."""

    def __init__(self, name: str, distance: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.name = name
        self._distance = distance

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """(b, 3, h, w) twice -> (b,)."""
        return self._distance(x, y)


def stage2_task(model: QLIPModel, config: ReconstructConfig, *, perceptual: bool) -> tuple[ReconstructTask, nn.Module]:
    """The task on the meta device, and LPIPS, whose weights need not be there (an empty module without LPIPS).

    Without `perceptual` no distance is computed.
    """
    task = ReconstructTask(model, replace(config, perceptual="encoder"))
    if not perceptual:
        task.perceptual = BesideTask("none", lambda x, y: x.new_zeros(len(x)))
    elif config.perceptual == "lpips":
        network = lpips_without_weights()
        task.perceptual = BesideTask("lpips", network)
        return task, network
    return task, nn.Module()


def lpips_without_weights() -> LpipsDistance:
    """LPIPS from a file that has every shape of VGG-16 and one number. Raises `UserError` without the package."""
    with torch.device("meta"):
        shapes = torchvision.models.vgg16().state_dict()
    with tempfile.TemporaryDirectory() as folder, torch.device("cpu"):
        path = Path(folder) / "shapes.pth"
        torch.save({name: torch.zeros(()).expand(tensor.shape) for name, tensor in shapes.items()}, path)
        return LpipsDistance(path)
