"""Captions of scenes read back: what they say of objects, colours, count and places, and whether it is right.

The language is that of `data/scene_text.py` (shape, short, medium and dense captions) and `data/scene_prompts.py`. Any
other word, and the caption says nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from qlip.data.scene_text import NUMBER_WORDS, place, plural
from qlip.data.scenes import BACKGROUND_NAMES, COLOUR_NAMES, SHAPE_NAMES, SIZE_NAMES, TEXTURES

FIGURES = ("parsed", "objects", "colours", "counts", "all")
PLACES = tuple(f"{row} {column}" for row in ("top", "bottom") for column in ("left", "right"))
PLACES += ("top", "bottom", "left", "right", "center")
COUNTS = {word: number for number, word in enumerate(NUMBER_WORDS) if number}
SINGULAR = {form: shape for shape in SHAPE_NAMES for form in (shape, plural(shape))}
UNNAMED = "shape"  # `a red shape`


def _any(*words: str) -> str:
    return "(?:" + "|".join(sorted(words, key=len, reverse=True)) + ")"


THING = re.compile(
    rf"(?:an? )?(?:(?P<size>{_any(*SIZE_NAMES)}) )?(?:(?P<colour>{_any(*COLOUR_NAMES)}) )?"
    rf"(?P<shape>{_any(*SHAPE_NAMES, UNNAMED)})(?: at the (?P<place>{_any(*PLACES)}))?"
)
SOMETHING = re.compile(rf"something (?P<colour>{_any(*COLOUR_NAMES)})")
BACKGROUND = rf" on an? (?:(?P<texture>{_any(*TEXTURES)}) )?(?P<background>{_any(*BACKGROUND_NAMES)}) background"
LISTED = re.compile(rf"(?P<count>{_any(*COUNTS)}) shapes?(?:{BACKGROUND})?: (?P<things>.+)")
COUNTED = re.compile(rf"(?P<count>{_any(*COUNTS)}) (?P<shape>{_any(*SINGULAR)})")
BEFORE = re.compile(rf"(?P<things>.+?){BACKGROUND}")
RELATED = re.compile(r"(?P<first>.+) (?:left of|right of|above|below) (?P<second>.+)")
BETWEEN = re.compile(r", | and ")


@dataclass(kw_only=True, slots=True, frozen=True)
class SaidObject:
    """What a caption says of one object; empty where it says nothing."""

    shape: str = ""
    colour: str = ""
    size: str = ""
    place: str = ""


@dataclass(kw_only=True, slots=True, frozen=True)
class Said:
    """What a caption says of a scene."""

    objects: tuple[SaidObject, ...]
    """In its order."""
    count: int | None = None
    """Number of objects, where a number word says it."""
    background: str = ""
    texture: str = ""


def read_caption(caption: str) -> Said | None:
    """What a caption says; None when it is not in the language of scenes.

    Capitals, spaces and a full stop at the end do not matter.
    """
    text = " ".join(caption.lower().split()).removesuffix(".").removeprefix("a picture of ")
    if found := LISTED.fullmatch(text):
        return _said(found["things"], count=COUNTS[found["count"]], around=found)
    if found := COUNTED.fullmatch(text):
        number = COUNTS[found["count"]]
        return Said(objects=(SaidObject(shape=SINGULAR[found["shape"]]),) * number, count=number)
    if found := SOMETHING.fullmatch(text):
        return Said(objects=(SaidObject(colour=found["colour"]),))
    if found := RELATED.fullmatch(text):
        pair = [_things(found[name]) for name in ("first", "second")]
        return Said(objects=pair[0] + pair[1]) if pair[0] and pair[1] else None
    found = BEFORE.fullmatch(text)
    return _said(found["things"] if found else text, around=found)


def _said(things: str, *, count: int | None = None, around: re.Match[str] | None) -> Said | None:
    objects = _things(things)
    if objects is None:
        return None
    background, texture = (around[name] or "" if around else "" for name in ("background", "texture"))
    return Said(objects=objects, count=count, background=background, texture=texture)


def _things(text: str) -> tuple[SaidObject, ...] | None:
    """Objects between commas and `and`; None when one of them is none."""
    objects = []
    for part in BETWEEN.split(text):
        found = THING.fullmatch(part)
        if found is None:
            return None
        said = {name: value or "" for name, value in found.groupdict().items()}
        objects.append(SaidObject(**said | {"shape": "" if said["shape"] == UNNAMED else said["shape"]}))
    return tuple(objects)


def truth_of(scene: dict[str, Any]) -> Said:
    """All that a dense caption says of a scene of `scenes.scene_records`."""
    objects = tuple(
        SaidObject(shape=obj["shape"], colour=obj["colour"], size=obj["size"], place=place(obj))
        for obj in scene["objects"]
    )
    return Said(objects=objects, count=len(objects), background=scene["background"], texture=scene["texture"])


def judge_caption(caption: str, scene: dict[str, Any]) -> dict[str, bool]:
    """`FIGURES` of one caption against a scene's truth; nothing is right in a caption that is not understood.

    `objects`: the shapes with their number; `colours`: each shape in its colour; `counts`: the objects that it lists,
    and the number word if it has one; `all`: all that a dense caption says. What is not said is wrong.
    """
    said, true = read_caption(caption), truth_of(scene)
    if said is None:
        return dict.fromkeys(FIGURES, False)
    counts = len(said.objects) == true.count and said.count in (None, true.count)

    def same(*names: str) -> bool:
        rows = [Counter(tuple(getattr(obj, name) for name in names) for obj in one.objects) for one in (said, true)]
        return rows[0] == rows[1]

    around = (said.count, said.background, said.texture) == (true.count, true.background, true.texture)
    return {
        "parsed": True,
        "objects": same("shape"),
        "colours": same("colour", "shape"),
        "counts": counts,
        "all": around and same("shape", "colour", "size", "place"),
    }


def most_frequent_answers(scenes: list[dict[str, Any]]) -> dict[str, float]:
    """The share of scenes, in [0, 1], in which the best constant caption is right, for each figure but `parsed`.

    That caption says what is true of most scenes: so many objects, these shapes, these shapes in these colours, or all
    that a dense caption says. The order of objects does not matter.
    """
    truths = [truth_of(scene) for scene in scenes]

    def rows(true: Said, *names: str) -> tuple[tuple[str, ...], ...]:
        return tuple(sorted(tuple(getattr(obj, name) for name in names) for obj in true.objects))

    answers: dict[str, list[Any]] = {
        "objects": [rows(true, "shape") for true in truths],
        "colours": [rows(true, "colour", "shape") for true in truths],
        "counts": [true.count for true in truths],
        "all": [(true.background, true.texture, rows(true, "shape", "colour", "size", "place")) for true in truths],
    }
    return {name: max(Counter(found).values()) / len(scenes) for name, found in answers.items()}
