"""QLIP as the vision tower of transformers' LLaVA: LLaVA-1.5 with another tower, and nothing of LLaVA rewritten.

    picture -> QLIP tower -> features of n patches -> two-layer MLP with GELU -> language model      (QLIP, Eq 8)

| features         | what the projector reads                                | row of Table 6       |
|------------------|---------------------------------------------------------|----------------------|
| `hidden`, layer -2 | `hidden_states[-2]` without CLS                       | -2, the paper's choice |
| `hidden`, layer -1 | `hidden_states[-1]` without CLS: before the quantizer | -1                   |
| `post_quantizer` | Z^, behind the quantizer                                | -1, after Q          |
| `codes`          | the bits themselves, as token embeddings                | -                    |
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import torch
from torch import nn
from transformers import (
    AddedToken,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from qlip.core.chats import chat_text
from qlip.core.errors import UserError
from qlip.models.chat_templates import CHAT_TEMPLATES, IMAGE_TOKEN, NEEDED_TOKENS, flattening
from qlip.models.qlip.code_tower import code_tower
from qlip.models.qlip.towers import QLIPVisionModel

FeatureKind = Literal["hidden", "post_quantizer", "codes"]
PROBE = "Sentinel"  # an answer that no template holds


def build_llava(
    encoder: QLIPVisionModel,
    language_model: PreTrainedModel,
    processor: LlavaProcessor,
    *,
    features: FeatureKind = "hidden",
    layer: int = -2,
) -> LlavaForConditionalGeneration:
    """A LLaVA of a QLIP encoder, a causal language model and a fresh projector, in float32 on the CPU.

    Encoder and language model become parts of it; the latter's table gets a row for every token that `processor` has
    added, the mean of the others. The projector is drawn from PyTorch's random state (its `nn.Linear` rule, LLaVA's).

    Raises `UserError` for unknown features, a layer or a quantizer that the encoder does not have, and a language model
    whose output has a bias.
    """
    _refuse_impossible(encoder, language_model, features, layer)
    tower = encoder if features == "hidden" else code_tower(encoder, features)
    tokenizer = processor.tokenizer
    _make_room(language_model, len(tokenizer))
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language_model.config,
        image_token_index=processor.image_token_id,
        image_seq_length=encoder.config.grid_size**2,
        vision_feature_layer=layer if features == "hidden" else -1,
        vision_feature_select_strategy=select_strategy(features),
        tie_word_embeddings=language_model.config.tie_word_embeddings,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = tower
    model.model.language_model = language_model.base_model
    model.lm_head = language_model.get_output_embeddings()
    model.model.multi_modal_projector.to_empty(device="cpu")
    for part in model.model.multi_modal_projector.children():
        if isinstance(part, nn.Linear):
            part.reset_parameters()
    model.tie_weights()
    model.generation_config = _generation_config(language_model, processor.tokenizer)
    end_answers_as(model, processor)
    return model.float().eval()


def select_strategy(features: FeatureKind) -> Literal["default", "full"]:
    """LLaVA's name for which of a tower's features are taken: `default` leaves CLS out, `full` takes all."""
    return "default" if features == "hidden" else "full"


def build_processor(
    tokenizer: PreTrainedTokenizerBase,
    *,
    image_size: int,
    patch_size: int,
    chat_template: str = "auto",
    pad_to_square: bool = True,
    features: FeatureKind = "hidden",
) -> LlavaProcessor:
    """The processor of an assistant: pictures and chats -> inputs, with n `<image>` tokens for n features.

    `tokenizer` gets `<image>`, and `<pad>` if it has no padding of its own. `chat_template`: a name of
    `CHAT_TEMPLATES`, a Jinja file, or `auto`, the tokenizer's own. `pad_to_square` adds bars of the mean colour
    instead of cropping. Raises `UserError` for a template that is not there or does not fit the tokenizer.
    """
    template = _find_template(tokenizer, chat_template)
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token is None:
        if tokenizer.unk_token is not None:  # Vicuna's, as in LLaVA
            tokenizer.pad_token = tokenizer.unk_token
        else:
            tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.padding_side = "left"  # for answers; training pads on the right by itself
    image_processor = LlavaImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        do_pad=pad_to_square,
    )
    return LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy=select_strategy(features),
        num_additional_image_tokens=1 if select_strategy(features) == "default" else 0,
        chat_template=flattening(template),
        image_token=IMAGE_TOKEN,
    )


def with_chat_template(processor: LlavaProcessor, chat_template: str) -> LlavaProcessor:
    """The same processor with another template. Raises `UserError` as `build_processor`."""
    processor.chat_template = flattening(_find_template(processor.tokenizer, chat_template))
    return processor


def end_answers_as(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    """Let `generate` also stop at the marker behind an answer of the processor's template."""
    end = end_of_answer(processor)
    known = _ids_of(model.generation_config.eos_token_id)
    if end is not None and end not in known:
        model.generation_config.eos_token_id = [*known, end]


