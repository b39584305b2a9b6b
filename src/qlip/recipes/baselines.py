"""What QLIP is measured against, trained by the same code: BSQ-ViT (no text), CLIP (no decoder), recipe 2 of Table 3c.

Every baseline is a recipe of `tokenizer.py` with another weight or part; what is INFERRED or OPEN there is so here, and
so is the meaning of Time. `starts/b16` is the import that `qlip_b_16_256` names. Runs: `docs/training.md`.
"""

from __future__ import annotations

from qlip.recipes.run import RunConfig
from qlip.recipes.tokenizer import one_gpu, qlip_b_16_256, qlip_b_16_256_stage2
from qlip.tasks.align import AlignConfig
from qlip.tasks.reconstruct import ReconstructConfig

ABLATION_BATCH = 16_384  # x 120,000 steps = 2.0 billion samples, the length of Table 3
ABLATION_BATCH_PER_GPU = 512


def bsqvit_b_16() -> RunConfig:
    """BSQ-ViT on captioned pictures: stage 1 without contrast. No text tower runs.

    Command:  qlip train bsqvit_b_16 --data.train SHARDS --task.init starts/b16
    Hardware: 128 GPUs of 80 GB.
    Time:     about 19 hours on 128 H100 (estimate).
    Expect:   rFID 35.7, PSNR 24.5, zero-shot 0.1 (Table 3a, 0:1, at 2.0 billion samples).
    Open:     how the paper's BSQ-ViT+ row (Table 2) was trained; here as QLIP but for one weight.
    """
    config = qlip_b_16_256()
    config.recipe = "bsqvit_b_16"
    assert isinstance(config.task, AlignConfig)
    config.task.contrastive_weight = 0.0
    return config


def bsqvit_b_16_stage2() -> RunConfig:
    """Stage 2 of `bsqvit_b_16`, the same as QLIP's.

    Command:  qlip train bsqvit_b_16_stage2 --data.train SHARDS --task.init RUN/export --task.vgg-weights VGG16
    Hardware: 128 GPUs of 80 GB.
    Time:     about 25 hours on 128 H100 (estimate).
    Expect:   rFID 3.81, PSNR 24.12, SSIM .6638 (Table 2, BSQ-ViT+).
    Open:     as for `bsqvit_b_16`.
    """
    config = qlip_b_16_256_stage2()
    config.recipe = "bsqvit_b_16_stage2"
    return config


def clip_b_16() -> RunConfig:
    """CLIP on the same data: stage 1 without pixels. No decoder runs; bottleneck and decoder stay as they were.

    Command:  qlip train clip_b_16 --data.train SHARDS --task.init starts/b16
    Hardware: 128 GPUs of 80 GB.
    Time:     about 10 hours on 128 H100 (estimate).
    Expect:   ImageNet zero-shot 75.7 (Table 3a, 1:0, at 2.0 billion samples).
    Open:     whether the paper kept the quantizer's own losses in this row; here they are left out.
    """
    config = qlip_b_16_256()
    config.recipe = "clip_b_16"
    assert isinstance(config.task, AlignConfig)
    config.task.pixel_weight = 0.0
    return config


def recipe2_b_16() -> RunConfig:
    """Table 3c, recipe 2, stage 1: alignment and pixels without a quantizer; the decoder sees the encoder's states.

    Command:  qlip train recipe2_b_16 --data.train SHARDS --task.init starts/b16_none
    Hardware: 32 GPUs of 80 GB.
    Time:     about 20 hours on 32 H100 (estimate).
    Expect:   zero-shot 75.0, rFID 17.2, PSNR 26.72 (2.0 billion samples).
    Open:     the paper's "without Q" is read as the identity from encoder to decoder, no bottleneck MLPs.

    The start must have no quantizer either: `starts/b16_none` is made as `starts/b16`, with `--quantizer none`.
    """
    config = qlip_b_16_256()
    config.recipe = "recipe2_b_16"
    config.model.quantizer = "none"
    del config.task.optimizer.part_lrs["model.vision_model.quant_embed"]
    config.data.batch_size, config.data.global_batch_size = ABLATION_BATCH_PER_GPU, ABLATION_BATCH
    return config


