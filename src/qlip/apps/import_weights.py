"""`qlip import eva SRC OUT`: a model folder from weights of others, and a report of every tensor."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qlip.core.errors import UserError, nearest_name
from qlip.core.log import console
from qlip.models.qlip.eva import import_eva
from qlip.models.qlip.eva_moves import ImportReport
from qlip.models.qlip.eva_sizes import EvaImportConfig
from qlip.models.qlip.loading import save_model
from qlip.models.qlip.processing import QLIPProcessor

KINDS = ("eva", "llama")
REPORT_NAME = "import_report.json"
LAYER = re.compile(r"\b(layers|blocks|resblocks)\.(\d+)")


def options_of(kind: str, options: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of the options of each kind, None where not given: those of `kind` that were given.

    Raises `UserError` for an unknown kind, and for an option that only another kind has.
    """
    if kind not in KINDS:
        raise UserError(f"kind {kind!r} is unknown: {nearest_name(kind, KINDS)}")
    for other, named in options.items():
        for name, value in named.items():
            if value is not None and name not in options[kind]:
                raise UserError(f"--{name.replace('_', '-')} is for `qlip import {other}`: leave it out for {kind}")
    return {name: value for name, value in options[kind].items() if value is not None}


def import_eva_weights(src: Path, out: Path, *, text_from: Path | None = None, config: EvaImportConfig) -> None:
    """Import, write OUT whole or not at all, print the report and keep it in OUT/import_report.json.

    Raises `UserError` for an unfit file and an OUT that is not ours or holds the files to be read.
    """
    sources = [src] if text_from is None else [src, text_from]
    for path in sources:
        if out.resolve() in path.resolve().parents:
            raise UserError(f"{path} lies in {out}, which would be replaced; choose another OUT")
        if path.is_file():
            say(f"reading {path} ({path.stat().st_size / 1e6:,.1f} MB)")
    model, report = import_eva(src, text_from=text_from, config=config)
    count = sum(parameter.numel() for parameter in model.parameters())
    say(f"writing {out} ({count / 1e6:,.1f} million parameters, float32)")
    text_config = model.config.text_config
    processor = QLIPProcessor.for_size(config.image_size, context_length=text_config.max_position_embeddings)
    save_model(model, folder=out, processor=processor, step=0)
    record = {"kind": "eva", "files": [path.name for path in sources], "options": asdict(config), **asdict(report)}
    (out / REPORT_NAME).write_text(json.dumps(record, indent=1) + "\n")
    for line in report_lines(report):
        say(line)
    say(f"every tensor is listed in {out / REPORT_NAME}; train {out} before use: its bottleneck and decoder are fresh")


def say(line: str) -> None:
    """Print as it is: brackets in tensor names are no markup."""
    console.print(line, markup=False)


def report_lines(report: ImportReport) -> list[str]:
    """One line per kind of tensor, the layers of a tower together, under a heading with counts."""
    groups = {
        "taken": [(row.target, f"  <- {row.source}") for row in report.taken],
        "resized": [
            (row.target, f"  <- {row.source}  {_shape(row.from_shape)} -> {_shape(row.to_shape)}")
            for row in report.resized
        ],
        "fresh": [(name, "") for name in report.fresh],
        "ignored": [(row.source, f"  ({row.reason})") for row in report.ignored],
    }
    lines = []
    for title, rows in groups.items():
        lines += [f"{title} ({len(rows)} tensors)", *(f"  {line}" for line in _collapsed(rows))]
    return lines


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _collapsed(rows: list[tuple[str, str]]) -> list[str]:
    """Rows that differ in the layer number only, as one line with the range of layers in braces."""
    layers: dict[str, set[int]] = {}
    for row in rows:
        line = "".join(row)
        found = LAYER.search(line)
        numbers = layers.setdefault(LAYER.sub(r"\1.#", line), set())
        if found is not None:
            numbers.add(int(found[2]))
    return [pattern.replace("#", _range(numbers)) if numbers else pattern for pattern, numbers in layers.items()]


def _range(numbers: set[int]) -> str:
    first, last = min(numbers), max(numbers)
    if last - first + 1 == len(numbers) > 1:
        return f"{{{first}-{last}}}"
    return f"{{{','.join(map(str, sorted(numbers)))}}}"
