"""A table of figures as Markdown, LaTeX (booktabs), CSV or plain strings; text from outside is escaped in each."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

Format = Literal["markdown", "latex", "csv"]
DASH = "\N{EN DASH}"
LATEX = {
    **{c: rf"\{c}" for c in "{}$&#%_"},
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "[": "{[}",  # after the end of a row it would open an argument
    "]": "{]}",
    DASH: "--",
}


class Cell(NamedTuple):
    """One cell; an empty text is shown as an en dash: not measured."""

    text: str
    mark: str = ""
    """Explained in `Page.marks`: a sign of the paper, or a number."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Page:
    """A rectangular table with what stands below it."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    marks: dict[str, str]
    """Mark -> what it means, of all marks that occur."""
    notes: tuple[str, ...]
    """Sentences below the marks."""
    text_columns: frozenset[int] = frozenset((0,))
    """Aligned to the left; all others to the right."""
    rules: frozenset[int] = frozenset()
    """Rows above which a rule is drawn, where the format has rules."""

    def footer(self) -> list[str]:
        """Marks explained, then notes: plain lines."""
        return [f"{_shown_mark(mark)} {meaning}" for mark, meaning in self.marks.items()] + list(self.notes)


class PlainTable(NamedTuple):
    """What a page of another kind needs: strings alone, not escaped."""

    title: str
    header: list[str]
    rows: list[list[str]]
    footer: list[str]


def plain(page: Page) -> PlainTable:
    """Cells with their marks behind them."""
    rows = [[_joined(cell.text or DASH, cell.mark) for cell in row] for row in page.rows]
    return PlainTable(title=page.title, header=list(page.header), rows=rows, footer=page.footer())


def one_line(text: str) -> str:
    """Text from outside without line breaks and control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def render(pages: list[Page], format: Format) -> str:
    """All pages below each other; ends without a line break."""
    write = {"markdown": _markdown, "latex": _latex, "csv": _csv}[format]
    return "\n\n".join(write(page) for page in pages)


def _shown_mark(mark: str) -> str:
    return f"[{mark}]" if mark.isdigit() else mark


def _joined(text: str, mark: str) -> str:
    """`24.10 [1]`, `BSQ-ViT+`."""
    return text + (f" [{mark}]" if mark.isdigit() else mark)


def _markdown(page: Page) -> str:
    table = plain(page)
    rule = [":--" if place in page.text_columns else "--:" for place in range(len(page.header))]
    lines = [f"**{_escape_markdown(page.title)}**", ""]
    lines += [_markdown_row([_escape_markdown(text) for text in table.header]), _markdown_row(rule)]
    lines += [_markdown_row([_escape_markdown(text) for text in row]) for row in table.rows]
    if table.footer:
        # two blanks end a line inside a paragraph
        lines += ["", "  \n".join(_escape_sign(_escape_markdown(line)) for line in table.footer)]
    return "\n".join(lines)


def _markdown_row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escape_markdown(text: str) -> str:
    """Pipes, code, emphasis, links and tags lose their meaning; an underscore inside a word has none."""
    text = re.sub(r"([\\`*|<])", r"\\\1", text)
    text = re.sub(r"\](?=[(\[:])", r"\\]", text)
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)


def _escape_sign(line: str) -> str:
    """A line that begins with + or # would be a list or a heading."""
    return rf"\{line}" if line[:1] in ("+", "#") else line


def _latex(page: Page) -> str:
    columns = "".join("l" if place in page.text_columns else "r" for place in range(len(page.header)))
    lines = [
        "% needs \\usepackage{booktabs}",
        "\\begin{table}",
        "\\centering\\small",
        f"\\caption{{{_escape_latex(page.title)}}}",
        f"\\begin{{tabular}}{{{columns}}}",
        "\\toprule",
        _latex_row([_escape_latex(text) for text in page.header]),
        "\\midrule",
    ]
    for place, row in enumerate(page.rows):
        if place in page.rules:
            lines.append("\\midrule")
        lines.append(_latex_row([_latex_cell(cell) for cell in row]))
    lines += ["\\bottomrule", "\\end{tabular}"]
    for mark, meaning in page.marks.items():
        lines.append(f"\\par\\footnotesize\\textsuperscript{{{_escape_latex(mark)}}} {_escape_latex(meaning)}")
    lines += [f"\\par\\footnotesize {_escape_latex(note)}" for note in page.notes]
    return "\n".join([*lines, "\\end{table}"])


def _latex_row(cells: list[str]) -> str:
    return f"{' & '.join(cells)} \\\\"


def _latex_cell(cell: Cell) -> str:
    mark = f"\\textsuperscript{{{_escape_latex(cell.mark)}}}" if cell.mark else ""
    return _escape_latex(cell.text or DASH) + mark


def _escape_latex(text: str) -> str:
    return "".join(LATEX.get(c, c) for c in text)


def _csv(page: Page) -> str:
    """Numbers stay numbers: what was not measured is empty, and marks are spelled out in a last column."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*map(_inert, page.header), "remarks"])
    for row in page.rows:
        said = [f"{name}: {page.marks[cell.mark]}" for name, cell in zip(page.header, row, strict=True) if cell.mark]
        writer.writerow([*(_inert(cell.text) for cell in row), _inert("; ".join(said))])
    return text.getvalue().rstrip("\n")


def _inert(text: str) -> str:
    """Spreadsheets run what begins so; a quote before it keeps it text."""
    return f"'{text}" if re.match(r"[=+@]|-(?![\d.])", text) else text
