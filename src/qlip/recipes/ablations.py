"""Table 3 of the paper: balancing of the losses (3a) and the start of the encoder (3b), ViT-B/16, 2.0 billion samples.

Rows of 3a differ from `table3a_1_1e3` in one weight; a weight of 0 also leaves out the tower that it would train. Rows
of 3b differ in `--task.init` alone, which a recipe cannot carry: none of them has another number, and each names the
import it wants. What is INFERRED or OPEN in `tokenizer.py` is so here, and so is the meaning of Time; besides, the
paper does not say on how many GPUs these ran.
"""

from __future__ import annotations

from qlip.recipes.baselines import ABLATION_BATCH, ABLATION_BATCH_PER_GPU
from qlip.recipes.run import RunConfig
from qlip.recipes.tokenizer import one_gpu, qlip_b_16_256
from qlip.tasks.align import AlignConfig


def ablation(recipe: str, *, contrastive_weight: float = 1.0, pixel_weight: float = 1e3) -> RunConfig:
    """Stage 1 of QLIP-B-16-256 at the length of Table 3, with these weights a_a and a_r."""
    config = qlip_b_16_256()
    config.recipe = recipe
    assert isinstance(config.task, AlignConfig)
    config.task.contrastive_weight, config.task.pixel_weight = contrastive_weight, pixel_weight
    config.data.batch_size, config.data.global_batch_size = ABLATION_BATCH_PER_GPU, ABLATION_BATCH
    return config


def ablation_small(config: RunConfig) -> RunConfig:
    """The same row for one GPU: batch 4,096, 57 million samples."""
    return one_gpu(config, batch_size=1024, global_batch_size=4096, steps=14_000)


def table3a_1_0() -> RunConfig:
    """Table 3a, contrast to pixels 1:0.

    Command:  qlip train table3a_1_0 --data.train SHARDS --task.init starts/b16
    Hardware: 32 GPUs of 80 GB.
    Time:     about 10 hours on 32 H100 (estimate).
    Expect:   ImageNet zero-shot 75.7, rFID 367.8, PSNR 11.7: nothing trains the decoder.
    """
    return ablation("table3a_1_0", pixel_weight=0.0)


def table3a_1_1() -> RunConfig:
    """Table 3a, contrast to pixels 1:1.

    Command:  qlip train table3a_1_1 --data.train SHARDS --task.init starts/b16
    Hardware: 32 GPUs of 80 GB.
    Time:     about 20 hours on 32 H100 (estimate).
    Expect:   ImageNet zero-shot 75.1, rFID 162.6, PSNR 17.8.
    """
    return ablation("table3a_1_1", pixel_weight=1.0)


def table3a_1_1e2() -> RunConfig:
    """Table 3a, contrast to pixels 1:1e2.

    Command:  qlip train table3a_1_1e2 --data.train SHARDS --task.init starts/b16
    Hardware: 32 GPUs of 80 GB.
    Time:     about 20 hours on 32 H100 (estimate).
    Expect:   ImageNet zero-shot 74.7, rFID 41.7, PSNR 22.5.
    """
    return ablation("table3a_1_1e2", pixel_weight=1e2)


def table3a_1_1e3() -> RunConfig:
    """Table 3a, contrast to pixels 1:1e3, the paper's choice.

    Command:  qlip train table3a_1_1e3 --data.train SHARDS --task.init starts/b16
    Hardware: 32 GPUs of 80 GB.
    Time:     about 20 hours on 32 H100 (estimate).
    Expect:   ImageNet zero-shot 74.3, rFID 35.3, PSNR 24.5.
    """
    return ablation("table3a_1_1e3", pixel_weight=1e3)


def table3a_1_1e4() -> RunConfig:
    """Table 3a, contrast to pixels 1:1e4.

    Command:  qlip train table3a_1_1e4 --data.train SHARDS --task.init starts/b16
    Hardware: 32 GPUs of 80 GB.
    Time:     about 20 hours on 32 H100 (estimate).
    Expect:   ImageNet zero-shot 35.4, rFID 35.6, PSNR 24.5.
    """
    return ablation("table3a_1_1e4", pixel_weight=1e4)


def table3a_0_1() -> RunConfig:
    """Table 3a, contrast to pixels 0:1.

    Command:  qlip train table3a_0_1 --data.train SHARDS --task.init starts/b16
    Hardware: 32 GPUs of 80 GB.
    Time:     about 19 hours on 32 H100 (estimate).
    Expect:   ImageNet zero-shot 0.1, rFID 35.7, PSNR 24.5.
    """
    return ablation("table3a_0_1", contrastive_weight=0.0)


def table3b_none() -> RunConfig:
    """Table 3b, no start: all weights fresh.

    Command:  qlip train table3b_none --data.train SHARDS    (without --task.init)
    Hardware: 32 GPUs of 80 GB.
    Time:     about 20 hours on 32 H100 (estimate).
    Expect:   ImageNet zero-shot 26.4, rFID 35.0, PSNR 24.8.

    The text tower is fresh too: the paper's row is read so; it does not say.
    """
    return ablation("table3b_none")


