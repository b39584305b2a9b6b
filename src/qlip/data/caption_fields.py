"""Captions out of the json that comes with a picture, field by field."""

from __future__ import annotations

from itertools import islice
from typing import Any

from qlip.core.errors import UserError, nearest_name
from qlip.data.items import Item, Source

PROMPTS = "prompts"  # the field that is computed from a scene's record
LOOKED_AT = 1000  # items among which every field must occur
MAX_CAPTION_CHARS = 5000


def captions_of_item(item: Item, *, fields: tuple[str, ...]) -> tuple[str, ...]:
    """The texts in these fields of the item's json, each once; its plain captions when it has none of them."""
    texts = [text for name in fields for text in _texts(item, name)] or list(item.captions)
    clean = (text.replace("\0", " ").strip()[:MAX_CAPTION_CHARS].strip() for text in texts)
    # json can spell half a surrogate pair, which no file holds
    return tuple(dict.fromkeys(text.encode("utf-8", "ignore").decode() for text in clean if text))


def _texts(item: Item, name: str) -> list[str]:
    scene = item.record.get("scene")
    if name == PROMPTS and isinstance(scene, dict) and "objects" in scene:
        from qlip.data.scene_prompts import prompt_captions

        return list(prompt_captions(scene).values())
    value: object = item.record
    for part in [name] if name in item.record else name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    found = value if isinstance(value, list) else [value]
    return [text for text in found if isinstance(text, str) and text.strip()]


def check_fields(source: Source, fields: tuple[str, ...]) -> None:
    """Raise `UserError` for a field that none of the first pictures has: most likely it is mistyped."""
    missing = list(fields)
    items = (entry for entry in source.items() if isinstance(entry, Item)) if fields else ()
    known: set[str] = set()
    for item in islice(items, LOOKED_AT):
        missing = [name for name in missing if not _texts(item, name)]
        known |= _text_fields(item.record)
        if not missing:
            return
    if missing:
        remedy = nearest_name(missing[0], known) if known else "leave --caption-fields out"
        raise UserError(
            f"{source.name}: no picture of the first {LOOKED_AT} has caption field {missing[0]!r}; {remedy}"
        )


def _text_fields(record: dict[str, Any]) -> set[str]:
    inside = {f"{name}.{key}" for name, value in record.items() if isinstance(value, dict) for key in value}
    scene = {PROMPTS} if "scene" in record else set()
    return {name for name, value in record.items() if isinstance(value, str)} | inside | scene
