"""The paper's Figure 1: zero-shot accuracy against rFID, its rows in grey and ours in colour.

The plane holds what has both. Beside it stand encoders, which have an accuracy alone, and below it tokenizers, which
have an rFID alone. Up and to the right is better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import Bbox

from qlip.apps.table_models import Model
from qlip.apps.table_rows import ALIGNED, ENCODERS, QLIP, TOKENIZERS, PaperRow
from qlip.core.errors import UserError

INK, GREY, PALE, ACCENT = "#222222", "#6b7280", "#d1d5db", "#c2410c"
MARKERS = {QLIP: "o", ALIGNED: "s"}
ENCODER_GAP, TOKENIZER_GAP = 0.044, 0.036  # of the side of the plane, between two labels
NEAR = 8  # points between a marker's middle and its name
OFFSETS = tuple(
    (distance * x, distance * y)
    for distance in (NEAR, 14, 22, 32)
    for x, y in ((1, 0), (-1, 0), (0, 1), (0, -1), (0.7, 0.7), (-0.7, 0.7), (0.7, -0.7), (-0.7, -0.7))
)
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "qlip",  # equal plots give equal bytes
    "font.size": 9,
    "axes.edgecolor": PALE,
    "axes.labelcolor": INK,
    "xtick.color": PALE,
    "ytick.color": PALE,
    "xtick.labelcolor": GREY,
    "ytick.labelcolor": GREY,
    "axes.axisbelow": True,
    "grid.color": PALE,
    "grid.linewidth": 0.5,
}


class Point(NamedTuple):
    """A model of ours in the plane."""

    name: str
    zero_shot: float
    """Top-1 in per cent."""
    rfid: float
    complete: bool
    """Whether both are of the full validation set."""


def plane_points(models: Sequence[Model]) -> list[Point]:
    """Models with an rFID and a top-1, both of ImageNet. Raises `UserError` when there is none."""
    points = []
    for model in models:
        both = [model.figures[name] for name in ("top1", "rfid") if name in model.figures]
        if len(both) < 2 or not all(figure.card["protocol"].startswith("imagenet-") for figure in both):
            continue
        counts = sorted({figure.card["count"] for figure in both if figure.card.get("complete") is False})
        name = f"{model.name} (n = {', '.join(map(str, counts))})" if counts else model.name
        if both[1].value > 0:  # the axis is logarithmic
            points.append(Point(name, 100 * both[0].value, both[1].value, not counts))
    if not points:
        raise UserError(
            "no model has both a top-1 and an rFID of ImageNet, which Figure 1 shows; evaluate with --data "
            "imagenet/val --evals imagenet-zeroshot-openai80-v1 imagenet-recon-256-bilinear-v1"
        )
    return points


def draw_plane(points: Sequence[Point], path: Path, *, paper: bool = True) -> None:
    """Draw the points, and the paper's unless told otherwise, to a .svg or .png.

    Raises `UserError` for another suffix and for a file that cannot be written.
    """
    if path.suffix.lower() not in (".svg", ".png"):
        raise UserError(f"cannot draw {path}; name a .svg or .png file")
    rows = [row for group in TOKENIZERS.values() for row in group] if paper else []
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(9, 6.6))
        plane = figure.add_axes((0.25, 0.4, 0.72, 0.5) if paper else (0.1, 0.12, 0.87, 0.76))
        _scale(plane, points, rows)
        _draw_points(plane, points, rows)
        if paper:
            encoders = [row for row in rows if row.family == ENCODERS]
            tokenizers = [row for row in rows if row.rfid and not row.zero_shot]
            _draw_encoders(figure, plane, encoders)
            _draw_tokenizers(figure, plane, tokenizers)
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=160, metadata=metadata)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; choose another file") from None


def _scale(plane: Axes, points: Sequence[Point], rows: Sequence[PaperRow]) -> None:
    """Axes that hold all figures; better is to the right and up."""
    rfids = [point.rfid for point in points] + [float(row.rfid) for row in rows if row.rfid]
    accuracies = [point.zero_shot for point in points] + [float(row.zero_shot) for row in rows if row.zero_shot]
    plane.set_xscale("log")
    plane.set_xlim(1.4 * max(rfids), min(rfids) / 1.4)
    margin = 0.08 * (max(accuracies) - min(accuracies)) + 1
    plane.set_ylim(max(0.0, min(accuracies) - margin), max(accuracies) + margin)
    plane.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    plane.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    plane.xaxis.set_minor_formatter(NullFormatter())
    plane.tick_params(which="minor", bottom=False)
    plane.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    plane.set_xlabel("rFID (logarithmic, lower is better \N{RIGHTWARDS ARROW})")
    plane.set_title("ImageNet zero-shot top-1, %", fontsize=9, color=INK, loc="left")
    plane.grid(visible=True)
    for side in ("top", "right"):
        plane.spines[side].set_visible(False)


def _draw_points(plane: Axes, points: Sequence[Point], rows: Sequence[PaperRow]) -> None:
    """Markers and labels of all that have both figures."""
    labelled: list[tuple[float, float, str, str]] = []
    for family, marker in MARKERS.items():
        both = [row for row in rows if row.family == family and row.rfid and row.zero_shot]
        if not both:
            continue
        xs, ys = [float(row.rfid) for row in both], [float(row.zero_shot) for row in both]
        label = f"{family}, of the paper" if family == ALIGNED else family
        plane.plot(xs, ys, marker, color=GREY, markersize=7, label=label)
        labelled += [(x, y, row.name, INK if family == QLIP else GREY) for x, y, row in zip(xs, ys, both, strict=True)]
    for complete, label in ((True, "ours"), (False, "ours, not the full validation set")):
        some = [point for point in points if point.complete == complete]
        if some:
            fill = ACCENT if complete else "white"
            xs, ys = [point.rfid for point in some], [point.zero_shot for point in some]
            plane.plot(xs, ys, "*", color=ACCENT, markerfacecolor=fill, markersize=13, label=label)
            labelled += [(point.rfid, point.zero_shot, point.name, ACCENT) for point in some]
    _label(plane, labelled)
    plane.legend(
        loc="lower right",
        bbox_to_anchor=(1.0, 1.06),
        ncols=4,
        frameon=False,
        labelcolor=GREY,
        fontsize=8,
        handletextpad=0.2,
    )


def _label(plane: Axes, labelled: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each name at the nearest place around its point where it covers no point and no other name."""
    side = 12 * plane.figure.dpi / 72  # of a marker, in pixels
    taken = []
    for x, y, _, _ in labelled:
        left, bottom = plane.transData.transform((x, y)) - side / 2
        taken.append(Bbox.from_bounds(left, bottom, side, side))
    frame = plane.get_window_extent()
    for x, y, name, colour in labelled:
        text = plane.annotate(
            *(name, (x, y), (0, 0)), textcoords="offset points", color=colour, annotation_clip=False, parse_math=False
        )
        faults = []
        for offset in OFFSETS:
            box = _put(text, offset)
            outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
            faults.append(sum(box.overlaps(other) for other in taken) + outside)
        chosen = OFFSETS[faults.index(min(faults))]
        taken.append(_put(text, chosen))
        if math.hypot(*chosen) > NEAR:  # a line leads back to its point
            line = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
            plane.annotate("", (x, y), chosen, textcoords="offset points", arrowprops=line)


