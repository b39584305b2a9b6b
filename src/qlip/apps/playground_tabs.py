"""What the playground's tabs share, and the first of them: a picture, its reconstruction, their difference.

What a visitor has done is in `gr.State` alone; models are called one at a time, under one `MODEL_CALL`.
"""

from __future__ import annotations

import functools
import html
import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
import torch
from PIL import Image

from qlip.apps import token_explorer as explorer
from qlip.apps.playground_models import Chosen, Playground, shown
from qlip.core.errors import UserError
from qlip.core.images import ImageRejected

PRIVATE: dict[str, Any] = {"api_visibility": "private"}  # the page's own, no documented address
MODEL_CALL: dict[str, Any] = PRIVATE | {"concurrency_limit": 1, "concurrency_id": "model"}
MESSAGE_SECONDS = 12
TIMES = "\N{MULTIPLICATION SIGN}"


@dataclass(kw_only=True, slots=True, frozen=True)
class Tab:
    """What a tab shows of a picture."""

    outputs: Sequence[Any]
    """Components and states."""
    fresh: Callable[[Chosen], Sequence[Any]]
    """A newly chosen picture -> as many values."""


def said(function: Callable[..., Any]) -> Callable[..., Any]:
    """A handler whose errors are messages on the page: a user's mistake as its line, others in the terminal only."""

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        try:
            with torch.inference_mode():
                return function(*arguments)
        except ImageRejected as rejected:
            message = f"This picture cannot be used: {rejected}"
        except UserError as error:
            message = str(error)
        except Exception:
            traceback.print_exc()
            message = "That went wrong, and it is our mistake: the terminal says where. The page works on."
        raise gr.Error(html.escape(message), duration=MESSAGE_SECONDS, title="", print_exception=False)

    return run


def begun(chosen: Chosen | None) -> Chosen:
    """The visitor's picture. Raises `UserError` where there is none yet."""
    if chosen is None:
        raise UserError("there is no picture yet: choose one")
    return chosen


def place_in(event: gr.EventData, *, num: int) -> int:
    """Which of `num` things the browser says was clicked. Raises `UserError` for anything else than a number of one."""
    sent = event._data.get("index") if isinstance(event._data, dict) else None
    if not isinstance(sent, int) or isinstance(sent, bool) or not 0 <= sent < num:
        raise UserError("that is none of the pictures: click one of them")
    return sent


def picture_box(title: str, elem_id: str, *, first: Image.Image | None = None) -> gr.Image:
    """A result below its title, as PNG: gradio's own choice is a lossy format."""
    gr.Markdown(f"**{title}**")
    return gr.Image(
        first,
        label=title,
        show_label=False,
        container=False,
        format="png",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_id=elem_id,
        elem_classes="picture",
    )


def examples_box(thumbnails: Sequence[Any], elem_id: str) -> gr.Gallery:
    """Pictures to pick from."""
    return gr.Gallery(
        list(thumbnails),
        label="or pick one",
        show_label=False,
        container=False,
        columns=3,
        allow_preview=False,
        format="png",
        object_fit="cover",
        buttons=[],
        interactive=False,
        elem_id=elem_id,
        elem_classes="examples",
    )


def decibels(psnr: float) -> str:
    """PSNR in words."""
    return "infinite: equal" if math.isinf(psnr) else f"{psnr:.1f} dB"


def counted(number: int, thing: str) -> str:
    """`1 patch`, `2 patches`."""
    ending = "" if number == 1 else "es" if thing.endswith("ch") else "s"
    return f"{number:,} {thing}{ending}"


def reconstruct_tab(playground: Playground) -> Tab:
    """Original, reconstruction, difference, and what the bits cost."""
    (rows, columns), num_bits = playground.tokenizer.grid, playground.tokenizer.num_bits
    side = playground.tokenizer.image_size
    gr.Markdown(
        f"The picture is cut into {rows} {TIMES} {columns} patches of {side // columns} {TIMES} {side // rows} pixels. "
        f"Each becomes a **token** of {num_bits} **bits**, {num_bits} times yes or no; the second picture is drawn "
        "from the bits alone."
    )
    with gr.Row():
        with gr.Column(min_width=200):
            original = picture_box("What the tokenizer sees", "original")
        with gr.Column(min_width=200):
            back = picture_box("Drawn from the bits", "reconstruction")
        with gr.Column(min_width=200):
            error = picture_box(f"Difference, amplified {explorer.DIFFERENCE_GAIN} times", "difference")
    line = gr.Markdown(elem_id="figures")

    def fresh(chosen: Chosen) -> Sequence[Any]:
        found = explorer.figures(chosen.pixels, chosen.reconstruction, chosen.bits)
        difference = explorer.difference_picture(chosen.pixels, chosen.reconstruction)
        text = (
            "| bits | bits per pixel | smaller than 24-bit colour | PSNR, higher is closer |\n|--|--|--|--|\n"
            f"| {found.num_bits:,} ({rows * columns} tokens {TIMES} {num_bits}) | {found.bits_per_pixel:.3f} | "
            f"{24 / found.bits_per_pixel:.0f} times | {decibels(found.psnr)} |"
        )
        return [*map(shown, (chosen.pixels, chosen.reconstruction, difference)), text]

    return Tab(outputs=[original, back, error, line], fresh=fresh)
