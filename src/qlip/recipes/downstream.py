"""Models on top of QLIP: LlamaGen's text-to-image generator over its tokens (QLIP section 8, Tables 7, 12 and 13), and
LLaVA-1.5 with its encoder as vision tower (section 7, Tables 4 and 6).

Of the generator's training the paper says that LlamaGen's recipe was "mostly" followed, on 15M captioned pictures;
steps, batch and epochs are OPEN. Here: LlamaGen's rates (AdamW 1e-4 constant, betas .9 and .95, decay .05, clip 1)
with this engine's cosine instead of a constant, batch 256, five epochs. How the paper predicts a token of 28 bits is
OPEN too: two sub-codes of 14 bits as successive positions, which its arithmetic for UM3 implies.
"""

from __future__ import annotations

from qlip.data.conversation_loader import ConversationDataConfig
from qlip.data.token_loader import TokenDataConfig
from qlip.engine.interfaces import OptimizerConfig
from qlip.engine.trainer import TrainerConfig
from qlip.recipes.generation_run import GenerationRunConfig, GeneratorSize
from qlip.recipes.instruction_run import InstructionRunConfig
from qlip.tasks.instruct import InstructConfig
from qlip.tasks.next_token import NextTokenConfig


def t2i_xl_256() -> GenerationRunConfig:
    """LlamaGen-XL on tokens of QLIP-B-16-256: 36 blocks of width 1280, 819.7M parameters, 512 positions a picture.

    Command:  qlip train t2i_xl_256 --tokenizer QLIP --data.tokens STORE --caption-encoder FLAN_T5_XL
    Hardware: 8 GPUs of 80 GB.
    Time:     about 24 hours on 8 H100 (estimate: 293,000 steps x 256 pictures x 632 positions, and the T5, at 35 %
              of the peak).
    Expect:   gFID 15.29, CLIPScore .316, GenEval .48, DPG-Bench 78.17 (Table 7). Never run here.
    Open:     steps, batch, schedule, guidance; the head.

    The store: `qlip tokenize QLIP PICTURES STORE`, of 4M pictures of LAION-COCO and 11M of SA-1B with their captions.
    """
    return GenerationRunConfig(
        recipe="t2i_xl_256",
        trainer=TrainerConfig(steps=293_000, log_every=50, save_every=2000, precision="bf16", compile=True),
        data=TokenDataConfig(batch_size=32, global_batch_size=256),
    )


def t2i_xl_256_bsqvit() -> GenerationRunConfig:
    """The same on tokens of BSQ-ViT-B/16, which was trained without text: Table 7's second row.

    Command:  qlip train t2i_xl_256_bsqvit --tokenizer BSQVIT --data.tokens STORE --caption-encoder FLAN_T5_XL
    Hardware: 8 GPUs of 80 GB.
    Time:     as `t2i_xl_256`.
    Expect:   gFID 19.03, CLIPScore .303, GenEval .31, DPG-Bench 34.03 (Table 7). Never run here.
    Open:     as `t2i_xl_256`.
    """
    config = t2i_xl_256()
    config.recipe = "t2i_xl_256_bsqvit"
    return config


def t2i_xl_256_vqgan() -> GenerationRunConfig:
    """The same on LlamaGen's VQGAN (2^14 codes, one position a patch), its stage 1: Table 7's first row.

    Command:  qlip train t2i_xl_256_vqgan --tokenizer vq_ds16_t2i.pt --data.tokens STORE --caption-encoder FLAN_T5_XL
    Hardware: 8 GPUs of 80 GB.
    Time:     about 50 hours on 8 H100 (estimate: 977,000 steps x 256 pictures x 376 positions, and the T5, at 35 %
              of the peak).
    Expect:   gFID 15.68, CLIPScore .309, GenEval .32, DPG-Bench 43.22 (Table 7, 50M pictures). Never run here.
    Open:     as `t2i_xl_256`; that the row is LlamaGen's stage 1 is INFERRED.
    """
    config = t2i_xl_256()
    config.recipe = "t2i_xl_256_vqgan"
    config.tokenizer_image_size = 256
    config.trainer.steps = 977_000
    return config