def _put(text: Annotation, offset: tuple[float, float]) -> Bbox:
    """Move a name to an offset in points, on the side of it that looks away from its point; where it then is."""
    x, y = offset
    text.set(
        position=offset,
        horizontalalignment="left" if x > 0 else "right" if x < 0 else "center",
        verticalalignment="bottom" if y > 0 else "top" if y < 0 else "center",
    )
    return text.get_window_extent()


def _draw_encoders(figure: Figure, plane: Axes, rows: Sequence[PaperRow]) -> None:
    """A strip to the left of the plane with the accuracies of what has no decoder."""
    strip = figure.add_axes((0.05, 0.4, 0.15, 0.5))
    _bare(strip)
    low, high = plane.get_ylim()
    heights = [(float(row.zero_shot) - low) / (high - low) for row in rows]
    places = spread(heights, gap=ENCODER_GAP)
    for row, height, place in zip(rows, heights, places, strict=True):
        strip.plot([0.84, 0.97], [place, height], color=PALE, linewidth=0.8, transform=strip.transAxes)
        strip.plot(0.97, height, "D", color=GREY, markersize=4, transform=strip.transAxes, clip_on=False)
        strip.text(
            *(0.82, place, row.name), ha="right", va="center", fontsize=7.5, color=GREY, transform=strip.transAxes
        )
    strip.set_title("no decoder: accuracy alone", fontsize=8, color=GREY, loc="right")


def _draw_tokenizers(figure: Figure, plane: Axes, rows: Sequence[PaperRow]) -> None:
    """A strip below the plane with the rFIDs of what has no text side."""
    strip = figure.add_axes((0.25, 0.02, 0.72, 0.26))
    _bare(strip)
    worst, best = (math.log(limit) for limit in plane.get_xlim())
    shares = [(math.log(float(row.rfid)) - worst) / (best - worst) for row in rows]
    for row, share, place in zip(rows, shares, spread(shares, gap=TOKENIZER_GAP), strict=True):
        strip.plot([share, place], [0.95, 0.8], color=PALE, linewidth=0.8, transform=strip.transAxes)
        strip.plot(share, 0.95, "^", color=GREY, markersize=5, transform=strip.transAxes, clip_on=False)
        strip.text(
            *(place, 0.77, row.name),
            ha="center",
            va="top",
            rotation=90,
            fontsize=7.5,
            color=GREY,
            transform=strip.transAxes,
        )
    figure.text(0.235, 0.265, "no text side: rFID alone", fontsize=8, color=GREY, ha="right", va="center")


def _bare(axes: Axes) -> None:
    """No frame and no ticks of its own."""
    axes.set_axis_off()
    axes.set_facecolor("none")


def spread(values: Sequence[float], *, gap: float, low: float = 0.02, high: float = 0.98) -> list[float]:
    """Places at least `gap` apart between `low` and `high`, in the order of the values, with the least squared moves.

    A least-squares fit of an ascending row to `value - rank * gap`, where neighbours that would descend share their
    mean; then cut off at both ends, which keeps it the best within them.
    """
    order = sorted(range(len(values)), key=lambda i: values[i])
    blocks: list[list[float]] = []
    for rank, i in enumerate(order):
        blocks.append([values[i] - rank * gap])
        while len(blocks) > 1 and _mean(blocks[-2]) > _mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    last = high - (len(values) - 1) * gap
    fitted = [max(low, min(last, _mean(block))) for block in blocks for _ in block]
    places = [0.0] * len(values)
    for rank, i in enumerate(order):
        places[i] = fitted[rank] + rank * gap
    return places


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
