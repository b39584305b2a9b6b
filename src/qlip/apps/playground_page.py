"""The playground's page: a picture chosen on the left, and tabs about it. Nothing on it is loaded from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from qlip.apps.playground_models import Chosen, Playground, shown
from qlip.apps.playground_painting import bits_tab, swap_tab
from qlip.apps.playground_sent import uploaded
from qlip.apps.playground_tabs import MODEL_CALL, TIMES, Tab, examples_box, place_in, reconstruct_tab, said
from qlip.apps.playground_words import ask_tab, caption_tab, classify_tab, draw_tab

KEPT_SECONDS = 24 * 3600  # of uploads and results; what is left goes with the server
CLEANED_SECONDS = 3600
SMOOTH_SIDE = 256  # pixels; smaller pictures are shown as sharp squares
PIXELS = ".gradio-container img { image-rendering: pixelated; }"
STYLE = """
.gradio-container { width: 100% !important; max-width: 1280px !important; margin: 0 auto !important; }
.gradio-container h1 { margin-bottom: 4px; }
#picker { max-width: 240px; }
#picker, #picker .column { gap: 10px; }
.picture .image-frame, .picture img { width: 100% !important; height: auto !important; border-radius: 6px; }
.picture img { object-fit: fill !important; }
#drawn { max-width: 400px; margin: 0; }
#planes .icon-button-wrapper, #chosen .icon-button-wrapper { display: none; }
.brush .html-container { padding: 0; }
.examples .grid-container {
  grid-template: none / repeat(3, minmax(0, 1fr)) !important; grid-auto-rows: auto !important; padding: 0 !important;
}
.examples .grid-wrap { max-height: none !important; height: auto !important; padding: 2px !important; }
.examples .thumbnail-item { height: auto !important; aspect-ratio: 1; }
#figures table { width: 100%; }
footer { display: none !important; }
"""


def style(playground: Playground) -> str:
    """The page's style sheet."""
    return STYLE + (PIXELS if playground.tokenizer.image_size < SMOOTH_SIDE else "")


def theme() -> gr.themes.ThemeClass:
    """Fonts of the visitor's own system: gradio's would be asked for."""
    names = ("system-ui", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif")
    mono = ("ui-monospace", "Menlo", "Consolas", "monospace")
    return gr.themes.Soft(
        primary_hue="orange",
        neutral_hue="slate",
        font=[gr.themes.Font(name) for name in names],
        font_mono=[gr.themes.Font(name) for name in mono],
    )


def build_page(playground: Playground) -> gr.Blocks:
    """All tabs for which there is a model. The first example is chosen when a page is opened."""
    tokenizer = playground.tokenizer
    (rows, columns), side = tokenizer.grid, tokenizer.image_size
    thumbnails = [shown(playground.choose(source).pixels, side=128) for source in playground.examples]
    with gr.Blocks(
        title="qlip playground", analytics_enabled=False, delete_cache=(CLEANED_SECONDS, KEPT_SECONDS)
    ) as page:
        state = gr.State(None)
        gr.Markdown(
            f"# A picture in {rows * columns * tokenizer.num_bits:,} bits\n"
            f"This tokenizer ({tokenizer.name}) writes {side} {TIMES} {side} pixels as {rows} {TIMES} {columns} tokens "
            f"of {tokenizer.num_bits} bits. Choose a picture, and a tab to see what its tokens can do."
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=230, elem_id="picker"):
                upload, gallery, preview = _picker(thumbnails)
            with gr.Column(scale=4, min_width=600):
                tabs = _tabs(playground, state, thumbnails)
        tabs.append(Tab(outputs=[preview], fresh=lambda chosen: [shown(chosen.pixels)]))
        outputs = [state, *(output for tab in tabs for output in tab.outputs)]

        def choose(source: bytes | Path) -> list[Any]:
            chosen: Chosen = playground.choose(source)
            return [chosen, *(value for tab in tabs for value in tab.fresh(chosen))]

        def on_example(event: gr.EventData) -> list[Any]:
            return choose(playground.examples[place_in(event, num=len(playground.examples))])

        upload.upload(said(lambda path: choose(uploaded(path))), upload, outputs, **MODEL_CALL)
        gallery.select(said(on_example), None, outputs, **MODEL_CALL)
        page.load(said(lambda: choose(playground.examples[0])), None, outputs, **MODEL_CALL)
    return page


def _picker(thumbnails: list[Any]) -> tuple[gr.UploadButton, gr.Gallery, gr.Image]:
    gr.Markdown("**Choose a picture**")
    preview = gr.Image(
        label="Your picture",
        show_label=False,
        container=False,
        format="png",
        interactive=False,
        buttons=[],
        elem_id="chosen",
        elem_classes="picture",
    )
    upload = gr.UploadButton("Upload a picture", type="filepath", variant="primary", elem_id="upload")
    gr.Markdown("or pick one:")
    gallery = examples_box(thumbnails, "examples")
    return upload, gallery, preview


def _tabs(playground: Playground, state: gr.State, thumbnails: list[Any]) -> list[Tab]:
    """The tabs; those about the picture are told when another is chosen, so that no answer is about an old one."""
    with gr.Tabs():
        with gr.Tab("Reconstruct"):
            tabs = [reconstruct_tab(playground)]
        with gr.Tab("Bits"):
            tabs.append(bits_tab(playground, state))
        with gr.Tab("Swap"):
            tabs.append(swap_tab(playground, state, thumbnails))
        if playground.reads_text:
            with gr.Tab("Classify"):
                tabs.append(classify_tab(playground, state))
        if playground.drawers:
            with gr.Tab("Draw"):
                draw_tab(playground)
        if playground.unified is not None:
            with gr.Tab("Caption"):
                tabs.append(caption_tab(playground, state))
        if playground.assistant is not None:
            with gr.Tab("Ask"):
                tabs.append(ask_tab(playground, state))
    return tabs
