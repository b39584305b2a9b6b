"""The demo's text-to-image model in the report: pictures of its prompts, and how many show what they should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from qlip.apps.report_folder import read_json
from qlip.apps.report_words import figure_words, format_figure

PICTURES = "pictures"
RESULTS = "text_to_image.json"
BASELINE = "_baseline"


class Generation(NamedTuple):
    """What there is of the text-to-image model."""

    prompts: list[tuple[str, list[Image.Image]]]
    """Each prompt with its pictures."""
    rows: list[tuple[str, str, str, str]]
    """Category, share that is right, chance, meaning."""
    card: str
    """The protocol behind the shares, as JSON; empty when they were not measured."""
    num_scored: int
    """Pictures that were scored."""


def generation_of(folder: Path) -> Generation | None:
    """Of a demo folder; None when nothing was generated. Raises `UserError` for a broken file."""
    record = read_json(folder / PICTURES / "generation.json", default=None)
    if record is None:
        return None
    prompts: dict[str, list[Image.Image]] = {}
    for entry in record["pictures"]:
        path = folder / PICTURES / entry["file"]
        if path.is_file():
            prompts.setdefault(entry["prompt"], []).append(Image.open(path).convert("RGB"))
    results: list[dict[str, Any]] = read_json(folder / "results" / RESULTS, default=[])
    figures = results[0]["figures"] if results else {}
    rows = [
        (
            name,
            format_figure(name, value),
            format_figure(name, figures.get(name + BASELINE)),
            figure_words(name).meaning,
        )
        for name, value in figures.items()
        if not name.endswith(BASELINE)
    ]
    card = results[0]["card"] if results else {}
    shown = json.dumps(card, indent=2, ensure_ascii=False) if card else ""
    return Generation(prompts=list(prompts.items()), rows=rows, card=shown, num_scored=card.get("count", 0))
