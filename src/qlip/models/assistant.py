"""An assistant as a folder and as something to ask: transformers' LLaVA with a QLIP tower, and its processor.

config.json  generation_config.json  model.safetensors  processor_config.json  chat_template.jinja  tokenizer*
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import AutoProcessor, BatchFeature, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from qlip.core.chats import chat_text, without_markers
from qlip.core.errors import UserError
from qlip.core.precision import cast_parameters
from qlip.models.baselines import read_config, whole_model
from qlip.models.chat_templates import IMAGE_TOKEN
from qlip.models.measured import Ability, sha256_of_config
from qlip.models.qlip.code_tower import QLIPCodeTower
from qlip.models.qlip.fingerprint import model_fingerprint
from qlip.models.qlip.loading import LOAD_ERRORS, quiet_transformers, write_export
from qlip.models.qlip.pretrained import one_line
from qlip.models.qlip.weight_files import find_weight_files, read_headers

Message = dict[str, Any]
"""transformers' convention: `role` (system, user, assistant) and `content`, a text or a list of parts
`{"type": "image"}` and `{"type": "text", "text": ...}`."""
MODEL_TYPE = "llava"


@dataclass(kw_only=True, slots=True)
class ChatPrompt:
    """A conversation that ends with a question, and its pictures."""

    messages: list[Message]
    """In order; the last is the user's."""
    images: list[Image.Image] = field(default_factory=list)
    """RGB, in the order of their places."""


@dataclass(kw_only=True, slots=True, frozen=True)
class AnswerSettings:
    """How an answer is written."""

    max_new_tokens: int = 128
    """Longer answers are cut."""
    temperature: float = 0.0
    """0 takes the most probable token, always the same."""
    top_p: float = 1.0
    """Draw among the most probable tokens that together reach this."""
    num_beams: int = 1
    """Beams; 1 is none."""
    until: tuple[str, ...] = ()
    """An answer ends before the first of these."""


class TooLong(UserError):  # noqa: N818 - a verdict on a prompt
    """A prompt that leaves no room for an answer in the context."""