def t2i_xl_256_small() -> GenerationRunConfig:
    """`t2i_xl_256` at LlamaGen-B's size for one GPU and a day: 12 blocks of width 768, 137M parameters.

    Command:  qlip train t2i_xl_256_small --tokenizer QLIP --data.tokens STORE --caption-encoder FLAN_T5_XL
    Hardware: one GPU of 80 GB.
    Time:     about 20 hours on one H100 (estimate: 150,000 steps x 256 pictures, and the T5, at 35 % of the peak).
    Expect:   no row of the paper. Never run here.
    Open:     as `t2i_xl_256`.
    """
    config = t2i_xl_256()
    config.recipe = "t2i_xl_256_small"
    config.model = GeneratorSize(hidden_size=768, num_layers=12, num_heads=12, intermediate_size=2048)
    config.task.optimizer.lr, config.task.optimizer.warmup_steps = 3e-4, 1000
    config.data = TokenDataConfig(batch_size=64, global_batch_size=256)
    config.trainer.steps = 150_000
    return config


def scenes_t2i_tiny() -> GenerationRunConfig:
    """A generator of 0.8M parameters and a caption table for the demo's tokenizer: 36 tokens of 28 bits, two CPU cores.

    Command:  qlip train scenes_t2i_tiny --tokenizer runs/demo/stage2/export --data.tokens runs/demo/tokens
    Hardware: two CPU cores, under 2 GB of memory.
    Time:     six minutes on one core (measured on an AMD EPYC with AVX2 that had other work too), less on two.
    Expect:   single objects right in 64 % of pictures, colours in 62 % (chance 17 % and 2 %; means of three seeds); two
              objects 11 %, counts and places at a few per cent: docs/results/text_to_image.md.

    The store: `qlip tokenize runs/demo/stage2/export SCENES runs/demo/tokens --caption-fields prompts`.
    """
    return GenerationRunConfig(
        recipe="scenes_t2i_tiny",
        model=GeneratorSize(
            hidden_size=128,
            num_layers=4,
            num_heads=4,
            intermediate_size=344,
            head="bitwise",
            division=(7, 7, 7, 7),
            depth_layers=1,
            dropout=0.0,
            caption_encoder="learned",
            caption_length=12,
            caption_width=64,
            guidance=3.0,
            initializer_range=0.05,
        ),
        task=NextTokenConfig(
            optimizer=OptimizerConfig(name="adamw", lr=2e-3, eps=1e-8, warmup_steps=50, clip_norm=1.0)
        ),
        data=TokenDataConfig(batch_size=32),
        trainer=TrainerConfig(steps=1600, log_every=50, save_every=800),
        sample_prompts=("a star", "a red ring", "a blue square and a green circle", "two triangles"),
    )


def llava_v15_7b_pretrain() -> InstructionRunConfig:
    """LLaVA-1.5's first stage with QLIP-L-14-392 and Vicuna-1.5-7B: the projector alone, on 558k captioned pictures.

    Command:  torchrun --nproc-per-node 8 --no-python qlip train llava_v15_7b_pretrain --tower QLIP_L
              --language-model VICUNA --data.conversations blip_laion_cc_sbu_558k.json --data.images LLaVA-Pretrain
    Hardware: 8 GPUs of 80 GB, weights and optimizer state sharded.
    Time:     about 2 hours on 8 H100 (estimate: 2,181 steps x 256 chats of 815 tokens, at 35 % of the peak).
    Expect:   nothing to measure before the second stage. Never run here.
    Open:     nothing: LLaVA-1.5's recipe.
    """
    return InstructionRunConfig(
        recipe="llava_v15_7b_pretrain",
        chat_template="vicuna_v1",
        pad_to_square=False,
        task=InstructConfig(
            trains="projector",
            optimizer=OptimizerConfig(
                name="adamw", lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, warmup_steps=66, clip_norm=1.0
            ),
        ),
        data=ConversationDataConfig(batch_size=16, global_batch_size=256, num_workers=8, plain=True),
        trainer=TrainerConfig(
            steps=2181,
            log_every=10,
            save_every=500,
            precision="bf16",
            parallel="fsdp",
            activation_checkpointing=True,
        ),
    )


