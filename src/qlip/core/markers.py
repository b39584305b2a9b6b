"""Markers of a tokenizer (`<image>`, `</s>`, `<|im_end|>`) in texts from outside: made harmless, never parsed."""

from __future__ import annotations

from collections.abc import Iterable


def without_markers(text: str, markers: Iterable[str]) -> str:
    """The text with a space behind the first character of every marker in it: `</s>` becomes `< /s>`.

    Longer markers are looked for first, so none is left by breaking another; a text without markers stays as it is.
    """
    for marker in sorted(markers, key=len, reverse=True):
        if len(marker) > 1 and marker in text:
            text = text.replace(marker, f"{marker[0]} {marker[1:]}")
    return text
