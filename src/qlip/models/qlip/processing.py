"""QLIPProcessor: pictures and texts into model inputs, pixels back into pictures; all of it offline.

Image side: CLIP's processor with the Pillow back end (torchvision's differs by up to 1/255, enough to flip bits).
Text side: CLIP's byte-pair encoding from the vocabulary that open_clip bundles.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import CLIPTokenizer, PreTrainedTokenizerBase, ProcessorMixin
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from qlip.core import pixels

START_OF_TEXT, END_OF_TEXT = "<|startoftext|>", "<|endoftext|>"
NUM_MERGES = 49152 - 256 - 2


def clip_tokenizer(*, context_length: int) -> CLIPTokenizer:
    """CLIP's tokenizer: lower-cased byte-pair encoding, 49,408 ids, start 49406, end and padding 49407.

    `context_length` is where texts are cut when truncation is asked for (77 in CLIP). Ids equal open_clip's but for
    what open_clip mends before (HTML entities, curly quotes, full-width letters, ligatures, mojibake; final sigma).
    """
    vocabulary, merges = _bundled_bpe()
    with tempfile.TemporaryDirectory() as folder:
        vocab_file, merges_file = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocab_file.write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
        merges_file.write_text("\n".join(["#version: 0.2", *merges]))
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


def pillow_image_processor(image_size: int) -> CLIPImageProcessorPil:
    """CLIP's preprocessing at this size: shortest edge bicubic, centre crop, CLIP mean and std."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
    )


def text_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[str]], dict[str, Tensor]]:
    """Texts -> `input_ids` and `attention_mask` (t, longest), cut to the tokenizer's `model_max_length`.

    Markers such as `<|endoftext|>` inside a text are read as plain characters.
    """
    return partial(_tokenize, tokenizer)


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> dict[str, Tensor]:
    encoded = tokenizer(texts, padding=True, truncation=True, return_tensors="pt", split_special_tokens=True)
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


class QLIPProcessor(ProcessorMixin):
    """`processor(images=..., text=..., return_tensors="pt")` and `postprocess(pixels)`.

    Output keys: `pixel_values` (b, 3, S, S) CLIP-normalised; `input_ids` and `attention_mask` (t, length).
    """

    def __init__(self, image_processor=None, tokenizer=None, **kwargs):
        super().__init__(image_processor, tokenizer, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> QLIPProcessor:
        """As transformers', but always with the Pillow back end, which Auto classes replace by torchvision's."""
        processor = super().from_pretrained(*args, **kwargs)
        if not isinstance(processor.image_processor, CLIPImageProcessorPil):
            size = processor.image_processor.crop_size["height"]
            processor.image_processor = pillow_image_processor(size)
        return processor

    @classmethod
    def for_size(cls, image_size: int, *, context_length: int = 77) -> QLIPProcessor:
        """The processor of a model with this picture side and longest text."""
        return cls(pillow_image_processor(image_size), clip_tokenizer(context_length=context_length))

    def postprocess(self, pixel_values: Tensor) -> list[Image.Image]:
        """(b, 3, S, S) CLIP-normalised pixels, as `QLIPModel.decode` returns them -> pictures, clamped and rounded."""
        pictures = pixels.to_uint8(pixel_values.detach()).permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(picture) for picture in pictures]
