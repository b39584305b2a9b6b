"""`qlip data inspect FILE.json`: what is in a conversation file, and one conversation as a language model gets it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlip.core.errors import UserError
from qlip.core.log import console
from qlip.data.chat_labels import ChatEncoder
from qlip.data.conversation_inspect import (
    format_conversation_report,
    inspect_conversation_files,
    labelled_text,
    sample_of,
    visible,
)
from qlip.data.conversations import open_conversations
from qlip.data.image_files import open_image_files
from qlip.data.tar_reader import SampleRejected

IMAGE_SIZE, PATCH_SIZE = 336, 14  # LLaVA-1.5's 576 image tokens, for a language model that has no tower yet


@dataclass(kw_only=True, slots=True)
class InspectSettings:
    """What to look at."""

    images: str = ""
    """Folder or shards of the pictures."""
    tokenizer: Path | None = None
    """Folder of a language model or an assistant; without one no conversation is shown."""
    chat_template: str = "auto"
    """The folder's own, a name, or a Jinja file."""
    sample: int = 0
    """Number of the conversation that is shown."""
    plain: bool = False
    """Show it as LLaVA's first stage has it."""
    max_length: int = 2048
    """Its tokens, as training cuts them."""
    num_pictures: int = 1000
    """How many pictures are looked for."""


def inspect_conversations(source: str, settings: InspectSettings) -> None:
    """Print the report, and with a tokenizer one conversation with what is supervised in green.

    Raises `UserError` for files that cannot be read, a sample that is not there, and a template that does not fit.
    """
    conversations = open_conversations(source)
    images = open_image_files(settings.images) if settings.images else None
    sample = sample_of(conversations, settings.sample)
    report = inspect_conversation_files(conversations, images=images, num_pictures=settings.num_pictures)
    console.print(format_conversation_report(report), markup=False)
    if settings.tokenizer is None:
        console.print("sample            not shown: give --tokenizer, the folder of a language model")
        return
    from qlip.models.assistant import is_assistant

    processor = _processor(settings.tokenizer, settings.chat_template)
    encoder = ChatEncoder(processor, max_length=settings.max_length, plain=settings.plain)
    conversation = conversations[sample]
    try:
        chat = encoder.encode(conversation)
    except SampleRejected as rejected:
        raise UserError(f"conversation {sample} would be skipped: {rejected}; choose another with --sample") from None
    supervised = int((chat.labels >= 0).sum())
    size = f"{len(chat.input_ids)} tokens, {supervised} supervised (green)"
    console.print(f"sample {sample}, id {visible(conversation.key)}, {size}", markup=False)
    if not is_assistant(settings.tokenizer) and chat.num_images:
        console.print(
            f"(as many <image> as a tower of {IMAGE_SIZE} px and patches of {PATCH_SIZE} px has)", markup=False
        )
    console.print(labelled_text(chat, tokenizer=processor.tokenizer, image_token_id=processor.image_token_id))


def _processor(folder: Path, chat_template: str) -> Any:
    """An assistant's own processor, or a new one around a language model's tokenizer."""
    from qlip.models.assistant import is_assistant, open_processor
    from qlip.models.language_model import open_text_tokenizer
    from qlip.models.llava import build_processor, with_chat_template

    if is_assistant(folder):
        processor = open_processor(folder)
        return processor if chat_template == "auto" else with_chat_template(processor, chat_template)
    if not folder.is_dir():
        raise UserError(f"no tokenizer at {folder}: give the folder of a language model or of an assistant")
    tokenizer = open_text_tokenizer(folder)
    return build_processor(tokenizer, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE, chat_template=chat_template)
