"""The paper's tokenizers: both stages of QLIP-B-16-256, B-8-256 and L-14-392, and each for one GPU and a day.

Numbers are those of QLIP Table 8 (arXiv 2502.05178), which the paper states for B-8 and calls "similar" for the others.
Not stated in the paper, hence INFERRED or OPEN in every recipe here:

    sizes of B-8 and L-14 beyond the parameter count          from the sizes of the released files
    rates of bottleneck, projections and logit_scale          5e-4, their tower's, 5e-4
    entropies of the quantizer                                gamma 1, tau 1, groups of one bit, mean over the batch
    unit of the pixel loss, mean of the commitment term       [0, 1] pixels; over elements
    augmentation                                              RandomResizedCrop (0.9, 1), no flip (captions name sides)
    averaged weights, precision                               none; bf16 autocast, quantizer and losses float32
    start of encoder and text tower                           EVA-02 after MIM and EVA02-CLIP; bottleneck, decoder fresh
    GPUs, memory options, pairs per GPU of L-14               128; activation checkpointing; 128
    stage 2: discriminator, R1, first step, LPIPS network     BSQ-ViT's, gamma 10 every 16 steps, 0, VGG-16
    stage 2 trains bottleneck and decoder                     one table of the paper names the decoder only

Every Time is an estimate, not a measurement: H100s at 35 % of their dense peak (bf16 989 TFLOP/s in the towers, TF32
495 in LPIPS and discriminator), with one more forward pass for activation checkpointing, and in stage 1 another one
when micro-batches are accumulated. `tests/recipes/test_tokenizer_recipes.py` holds the arithmetic.
"""

from __future__ import annotations

from qlip.data.batches import DataConfig
from qlip.engine.trainer import TrainerConfig
from qlip.recipes.model import ModelConfig, TowerSize
from qlip.recipes.run import EvalsConfig, RunConfig
from qlip.tasks.align import AlignConfig
from qlip.tasks.reconstruct import ReconstructConfig

CONTRASTIVE_CHUNK = 8192  # logits of (pairs of a rank) x 8192 in float32: 17 MB at 512 pairs, 537 MB at 16,384
NUM_WORKERS = 8
SMALL_WARMUP = 500  # of 5,000 to 25,000 steps; Table 8 has 2,000 of 120,000


def qlip_b_16_256() -> RunConfig:
    """Stage 1 of QLIP-B-16-256: 256 tokens of 28 bits from 256 px.

    Command:  qlip train qlip_b_16_256 --data.train SHARDS --task.init starts/b16    (under torchrun: runs/qlip.slurm)
    Hardware: 128 GPUs of 80 GB; fewer accumulate to the same batch (`data.global_batch_size`).
    Time:     about 20 hours on 128 H100 (estimate).
    Expect:   ImageNet zero-shot 74.3, rFID 35.3, PSNR 24.5 (Tables 2 and 3; 7.9 billion samples).
    Open:     what the module lists, and the number of samples: Table 8's product is taken, the text says 4 billion.

    `starts/b16` is `qlip import eva eva02_B_pt_in21k_p14.pt starts/b16 --text-from EVA02_CLIP_B_psz16_s8B.pt`.
    """
    return RunConfig(
        recipe="qlip_b_16_256",
        model=ModelConfig(image_size=256, patch_size=16),
        task=AlignConfig(contrastive_chunk=CONTRASTIVE_CHUNK),
        data=DataConfig(batch_size=512, global_batch_size=65_536, num_workers=NUM_WORKERS, crop_scale=(0.9, 1.0)),
        trainer=paper_trainer(),
        evals=EvalsConfig(names=("images-recon-offline-v1",)),
    )


def qlip_b_16_256_stage2() -> RunConfig:
    """Stage 2 of QLIP-B-16-256: texture for the decoder, encoder frozen.

    Command:  qlip train qlip_b_16_256_stage2 --data.train SHARDS --task.init RUN/export --task.vgg-weights VGG16
    Hardware: 128 GPUs of 80 GB, four micro-batches of 32 pictures each (Table 8's 128 take 179 GB with R1 in float32).
    Time:     about 25 hours on 128 H100 (estimate).
    Expect:   rFID 3.21, PSNR 23.16, SSIM .6286 (Table 2); zero-shot as after stage 1, to the last digit.
    Open:     what the module lists.

    VGG16 is torchvision's file vgg16-397923af.pth. Token ids change in this stage: make token stores with its export.
    """
    return RunConfig(
        recipe="qlip_b_16_256_stage2",
        model=qlip_b_16_256().model,
        task=ReconstructConfig(perceptual="lpips"),
        data=DataConfig(batch_size=32, global_batch_size=16_384, num_workers=NUM_WORKERS, crop_scale=(0.9, 1.0)),
        trainer=paper_trainer(),
        evals=EvalsConfig(names=("images-recon-offline-v1",)),
    )


