"""Small tasks, on the meta device or real, and batches for them: what the tests of the planner measure."""

from __future__ import annotations

import torch
from torch import nn

from qlip.engine.interfaces import Task
from qlip.engine.parallel import make_scalars_vectors, set_activation_checkpointing
from qlip.engine.step_cost import BatchShapes, DryRun
from qlip.models.qlip.modeling import QLIPModel
from qlip.recipes.model import ModelConfig, TowerSize
from qlip.tasks.align import AlignConfig, AlignTask
from qlip.tasks.reconstruct import ReconstructConfig, ReconstructTask

SHAPES: BatchShapes = {
    "pixel_values": ((3, 32, 32), torch.float32),
    "input_ids": ((8,), torch.int64),
    "attention_mask": ((8,), torch.int64),
}


def tiny_task(stage: int, *, side: int = 32, **changes) -> Task:
    """Stage 1 or 2 on the default device; `changes` are fields of the task's config."""
    tower = TowerSize(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48)
    sizes = {"encoder": tower, "decoder": tower, "text": tower, "context_length": 8, "projection_dim": 16}
    model = QLIPModel(ModelConfig(image_size=side, patch_size=8, **sizes).build_config())
    if stage == 1:
        return AlignTask(model, AlignConfig(**changes))
    adversary = {"discriminator_channel_base": 512, "discriminator_max_channels": 16}
    return ReconstructTask(model, ReconstructConfig(**adversary | changes))


def dry_run(stage: int, *, bf16: bool = True, checkpointing: bool = False, side: int = 32, **changes) -> DryRun:
    with torch.device("meta"):
        task = tiny_task(stage, side=side, **changes)
    return DryRun(task, bf16=bf16, activation_checkpointing=checkpointing)


def real_modules(task: Task, *, checkpointing: bool = False) -> nn.ModuleDict:
    """The task's modules as the trainer prepares them."""
    modules = nn.ModuleDict(task.modules()).train()
    make_scalars_vectors(modules)
    set_activation_checkpointing(modules, enabled=checkpointing)
    return modules


def real_batch(size: int) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(size, *shape, dtype=dtype) for name, (shape, dtype) in SHAPES.items()}
