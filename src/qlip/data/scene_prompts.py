"""The six kinds of GenEval's prompts in the language of scenes: phrases, and those that are true of a scene.

Generators are trained on these captions and scored on these prompts, so both are made by the same functions.
"""

from __future__ import annotations

from qlip.data.scene_text import NUMBER_WORDS, plural, relation, with_article


def single_object(shape: str) -> str:
    """`a star`."""
    return with_article(shape)


def two_objects(shape: str, other: str) -> str:
    """`a star and a ring`."""
    return f"{with_article(shape)} and {with_article(other)}"


def counted(num: int, shape: str) -> str:
    """`three stars`, for 2 to 4."""
    return f"{NUMBER_WORDS[num]} {plural(shape)}"


def coloured(colour: str, shape: str) -> str:
    """`a red star`."""
    return with_article(f"{colour} {shape}")


def placed(shape: str, place: str, other: str) -> str:
    """`a star left of a ring`; `place` as `scene_text.relation` says it."""
    return f"{with_article(shape)} {place} {with_article(other)}"


def coloured_pair(colour: str, shape: str, other_colour: str, other: str) -> str:
    """`a red star and a blue ring`."""
    return f"{coloured(colour, shape)} and {coloured(other_colour, other)}"


def prompt_captions(record: dict) -> dict[str, str]:
    """GenEval tag -> prompt that is exactly true of a scene, for the tags that fit it; the same at every call.

    `record` is one of `scenes.scene_records`. One object: `single_object`, `colors`. Two objects of different shapes:
    `two_object`, `position`, `color_attr`. Two to four objects of one shape: `counting`. Other scenes: nothing.
    """
    objects = record["objects"]
    shapes = [obj["shape"] for obj in objects]
    if len(objects) == 1:
        return {"single_object": single_object(shapes[0]), "colors": coloured(objects[0]["colour"], shapes[0])}
    if len(set(shapes)) == 1 and 2 <= len(objects) < len(NUMBER_WORDS):
        return {"counting": counted(len(objects), shapes[0])}
    if len(objects) != 2:
        return {}
    first, second = objects
    return {
        "two_object": two_objects(*shapes),
        "position": placed(shapes[0], relation(first, second), shapes[1]),
        "color_attr": coloured_pair(first["colour"], shapes[0], second["colour"], shapes[1]),
    }