def qlip_b_8_256() -> RunConfig:
    """Stage 1 of QLIP-B-8-256: 1,024 tokens; the model that Table 8 is stated for.

    Command:  qlip train qlip_b_8_256 --data.train SHARDS --task.init starts/b8      (under torchrun: runs/qlip.slurm)
    Hardware: 128 GPUs of 80 GB, two micro-batches of 256 pairs each per step (Table 8's 512 take 89 GB).
    Time:     about 4.5 days on 128 H100 (estimate); 3.6 where 512 pairs fit and one pass does.
    Expect:   ImageNet zero-shot 75.6 (Table 2); its figures of reconstruction are those after stage 2.
    Open:     what the module lists.

    `starts/b8` is made as `starts/b16` of `qlip_b_16_256`, with `--patch-size 8`.
    """
    config = qlip_b_16_256()
    config.recipe = "qlip_b_8_256"
    config.model.patch_size = 8
    config.data.batch_size = 256
    config.trainer.save_every = 250
    return config


def qlip_b_8_256_stage2() -> RunConfig:
    """Stage 2 of QLIP-B-8-256.

    Command:  qlip train qlip_b_8_256_stage2 --data.train SHARDS --task.init RUN/export --task.vgg-weights VGG16
    Hardware: 128 GPUs of 80 GB.
    Time:     about 36 hours on 128 H100 (estimate).
    Expect:   rFID 0.70, PSNR 26.79, SSIM .7905 (Table 2).
    Open:     what the module lists.
    """
    config = qlip_b_16_256_stage2()
    config.recipe = "qlip_b_8_256_stage2"
    config.model.patch_size = 8
    return config


def qlip_l_14_392() -> RunConfig:
    """Stage 1 of QLIP-L-14-392: 784 tokens from 392 px, 738 million parameters, sharded over all GPUs.

    Command:  qlip train qlip_l_14_392 --data.train SHARDS --task.init starts/l14    (under torchrun: runs/qlip.slurm)
    Hardware: 128 GPUs of 80 GB, four micro-batches of 128 pairs each per step.
    Time:     about 11 days on 128 H100 (estimate).
    Expect:   ImageNet zero-shot 79.1 (Table 2); linear probe of the class token 85.2 (Table 10).
    Open:     what the module lists; batch, rates and resolution stages of L (directly at 392, as B-8's Table 8).

    `starts/l14` is `qlip import eva eva02_L_pt_in21k_p14.pt starts/l14 --text-from EVA02_CLIP_L_psz14_s4B.pt
    --image-size 392 --patch-size 14`.
    """
    config = qlip_b_16_256()
    config.recipe = "qlip_l_14_392"
    config.model = large_model()
    config.data.batch_size = 128
    config.trainer.parallel = "fsdp"
    config.trainer.save_every = 100
    return config


def qlip_l_14_392_stage2() -> RunConfig:
    """Stage 2 of QLIP-L-14-392; the discriminator sees one random 256 px crop of both pictures.

    Command:  qlip train qlip_l_14_392_stage2 --data.train SHARDS --task.init RUN/export --task.vgg-weights VGG16
    Hardware: 128 GPUs of 80 GB.
    Time:     about 2.5 days on 128 H100 (estimate).
    Expect:   rFID 1.46, PSNR 25.36, SSIM .6903 (Table 2).
    Open:     what the module lists; the crop.
    """
    config = qlip_b_16_256_stage2()
    config.recipe = "qlip_l_14_392_stage2"
    config.model = large_model()
    config.trainer.parallel = "fsdp"
    config.trainer.save_every = 500
    return config


def qlip_b_16_256_small() -> RunConfig:
    """`qlip_b_16_256` for one GPU: batch 4,096 instead of 65,536, 57 million samples instead of 7.9 billion.

    Command:  qlip train qlip_b_16_256_small --data.train SHARDS --task.init starts/b16
    Hardware: one GPU of 80 GB (about 30 GB in use, read off the paper's Fig 3).
    Time:     about 23 hours on one H100 (estimate).
    Expect:   no row of the paper: a hundredth of its samples. Curves of its shape, far below its zero-shot figure.
    Open:     what `one_gpu` says of the rates.
    """
    return one_gpu(qlip_b_16_256(), batch_size=1024, global_batch_size=4096, steps=14_000)


def qlip_b_16_256_stage2_small() -> RunConfig:
    """`qlip_b_16_256_stage2` for one GPU: batch 512 instead of 16,384, 13 million pictures instead of 2 billion.

    Command:  qlip train qlip_b_16_256_stage2_small --data.train SHARDS --task.init RUN/export --task.vgg-weights VGG16
    Hardware: one GPU of 80 GB.
    Time:     about 21 hours on one H100 (estimate); LPIPS and discriminator take nine tenths of it.
    Expect:   no row of the paper. rFID falls far below that of stage 1, PSNR by about 1 dB, zero-shot stays.
    Open:     what `one_gpu` says of the rates.
    """
    return one_gpu(qlip_b_16_256_stage2(), batch_size=32, global_batch_size=512, steps=25_000)


