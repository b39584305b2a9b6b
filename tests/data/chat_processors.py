"""LlavaProcessors with tiny word tokenizers, one of the kind that each family of language models has."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlavaProcessor, PreTrainedTokenizerFast

from qlip.data.chat_labels import EncodedChat
from qlip.data.conversations import Conversation
from qlip.models.chat_templates import CHAT_TEMPLATES
from qlip.models.llava import build_processor, with_chat_template

WORDS = (
    "\n \n\n What Where Why is it this ? ! . , : < > / | red blue Be brief and USER ASSISTANT user assistant system A B"
)
SPECIAL = {
    "vicuna_v1": ["<unk>", "<s>", "</s>"],
    "llama_3": ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|pad|>"],
    "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
}


def chat_processor(family: str, *, image_size: int = 16, template: str | None = None) -> LlavaProcessor:
    """`vicuna_v1` marks spaces as sentencepiece does and adds `<s>`; `llama_3` has words of letters alone and drops
    spaces, its template writes the beginning; `chatml` is byte-level and has no beginning. Four tokens a picture."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = {
        "vicuna_v1": pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(prepend_scheme="first"),
                pre_tokenizers.Split(Regex(r"▁?\w+|▁?[^\w▁]|▁"), "removed", invert=True),
            ]
        ),
        "llama_3": pre_tokenizers.Split(Regex(r"\n+|\w+|[^\w\s]"), "removed", invert=True),
        "chatml": pre_tokenizers.ByteLevel(add_prefix_space=False),
    }[family]
    tokenizer.decoder = {
        "vicuna_v1": decoders.Metaspace(prepend_scheme="first"),
        "llama_3": decoders.WordPiece(),
        "chatml": decoders.ByteLevel(),
    }[family]
    special = list(dict.fromkeys(["<unk>", *SPECIAL[family]]))
    words = WORDS.split(" ")
    texts = [text for word in words for text in (word, f"x {word}", f"\n{word}", f"!{word}")] + ["x  x"]
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
    if family == "vicuna_v1":
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {
        "vicuna_v1": {"bos_token": "<s>", "eos_token": "</s>"},
        "llama_3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|pad|>"},
        "chatml": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    }[family]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **names)
    processor = build_processor(fast, image_size=image_size, patch_size=image_size // 2, chat_template=family)
    return processor if template is None else with_template(processor, template)


def with_template(processor: LlavaProcessor, template: str) -> LlavaProcessor:
    """A name, or the template itself."""
    if template in CHAT_TEMPLATES:
        return with_chat_template(processor, template)
    processor.chat_template = template
    return processor


def conversation(*turns: str, system: str = "", images: int = 0) -> Conversation:
    """Questions and answers in turn; `<image>` stands for a picture."""
    messages = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    for number, turn in enumerate(turns):
        role = ("user", "assistant")[number % 2]
        content: list[dict[str, str]] = []
        for place, text in enumerate(turn.split("<image>") if role == "user" else [turn]):
            content += [{"type": "image"}] if place else []
            content += [{"type": "text", "text": text.strip()}] if text.strip() else []
        messages.append({"role": role, "content": content})
    return Conversation(key="c", images=tuple(f"{n}.png" for n in range(images)), messages=messages)


def shown(chat: EncodedChat, processor: LlavaProcessor) -> str:
    """Tokens between spaces, `+` before what is supervised, `_` for the space sign, pictures as `<image>*4`."""
    tokens = processor.tokenizer.convert_ids_to_tokens(chat.input_ids.tolist())
    signs = {"▁": "_", "Ġ": "_", "Ċ": "\\n", "\n": "\\n"}
    for sign, plain in signs.items():
        tokens = [token.replace(sign, plain) for token in tokens]
    for token, label, number in zip(tokens, chat.labels.tolist(), chat.input_ids.tolist(), strict=True):
        assert label in (-100, number), f"{token} is labelled {label}"
    marked = [("+" if label >= 0 else "") + token for token, label in zip(tokens, chat.labels.tolist(), strict=True)]
    return " ".join(marked).replace("<image> <image> <image> <image>", "<image>*4")
