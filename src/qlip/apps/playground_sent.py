"""The playground's limits: whatever a browser sends is read as text, numbers or strokes, or refused; no page here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from qlip.apps import token_explorer as explorer
from qlip.core.errors import UserError

MOST_LABELS, LONGEST_LABEL = 100, 100
LONGEST_TEXT = 2000  # characters of a prompt or a question
MOST_POINTS = 5000  # of a stroke
LARGEST_SEED = (1 << 63) - 1


def labels_of(text: object) -> list[str]:
    """Labels, one a line or between commas, each once. Raises `UserError` for none, too many and too long ones."""
    parts = whole_text(text).replace("\n", ",").split(",")
    labels = list(dict.fromkeys(label.strip() for label in parts if label.strip()))
    if not labels:
        raise UserError("no labels given: write some, one a line")
    if len(labels) > MOST_LABELS:
        raise UserError(f"{len(labels)} labels, at most {MOST_LABELS} are compared: leave some out")
    longest = max(labels, key=len)
    if len(longest) > LONGEST_LABEL:
        raise UserError(f"a label has {len(longest)} characters, at most {LONGEST_LABEL} are read: shorten it")
    return labels


def limited(text: object) -> str:
    """A prompt or question without white space around it. Raises `UserError` for a very long one."""
    whole = whole_text(text)
    if len(whole) > LONGEST_TEXT:
        raise UserError(f"the text has {len(whole)} characters, at most {LONGEST_TEXT} are read: shorten it")
    return whole.strip()


def whole_text(text: object) -> str:
    """What a text box sent, empty for nothing. Raises `UserError` for half a character, which no tokenizer reads."""
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError("that is no text: write some")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError("the text holds half of a character (a lone surrogate): write it again")
    return text


def seed_of(value: object) -> int:
    """What the box of the seed sent. Raises `UserError` for anything but a whole number from 0 on."""
    is_whole = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= LARGEST_SEED
    if not is_whole or int(value) != value or int(value) > LARGEST_SEED:  # type: ignore[call-overload]
        raise UserError(f"the seed is no whole number from 0 to {LARGEST_SEED}: write one")
    return int(value)  # type: ignore[call-overload]


def uploaded(path: object) -> Path:
    """What an upload button sent. Raises `UserError` for no file."""
    if not isinstance(path, str) or not path:
        raise UserError("no file has come: upload one")
    return Path(path)


def pixel_in(event: object) -> tuple[float, float]:
    """Where on a picture the browser says was clicked, in pixels. Raises `UserError` for anything but two numbers."""
    place = event.get("index") if isinstance(event, dict) else None
    if not isinstance(place, list) or len(place) != 2 or not all(map(_is_number, place)):
        raise UserError("that is no place on the picture: click on it")
    return place[0], place[1]


def stroked(event: Any, *, grid: tuple[int, int]) -> Tensor:
    """What the browser sent of a stroke -> the patches it touches, (n,) bool. Raises `UserError` for anything else."""
    sent: dict[str, Any] = event if isinstance(event, dict) else {}
    points: Any = sent.get("points")
    diameter: Any = sent.get("diameter")
    is_line = isinstance(points, list) and 0 < len(points) <= MOST_POINTS and all(map(_is_place, points))
    if not is_line or not _is_share(diameter) or not 0 < diameter <= 1:
        raise UserError(f"that is no stroke of 1 to {MOST_POINTS} points: paint again, with a shorter one")
    return explorer.cells_under(explorer.painted([(x, y) for x, y in points], diameter=diameter), grid=grid)


def _is_place(point: object) -> bool:
    return isinstance(point, list) and len(point) == 2 and all(map(_is_share, point))


def _is_share(value: Any) -> bool:
    """A number near [0, 1]: strokes may leave the picture."""
    return _is_number(value) and abs(value) <= 10  # nan and infinity are not


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