def table3b_mim() -> RunConfig:
    """Table 3b, encoder from EVA-02 (MIM), the paper's choice.

    Command:  qlip train table3b_mim --data.train SHARDS --task.init starts/b16
    Hardware: 32 GPUs of 80 GB.
    Time:     about 20 hours on 32 H100 (estimate).
    Expect:   ImageNet zero-shot 74.3, rFID 35.3, PSNR 24.5: `table3a_1_1e3` under another name.

    The start: `qlip import eva eva02_B_pt_in21k_p14.pt starts/b16 --text-from EVA02_CLIP_B_psz16_s8B.pt`.
    """
    return ablation("table3b_mim")


def table3b_clip() -> RunConfig:
    """Table 3b, encoder from EVA02-CLIP.

    Command:  qlip train table3b_clip --data.train SHARDS --task.init starts/b16_clip
    Hardware: 32 GPUs of 80 GB.
    Time:     about 20 hours on 32 H100 (estimate).
    Expect:   ImageNet zero-shot 74.7, rFID 41.7, PSNR 23.9 (the first two may be a copying error).

    The start: `qlip import eva EVA02_CLIP_B_psz16_s8B.pt starts/b16_clip`.
    """
    return ablation("table3b_clip")


def table3a_1_0_small() -> RunConfig:
    """`table3a_1_0` for one GPU.

    Command:  qlip train table3a_1_0_small --data.train SHARDS --task.init starts/b16
    Hardware: one GPU of 80 GB.
    Time:     about 12 hours on one H100 (estimate).
    Expect:   no row of the paper; the order of its columns, not their numbers.
    """
    return ablation_small(table3a_1_0())


def table3a_1_1_small() -> RunConfig:
    """`table3a_1_1` for one GPU.

    Command:  qlip train table3a_1_1_small --data.train SHARDS --task.init starts/b16
    Hardware: one GPU of 80 GB.
    Time:     about 23 hours on one H100 (estimate).
    Expect:   no row of the paper; the order of its columns, not their numbers.
    """
    return ablation_small(table3a_1_1())


def table3a_1_1e2_small() -> RunConfig:
    """`table3a_1_1e2` for one GPU.

    Command:  qlip train table3a_1_1e2_small --data.train SHARDS --task.init starts/b16
    Hardware: one GPU of 80 GB.
    Time:     about 23 hours on one H100 (estimate).
    Expect:   no row of the paper; the order of its columns, not their numbers.
    """
    return ablation_small(table3a_1_1e2())


def table3a_1_1e3_small() -> RunConfig:
    """`table3a_1_1e3` for one GPU.

    Command:  qlip train table3a_1_1e3_small --data.train SHARDS --task.init starts/b16
    Hardware: one GPU of 80 GB.
    Time:     about 23 hours on one H100 (estimate).
    Expect:   no row of the paper; the order of its columns, not their numbers.
    """
    return ablation_small(table3a_1_1e3())


def table3a_1_1e4_small() -> RunConfig:
    """`table3a_1_1e4` for one GPU.

    Command:  qlip train table3a_1_1e4_small --data.train SHARDS --task.init starts/b16
    Hardware: one GPU of 80 GB.
    Time:     about 23 hours on one H100 (estimate).
    Expect:   no row of the paper; the order of its columns, not their numbers.
    """
    return ablation_small(table3a_1_1e4())


def table3a_0_1_small() -> RunConfig:
    """`table3a_0_1` for one GPU.

    Command:  qlip train table3a_0_1_small --data.train SHARDS --task.init starts/b16
    Hardware: one GPU of 80 GB.
    Time:     about 22 hours on one H100 (estimate).
    Expect:   no row of the paper; the order of its columns, not their numbers.
    """
    return ablation_small(table3a_0_1())


def table3b_none_small() -> RunConfig:
    """`table3b_none` for one GPU.

    Command:  qlip train table3b_none_small --data.train SHARDS
    Hardware: one GPU of 80 GB.
    Time:     about 23 hours on one H100 (estimate).
    Expect:   no row of the paper; the order of its columns, not their numbers.
    """
    return ablation_small(table3b_none())


def table3b_mim_small() -> RunConfig:
    """`table3b_mim` for one GPU.

    Command:  qlip train table3b_mim_small --data.train SHARDS --task.init starts/b16
    Hardware: one GPU of 80 GB.
    Time:     about 23 hours on one H100 (estimate).
    Expect:   no row of the paper; the order of its columns, not their numbers.
    """
    return ablation_small(table3b_mim())


def table3b_clip_small() -> RunConfig:
    """`table3b_clip` for one GPU.

    Command:  qlip train table3b_clip_small --data.train SHARDS --task.init starts/b16_clip
    Hardware: one GPU of 80 GB.
    Time:     about 23 hours on one H100 (estimate).
    Expect:   no row of the paper; the order of its columns, not their numbers.
    """
    return ablation_small(table3b_clip())
