"""`qlip table`: results of `qlip eval` in the shape of the paper's Tables 2, 3 and 10, its rows beside ours.

    results.json, ... -> models (`table_models.py`) -> Page -> Markdown, LaTeX, CSV, plain strings (`table_formats.py`)

The paper's rows are in `table_rows.py`; `table_plot.py` draws Figure 1.

A figure stands in the column of its own name or nowhere. Every figure of ours has a number that names its protocol,
pictures and count below the table.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from qlip.apps.table_formats import DASH, Cell, Format, Page, PlainTable, one_line, plain, render
from qlip.apps.table_models import COLUMNS, Model, read_models
from qlip.apps.table_rows import (
    ABLATION_NOTES,
    ABLATION_PARTS,
    ABLATIONS,
    MARKS,
    PROBE_NOTES,
    PROBES,
    TOKENIZER_NOTES,
    TOKENIZERS,
)
from qlip.core.errors import UserError
from qlip.evals.protocols import PROTOCOLS

Shape = Literal["2", "3", "10"]
POSITIONS = ("cls", "mean", "cls+mean")
WANTED: dict[Shape, tuple[str, ...]] = {
    "2": ("compression_ratio", "top1", "rfid", "psnr", "ssim", "fd_encoder"),
    "3": ("top1", "rfid", "psnr", "fd_encoder"),
    "10": tuple(f"linear_{position}" for position in POSITIONS),
}
NEEDED: dict[Shape, str] = {
    "2": "a reconstruction or zero-shot protocol",
    "3": "a reconstruction or zero-shot protocol",
    "10": "imagenet-linear-table11-v1 or another linear probe",
}


class Marks:
    """Numbers for the protocols of figures, in the order in which they are met, and the paper's own marks."""

    def __init__(self) -> None:
        self.meanings: dict[str, str] = {}
        self._paper: set[str] = set()

    def number(self, meaning: str) -> str:
        """The number of this meaning."""
        return self.meanings.setdefault(meaning, str(len(self.meanings) + 1))

    def paper(self, mark: str) -> str:
        """The same mark, now explained below the table."""
        self._paper.add(mark)
        return mark

    def explained(self) -> dict[str, str]:
        """Mark -> meaning."""
        paper = {mark: MARKS[mark] for mark in MARKS if mark in self._paper}
        return {**paper, **{number: meaning for meaning, number in self.meanings.items()}}


def build_table(
    results: list[Path],
    *,
    shape: Shape = "2",
    format: Format = "markdown",
    paper: bool = True,
    out: Path | None = None,
    plot: Path | None = None,
    protocols: tuple[str, ...] = (),
) -> None:
    """Print the table, or write it to `out`; `plot` also draws Figure 1 to that .svg or .png.

    `protocols` keeps the results of these protocols alone. Raises `UserError` for results that cannot be read or hold
    nothing for this table, for one model's column measured in two ways, and for files that cannot be written.
    """
    models = read_models(results, wanted=WANTED[shape], protocols=protocols)
    text = render(_pages(models, shape=shape, paper=paper, one=format == "csv"), format)
    if out is None:
        print(text)
    else:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {out}: {error.strerror}; choose another file") from None
    if plot is not None:
        from qlip.apps.table_plot import draw_plane, plane_points  # brings matplotlib along

        draw_plane(plane_points(read_models(results, wanted=("top1", "rfid"), protocols=protocols)), plot, paper=paper)


def table_rows(
    results: list[Path], *, shape: Shape = "2", paper: bool = True, protocols: tuple[str, ...] = ()
) -> PlainTable:
    """Title, header, rows and footer as plain strings, for pages that lay them out. Raises as `build_table` does."""
    models = read_models(results, wanted=WANTED[shape], protocols=protocols)
    return plain(_pages(models, shape=shape, paper=paper, one=True)[0])