def qlip_b_8_256_small() -> RunConfig:
    """`qlip_b_8_256` for one GPU: batch 2,048, 13 million samples.

    Command:  qlip train qlip_b_8_256_small --data.train SHARDS --task.init starts/b8
    Hardware: one GPU of 80 GB.
    Time:     about 23 hours on one H100 (estimate).
    Expect:   no row of the paper: a sixth of a percent of its samples.
    Open:     what `one_gpu` says of the rates.
    """
    return one_gpu(qlip_b_8_256(), batch_size=256, global_batch_size=2048, steps=6500)


def qlip_b_8_256_stage2_small() -> RunConfig:
    """`qlip_b_8_256_stage2` for one GPU: batch 512, 9 million pictures.

    Command:  qlip train qlip_b_8_256_stage2_small --data.train SHARDS --task.init RUN/export --task.vgg-weights VGG16
    Hardware: one GPU of 80 GB.
    Time:     about 21 hours on one H100 (estimate).
    Expect:   no row of the paper.
    Open:     what `one_gpu` says of the rates.
    """
    return one_gpu(qlip_b_8_256_stage2(), batch_size=32, global_batch_size=512, steps=18_000)


def qlip_l_14_392_small() -> RunConfig:
    """`qlip_l_14_392` for one GPU: batch 1,024, 5 million samples.

    Command:  qlip train qlip_l_14_392_small --data.train SHARDS --task.init starts/l14
    Hardware: one GPU of 80 GB.
    Time:     about 22 hours on one H100 (estimate).
    Expect:   no row of the paper.
    Open:     what `one_gpu` says of the rates.
    """
    return one_gpu(qlip_l_14_392(), batch_size=128, global_batch_size=1024, steps=5000)


def qlip_l_14_392_stage2_small() -> RunConfig:
    """`qlip_l_14_392_stage2` for one GPU: batch 512, 6 million pictures.

    Command:  qlip train qlip_l_14_392_stage2_small --data.train SHARDS --task.init RUN/export --task.vgg-weights VGG16
    Hardware: one GPU of 80 GB.
    Time:     about 22 hours on one H100 (estimate).
    Expect:   no row of the paper.
    Open:     what `one_gpu` says of the rates.
    """
    return one_gpu(qlip_l_14_392_stage2(), batch_size=16, global_batch_size=512, steps=11_000)


def large_model() -> ModelConfig:
    """L-14-392: widths and depths that give the released file's size exactly (INFERRED)."""
    vision = {"hidden_size": 1024, "num_layers": 24, "num_heads": 16, "intermediate_size": 2730}
    return ModelConfig(
        image_size=392,
        patch_size=14,
        encoder=TowerSize(**vision),
        decoder=TowerSize(**vision),
        text=TowerSize(hidden_size=768, num_layers=12, num_heads=12, intermediate_size=3072),
        projection_dim=768,
    )


def paper_trainer() -> TrainerConfig:
    """Table 8's 120,000 iterations, and how a large run computes."""
    return TrainerConfig(
        steps=120_000,
        log_every=50,
        save_every=1000,
        parallel="ddp",
        precision="bf16",
        compile=True,
        activation_checkpointing=True,
        async_save=True,
    )


def one_gpu(config: RunConfig, *, batch_size: int, global_batch_size: int, steps: int) -> RunConfig:
    """A recipe as `<name>_small`: fewer samples in micro-batches of `batch_size`, all else equal.

    The rates stay Table 8's, an untested choice and the first thing to sweep. For it: LAMB's step is a share of each
    matrix's norm whatever the batch, and the paper kept its rates between batches of 16,384 and 65,536. Against it: the
    square-root rule asks for a quarter of them at 4,096; but with a ninth of the steps weights would hardly move.
    In stage 2, where AdamW's steps do not depend on the gradient's scale either, the same.
    """
    config.recipe = f"{config.recipe}_small"
    config.data.batch_size, config.data.global_batch_size = batch_size, global_batch_size
    config.task.optimizer.warmup_steps = SMALL_WARMUP
    if isinstance(config.task, AlignConfig):
        config.task.contrastive_chunk = 0  # the whole matrix of logits takes 67 MB at 4,096
    else:
        config.task.discriminator_optimizer.warmup_steps = SMALL_WARMUP
    config.trainer.parallel = "auto"
    config.trainer.steps = steps
    config.trainer.log_every, config.trainer.save_every = 10, 200
    return config
