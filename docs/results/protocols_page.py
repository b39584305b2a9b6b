"""Tables and plot of `protocols.py` from protocols.json.

.venv/bin/python docs/results/protocols_page.py   # prints the tables of protocols.md, writes protocols.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TITLES = {
    "filter": "Resize of the patches to 48 px, both sides alike",
    "reference": "What the reconstructions are compared with",
    "pixels": "How pixels become the network's and the metrics' input",
    "count": "How many of the same pictures",
    "formula": "How a figure is formed from the same pixels",
    "jpeg60": "Another codec: JPEG of quality 60",
}
SHORT = {"filter": "resize", "reference": "against", "pixels": "pixels", "count": "count", "formula": "formula"}
JPEG = "JPEG: "
METRICS = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "fd_efficientnet_lite0": "fd_efficientnet_lite0",
    "fd_encoder": "fd_encoder",
    "fd_dct": "fd_dct",
}
PANELS = {  # title -> (metrics, where nothing moved)
    "PSNR, difference in dB": (("psnr",), 0.0),
    "SSIM, difference": (("ssim",), 0.0),
    "Frechet distance, times the base": (("fd_efficientnet_lite0", "fd_encoder", "fd_dct"), 1.0),
}
COLOURS = {"fd_efficientnet_lite0": "tab:blue", "fd_encoder": "tab:orange", "fd_dct": "tab:green"}


def cell(metric: str, figure: dict[str, float] | None, *, is_base: bool) -> str:
    """Value and, in bold, difference (PSNR, SSIM) or factor (Frechet distances)."""
    if figure is None:
        return ""
    digits = {"psnr": 2, "ssim": 4}.get(metric)
    if digits is None:
        value, factor = f"{figure['value']:.4g}", figure["change"]
        return value if is_base else f"{value} **x {factor:.3f}**" if factor < 10 else f"{value} **x {factor:.0f}**"
    value = f"{figure['value']:.{digits}f}"
    return value if is_base else f"{value} **{figure['change']:+.{digits}f}**"


def tables(summary: dict[str, Any]) -> str:
    """A Markdown table per question: the base, then one change per row."""
    base_name = next(name for name, row in summary["rows"].items() if row["question"] == "base")
    base, jpeg_base = summary["rows"][base_name], JPEG + base_name
    pages = []
    for question, title in TITLES.items():
        rows = {name: row for name, row in summary["rows"].items() if row["question"] == question}
        metrics = [metric for metric in METRICS if any(metric in row for row in rows.values())]
        lines = [f"| {title} | " + " | ".join(METRICS[m] for m in metrics) + " |", "|---" * (1 + len(metrics)) + "|"]
        if jpeg_base not in rows:
            rows = {base_name: base, **rows}
        for name, row in rows.items():
            cells = [cell(metric, row.get(metric), is_base=name in (base_name, jpeg_base)) for metric in metrics]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        pages.append("\n".join(lines))
    return "\n\n".join([*pages, codec_table(summary)])


def codec_table(summary: dict[str, Any]) -> str:
    """PSNR of each codec under each filter."""
    filters = list(next(iter(summary["codecs"].values())))
    lines = ["| PSNR, dB | " + " | ".join(filters) + " | bilinear - lanczos |", "|---" * (2 + len(filters)) + "|"]
    for codec, values in summary["codecs"].items():
        cells = [f"{values[name]:.2f}" for name in filters] + [f"**{values['bilinear'] - values['lanczos']:+.2f}**"]
        lines.append(f"| {codec} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(summary: dict[str, Any]) -> None:
    """A line per choice, a panel per kind of figure: change against the base, and its range. JPEG is hollow."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, StrMethodFormatter

    all_rows = summary["rows"]
    rows = [(name, row) for question in SHORT for name, row in all_rows.items() if row["question"] == question]
    questions = [row["question"] for _, row in rows]
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    axes = figure.subplots(1, len(PANELS), sharey=True, width_ratios=(1, 1, 1.6))
    for panel, (title, (metrics, still)) in zip(axes, PANELS.items(), strict=True):
        panel.axvline(still, color="grey", linewidth=1)
        for offset, metric in enumerate(metrics):
            shift = (offset - (len(metrics) - 1) / 2) * 0.24
            for prefix, filled in (("", True), (JPEG, False)):
                marks = [
                    (place + shift, all_rows.get(prefix + name, {}).get(metric)) for place, (name, _) in enumerate(rows)
                ]
                draw_marks(
                    panel, [mark for mark in marks if mark[1]], colour=COLOURS.get(metric, "black"), filled=filled
                )
            panel.plot([], [], "o", color=COLOURS.get(metric, "black"), markersize=5, label=metric)
        for place in range(1, len(rows)):
            if questions[place] != questions[place - 1]:
                panel.axhline(place - 0.5, color="grey", linewidth=0.6)
        panel.set_title(title, fontsize=10)
        panel.grid(alpha=0.3, axis="x")
    names = [f"{SHORT[row['question']]}: {name}" for name, row in rows]
    axes[0].set_yticks(range(len(rows)), names, fontsize=8.5)
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    last = axes[-1]
    last.set_xscale("log")
    last.xaxis.set_major_locator(FixedLocator([0.5, 1, 2, 5, 10, 30, 100, 300]))
    last.xaxis.set_minor_locator(NullLocator())
    last.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    last.xaxis.set_minor_formatter(NullFormatter())
    last.plot([], [], "o", color="black", markerfacecolor="white", markersize=5, label="hollow: JPEG, quality 60")
    last.legend(fontsize=8, loc="lower right")
    figure.savefig(HERE / "protocols.svg", metadata={"Date": None})


def draw_marks(panel: Any, marks: list[tuple[float, dict[str, float]]], *, colour: str, filled: bool) -> None:
    """A point and its range for every (height, figure)."""
    heights = [height for height, _ in marks]
    low, high, change = ([figure[key] for _, figure in marks] for key in ("low", "high", "change"))
    panel.hlines(heights, low, high, color=colour, alpha=0.5)
    panel.plot(change, heights, "o", color=colour, markerfacecolor=colour if filled else "white", markersize=5)


def main() -> None:
    """Command line."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    summary = json.loads((HERE / "protocols.json").read_text())
    draw(summary)
    print(tables(summary))


if __name__ == "__main__":
    main()
