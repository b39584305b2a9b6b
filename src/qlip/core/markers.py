"""Markers of a tokenizer (`<image>`, `</s>`, `<|im_end|>`) in texts from outside: made harmless, never parsed."""

from __future__ import annotations

from collections.abc import Iterable


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
