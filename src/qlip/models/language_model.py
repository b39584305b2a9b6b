"""The language model of an assistant: from a folder of transformers, or a tiny fresh one with its own tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qlip.core.errors import UserError
from qlip.models.baselines import read_config
from qlip.models.chat_templates import SHORT
from qlip.models.qlip.loading import quiet_transformers
from qlip.models.qlip.pretrained import one_line
from qlip.models.qlip.weight_files import find_weight_files, read_headers

START, END = "<s>", "</s>"


@dataclass(kw_only=True, slots=True)
class TinyLanguageModel:
    """Size of a fresh Llama, for tests and recipes on a CPU."""

    hidden_size: int = 128
    """Width."""
    num_layers: int = 3
    """Blocks."""
    num_heads: int = 4
    """Attention heads."""
    intermediate_size: int = 344
    """Feed-forward width."""
    vocab_size: int = 600
    """Byte pairs that its tokenizer learns from the conversations, at most; 256 are the bytes."""
    max_positions: int = 512
    """Longest input in tokens."""
    initializer_range: float = 0.06
    """Standard deviation of fresh weights; with 0.02, meant for wide models, existence is not learned in 900 steps."""


def open_language_model(folder: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal language model in a folder and its tokenizer, on the CPU, in the dtype of its file.

    Raises `UserError` for anything that transformers cannot read whole, without running code of the folder.
    """
    if not Path(folder).is_dir():
        raise UserError(f"no language model at {folder}: download one (Vicuna, Llama-3, Qwen) and give its folder")
    kind = read_config(Path(folder)).get("model_type")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"{folder} holds a {kind!r} model, no language model: give the folder of a Vicuna, Llama, Qwen, ..."
        )
    read_headers(find_weight_files(folder))
    tokenizer = open_text_tokenizer(folder)
    try:
        with quiet_transformers():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                dtype="auto",
                attn_implementation="sdpa",  # not what config.json says: it can name code of a hub
                output_loading_info=True,
            )
    except Exception as error:  # the readers raise nearly every type on broken files
        raise UserError(f"cannot read a language model from {folder}: {one_line(error)}; download it again") from None
    absent = [*info["missing_keys"], *info["mismatched_keys"]]
    if absent:
        raise UserError(f"{folder} lacks {len(absent)} tensors of its language model: download it again")
    return model, tokenizer


def open_text_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder. Raises `UserError` for one that cannot say which characters a token stands for."""
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # as above
        if (Path(folder) / "tokenizer.model").is_file() and not (Path(folder) / "tokenizer.json").is_file():
            raise UserError(
                f"{folder} has a tokenizer.model alone: pip install sentencepiece, and save the tokenizer again with a "
                "tokenizer.json (docs/understanding.md)"
            ) from None
        raise UserError(f"cannot read a tokenizer from {folder}: {one_line(error)}; download it again") from None
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer of {folder} has no fast form (tokenizer.json): save it with one")
    return tokenizer


def tiny_language_model(
    texts: Iterable[str], size: TinyLanguageModel
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A fresh Llama, and a byte-level tokenizer whose pairs are learned from `texts`; every text can be written in it.

    Weights are drawn from PyTorch's random state. Texts in the same order give the same tokenizer. Raises `UserError`
    for a width that its heads cannot share.
    """
    if size.hidden_size % (2 * size.num_heads):  # rotary positions turn pairs
        raise UserError(
            f"tiny.hidden_size {size.hidden_size} is not an even multiple of tiny.num_heads {size.num_heads}: "
            f"take {2 * size.num_heads * max(1, size.hidden_size // (2 * size.num_heads))}"
        )
    tokenizer = _byte_pairs(texts, vocab_size=size.vocab_size)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        intermediate_size=size.intermediate_size,
        max_position_embeddings=size.max_positions,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=size.initializer_range,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config), tokenizer


def _byte_pairs(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learned.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learned.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=learned, bos_token=START, eos_token=END, chat_template=SHORT)
