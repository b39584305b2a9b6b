"""Recipes by name. The table is all that `qlip train --help` needs, so listing them loads nothing."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from qlip.core.errors import UserError, nearest_name

if TYPE_CHECKING:
    from qlip.recipes.run import RunConfig

SCENES = "qlip.recipes.scenes"
TOKENIZER = "qlip.recipes.tokenizer"
BASELINES = "qlip.recipes.baselines"
ABLATIONS = "qlip.recipes.ablations"
DOWNSTREAM = "qlip.recipes.downstream"
UNIFIED = "qlip.recipes.unified"
RECIPES = {  # name -> (module, one line); `qlip train --help` lists them in this order
    "scenes_tiny": (SCENES, "stage 1 on procedural scenes, two CPU cores, minutes"),
    "scenes_tiny_stage2": (SCENES, "stage 2 of the same: perceptual and adversarial, frozen encoder"),
    "scenes_small": (SCENES, "stage 1 on scenes of 128 px, one GPU of 24 GB, minutes"),
    "scenes_small_stage2": (SCENES, "... stage 2"),
    "qlip_b_16_256": (TOKENIZER, "the paper's B-16, 256 px, stage 1: 128 GPUs"),
    "qlip_b_16_256_stage2": (TOKENIZER, "... stage 2"),
    "qlip_b_8_256": (TOKENIZER, "the paper's B-8, 256 px, stage 1: 128 GPUs"),
    "qlip_b_8_256_stage2": (TOKENIZER, "... stage 2"),
    "qlip_l_14_392": (TOKENIZER, "the paper's L-14, 392 px, stage 1: 128 GPUs, sharded"),
    "qlip_l_14_392_stage2": (TOKENIZER, "... stage 2"),
    "qlip_b_16_256_small": (TOKENIZER, "B-16 stage 1 for one GPU and a day"),
    "qlip_b_16_256_stage2_small": (TOKENIZER, "... stage 2"),
    "qlip_b_8_256_small": (TOKENIZER, "B-8 stage 1 for one GPU and a day"),
    "qlip_b_8_256_stage2_small": (TOKENIZER, "... stage 2"),
    "qlip_l_14_392_small": (TOKENIZER, "L-14 stage 1 for one GPU and a day"),
    "qlip_l_14_392_stage2_small": (TOKENIZER, "... stage 2"),
    "bsqvit_b_16": (BASELINES, "B-16 without text (BSQ-ViT), stage 1"),
    "bsqvit_b_16_stage2": (BASELINES, "... stage 2"),
    "clip_b_16": (BASELINES, "B-16 without decoder (CLIP)"),
    "recipe2_b_16": (BASELINES, "Table 3c, recipe 2: stage 1 without quantizer"),
    "recipe2_b_16_stage2": (BASELINES, "... stage 2 adds the quantizer"),
    "bsqvit_b_16_small": (BASELINES, "BSQ-ViT stage 1 for one GPU"),
    "bsqvit_b_16_stage2_small": (BASELINES, "... stage 2"),
    "clip_b_16_small": (BASELINES, "CLIP for one GPU"),
    "recipe2_b_16_small": (BASELINES, "recipe 2, stage 1, for one GPU"),
    "recipe2_b_16_stage2_small": (BASELINES, "... stage 2"),
    "scenes_t2i_tiny": (DOWNSTREAM, "text to image over the tokens of scenes_tiny_stage2, two CPU cores, minutes"),
    "t2i_xl_256": (DOWNSTREAM, "LlamaGen-XL over the tokens of QLIP-B-16-256: 8 GPUs"),
    "t2i_xl_256_bsqvit": (DOWNSTREAM, "... over those of BSQ-ViT"),
    "t2i_xl_256_vqgan": (DOWNSTREAM, "... over those of LlamaGen's VQGAN"),
    "t2i_xl_256_small": (DOWNSTREAM, "LlamaGen-B over QLIP's tokens, one GPU and a day"),
    "scenes_llava_tiny": (DOWNSTREAM, "questions about scenes through the tower of scenes_tiny_stage2, two CPU cores"),
    "llava_v15_7b_pretrain": (DOWNSTREAM, "LLaVA-1.5 with QLIP-L-14-392 and Vicuna-7B, the projector: 8 GPUs, sharded"),
    "llava_v15_7b_finetune": (DOWNSTREAM, "... instruction tuning"),
    "llava_v15_small_pretrain": (DOWNSTREAM, "the projector of a language model of 0.5 to 1B, one GPU"),
    "llava_v15_small_finetune": (DOWNSTREAM, "... instruction tuning"),
    "scenes_um3_tiny": (UNIFIED, "stories, captions and drawings of scenes with one model, two CPU cores, minutes"),
    "um3_1_5b": (UNIFIED, "UM3 of Llama-3.2-1B over documents and QLIP-B-16-256's tokens: 64 GPUs, sharded"),
    "um3_1_5b_small": (UNIFIED, "... for one GPU and a day"),
    "table3a_1_0": (ABLATIONS, "Table 3a, contrast to pixels 1:0; 32 GPUs, as all of Table 3"),
    "table3a_1_1": (ABLATIONS, "... 1:1"),
    "table3a_1_1e2": (ABLATIONS, "... 1:100"),
    "table3a_1_1e3": (ABLATIONS, "... 1:1,000, the paper's choice"),
    "table3a_1_1e4": (ABLATIONS, "... 1:10,000"),
    "table3a_0_1": (ABLATIONS, "... 0:1"),
    "table3b_none": (ABLATIONS, "Table 3b, all weights fresh"),
    "table3b_mim": (ABLATIONS, "... --task.init from EVA-02 (MIM)"),
    "table3b_clip": (ABLATIONS, "... --task.init from EVA02-CLIP"),
    "table3a_1_0_small": (ABLATIONS, "Table 3a, 1:0, for one GPU and a day, as all below"),
    "table3a_1_1_small": (ABLATIONS, "... 1:1"),
    "table3a_1_1e2_small": (ABLATIONS, "... 1:100"),
    "table3a_1_1e3_small": (ABLATIONS, "... 1:1,000"),
    "table3a_1_1e4_small": (ABLATIONS, "... 1:10,000"),
    "table3a_0_1_small": (ABLATIONS, "... 0:1"),
    "table3b_none_small": (ABLATIONS, "Table 3b, all weights fresh"),
    "table3b_mim_small": (ABLATIONS, "... --task.init from EVA-02 (MIM)"),
    "table3b_clip_small": (ABLATIONS, "... --task.init from EVA02-CLIP"),
}


def find_recipe(name: str) -> RunConfig:
    """The config a recipe returns. Raises `UserError` naming the nearest recipe for an unknown name."""
    if name not in RECIPES:
        raise UserError(f"recipe {name!r} is unknown: {nearest_name(name, RECIPES)}")
    return getattr(importlib.import_module(RECIPES[name][0]), name)()
