"""UM3 (QLIP section 9, Tables 5 and 9): Llama 3 that goes on over documents, captioned pictures and pictures to draw.

From Table 9: rate 1e-4 with a cosine, AdamW (.9, .95), decay .1, clip 1, 2,000 steps of warm-up of 600,000, 512 rows of
4,096 tokens, and the calm-down of text from 60 : 1 : 3 to 12 : 1 : 3 samples within 10,000 steps (Eq 7). OPEN in the
paper, with the defaults of this project: how a token of 28 bits is written (two ids of 14 bits, which the paper's
arithmetic implies), the order of a sequence, whether pairs were packed, the end of the cosine (.1, Lingua's).
"""

from __future__ import annotations

from qlip.data.mixing import MixDataConfig
from qlip.engine.interfaces import OptimizerConfig
from qlip.engine.trainer import TrainerConfig
from qlip.models.language_model import TinyLanguageModel
from qlip.models.widening import WideningConfig
from qlip.recipes.unified_run import UnifiedRunConfig
from qlip.tasks.unified import UnifiedConfig


def um3_1_5b() -> UnifiedRunConfig:
    """UM3 of Llama-3.2-1B: 1.63B parameters, of which 262.7M are the text table and 67.1M the visual one, twice.

    Command:  torchrun --nproc-per-node 8 --no-python qlip train um3_1_5b --init UM3 --data.text 'DCLM/*.jsonl.zst'
              --data.tokens STORE
    Hardware: 64 GPUs of 80 GB (8 rows each, Table 9), weights and optimizer state sharded; fewer take micro-batches.
    Time:     about 6 days on 64 H100 (estimate: 600,000 steps x 2.1M ids, 8.5 GFLOPs each, at 35 % of the peak).
    Expect:   ARC-C 34.30, HellaSwag 45.35, PIQA 74.65, SIQA 43.09, WinoGrande 54.22; COCO captions BLEU-4 8.6, METEOR
              20.2, CIDEr 17.3; COCO-30k gFID 44.1, CLIPScore .250 (Table 5). Never run here.
    Open:     two ids a token, sequence order, packing of pairs, end of the cosine, number of GPUs.

    UM3 is what `qlip import llama LLAMA_3.2_1B UM3 --tokenizer QLIP_B_16_256` makes, the store what `qlip tokenize`
    makes of CC-12M and SA-1B with captions of Qwen2-VL-7B (18M pictures).
    """
    return UnifiedRunConfig(
        recipe="um3_1_5b",
        data=MixDataConfig(batch_size=8, global_batch_size=512),
        trainer=TrainerConfig(
            steps=600_000,
            log_every=50,
            save_every=2000,
            precision="bf16",
            parallel="fsdp",
            activation_checkpointing=True,
        ),
    )


def um3_1_5b_small() -> UnifiedRunConfig:
    """The same for one GPU and a day: 64 rows of 2,048 tokens, 20,000 steps, the calm-down within the first 2,000.

    Command:  qlip train um3_1_5b_small --init UM3 --data.text 'DCLM/*.jsonl.zst' --data.tokens STORE
    Hardware: one GPU of 80 GB.
    Time:     about 17 hours on one H100 (estimate: 20,000 steps x 131,072 ids, at 35 % of the peak).
    Expect:   no row of the paper. Never run here.
    Open:     as `um3_1_5b`; a quarter of the text at the end (3 : 1 : 3), since there is time for few pictures.
    """
    config = um3_1_5b()
    config.recipe = "um3_1_5b_small"
    config.data = MixDataConfig(
        batch_size=8, global_batch_size=64, sequence_length=2048, text_start=15, text_end=3, calm_down_steps=2000
    )
    config.task.optimizer.warmup_steps = 500
    config.trainer.steps = 20_000
    config.trainer.parallel = "auto"
    return config


def scenes_um3_tiny() -> UnifiedRunConfig:
    """A fresh model of 1.05M parameters that tells stories, captions scenes and draws them; two CPU cores.

    Command:  qlip train scenes_um3_tiny --tokenizer runs/coarse/export --data.text runs/demo/data/train
              --data.tokens runs/tokens_drawn --data.captioned-tokens runs/tokens_captioned
    Hardware: two CPU cores, under 2 GB of memory.
    Time:     14 minutes (measured on an AMD EPYC with AVX2).
    Expect:   stories of perplexity 1.61 (their unigrams: 48); captions of held-out scenes with all shapes right in
              19 %, with their colours in 18, the number of objects in 93 (most frequent answers: 6, 1, 55); drawn
              single objects 25 %, colours 19 (chance 17 and 2), several objects at chance: docs/results/unified.md.
    Open:     as `um3_1_5b`; a row of 256 ids is a sample of text, so ratios of text are small here, five times as large
              at first as at the end as the paper's, and captions get half as much again.

    The tokenizer is a coarse one, 3 x 3 tokens: `qlip train scenes_tiny --model.patch-size 16`. Pictures of the demo's
    36 tokens are 144 ids, from which so short a training learns too little of captions.
    """
    return UnifiedRunConfig(
        recipe="scenes_um3_tiny",
        fresh_language_model=True,
        tiny=TinyLanguageModel(num_layers=4),
        widening=WideningConfig(division=(7, 7, 7, 7), bit_structure=0.02),
        task=UnifiedConfig(
            optimizer=OptimizerConfig(
                name="adamw", lr=2e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05, warmup_steps=100, clip_norm=1.0
            )
        ),
        data=MixDataConfig(
            text_field="story",
            batch_size=10,
            sequence_length=256,
            text_start=0.75,
            text_end=0.15,
            image_to_text=1.5,
            calm_down_steps=500,
            shuffle_window=2000,
        ),
        trainer=TrainerConfig(steps=4000, log_every=50, save_every=1000),
        sample_prompts=("a star", "a red ring", "a blue square", "two triangles"),
    )
