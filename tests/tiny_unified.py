"""UM3s and Llama 3s of a few thousand parameters: random weights, byte-level tokenizers, tokens of a tiny QLIP."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from qlip.models.image_tokenizer import ImageTokenizer, open_image_tokenizer
from qlip.models.language_model import TinyLanguageModel, tiny_language_model
from qlip.models.unified import UM3Config, UM3ForCausalLM
from qlip.models.unified_model import save_unified
from qlip.models.widening import RESERVED, WideningConfig, widen
from tiny_tokenizer import save_tiny_tokenizer

TEXTS = ("a red star", "a blue ring and a red star", "Once upon a time there was a green circle.", "two small stars")
DIVISION = (7, 7, 7, 7)
IMAGE_LENGTH = 16  # 2 x 2 tokens of four sub-codes
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def tiny_config(**changes: object) -> UM3Config:
    """40 text ids, 2 x 3 tokens of two sub-codes of 4 bits: images are 12 ids of 40 to 55 and 56 to 71 by turns."""
    fields = {
        "vocab_size": 72,
        "text_vocab_size": 40,
        "visual_division": [4, 4],
        "num_bits": 8,
        "grid": [2, 3],
        "image_begin_id": 38,
        "image_end_id": 39,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return UM3Config(**(fields | changes))


def tiny_um3(*, seed: int = 0, **changes: object) -> UM3ForCausalLM:
    """A network of `tiny_config`, in evaluation mode, whose predictions are far from uniform."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UM3ForCausalLM(tiny_config(**changes)).eval()


def tiny_unified_parts(
    images: ImageTokenizer, *, seed: int = 0, **widening: object
) -> tuple[UM3ForCausalLM, PreTrainedTokenizerBase]:
    """A widened tiny Llama whose new rows differ as trained ones do, and its text tokenizer."""
    size = TinyLanguageModel(hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24, max_positions=256)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        language_model, tokenizer = tiny_language_model(TEXTS, size)
        model = widen(language_model, tokenizer, images, WideningConfig(**({"division": DIVISION} | widening)))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
    return model, tokenizer


def tiny_unified_folder(path: Path, *, seed: int = 0, **widening: object) -> Path:
    """A whole UM3 in `path`; its pictures are 16 px, `IMAGE_LENGTH` ids. Fields of `WideningConfig` can be changed.

    The image tokenizer alone lies beside it, under a name with `_images` behind.
    """
    source = path.with_name(f"{path.name}_images")
    if not source.exists():
        save_tiny_tokenizer(source)
    model, tokenizer = tiny_unified_parts(open_image_tokenizer(source), seed=seed, **widening)
    save_unified(model, folder=path, tokenizer=tokenizer, image_tokenizer=str(source), step=None)
    return path


def tiny_llama(
    *, seed: int = 0, tied: bool = True, reserved: bool = True
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """A random Llama of Llama 3's shape: grouped queries, its rotary scaling, and if `reserved` its reserved tokens."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _, tokenizer = tiny_language_model(TEXTS, TinyLanguageModel(hidden_size=8, num_heads=2, num_layers=1))
        if reserved:
            tokenizer.add_special_tokens({"additional_special_tokens": list(RESERVED)})
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            max_position_embeddings=256,
            rope_parameters=dict(LLAMA3_ROPE),
            initializer_range=0.3,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=tied,
        )
        return LlamaForCausalLM(config).eval(), tokenizer


def tiny_llama_folder(path: Path, *, seed: int = 0, tied: bool = True, reserved: bool = True) -> Path:
    """`tiny_llama` as transformers saves it."""
    model, tokenizer = tiny_llama(seed=seed, tied=tied, reserved=reserved)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