class Assistant:
    """Pictures and questions -> answers, as evaluations and harnesses use it."""

    name = "LlavaForConditionalGeneration"

    def __init__(self, model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
        """Both belong together, on one device, in evaluation mode."""
        self.model, self.processor = model.eval(), processor
        self.image_size = int(model.config.vision_config.image_size)
        self.abilities: frozenset[Ability] = frozenset(("answer",))
        self._identity: dict[str, Any] = {}
        self._as_saved = True

    @property
    def dtype(self) -> torch.dtype:
        """What the language model computes in."""
        return self.model.lm_head.weight.dtype

    @property
    def context_length(self) -> int:
        """Tokens of question and answer together."""
        return int(self.model.config.text_config.max_position_embeddings)

    def identity(self) -> dict[str, Any]:
        """Fingerprint, dtype, number of parameters of each part, and what the tower hands on.

        The first call reads all weights and comes before `to` changes their dtype.
        """
        config = self.model.config
        assert self._identity or self._as_saved, "a fingerprint is of weights as they were saved"
        self._identity = self._identity or {
            "model_fingerprint": model_fingerprint(self.model),
            "config_sha256": sha256_of_config(config),
            "parameters": {
                name: sum(parameter.numel() for parameter in part.parameters())
                for name, part in self.model.model.named_children()
            },
            "vision_features": getattr(
                config.vision_config, "features", f"hidden_states[{config.vision_feature_layer}]"
            ),
        }
        return self._identity | {"dtype": str(self.dtype).removeprefix("torch.")}

    def to(self, device: torch.device, *, dtype: torch.dtype | None = None) -> None:
        """Move it there; `dtype` is what it computes in: if not given bfloat16 on GPUs that have it, else the file's.

        Towers of codes stay float32, with the projector behind them: rounding would flip bits.
        """
        if dtype is None:
            has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            dtype = torch.bfloat16 if has_bf16 else self.dtype
        self._as_saved = self._as_saved and dtype == self.dtype
        self.model.to(device)
        parts = self.model.model
        seeing = (
            [] if isinstance(parts.vision_tower, QLIPCodeTower) else [parts.vision_tower, parts.multi_modal_projector]
        )
        for part in (parts.language_model, self.model.lm_head, *seeing):
            cast_parameters(part, dtype)

    def inputs(self, prompts: list[ChatPrompt]) -> BatchFeature:
        """Prompts -> `input_ids`, `attention_mask` (b, t), padded on the left, and `pixel_values` of all pictures.

        Markers inside texts are plain characters. Raises `UserError` for a prompt whose pictures and places differ in
        number.
        """
        texts = [self._text(prompt) for prompt in prompts]
        images = [image for prompt in prompts for image in prompt.images]
        bos = self.processor.tokenizer.bos_token
        return self.processor(
            text=texts,
            images=images or None,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            add_special_tokens=not (
                bos and texts[0].startswith(bos)
            ),  # one beginning, the template's or the tokenizer's
        )

    @torch.inference_mode()
    def answer(self, prompts: list[ChatPrompt], settings: AnswerSettings | None = None) -> list[str]:
        """b prompts -> b answers, without white space around them.

        In float32 on a CPU an answer does not depend on the prompts beside it but through rounding, and near the end
        of the context: the longest prompt leaves its room to all. Raises `TooLong` for one that leaves none, and as
        `inputs`.
        """
        settings = settings or AnswerSettings()
        inputs = self.inputs(prompts)
        length = inputs["input_ids"].shape[1]
        room = self.context_length - length
        if room < 1:
            raise TooLong(f"the question has {length} tokens, the context {self.context_length}: shorten it")
        inputs = inputs.to(self.model.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(
                self.model.model.multi_modal_projector.linear_1.weight.dtype
            )
        sampled = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}  # 0 is all
        stops = {"stop_strings": list(settings.until), "tokenizer": self.processor.tokenizer} if settings.until else {}
        written = self.model.generate(
            **inputs,
            max_new_tokens=min(settings.max_new_tokens, room),
            do_sample=settings.temperature > 0,
            num_beams=settings.num_beams,
            **(sampled if settings.temperature > 0 else {}),
            **stops,
        )
        answers = self.processor.batch_decode(written[:, length:], skip_special_tokens=True)
        return [_before(answer, settings.until).strip() for answer in answers]

    def answer_what_fits(self, prompts: list[ChatPrompt], settings: AnswerSettings | None = None) -> list[str | None]:
        """As `answer`, with None for a prompt that leaves no room in the context."""
        try:
            return list(self.answer(prompts, settings))
        except TooLong:
            if len(prompts) == 1:
                return [None]
            return [answer for prompt in prompts for answer in self.answer_what_fits([prompt], settings)]

    def _text(self, prompt: ChatPrompt) -> str:
        markers = [token for token in self.processor.tokenizer.get_added_vocab() if token]
        messages = [_harmless(message, markers) for message in prompt.messages]
        text = chat_text(self.processor, messages, asking=True)
        places = text.count(IMAGE_TOKEN)
        if places != len(prompt.images):
            raise UserError(f"{places} places for pictures, {len(prompt.images)} pictures: give one part for each")
        return text


def _harmless(message: Message, markers: list[str]) -> Message:
    """In part form, which every LLaVA's template takes, without markers in its texts."""
    content = message["content"]
    content = [{"type": "text", "text": content}] if isinstance(content, str) else content
    parts = [part | {"text": without_markers(part["text"], markers)} if "text" in part else part for part in content]
    return message | {"content": parts}


def _before(text: str, until: tuple[str, ...]) -> str:
    for stop in until:
        text = text.split(stop, 1)[0]
    return text


def is_assistant(source: str | Path) -> bool:
    """Whether a folder holds a LLaVA."""
    folder = Path(source)
    return (folder / "config.json").is_file() and read_config(folder).get("model_type") == MODEL_TYPE


def open_assistant(source: str | Path) -> Assistant:
    """The assistant in a folder, on the CPU, in the dtype of its file. LLaVAs of others (`llava-hf`) open too.

    Raises `UserError` for any other folder, and for damaged or missing files.
    """
    folder = Path(source)
    if not is_assistant(folder):
        of_run = folder / "export"
        remedy = str(of_run) if is_assistant(of_run) else "the export of `qlip train scenes_llava_tiny` or of a LLaVA"
        raise UserError(f"{source} holds no assistant: give {remedy}")
    if "quantization_config" in read_config(folder):
        raise UserError(f"{source} holds quantized weights, which are not read here: save it with whole ones")
    read_headers(find_weight_files(folder))

    def load() -> tuple[Any, Mapping[str, Any]]:
        with quiet_transformers():
            return LlavaForConditionalGeneration.from_pretrained(
                folder, local_files_only=True, dtype="auto", attn_implementation="sdpa", output_loading_info=True
            )

    return Assistant(whole_model(folder, load), open_processor(folder))


def open_processor(folder: Path) -> LlavaProcessor:
    """The processor of an assistant's folder, with the Pillow back end.

    Raises `UserError` for files that are missing or broken.
    """
    try:
        with quiet_transformers():
            processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise UserError(f"cannot load the processor of {folder}: {one_line(error)}; export it again") from error
    if not isinstance(processor, LlavaProcessor) or processor.chat_template is None:
        raise UserError(f"{folder} has no processor of a LLaVA with a chat template: export it again")
    if not isinstance(processor.image_processor, LlavaImageProcessorPil):
        processor.image_processor = LlavaImageProcessorPil(**processor.image_processor.to_dict())
    return processor


def save_assistant(model: nn.Module, *, folder: Path, processor: LlavaProcessor, step: int | None) -> None:
    """Write model, processor and card; the folder appears whole or not at all.

    Raises `UserError` for a folder that holds anything else or cannot be written.
    """
    assert isinstance(model, LlavaForConditionalGeneration)

    def write(temporary: Path) -> None:
        with quiet_transformers():
            model.save_pretrained(temporary)
            processor.save_pretrained(temporary)
        (temporary / "README.md").write_text(_card(model, step), encoding="utf-8")

    write_export(folder, write, step=step)


def _card(model: LlavaForConditionalGeneration, step: int | None) -> str:
    config = model.config
    tower = getattr(config.vision_config, "features", f"hidden_states[{config.vision_feature_layer}]")
    trained = f", trained for {step} steps" if step else ""
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return f"""---
library_name: transformers
pipeline_tag: image-text-to-text
---
# LLaVA with a QLIP vision tower

{millions:.1f}M parameters{trained}: {config.image_seq_length} features (`{tower}`) of a picture of
{config.vision_config.image_size} pixels, and a {type(model.model.language_model).__name__} behind a projector.

    qlip ask THIS_FOLDER picture.png "What is in the picture?"

In Python: `import qlip.models`, then transformers' `AutoModelForImageTextToText` and `AutoProcessor`.
"""
