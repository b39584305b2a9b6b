"""The playground's tabs with a brush: bits flipped under it, patches taken from another picture.

Both keep what was painted as a list of versions of the bits, (n, L) bool each; the last one is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from torch import Tensor

from qlip.apps import token_explorer as explorer
from qlip.apps.playground_brush import brush, data_url, forget_after
from qlip.apps.playground_models import Chosen, Playground, shown
from qlip.apps.playground_sent import pixel_in, stroked, uploaded
from qlip.apps.playground_tabs import (
    MODEL_CALL,
    PRIVATE,
    Tab,
    begun,
    counted,
    examples_box,
    picture_box,
    place_in,
    said,
)
from qlip.core.errors import UserError

STROKE_CALL: dict[str, Any] = MODEL_CALL | {"trigger_mode": "multiple", "show_progress": "hidden"}
MOST_VERSIONS = 50
ALL_BITS = -1  # of the choice of a bit
Show = Callable[[Chosen, list[Tensor]], list[Any]]


def bits_tab(playground: Playground, state: gr.State) -> Tab:
    """Flip bits, and look at the bit planes."""
    grid, num_bits = playground.tokenizer.grid, playground.tokenizer.num_bits
    gr.Markdown(
        "What does a bit say? **Paint on the picture:** the chosen bits of the patches you touch are flipped, and the "
        "picture is drawn again from all bits. Paint once more to flip them back."
    )
    versions = gr.State([])
    with gr.Row():
        with gr.Column(min_width=200):
            gr.Markdown("**Paint here**")
            canvas = brush(grid=grid, text="picture to paint on: flips bits", elem_id="flip-brush")
            undo, reset = _undo_buttons("flip")
        with gr.Column(min_width=200):
            change = picture_box(f"What changed, amplified {explorer.DIFFERENCE_GAIN} times", "change")
        with gr.Column(min_width=200):
            choices = [(f"all {num_bits} bits", ALL_BITS), *((f"bit {bit}", bit) for bit in range(num_bits))]
            which = gr.Dropdown(choices, value=ALL_BITS, label="Which bits to flip", elem_id="which-bits")
            line = gr.Markdown(elem_id="flipped")
    gr.Markdown(f"**The {num_bits} bits of every patch:** 1 is yellow, 0 is dark. Click one to choose it.")
    planes = gr.Image(
        label="bit planes",
        show_label=False,
        container=False,
        format="png",
        interactive=False,
        buttons=[],
        elem_id="planes",
    )

    def show(chosen: Chosen, kept: list[Tensor]) -> list[Any]:
        picture = playground.decode(kept[-1])
        sheet = explorer.contact_sheet(explorer.bit_planes(kept[-1], grid=grid))
        difference = explorer.difference_picture(picture, chosen.reconstruction)
        text = _flipped_line(kept[-1], chosen, picture, grid=grid)
        return [kept, data_url(picture), shown(difference), text, sheet.picture]

    def on_stroke(event: gr.EventData, chosen: Chosen | None, kept: list[Tensor], bit: Any) -> list[Any]:
        picture, cells = begun(chosen), stroked(event._data, grid=grid)
        chosen_bits = chosen_of(bit, num_bits=num_bits)
        return show(picture, [*kept[1 - MOST_VERSIONS :], explorer.flip(kept[-1], cells, which=chosen_bits)])

    def on_plane(event: gr.EventData, kept: list[Tensor], bit: Any) -> Any:
        place = pixel_in(event._data)
        if not kept:
            return bit
        found = explorer.contact_sheet(explorer.bit_planes(kept[-1], grid=grid)).bit_at(*place)
        return bit if found is None else found

    outputs = [versions, canvas, change, line, planes]
    forget_after(canvas.stroke(said(on_stroke), [state, versions, which], outputs, **STROKE_CALL), elem_id="flip-brush")
    _wire_undo(undo, reset, state=state, versions=versions, outputs=outputs, show=show)
    planes.select(said(on_plane), [versions, which], which, show_progress="hidden", **PRIVATE)
    return Tab(outputs=outputs, fresh=lambda chosen: show(chosen, [chosen.bits]))


def chosen_of(bit: object, *, num_bits: int) -> range:
    """Which bits a choice means. Raises `UserError` for none."""
    if not isinstance(bit, int) or isinstance(bit, bool) or not ALL_BITS <= bit < num_bits:
        raise UserError(f"no bit is chosen: choose one of 0 to {num_bits - 1}, or all")
    return range(num_bits) if bit == ALL_BITS else range(bit, bit + 1)


def swap_tab(playground: Playground, state: gr.State, thumbnails: Sequence[Any]) -> Tab:
    """Take patches from another picture."""
    grid = playground.tokenizer.grid
    gr.Markdown(
        "A picture is a list of tokens, so parts of two can be mixed. **Paint on the left picture:** the patches you "
        "touch take the bits of the right one."
    )
    first = playground.choose(playground.examples[-1])
    versions, other = gr.State([]), gr.State(first)
    with gr.Row():
        with gr.Column(min_width=200):
            gr.Markdown("**Paint here**")
            canvas = brush(grid=grid, text="picture to paint on: takes patches of the other", elem_id="swap-brush")
            undo, reset = _undo_buttons("swap")
        with gr.Column(min_width=200):
            right = picture_box("The other picture, from its bits", "other", first=shown(first.reconstruction))
            line = gr.Markdown(elem_id="swapped")
        with gr.Column(min_width=200):
            gr.Markdown("**Choose the other**")
            upload = gr.UploadButton("Upload another", type="filepath", elem_id="upload-other")
            gallery = examples_box(thumbnails, "other-examples")

    def show(chosen: Chosen, kept: list[Tensor]) -> list[Any]:
        num = int((kept[-1] != chosen.bits).any(-1).sum())
        text = f"{counted(num, 'patch')} of {len(chosen.bits)} differ from your picture."
        return [kept, data_url(playground.decode(kept[-1])), text]

    def on_stroke(event: gr.EventData, chosen: Chosen | None, kept: list[Tensor], second: Chosen) -> list[Any]:
        picture, cells = begun(chosen), stroked(event._data, grid=grid)
        return show(picture, [*kept[1 - MOST_VERSIONS :], explorer.swap(kept[-1], second.bits, cells)])

    def picked(source: bytes | Path) -> list[Any]:
        second = playground.choose(source)
        return [second, shown(second.reconstruction)]

    def on_example(event: gr.EventData) -> list[Any]:
        return picked(playground.examples[place_in(event, num=len(playground.examples))])

    outputs = [versions, canvas, line]
    forget_after(canvas.stroke(said(on_stroke), [state, versions, other], outputs, **STROKE_CALL), elem_id="swap-brush")
    _wire_undo(undo, reset, state=state, versions=versions, outputs=outputs, show=show)
    upload.upload(said(lambda path: picked(uploaded(path))), upload, [other, right], **MODEL_CALL)
    gallery.select(said(on_example), None, [other, right], **MODEL_CALL)
    return Tab(outputs=outputs, fresh=lambda chosen: show(chosen, [chosen.bits]))


def _undo_buttons(name: str) -> tuple[gr.Button, gr.Button]:
    with gr.Row():
        return (
            gr.Button("Undo", size="sm", elem_id=f"{name}-undo", min_width=60),
            gr.Button("Start again", size="sm", elem_id=f"{name}-reset", min_width=60),
        )


def _wire_undo(
    undo: gr.Button, reset: gr.Button, *, state: gr.State, versions: gr.State, outputs: Sequence[Any], show: Show
) -> None:
    def on_undo(chosen: Chosen | None, kept: list[Tensor]) -> list[Any]:
        return show(begun(chosen), kept[:-1] or kept)

    def on_reset(chosen: Chosen | None) -> list[Any]:
        return show(begun(chosen), [begun(chosen).bits])

    undo.click(said(on_undo), [state, versions], outputs, **STROKE_CALL)
    reset.click(said(on_reset), state, outputs, **STROKE_CALL)


def _flipped_line(bits: Tensor, chosen: Chosen, picture: Tensor, *, grid: tuple[int, int]) -> str:
    """What was done to the picture's bits, and what came of it."""
    flipped = bits != chosen.bits
    cells = flipped.any(-1)
    if not cells.any():
        return "Nothing is flipped yet: paint on the picture."
    changes = explorer.change_by_patch(chosen.reconstruction, picture, grid=grid)
    num_bits, num_cells = int(flipped.sum()), int(cells.sum())
    text = (
        f"**{counted(num_bits, 'bit')}** of {bits.numel():,} flipped, in {counted(num_cells, 'patch')}.\n\n"
        f"Colours inside changed by **{float(changes[cells].mean()):.1f}** of 255 on average"
    )
    return text + (f", in all others by **{float(changes[~cells].mean()):.1f}**." if not cells.all() else ".")