def _pages(models: list[Model], *, shape: Shape, paper: bool, one: bool) -> list[Page]:
    """The table; of Table 3 its three parts, unless all is to be `one`."""
    measured = [model for model in models if model.figures.keys() - {"compression_ratio"}]
    if not measured:
        raise UserError(f"no result has a figure of Table {shape}; evaluate with --evals {NEEDED[shape]}")
    if shape == "2":
        pages = [_tokenizers(measured, paper=paper)]
    elif shape == "10":
        pages = [_probes(measured, paper=paper)]
    else:
        parts = tuple(ABLATION_PARTS) if paper else ()
        pages = [_ablations(measured, parts=(part,)) for part in parts if not one]
        pages = pages or [_ablations(measured, parts=parts)]
    missing = ", ".join(model.name for model in models if model not in measured)
    note = (f"Without a figure of this table: {missing}.",) if missing else ()
    return [*pages[:-1], replace(pages[-1], notes=(*note, *pages[-1].notes))]


def _cell(model: Model, name: str, marks: Marks) -> Cell:
    """A figure in its column's digits, with the number of how it was measured."""
    if name not in model.figures:
        return Cell("")
    figure = model.figures[name]
    mark = "" if name == "compression_ratio" else marks.number(_measured_how(figure.card))
    return Cell(COLUMNS[name][1](figure.value), mark)


def _measured_how(card: dict[str, Any]) -> str:
    """`imagenet-recon-256-bilinear-v1, n = 50000 of imagenet/val, 256 pixels`."""
    said = [one_line(card["protocol"]), f"n = {card['count']} of {one_line(card.get('data', '')) or 'unknown data'}"]
    if isinstance(card.get("image_size"), int):
        said.append(f"{card['image_size']} pixels")
    if isinstance(reference := card.get("reference"), str) and not reference.startswith("the originals"):
        said.append(f"against {one_line(reference)}")
    if card.get("complete") is False:
        said.append("not the full set")
    return ", ".join(said)


def _source(model: Model, names: Iterable[str]) -> Cell:
    """`ours`, with n unless all figures are of the full set that their protocol names."""
    counts = []
    for name in names:
        if name in model.figures and name != "compression_ratio":
            card = model.figures[name].card
            protocol = PROTOCOLS.get(card["protocol"])
            if card.get("complete") is False or protocol is None or not protocol.count:
                counts.append(card["count"])
    numbers = ", ".join(str(count) for count in sorted(set(counts)))
    return Cell(f"ours (n = {numbers})" if numbers else "ours")


def _notes(models: list[Model], names: Collection[str], marks: Marks, of_paper: Iterable[str]) -> tuple[str, ...]:
    """What stands below: which figures do not compare, then the paper's notes."""
    notes = []
    if len(marks.meanings) > 1:
        notes.append(
            "Figures of one column with different numbers were measured differently; qlip eval compare says whether "
            "they compare."
        )
    if any("n = " in _source(model, names).text for model in models):
        notes.append(
            "Where n stands, it was not the whole of a data set that the protocol names: no comparison with others."
        )
    if "fd_encoder" in names:
        notes.append("FD (encoder) is a Frechet distance in the model's own encoder: no rFID, and two models' differ.")
    return (*notes, *of_paper)


def _columns(models: list[Model], *, shape: Shape) -> list[str]:
    """The figures that this table shows: an encoder distance only where an rFID is missing."""
    if any("fd_encoder" in model.figures and "rfid" not in model.figures for model in models):
        return list(WANTED[shape])
    return [name for name in WANTED[shape] if name != "fd_encoder"]


def _tokenizers(models: list[Model], *, paper: bool) -> Page:
    """Table 2."""
    marks = Marks()
    names = _columns(models, shape="2")
    extra = names[names.index("ssim") + 1 :]
    rows: list[tuple[Cell, ...]] = []
    rules = set()
    for group in TOKENIZERS.values() if paper else ():
        rules.add(len(rows))
        for row in group:
            given = (row.ratio, row.zero_shot, row.rfid, row.psnr, row.ssim, *("" for _ in extra))
            head: tuple[Cell, ...] = (Cell(row.name, marks.paper(row.mark)), Cell(row.data), Cell(row.params))
            bits = Cell(row.bits, marks.paper(row.bits_mark))
            rows.append((*head, bits, *map(Cell, given), Cell("paper")))
    rules.add(len(rows))
    for model in models:
        # no card says what a model was trained on
        head = (Cell(model.name), Cell(""), Cell(_params(model.fact("parameters"))), _bits(model, marks))
        rows.append((*head, *(_cell(model, name, marks) for name in names), _source(model, names)))
    return Page(
        title="Table 2: tokenizers (ZS: zero-shot top-1 in %, on ImageNet unless a note says otherwise; PSNR in dB)",
        header=("tokenizer", "data", "E + G + Q", "bits", *(COLUMNS[name][0] for name in names), "source"),
        rows=tuple(rows),
        marks=marks.explained(),
        notes=_notes(models, names, marks, TOKENIZER_NOTES if paper else ()),
        text_columns=frozenset((0, 1, 2, 4 + len(names))),
        rules=frozenset(rules - {0}),
    )


