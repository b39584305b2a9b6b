"""Text-to-image models of a few thousand parameters, and captions for them."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from qlip.models import caption_encoder, opening
from qlip.models.image_tokenizer import ImageTokenizer
from qlip.models.qlip.processing import QLIPProcessor
from qlip.models.qlip.tokenizer import clip_tokenizer
from qlip.models.text_to_image import TextToImageConfig, TextToImageModel

HEADS = ("flat", "depth", "bitwise")
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def tiny_config(head: str = "depth", **changes: object) -> TextToImageConfig:
    """2 x 3 tokens of 6 bits after 4 caption slots of width 8."""
    fields = {
        **SIZES,
        "initializer_range": 0.3,
        "dropout": 0.0,
        "head": head,
        "grid": [2, 3],
        "num_bits": 6,
        "division": [3, 3],
        "depth_layers": 1,
        "caption_width": 8,
        "caption_length": 4,
    }
    return TextToImageConfig(**(fields | changes))


def outputs_of(model: TextToImageModel) -> list[nn.Linear]:
    """The output layers of the head, which start at zero."""
    return [part for name, part in model.head.named_modules() if name.endswith("output")]


def tiny_generator(head: str = "depth", *, seed: int = 0, scale: float = 1.0, **changes: object) -> TextToImageModel:
    """In evaluation mode, with predictions that are not uniform; `scale` makes them sharper."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = TextToImageModel(tiny_config(head, **changes)).eval()
        for output in outputs_of(model):
            nn.init.normal_(output.weight, std=scale)
    return model


def captions(num: int = 3, *, seed: int = 1, length: int = 4, width: int = 8) -> tuple[Tensor, Tensor]:
    """Features (num, t, c) and their mask (num, t) bool: the first caption has one slot, the next one more, ..."""
    features = torch.randn(num, length, width, generator=torch.Generator().manual_seed(seed))
    counts = 1 + torch.arange(num) % length
    return features, torch.arange(length) >= length - counts[:, None]


def some_bits(num: int = 3, *, tokens: int = 6, width: int = 6, seed: int = 2) -> Tensor:
    """(num, tokens, width) bool."""
    return torch.rand(num, tokens, width, generator=torch.Generator().manual_seed(seed)) < 0.5


def all_bits(num_bits: int) -> Tensor:
    """(2^L, L) bool, every code once."""
    return torch.cartesian_prod(*[torch.tensor([False, True])] * num_bits).reshape(-1, num_bits)


def generator_for(tokenizer: ImageTokenizer, *, head: str = "depth", **changes: object) -> TextToImageModel:
    """A tiny model for the tokens of that tokenizer, with captions of 8 slots in a table of its own."""
    fields = {
        "grid": list(tokenizer.grid),
        "num_bits": tokenizer.num_bits,
        "division": [7] * 4 if tokenizer.num_bits == 28 else [tokenizer.num_bits],
        "caption_encoder": "learned",
        "caption_length": 8,
        "image_tokenizer": tokenizer.encoder_fingerprint,
        "image_tokenizer_name": tokenizer.name,
        "image_size": tokenizer.image_size,
    }
    return tiny_generator(head, **(fields | changes))


def read_vocabularies_once(patch: pytest.MonkeyPatch) -> None:
    """Reading CLIP's vocabulary is nearly all the time that opening one of these takes."""
    patch.setattr(caption_encoder, "clip_tokenizer", cache(clip_tokenizer))
    processor = QLIPProcessor.for_size(16, context_length=16)
    patch.setattr(opening, "load_processor", lambda source: processor)
