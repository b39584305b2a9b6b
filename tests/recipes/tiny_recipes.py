"""A paper's recipe cut down to what two cores train in a second."""

from __future__ import annotations

from qlip.recipes.model import ModelConfig, TowerSize
from qlip.recipes.run import RunConfig
from qlip.tasks.align import AlignConfig


def tiny(config: RunConfig, data: str) -> RunConfig:
    """A recipe at 16 px, one layer, three steps of two micro-batches; all its other settings stay, but compiling."""
    tower = TowerSize(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24)
    config.model = ModelConfig(
        image_size=16,
        patch_size=8,
        quantizer=config.model.quantizer,
        encoder=tower,
        decoder=tower,
        text=tower,
        context_length=16,
        projection_dim=16,
    )
    config.data.train, config.data.shuffle_buffer, config.data.num_workers = data, 8, 0
    config.data.batch_size, config.data.global_batch_size = 2, 4
    config.trainer.steps, config.trainer.log_every, config.trainer.save_every = 3, 1, 2
    config.trainer.device, config.trainer.compile = "cpu", False
    if isinstance(config.task, AlignConfig):
        config.task.contrastive_chunk = min(config.task.contrastive_chunk, 3)
    else:
        config.task.discriminator_channel_base, config.task.discriminator_max_channels = 64, 8
    return config
