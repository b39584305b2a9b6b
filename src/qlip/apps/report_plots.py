"""The report's plots as inline SVG: no script, no outside address, colours from the page so that dark mode works.

matplotlib draws with the stand-in colours below; `inline_svg` replaces them by the CSS variables of report.html.j2.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

INK, MUTED, RULE, ACCENT, SECOND = "#010101", "#020202", "#030303", "#040404", "#050505"
CSS_COLOURS = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    RULE: "var(--rule)",
    ACCENT: "var(--accent)",
    SECOND: "var(--second)",
}
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: selectable, and in the reader's system font
    "svg.hashsalt": "qlip",  # equal plots give equal bytes
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "grid.alpha": 0.6,
}


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of so many SVG pixels with one pair of axes; no pyplot, so no global state."""
    figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
    return figure, figure.subplots()


def inline_svg(figure: Figure, *, label: str) -> Markup:
    """The figure as an `<svg>` element that scales to its column; `label` is read out by screen readers."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    prefix = f"p{hashlib.sha256((label + text).encode()).hexdigest()[:8]}-"  # ids must be unique in the page
    used = set(re.findall(r"(?:href=\"|url\()#([\w.-]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(href="|url\()#', rf"\1#{prefix}", text)
    for stand_in, colour in CSS_COLOURS.items():
        text = text.replace(stand_in, colour)
    box = re.search(r'viewBox="[^"]*"', text)
    width = re.search(r'width="([\d.]+)pt"', text)
    assert box is not None and width is not None, "matplotlib writes both"
    head = f'<svg role="img" aria-label="{escape(label)}" {box[0]} style="max-width: {1.5 * float(width[1]):.0f}px">'
    return Markup(re.sub(r"^<svg[^>]*>", lambda _: head, text))


def _number(value: float, _position: int | None = None) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"


def curve(steps: Sequence[int], values: Sequence[float], *, term: str, unit: str) -> Markup:
    """A training term over steps; logarithmic where it is positive and spans more than a decade."""
    with matplotlib.rc_context(SETTINGS):
        figure, axes = _figure(250, 160)
        axes.plot(steps, values, color=ACCENT, linewidth=1.4, marker="" if len(steps) > 1 else "o", markersize=3)
        axes.set_xlabel("step")
        axes.set_ylabel(unit or "value")
        lowest, highest = min(values), max(values)
        if lowest > 0 and highest > 10 * lowest:
            axes.set_yscale("log")
            subs = (1.0, 2.0, 5.0) if highest < 200 * lowest else (1.0,)
            axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=6))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.tick_params(which="minor", left=False)
        else:
            axes.yaxis.set_major_locator(MaxNLocator(4))
            if highest - lowest < 1e-3 * abs(highest):  # a constant would be drawn as magnified rounding noise
                margin = 0.1 * abs(highest) or 1.0
                axes.set_ylim(lowest - margin, highest + margin)
        axes.yaxis.set_major_formatter(FuncFormatter(_number))
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(_number))
        return inline_svg(figure, label=f"{term} over training steps, from {values[0]:.4g} to {values[-1]:.4g}")


def bit_bars(shares: Sequence[float], *, label: str) -> Markup:
    """The share of ones of every bit, with a line at one half."""
    with matplotlib.rc_context(SETTINGS):
        figure, axes = _figure(520, 190)
        axes.bar(range(len(shares)), shares, color=ACCENT, width=0.72)
        axes.axhline(0.5, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_ylim(0, 1)
        axes.set_xlim(-0.7, len(shares) - 0.3)
        axes.set_xlabel("bit")
        axes.set_ylabel("share of ones")
        axes.xaxis.set_major_locator(MaxNLocator(14, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.grid(visible=False, axis="x")
        return inline_svg(figure, label=label)


def accuracy_bars(names: Sequence[str], values: Sequence[float], chances: Sequence[float | None]) -> Markup:
    """Accuracies as bars with their value behind them, and a mark where chance lies."""
    with matplotlib.rc_context(SETTINGS):
        figure, axes = _figure(520, 34 * len(names) + 50)
        rows = range(len(names))
        for row, value, chance in zip(rows, values, chances, strict=True):
            if math.isnan(value):
                axes.text(0.01, row, "none in the data", va="center", color=MUTED)
                continue
            axes.barh(row, value, color=ACCENT, height=0.5)
            axes.text(0.01 + value, row, f"{100 * value:.1f} %", va="center", color=INK)
            if chance is not None:
                axes.plot([chance, chance], [row - 0.4, row + 0.4], color=SECOND, linewidth=2)
        axes.set_yticks(rows, names)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.12)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xlabel("accuracy")
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.spines["left"].set_visible(False)
        axes.grid(visible=False, axis="y")
        return inline_svg(figure, label="zero-shot accuracy beside chance")


def confusion(counts: Sequence[Sequence[int]], names: Sequence[str], *, label: str) -> Markup:
    """A heat map of the share of answers (column) to each true class (row), in per cent; below 0.5 % stays empty."""
    with matplotlib.rc_context(SETTINGS):
        figure, axes = _figure(420, 400)
        for row, line in enumerate(counts):
            total = sum(line)
            for column, number in enumerate(line):
                share = number / total if total else 0.0
                axes.add_patch(
                    Rectangle(
                        (column - 0.47, row - 0.47), 0.94, 0.94, color=ACCENT, linewidth=0, alpha=0.06 + 0.54 * share
                    )
                )
                if share >= 0.005:
                    axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8.5, color=INK)
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_ylim(len(counts) - 0.5, -0.5)
        axes.set_aspect("equal")
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(counts)), names)
        axes.set_xlabel("answer")
        axes.set_ylabel("truth")
        axes.tick_params(length=0)
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return inline_svg(figure, label=label)