def _params(parameters: Any) -> str:
    """Encoder, decoder and quantizer as `87M+87M+1M`; nothing when the card does not say."""
    if not isinstance(parameters, dict):
        return ""
    counts = [parameters.get(part) for part in ("encoder", "decoder", "quantizer")]
    said = [_short(count) if type(count) is int and count >= 0 else DASH for count in counts]
    while said and said[-1] == DASH:
        said.pop()
    return "+".join(said)


def _short(count: int) -> str:
    """`87M`, `1.1M`, `28k`, `0`."""
    for unit, size in (("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.{0 if count >= 10 * size else 1}f}".removesuffix(".0") + unit
    return str(count)


def _bits(model: Model, marks: Marks) -> Cell:
    """Bits of a token; of a continuous latent with a number that says so."""
    bits, latent = model.fact("bits_per_token"), model.fact("latent_bits")
    if not isinstance(bits, int | float) or not math.isfinite(bits):
        return Cell("")
    mark = marks.number(f"a continuous latent, {latent} bits a number") if isinstance(latent, int | float) else ""
    return Cell(f"{bits:g}", mark)


def _ablations(models: list[Model], *, parts: tuple[str, ...]) -> Page:
    """Table 3, or some of its parts: figures as rows, variants as columns, ours behind the paper's."""
    marks = Marks()
    names = _columns(models, shape="3")
    variants = [variant for variant in ABLATIONS if variant.part in parts]
    prefix = len(parts) > 1
    given = {"top1": [v.zero_shot for v in variants], "rfid": [v.rfid for v in variants]}
    given["psnr"] = [v.psnr for v in variants]
    rows = [
        (
            Cell(COLUMNS[name][0]),
            *map(Cell, given.get(name, [""] * len(variants))),
            *(_cell(model, name, marks) for model in models),
        )
        for name in names
    ]
    sources = (Cell("source"), *(Cell("paper") for _ in variants), *(_source(model, names) for model in models))
    title = "; ".join(ABLATION_PARTS[part] for part in parts) or "Table 3: ablations"
    return Page(
        title=f"{title} (ZS: zero-shot top-1 in %, on ImageNet unless a note says otherwise; PSNR in dB)",
        header=("", *(f"{v.part}. {v.name}" if prefix else v.name for v in variants), *(m.name for m in models)),
        rows=(*rows, sources),
        marks=marks.explained(),
        notes=_notes(models, names, marks, (ABLATION_NOTES[part] for part in parts)),
        rules=frozenset((len(rows),)),
    )


def _probes(models: list[Model], *, paper: bool) -> Page:
    """Table 10: a row per model and position."""
    marks = Marks()
    rows = [
        (Cell(probe.name, marks.paper(probe.mark)), Cell(probe.position), Cell(probe.accuracy), Cell("paper"))
        for probe in (PROBES if paper else ())
    ]
    num_paper = len(rows)
    for model in models:
        for position in POSITIONS:
            name = f"linear_{position}"
            if name in model.figures:
                rows.append((Cell(model.name), Cell(position), _cell(model, name, marks), _source(model, (name,))))
    return Page(
        title="Table 10: linear probe (top-1 in %, on ImageNet unless a note says otherwise)",
        header=("model", "position", "top-1", "source"),
        rows=tuple(rows),
        marks=marks.explained(),
        notes=_notes(models, WANTED["10"], marks, PROBE_NOTES if paper else ()),
        text_columns=frozenset((0, 1, 3)),
        rules=frozenset((num_paper,)) - {0},
    )
