"""Markers in texts from outside lose their meaning, other texts stay as they are."""

from __future__ import annotations

import pytest

from qlip.core.chats import without_markers

MARKERS = ("<image>", "</s>", "<|im_end|>", "|||IP|||", "\n\n", "   ", "a", "x ", "")


@pytest.mark.parametrize(
    ("text", "harmless"),
    [
        ("look <image> here</s>", "look < image> here< /s>"),
        ("<<image>>", "<< image>>"),
        ("|||IP|||IP|||", "| ||IP| ||IP|||"),
        ("a\n\nb   c x y", "a\n\nb   c x y"),
        ("", ""),
    ],
)
def test_markers_are_broken_up(text, harmless):
    found = without_markers(text, MARKERS)
    assert found == harmless
    assert not any(marker in found for marker in ("<image>", "</s>", "|||IP|||"))
