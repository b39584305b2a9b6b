"""Compiled blocks give the gradients of plain ones, together with checkpointing, the probe and the adaptive weight."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import qlip.engine.trainer as trainer_module
from qlip.engine.interfaces import OptimizerConfig
from qlip.engine.parallel import compile_blocks
from qlip.engine.trainer import Trainer, TrainerConfig
from qlip.models.qlip.modeling import QLIPModel
from qlip.recipes.model import ModelConfig, TowerSize
from qlip.tasks.align import AlignConfig, AlignTask
from qlip.tasks.reconstruct import ReconstructConfig, ReconstructTask

TOWER = TowerSize(hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24)


def one_step(stage: int, folder: Path, *, compiled: bool) -> dict[str, Tensor]:
    """Figures of one step, among them the gradient's norm, and the weights after it."""
    torch.manual_seed(0)
    sizes = {"encoder": TOWER, "decoder": TOWER, "text": TOWER, "context_length": 8, "projection_dim": 16}
    model = QLIPModel(ModelConfig(image_size=16, patch_size=8, initializer_range=0.1, **sizes).build_config())
    optimizer = OptimizerConfig(lr=1e-2, warmup_steps=1, eps=1e-3)
    if stage == 1:
        task = AlignTask(model, AlignConfig(optimizer=optimizer, probe_every=1))
    else:
        options = {"discriminator_channel_base": 64, "discriminator_max_channels": 8, "adaptive_gan_weight": True}
        task = ReconstructTask(model, ReconstructConfig(optimizer=optimizer, **options))
    config = TrainerConfig(
        steps=2, device="cpu", precision="fp32", compile=compiled, activation_checkpointing=stage == 1
    )
    trainer = Trainer(task, [], config, folder)
    ids = torch.randint(1, 1000, (4, 8))
    batch = {"pixel_values": torch.randn(4, 3, 16, 16), "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    figures = trainer.train_step([batch | {"key": list("abcd")}])
    assert len(figures) > 5
    return figures | dict(trainer.whole_model().state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_a_compiled_step_equals_a_plain_one(tmp_path, monkeypatch, stage):
    plain = one_step(stage, tmp_path, compiled=False)
    monkeypatch.setattr(trainer_module, "compile_blocks", partial(compile_blocks, backend="aot_eager"))
    compiled = one_step(stage, tmp_path, compiled=True)
    assert plain.keys() == compiled.keys()
    assert any(name.startswith("probe/" if stage == 1 else "decoder/adaptive") for name in plain)
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
