"""A picture of tokens that can be painted on: a canvas in the browser, and what its strokes mean here.

gradio's own ImageEditor is not used: it takes whole pictures from the browser, opens them with every reader that Pillow
has, and keeps them in memory under a name that the sender chooses. A stroke here is a short list of numbers.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import gradio as gr
from torch import Tensor

from qlip.apps.playground_models import shown

SCRIPT = "playground_brush.js"
PAGE = """
<div class="board" data-columns="${columns}">
  <img src="${value}" alt="${text}" draggable="false">
  <div class="lines"></div>
  <canvas></canvas>
</div>
<label>Brush
  <input type="range" min="1" max="4" step="0.5" value="1" aria-label="width of the brush in patches">
</label>
"""
STYLE = """
.board { position: relative; aspect-ratio: 1; cursor: crosshair; touch-action: none; user-select: none; }
.board > * { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0 !important; border-radius: 6px; }
.board img { object-fit: fill; max-width: none; }
.board canvas { opacity: 0.65; }
.board .lines {
  background-image: linear-gradient(to right, rgba(255, 255, 255, 0.4) 1px, transparent 1px),
    linear-gradient(to bottom, rgba(255, 255, 255, 0.4) 1px, transparent 1px);
  background-size: calc(100% / ${columns}) calc(100% / ${rows}); pointer-events: none;
}
label { display: flex; align-items: center; gap: 10px; margin-top: 8px; font-size: 14px; }
label input { flex: 1; accent-color: rgb(249, 115, 22); }
"""


def brush(*, grid: tuple[int, int], text: str, elem_id: str) -> gr.HTML:
    """A square to paint on, whose value is a `data_url`; its event `stroke` carries what `stroked` reads."""
    rows, columns = grid
    return gr.HTML(
        data_url(None),
        html_template=PAGE,
        css_template=STYLE,
        js_on_load=Path(__file__).with_name(SCRIPT).read_text(encoding="utf-8"),
        rows=rows,
        columns=columns,
        text=text,
        elem_id=elem_id,
        elem_classes="brush",
    )


def forget_after(stroke: Any, *, elem_id: str) -> None:
    """Take the line of a stroke away when its call has ended, also where nothing changed or it was refused."""
    told = f"() => document.querySelector('#{elem_id} .board').dispatchEvent(new Event('answered', {{bubbles: true}}))"
    for ended in (stroke.success, stroke.failure):  # with `then` the line of a refused stroke stayed
        ended(None, js=told, show_progress="hidden", api_visibility="private")


def data_url(picture: Tensor | None) -> str:
    """(3, S, S) uint8 -> a PNG, enlarged in whole steps, as the address that the brush shows; None is an empty one."""
    if picture is None:
        return "data:,"
    buffer = io.BytesIO()
    shown(picture).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
