"""What training and asking do alike with chats: markers in texts made harmless, templates applied.

Markers of a tokenizer (`<image>`, `</s>`, `<|im_end|>`) in texts from outside are never parsed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qlip.core.errors import UserError


def chat_text(processor: Any, messages: list[dict[str, Any]], *, asking: bool = False) -> str:
    """What a processor's chat template makes of messages; `asking` for an answer, it ends where that begins.

    Raises `UserError` for a template that is broken or refuses the messages.
    """
    try:
        return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=asking)
    except Exception as error:  # templates raise what they like: jinja2's own and, inside, Python's errors
        reason = " ".join(str(error).split())
        raise UserError(
            f"the chat template {template_name(processor)} fails: {reason}; choose another with --chat-template"
        ) from None


def template_name(processor: Any) -> str:
    """Which template it is, in words."""
    source = processor.tokenizer.name_or_path
    return f"of {source}" if source else "of this tokenizer"


def without_markers(text: str, markers: Iterable[str]) -> str:
    """The text with a space behind the first character of every marker in it: `</s>` becomes `< /s>`.

    A text without markers stays as it is. Those of white space alone (runs of spaces or line breaks that a tokenizer
    has as tokens) and of one character are no markers.
    """
    for marker in sorted(markers, key=len, reverse=True):
        broken = f"{marker[:1]} {marker[1:]}"
        if len(marker) < 2 or marker.isspace() or marker in broken:
            continue
        while marker in text:  # two that overlap are broken one after the other
            text = text.replace(marker, broken)
    return text