def end_of_answer(processor: LlavaProcessor) -> int | None:
    """Id of the marker behind an answer in the processor's template; None if there is none."""
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": PROBE}]
    text = chat_text(processor, messages)
    behind = text.split(PROBE, 1)[1] if PROBE in text else ""
    ids = processor.tokenizer(behind, add_special_tokens=False)["input_ids"]
    return next((token for token in ids if token in processor.tokenizer.all_special_ids), None)


def _refuse_impossible(
    encoder: QLIPVisionModel, language_model: PreTrainedModel, features: FeatureKind, layer: int
) -> None:
    num_layers = encoder.config.num_hidden_layers
    if features not in get_args(FeatureKind):
        raise UserError(f"features {features!r} are unknown: give {', '.join(get_args(FeatureKind))}")
    if features == "hidden" and not -num_layers - 1 <= layer <= num_layers:
        raise UserError(f"layer {layer}: the encoder has states {-num_layers - 1} to {num_layers}; -2 is the paper's")
    if features != "hidden" and encoder.config.quantizer == "none":
        raise UserError(f"features {features} are a quantizer's, and this encoder has none: take hidden")
    output = language_model.get_output_embeddings()
    if not isinstance(output, nn.Linear) or output.bias is not None:
        raise UserError(f"a {type(language_model).__name__} cannot be LLaVA's language model: take Llama, Qwen, ...")


@torch.no_grad()
def _make_room(language_model: PreTrainedModel, num_tokens: int) -> None:
    """Rows for added tokens: the mean of the others, so that none is likelier than what was trained."""
    before = language_model.get_input_embeddings().weight.shape[0]
    if num_tokens <= before:  # many models have spare rows
        return
    language_model.resize_token_embeddings(num_tokens, mean_resizing=False)
    for table in (language_model.get_input_embeddings().weight, language_model.get_output_embeddings().weight):
        table[before:] = table[:before].float().mean(0).to(table.dtype)


def _generation_config(language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Greedy, and every end that the language model knows."""
    own = language_model.generation_config
    ends = _ids_of(own.eos_token_id if own is not None else None)
    if tokenizer.eos_token_id is not None:
        ends.append(tokenizer.eos_token_id)
    return GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(dict.fromkeys(ends)),
        pad_token_id=tokenizer.pad_token_id,
    )


def _ids_of(value: int | list[int] | None) -> list[int]:
    """A field of a generation config, which is none, one or several ids."""
    return [] if value is None else [value] if isinstance(value, int) else list(value)


def _find_template(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> str:
    remedy = f"give --chat-template {'|'.join(CHAT_TEMPLATES)}, or a Jinja file"
    if chat_template == "auto":
        if not isinstance(tokenizer.chat_template, str):
            raise UserError(f"the language model's tokenizer has no chat template of its own: {remedy}")
        return tokenizer.chat_template
    if chat_template in CHAT_TEMPLATES:
        vocabulary = tokenizer.get_added_vocab()
        absent = [marker for marker in NEEDED_TOKENS[chat_template] if marker not in vocabulary]
        if absent or (chat_template in ("vicuna_v1", "short") and tokenizer.eos_token is None):
            raise UserError(
                f"chat template {chat_template} needs {' '.join(absent) or 'an end token'}, which this tokenizer does "
                "not have: take the template of the language model's family"
            )
        return CHAT_TEMPLATES[chat_template]
    if not Path(chat_template).is_file():
        raise UserError(f"chat template {chat_template!r} is neither known nor a file: {remedy}")
    try:
        return Path(chat_template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"chat template {chat_template} cannot be read as UTF-8 ({error}): {remedy}") from None
