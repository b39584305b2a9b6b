"""CLIP's text tokenizer without the network: from the vocabulary that open_clip bundles, or from a model folder."""

import gzip
import importlib.util
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer, CLIPTokenizer, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessingKwargs, TextKwargs
from transformers.utils import cached_file

START_OF_TEXT, END_OF_TEXT = "<|startoftext|>", "<|endoftext|>"
NUM_MERGES = 49152 - 256 - 2
TOKENIZER_FILE, VOCABULARY_FILES = "tokenizer.json", ("vocab.json", "merges.txt")
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
PLAIN_TEXTS = {"padding": True, "truncation": True, "split_special_tokens": True}
"""How texts are read: padded to the longest, cut to `model_max_length`, markers inside them plain characters."""


class PlainTextKwargs(TextKwargs, total=False):  # type: ignore[call-arg]
    """transformers' text options, and the one among ours that its processors do not know."""

    split_special_tokens: bool | None  # read at run time, so that this file cannot postpone its annotations


class PlainTextProcessingKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """What a processor may be called with."""

    _defaults = {}  # type: ignore[var-annotated]  # transformers 5.20 reads it of every such class
    text_kwargs: PlainTextKwargs


def clip_tokenizer(*, context_length: int) -> CLIPTokenizer:
    """CLIP's tokenizer: lower-cased byte-pair encoding, 49,408 ids, start 49406, end and padding 49407.

    `context_length` is where texts are cut when truncation is asked for (77 in CLIP). Ids equal open_clip's but for
    what open_clip mends before (HTML entities, curly quotes, full-width letters, ligatures, mojibake; final sigma).
    """
    vocabulary, merges = _bundled_bpe()
    with tempfile.TemporaryDirectory() as folder:
        vocab_file, merges_file = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocab_file.write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
        merges_file.write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
        return CLIPTokenizer(
            vocab=str(vocab_file),
            merges=str(merges_file),
            bos_token=START_OF_TEXT,
            eos_token=END_OF_TEXT,
            unk_token=END_OF_TEXT,
            pad_token=END_OF_TEXT,
            model_max_length=context_length,
        )


def _bundled_bpe() -> tuple[list[str], list[str]]:
    """Vocabulary in id order and merge rules, read from open_clip's file without importing open_clip (seconds)."""
    spec = importlib.util.find_spec("open_clip")
    assert spec is not None and spec.submodule_search_locations, "open_clip_torch is a dependency of qlip"
    path = Path(spec.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        merges = file.read().split("\n")[1 : NUM_MERGES + 1]
    characters = _byte_characters()
    vocabulary = characters + [c + "</w>" for c in characters] + ["".join(merge.split()) for merge in merges]
    return [*vocabulary, START_OF_TEXT, END_OF_TEXT], merges


def _byte_characters() -> list[str]:
    """The 256 printable characters that stand for bytes in GPT-2's byte-pair encoding, in CLIP's id order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def load_tokenizer(source: str | Path, *, context_length: int, hub: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id: `tokenizer.json`, or `vocab.json` and `merges.txt`; CLIP's if it has none.

    `context_length` is where texts are cut if the files do not say; `hub` holds options of `cached_file`. Raises
    `ValueError` for files that are broken or half there.
    """

    def find(name: str) -> str | None:
        return cached_file(source, name, **hub, _raise_exceptions_for_missing_entries=False)

    config_file = find(TOKENIZER_CONFIG_FILE)
    missing = [name for name in VOCABULARY_FILES if find(name) is None] if find(TOKENIZER_FILE) is None else []
    if len(missing) == len(VOCABULARY_FILES) and config_file is None:
        return clip_tokenizer(context_length=context_length)
    if missing:
        raise ValueError(f"{source}: tokenizer files without {' and '.join(missing)}; add what is missing")
    try:
        settings = {} if config_file is None else json.loads(Path(config_file).read_text(encoding="utf-8"))
        ours = settings.get("tokenizer_class", CLIP_TOKENIZERS[0]) in CLIP_TOKENIZERS
        tokenizer = (CLIPTokenizer if ours else AutoTokenizer).from_pretrained(source, **hub, trust_remote_code=False)
    except OSError:
        raise
    except Exception as error:  # the readers raise nearly every type on broken files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{source}: broken tokenizer files: {reason}; replace them") from error
    if tokenizer.model_max_length > 1_000_000:  # transformers' way to say that no file sets it
        tokenizer.model_max_length = context_length
    return tokenizer


def text_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[str]], dict[str, Tensor]]:
    """Texts -> `input_ids` and `attention_mask` (t, longest), cut to the tokenizer's `model_max_length`.

    Markers such as `<|endoftext|>` inside a text are read as plain characters.
    """
    return partial(_tokenize, tokenizer)


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> dict[str, Tensor]:
    encoded = tokenizer(texts, return_tensors="pt", **PLAIN_TEXTS)
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
