"""Recipes on procedural scenes: `scenes_tiny` trains on two CPU cores in minutes."""

from __future__ import annotations

from qlip.data.batches import DataConfig
from qlip.engine.interfaces import OptimizerConfig
from qlip.engine.trainer import TrainerConfig
from qlip.recipes.run import ModelConfig, RunConfig, TowerSize
from qlip.tasks.align import AlignConfig
from qlip.tasks.reconstruct import ReconstructConfig


def scenes_tiny() -> RunConfig:
    """Stage 1 of the demo: a QLIP of 1.4M vision parameters, 48 px pictures, 36 tokens of 28 bits.

    Command:  qlip train scenes_tiny --data.train runs/demo/data/train
    Hardware: two CPU cores, under 2 GB of memory, about five minutes.
    Expect:   see README; loss weights are Table 8's, rates are AdamW's for a narrow model.
    """
    return RunConfig(
        recipe="scenes_tiny",
        model=ModelConfig(
            image_size=48,
            patch_size=8,
            encoder=TowerSize(hidden_size=128, num_layers=4, num_heads=4, intermediate_size=344),
            decoder=TowerSize(hidden_size=128, num_layers=1, num_heads=4, intermediate_size=344),
            text=TowerSize(hidden_size=64, num_layers=2, num_heads=2, intermediate_size=256),
            context_length=40,
            projection_dim=64,
            initializer_range=0.1,
        ),
        task=AlignConfig(optimizer=OptimizerConfig(name="adamw", lr=2e-3, warmup_steps=50)),
        data=DataConfig(
            batch_size=64,
            num_workers=0,
            shuffle_buffer=4000,
            crop_scale=(1.0, 1.0),
            caption_weights={"captions.short": 0.7, "captions.medium": 0.2, "captions.dense": 0.1},
        ),
        trainer=TrainerConfig(steps=1000, log_every=25, save_every=250),
    )


def scenes_tiny_stage2() -> RunConfig:
    """Stage 2 of the demo: perceptual and adversarial losses for bottleneck and decoder, encoder frozen.

    Command:  qlip train scenes_tiny_stage2 --data.train runs/demo/data/train --task.init runs/demo/stage1/export
    Hardware: two CPU cores, under 2 GB of memory, about two minutes.
    Expect:   the encoder distance on held-out scenes falls by at least 15 %; zero-shot figures do not move.
    """
    stage1 = scenes_tiny()
    return RunConfig(
        recipe="scenes_tiny_stage2",
        model=stage1.model,
        task=ReconstructConfig(
            optimizer=OptimizerConfig(name="adamw", lr=1e-3, warmup_steps=20, clip_norm=1.0),
            discriminator_optimizer=OptimizerConfig(name="adamw", lr=1e-3, warmup_steps=20, clip_norm=1.0),
            discriminator_channel_base=1024,
            discriminator_max_channels=64,
        ),
        data=stage1.data,
        trainer=TrainerConfig(steps=250, log_every=10, save_every=125),
    )
