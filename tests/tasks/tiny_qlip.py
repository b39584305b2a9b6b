"""A QLIP of a few thousand vision parameters, one batch of scenes for it, and the trainer's step without a run."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from qlip.core.pixels import from_uint8
from qlip.data.scenes import SceneConfig, render, sample_scenes
from qlip.engine.interfaces import Batch, Task
from qlip.engine.trainer import Trainer, TrainerConfig
from qlip.models.qlip.modeling import QLIPModel
from qlip.recipes.model import ModelConfig, TowerSize


def tiny_model(image_size: int = 16, *, width: int = 32, **changes) -> QLIPModel:
    torch.manual_seed(0)
    tower = TowerSize(hidden_size=width, num_layers=1, num_heads=2, intermediate_size=2 * width)
    sizes = ModelConfig(
        image_size=image_size,
        patch_size=8,
        encoder=tower,
        decoder=tower,
        text=tower,
        context_length=8,
        projection_dim=16,
        initializer_range=0.12,
        **changes,
    )
    return QLIPModel(sizes.build_config())


def scene_batch(num: int = 8, *, image_size: int = 16) -> Batch:
    """Scenes with texts that are all different: start, two words, end."""
    scenes = sample_scenes(num, split="train", shard=0, config=SceneConfig())
    words = torch.arange(num)
    ids = torch.stack([torch.full((num,), 49406), 320 + words, 900 + words % 3, torch.full((num,), 49407)], dim=1)
    return {
        "pixel_values": from_uint8(render(scenes, image_size=image_size)),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "key": [str(i) for i in range(num)],
    }


def trainer_of(task: Task, folder: Path, *, steps: int = 100) -> Trainer:
    """The trainer, for `train_step` on batches of one's own."""
    return Trainer(task, None, TrainerConfig(steps=steps, device="cpu", precision="fp32"), folder)


def copy_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names of the tensors that moved by a bit."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}
