"""Assistants of a few thousand parameters: random weights, a byte-level tokenizer, QLIP towers of 16 px."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from qlip.models.assistant import Assistant, ChatPrompt, save_assistant
from qlip.models.language_model import TinyLanguageModel, tiny_language_model
from qlip.models.llava import FeatureKind, build_llava, build_processor
from qlip.models.qlip.configuration import QLIPVisionConfig
from qlip.models.qlip.towers import QLIPVisionModel

TEXTS = ("What color is the star?", "red", "How many shapes are there?", "two", "Is there a blue ring?", "yes no")
SIZE = TinyLanguageModel(hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24, max_positions=512)


def tiny_encoder(*, seed: int = 0, **fields: object) -> QLIPVisionModel:
    """16 px, 2 x 2 patches, three blocks of width 16."""
    sizes = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    config = QLIPVisionConfig(
        **(sizes | {"num_attention_heads": 2, "hidden_size_post_q": 24, "initializer_range": 0.3} | fields)
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return QLIPVisionModel(config).eval()


def tiny_llava(
    *, features: FeatureKind = "hidden", layer: int = -2, seed: int = 0, chat_template: str = "vicuna_v1"
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """In evaluation mode, the same for the same seed; its answers are long nonsense."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        language_model, tokenizer = tiny_language_model(TEXTS, SIZE)
        for parameter in language_model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        processor = build_processor(
            tokenizer, image_size=16, patch_size=8, chat_template=chat_template, features=features
        )
        encoder = tiny_encoder(seed=seed)
        return build_llava(encoder, language_model, processor, features=features, layer=layer), processor


def tiny_assistant(**choices: object) -> Assistant:
    """The two together."""
    return Assistant(*tiny_llava(**choices))


def save_tiny_assistant(folder: Path, **choices: object) -> Path:
    """As a folder."""
    model, processor = tiny_llava(**choices)
    save_assistant(model, folder=folder, processor=processor, step=0)
    return folder


def some_picture(seed: int = 0, *, size: tuple[int, int] = (20, 16)) -> Image.Image:
    """RGB noise."""
    data = torch.randint(256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(data.numpy())


def question(text: str = "What color is the star?", *, seed: int = 0) -> ChatPrompt:
    """About one picture."""
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return ChatPrompt(messages=[{"role": "user", "content": content}], images=[some_picture(seed)])