def recipe2_b_16_stage2() -> RunConfig:
    """Table 3c, recipe 2, stage 2: a fresh quantizer between the trained towers; it trains, the decoder is finetuned.

    Command:  qlip train recipe2_b_16_stage2 --data.train SHARDS --task.init RUN/export --task.vgg-weights VGG16
    Hardware: 128 GPUs of 80 GB.
    Time:     about 25 hours on 128 H100 (estimate).
    Expect:   rFID 13.7, PSNR 23.34: four times the rFID of QLIP's recipe. Quantization must be learned under language.
    Open:     length and losses of this stage: QLIP's stage 2 is taken.
    """
    config = qlip_b_16_256_stage2()
    config.recipe = "recipe2_b_16_stage2"
    config.model.quantizer = "none"
    assert isinstance(config.task, ReconstructConfig)
    config.task.add_quantizer = "bsq"
    return config


def bsqvit_b_16_small() -> RunConfig:
    """`bsqvit_b_16` for one GPU, to be compared with `qlip_b_16_256_small`.

    Command:  qlip train bsqvit_b_16_small --data.train SHARDS --task.init starts/b16
    Hardware: one GPU of 80 GB.
    Time:     about 22 hours on one H100 (estimate).
    Expect:   no row of the paper; pixels as good as QLIP's, zero-shot at chance.
    Open:     what `one_gpu` says of the rates.
    """
    return one_gpu(bsqvit_b_16(), batch_size=1024, global_batch_size=4096, steps=14_000)


def bsqvit_b_16_stage2_small() -> RunConfig:
    """`bsqvit_b_16_stage2` for one GPU.

    Command:  qlip train bsqvit_b_16_stage2_small --data.train SHARDS --task.init RUN/export --task.vgg-weights VGG16
    Hardware: one GPU of 80 GB.
    Time:     about 21 hours on one H100 (estimate).
    Expect:   no row of the paper.
    Open:     what `one_gpu` says of the rates.
    """
    return one_gpu(bsqvit_b_16_stage2(), batch_size=32, global_batch_size=512, steps=25_000)


def clip_b_16_small() -> RunConfig:
    """`clip_b_16` for one GPU, as many samples as `qlip_b_16_256_small`.

    Command:  qlip train clip_b_16_small --data.train SHARDS --task.init starts/b16
    Hardware: one GPU of 80 GB.
    Time:     about 12 hours on one H100 (estimate).
    Expect:   no row of the paper; zero-shot a little above that of `qlip_b_16_256_small`.
    Open:     what `one_gpu` says of the rates.
    """
    return one_gpu(clip_b_16(), batch_size=1024, global_batch_size=4096, steps=14_000)


def recipe2_b_16_small() -> RunConfig:
    """`recipe2_b_16` for one GPU.

    Command:  qlip train recipe2_b_16_small --data.train SHARDS --task.init starts/b16_none
    Hardware: one GPU of 80 GB.
    Time:     about 23 hours on one H100 (estimate).
    Expect:   no row of the paper; rFID below that of `qlip_b_16_256_small`, which has 28 bits per token instead.
    Open:     what `one_gpu` says of the rates.
    """
    return one_gpu(recipe2_b_16(), batch_size=1024, global_batch_size=4096, steps=14_000)


def recipe2_b_16_stage2_small() -> RunConfig:
    """`recipe2_b_16_stage2` for one GPU.

    Command:  qlip train recipe2_b_16_stage2_small --data.train SHARDS --task.init RUN/export --task.vgg-weights VGG16
    Hardware: one GPU of 80 GB.
    Time:     about 21 hours on one H100 (estimate).
    Expect:   no row of the paper; rFID well above that of `qlip_b_16_256_stage2_small`.
    Open:     what `one_gpu` says of the rates.
    """
    return one_gpu(recipe2_b_16_stage2(), batch_size=32, global_batch_size=512, steps=25_000)
