"""The smallest things that can be trained: a linear task without files, and scenes with a QLIP of 16 or 24 pixels."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemWriter

from qlip.core.log import read_metrics
from qlip.data.scene_shards import write_scene_shards
from qlip.data.scenes import SceneConfig
from qlip.engine.guards import FiniteGuard
from qlip.engine.interfaces import Batch, OptimizerConfig, Phase
from qlip.engine.trainer import Trainer, TrainerConfig
from qlip.recipes import find_recipe
from qlip.recipes.model import ModelConfig, TowerSize
from qlip.recipes.run import RunConfig

TOWER = TowerSize(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24)
CLI_SIZES = (
    "--model.patch-size 8 --model.context-length 16 --model.projection-dim 16 "
    + " ".join(
        f"--model.{part}.hidden-size 16 --model.{part}.num-layers 1 --model.{part}.num-heads 2 "
        f"--model.{part}.intermediate-size 24"
        for part in ("encoder", "decoder", "text")
    )
).split()


def write_tiny_scenes(folder: Path) -> str:
    """Two shards of 40 scenes of 24 pixels; returns the pattern."""
    first = write_scene_shards(folder, num=40, split="train", config=SceneConfig(image_size=24))[0]
    shutil.copy(first, folder / "00001.tar")
    return str(folder / "{00000..00001}.tar")


def tiny_run(recipe: str, data: str, *, image_size: int = 16, steps: int = 20) -> RunConfig:
    """The recipe at the smallest size: batches of 4, a line per step, a checkpoint every 7 steps."""
    config = find_recipe(recipe)
    config.model = ModelConfig(
        image_size=image_size,
        patch_size=8,
        encoder=TOWER,
        decoder=TOWER,
        text=TOWER,
        context_length=16,
        projection_dim=16,
    )
    config.data.train, config.data.batch_size, config.data.shuffle_buffer = data, 4, 16
    config.trainer = TrainerConfig(steps=steps, log_every=1, save_every=7, device="cpu", precision="fp32")
    return config


def exported_weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "export" / "model.safetensors")


def curves(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the speed, which is never the same twice."""
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in read_metrics(run / "metrics.jsonl")]


def assert_same_runs(run: Path, other: Path) -> None:
    """Weights and figures agree bit for bit."""
    weights, others = exported_weights(run), exported_weights(other)
    assert weights.keys() == others.keys()
    assert [name for name in weights if not torch.equal(weights[name], others[name])] == []
    assert curves(run) == curves(other)
    assert [line["step"] for line in curves(run)] == list(range(1, len(curves(run)) + 1))


PLACES = ("before the step", "before the optimizer", "after the step", "while saving", "before the rename")


def die_at(step: int, place: str) -> None:
    """From now on this process kills itself like `kill -9` at that place of the first step that is not before `step`.

    For saving and renaming, of the first checkpoint that is not before it. Unlike a kill from outside it hits the same
    place on the slowest machine.
    """

    def doomed(owner: Any, name: str, *, at: Callable[..., bool], after: bool = False) -> None:
        whole = getattr(owner, name)

        def dying(*arguments: Any, **options: Any) -> Any:
            result = whole(*arguments, **options) if after else None
            if at(*arguments, **options):
                os.kill(os.getpid(), signal.SIGKILL)
            return result if after else whole(*arguments, **options)

        setattr(owner, name, dying)

    def checkpoint_is_due(path: Any) -> bool:
        name = Path(path).name
        return name.startswith("step_") and int(name[5:13]) >= step

    if place == "before the step":
        doomed(Trainer, "train_step", at=lambda trainer, batches: trainer.step >= step)
    elif place == "after the step":
        doomed(Trainer, "train_step", at=lambda trainer, batches: trainer.step > step, after=True)
    elif place == "before the optimizer":
        doomed(FiniteGuard, "allows", at=lambda guard, values, **options: options["place"].step >= step)
    elif place == "while saving":
        doomed(FileSystemWriter, "write_data", at=lambda writer, *rest: checkpoint_is_due(writer.path), after=True)
    else:
        doomed(Path, "rename", at=lambda path, target: checkpoint_is_due(path))


class LinearTask:
    """Least squares on (b, 3, 1, 1) "pictures"; `poison` maps a step to what its loss is multiplied by."""

    def __init__(self, *, optimizer: OptimizerConfig | None = None, poison: dict[int, float] | None = None) -> None:
        torch.manual_seed(1)
        self.model = nn.Linear(3, 2)
        self.poison = poison or {}
        optimizer = optimizer or OptimizerConfig(lr=0.1, warmup_steps=2)
        self.phase = Phase(name="fit", modules=("model",), optimizer=optimizer)

    def modules(self) -> dict[str, nn.Module]:
        return {"model": self.model}

    def phases(self, step: int) -> list[Phase]:
        return [self.phase]

    def loss(self, phase: Phase, batch: Batch, step: int) -> dict[str, Tensor]:
        fitted = self.model(batch["pixel_values"].flatten(1))
        return {"fit_loss": fitted.square().mean() * self.poison.get(step, 1.0)}

    def after_step(self, phase: Phase, terms: dict[str, Tensor]) -> None:
        pass


class CountingLoader:
    """Endless random batches that are a function of their number, which is all of the position."""

    def __init__(self) -> None:
        self.num = 0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            self.num += 1
            generator = torch.Generator().manual_seed(self.num)
            pixels = torch.randn(4, 3, 1, 1, generator=generator)
            yield {"pixel_values": pixels, "key": [f"{self.num}-{i}" for i in range(4)]}

    def state_dict(self) -> dict[str, Any]:
        return {"num": self.num}

    def resume(self, states: list[dict[str, Any]]) -> None:
        self.num = json.loads(json.dumps(states[0]))["num"]


class NoTracker:
    """Figures stay in metrics.jsonl."""

    def log(self, step: int, figures: dict[str, float]) -> None:
        pass

    def images(self, step: int, name: str, pictures: Tensor) -> None:
        pass

    def close(self) -> None:
        pass


def no_tracker(resume_step: int) -> NoTracker:
    return NoTracker()
