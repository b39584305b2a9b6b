"""The playground's tabs with words: classify, draw, caption, ask. Each is there when its model is."""

from __future__ import annotations

import html
from typing import Any

import gradio as gr
from torch import Tensor

from qlip.apps.playground_models import Chosen, Playground, shown
from qlip.apps.playground_sent import MOST_LABELS, limited, seed_of
from qlip.apps.playground_tabs import MODEL_CALL, Tab, begun, picture_box, said
from qlip.models.generator import Generator

FIRST_LABELS = "red circle\nblue star\ngreen square\nyellow heart\na photo of a cat"
MOST_SHOWN = 10  # labels


def classify_tab(playground: Playground, state: gr.State) -> Tab:
    """Own labels, compared with the picture."""
    gr.Markdown(
        "The tokenizer was trained with captions, so it can tell which **text** fits the picture best. Nothing was "
        "trained for these labels: write your own."
    )
    with gr.Row():
        with gr.Column(min_width=240):
            labels = gr.Textbox(
                FIRST_LABELS,
                label=f"Labels, one a line (at most {MOST_LABELS})",
                lines=8,
                max_lines=14,
                elem_id="labels",
            )
            button = gr.Button("Classify", variant="primary", elem_id="classify")
        with gr.Column(min_width=240):
            answer = gr.Label(label="How well they fit", num_top_classes=MOST_SHOWN, elem_id="probabilities")

    def on_click(chosen: Chosen | None, text: str) -> dict[str, float]:
        return playground.classify(begun(chosen), text)

    button.click(said(on_click), [state, labels], answer, **MODEL_CALL)
    return Tab(outputs=[answer], fresh=lambda chosen: [None])


def draw_tab(playground: Playground) -> None:
    """A prompt drawn by the generator or the UM3."""
    names = list(playground.drawers)
    gr.Markdown(
        "A second model **writes tokens** for your words, one after the other, as a language model writes words; the "
        "tokenizer turns their bits into a picture. The same seed draws the same picture."
    )
    with gr.Row():
        with gr.Column(min_width=240):
            prompt = gr.Textbox("a red star", label="What to draw", lines=2, elem_id="draw-prompt")
            name = gr.Radio(names, value=names[0], label="Drawn by", visible=len(names) > 1, elem_id="drawn-by")
            seed = gr.Number(0, label="Seed", step=1, elem_id="draw-seed")
            guidance = gr.Slider(
                0,
                15,
                value=playground.guidance(names[0]),
                step=0.1,
                label="Guidance",
                info="How strictly it keeps to the words; 1 is none.",
                elem_id="draw-guidance",
            )
            button = gr.Button("Draw", variant="primary", elem_id="draw")
        with gr.Column(min_width=240):
            picture = picture_box("Drawn", "drawn")

    def on_click(
        prompt: str,
        name: str,
        seed: object,
        guidance: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - how gradio finds it
    ) -> Any:
        drawer = playground.drawer(name)
        rows, columns = drawer.model.config.grid
        cut = drawer.captions.num_cut(limited(prompt)) if isinstance(drawer, Generator) else 0
        if cut:
            gr.Warning(html.escape(f"The last {cut} tokens of this prompt are not read: shorten it"))

        def report(done: int, bits: Tensor) -> None:
            progress((done, rows * columns), unit="tokens")

        return shown(playground.draw(name, prompt, seed=seed_of(seed), guidance=guidance, on_tokens=report))

    button.click(said(on_click), [prompt, name, seed, guidance], picture, **MODEL_CALL)
    name.change(said(playground.guidance), name, guidance, show_progress="hidden", api_visibility="private")


def caption_tab(playground: Playground, state: gr.State) -> Tab:
    """What a UM3 writes about the picture."""
    gr.Markdown(
        "One model reads text and image tokens alike (**UM3**). It reads your picture's tokens and goes on in words."
    )
    button = gr.Button("Describe my picture", variant="primary", elem_id="caption")
    words = gr.Textbox(label="Caption", lines=3, interactive=False, buttons=["copy"], elem_id="caption-text")

    def on_click(chosen: Chosen | None) -> str:
        return playground.caption(begun(chosen)) or "(the model wrote no caption)"

    button.click(said(on_click), state, words, **MODEL_CALL)
    return Tab(outputs=[words], fresh=lambda chosen: [""])


def ask_tab(playground: Playground, state: gr.State) -> Tab:
    """A question about the picture, answered by the assistant."""
    gr.Markdown("A language model sees your picture through the tokenizer's encoder. **Ask it** about the picture.")
    question = gr.Textbox("What is in the picture?", label="Question", lines=2, elem_id="question")
    button = gr.Button("Ask", variant="primary", elem_id="ask")
    words = gr.Textbox(label="Answer", lines=4, interactive=False, buttons=["copy"], elem_id="answer")

    def on_click(chosen: Chosen | None, text: str) -> str:
        return playground.ask(begun(chosen), text) or "(the model wrote no answer)"

    button.click(said(on_click), [state, question], words, **MODEL_CALL)
    return Tab(outputs=[words], fresh=lambda chosen: [""])