def llava_v15_7b_finetune() -> InstructionRunConfig:
    """LLaVA-1.5's second stage: projector and Vicuna on 665k conversations, pictures padded to squares.

    Command:  torchrun --nproc-per-node 8 --no-python qlip train llava_v15_7b_finetune --init PRETRAIN/export
              --data.conversations llava_v1_5_mix665k.json --data.images LLaVA-Instruct
    Hardware: 8 GPUs of 80 GB, weights and optimizer state sharded.
    Time:     about 4 hours on 8 H100 (estimate: 5,198 steps x 128 chats of 1,030 tokens, at 35 % of the peak).
    Expect:   VQAv2 78.3, GQA 61.8, TextVQA 55.2, POPE 86.1, MME 1498.3, MM-Vet 33.3 (Table 4). Never run here.
    Open:     nothing: LLaVA-1.5's recipe.
    """
    config = llava_v15_7b_pretrain()
    config.recipe = "llava_v15_7b_finetune"
    config.pad_to_square = True
    config.task = InstructConfig()
    config.data = ConversationDataConfig(batch_size=8, global_batch_size=128, num_workers=8)
    config.trainer.steps = 5198
    return config


def llava_v15_small_pretrain() -> InstructionRunConfig:
    """The first stage for one GPU: a language model of 0.5 to 1B parameters (Qwen2.5-0.5B-Instruct) and QLIP-B-16-256.

    Command:  qlip train llava_v15_small_pretrain --tower QLIP_B --language-model QWEN
              --data.conversations blip_laion_cc_sbu_558k.json --data.images LLaVA-Pretrain
    Hardware: one GPU of 80 GB.
    Time:     about 20 minutes on one H100 (estimate: 2,181 steps x 256 chats of 290 tokens, at 35 % of the peak).
    Expect:   no row of the paper. Never run here.
    Open:     nothing: LLaVA-1.5's rates, another language model.
    """
    config = llava_v15_7b_pretrain()
    config.recipe = "llava_v15_small_pretrain"
    config.chat_template = "auto"
    config.data.batch_size = 64
    config.trainer.parallel = "auto"
    config.trainer.activation_checkpointing = False
    return config


def llava_v15_small_finetune() -> InstructionRunConfig:
    """The second stage of the same.

    Command:  qlip train llava_v15_small_finetune --init PRETRAIN/export
              --data.conversations llava_v1_5_mix665k.json --data.images LLaVA-Instruct
    Hardware: one GPU of 80 GB.
    Time:     about an hour on one H100 (estimate: 5,198 steps x 128 chats of 500 tokens, at 35 % of the peak).
    Expect:   no row of the paper. Never run here.
    Open:     nothing: LLaVA-1.5's rates, another language model.
    """
    config = llava_v15_7b_finetune()
    config.recipe = "llava_v15_small_finetune"
    config.chat_template = "auto"
    config.data.batch_size = 8
    config.trainer.parallel = "auto"
    return config


def scenes_llava_tiny() -> InstructionRunConfig:
    """A fresh Llama of 0.65M parameters that answers questions about scenes through the demo's tower; two CPU cores.

    Command:  qlip train scenes_llava_tiny --tower runs/demo/stage2/export --data.conversations scenes.json
              --data.images runs/demo/data/train
    Hardware: two CPU cores, under 2 GB of memory.
    Time:     three and a half minutes (measured on an AMD EPYC with AVX2); six to eight on one core with other work.
    Expect:   right answers about held-out scenes: existence 76 %, colour 80, count 90, position 53 (majority answers
              50, 12, 59, 35; means of three seeds): docs/results/understanding.md.

    The conversations: `qlip data conversations runs/demo/data/train scenes.json`. A language model that knows nothing
    yet has to train from the first step on, so there is one stage.
    """
    return InstructionRunConfig(
        recipe="scenes_llava_tiny",
        fresh_language_model=True,
        task=InstructConfig(
            optimizer=OptimizerConfig(
                name="adamw", lr=2e-3, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.0, warmup_steps=100, clip_norm=1.0
            )
        ),
        data=ConversationDataConfig(batch_size=32, num_workers=0, max_length=256),
        trainer=TrainerConfig(steps=1000, log_every=50, save_every=500),
    )
