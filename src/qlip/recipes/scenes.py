"""Recipes on procedural scenes: `scenes_tiny` trains on two CPU cores in minutes."""

from __future__ import annotations

from qlip.data.batches import DataConfig
from qlip.engine.interfaces import OptimizerConfig
from qlip.engine.trainer import TrainerConfig
from qlip.recipes.model import ModelConfig, TowerSize
from qlip.recipes.run import RunConfig
from qlip.tasks.align import AlignConfig
from qlip.tasks.reconstruct import ReconstructConfig


def scenes_tiny() -> RunConfig:
    """Stage 1 of the demo: a QLIP of 1.2M vision parameters, 48 px pictures, 36 tokens of 28 bits.

    Command:  qlip train scenes_tiny --data.train runs/demo/data/train
    Hardware: two CPU cores, under 2 GB of memory, about five minutes.
    Expect:   the figures in README.md.

    Differs from Table 8 where a narrow tower and small batches ask for it. With pixel weight 1e3 shapes were still at
    chance after 50,000 pictures; with 20 they are learned, and the PSNR is the same, since AdamW ignores the scale of
    what only pixels train. AdamW at 2e-3 for all parts replaces LAMB's rates for batches of 65,536.
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
            initializer_range=0.12,
        ),
        task=AlignConfig(
            pixel_weight=20.0,
            commitment_weight=0.1,
            optimizer=OptimizerConfig(name="adamw", lr=2e-3, warmup_steps=50),
        ),
        data=DataConfig(
            batch_size=64,
            num_workers=0,
            shuffle_buffer=4000,
            crop_scale=(1.0, 1.0),
            caption_weights={
                "captions.shape": 0.6,  # colours are learned in the first minute; shapes need batches of their own
                "captions.short": 0.25,
                "captions.medium": 0.1,
                "captions.dense": 0.05,
            },
            caption_per_batch=True,
        ),
        trainer=TrainerConfig(steps=1800, log_every=25, save_every=450),
    )


def scenes_tiny_stage2() -> RunConfig:
    """Stage 2 of the demo: perceptual and adversarial losses for bottleneck and decoder, encoder frozen.

    Command:  qlip train scenes_tiny_stage2 --data.train runs/demo/data/train --task.init runs/demo/stage1/export
    Hardware: two CPU cores, under 2 GB of memory, about two minutes.
    Expect:   the encoder distance on held-out scenes falls by at least 15 %; zero-shot figures do not move.

    Differs from Table 8: perceptual weight 1, not 0.1, because the encoder distance of a stage-1 reconstruction is
    about 0.09 where LPIPS is several times as much; AdamW at 2e-3 for few steps; a discriminator of 32 channels.
    """
    stage1 = scenes_tiny()
    return RunConfig(
        recipe="scenes_tiny_stage2",
        model=stage1.model,
        task=ReconstructConfig(
            perceptual_weight=1.0,
            optimizer=OptimizerConfig(name="adamw", lr=2e-3, warmup_steps=20, clip_norm=1.0),
            discriminator_optimizer=OptimizerConfig(name="adamw", lr=1e-3, warmup_steps=20, clip_norm=1.0),
            discriminator_channel_base=512,
            discriminator_max_channels=32,
        ),
        data=stage1.data,
        trainer=TrainerConfig(steps=280, log_every=10, save_every=140),
    )
