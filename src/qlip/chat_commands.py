"""The command around assistants: ask. As `commands.py`: signature and docstring are the help.

Nothing heavy is imported before a command is called.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction


def ask(
    model: Positional[Path],
    words: Positional[tuple[str, ...]] = (),
    *,
    image: Annotated[tuple[Path, ...], UseAppendAction] = (),
    temperature: float = 0.0,
    max_new_tokens: int = 128,
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
) -> None:
    """Ask an assistant about pictures; it prints the answer alone. Without a question, at a terminal, it chats.

    Example: qlip ask runs/scenes_llava_tiny/export picture.png "What color is the star?"

    Args:
        model: Folder of an assistant, the export of a run.
        words: Pictures, then the question in quotes; without pictures the question alone. Pictures alone start a chat,
            in which each line is a question and Ctrl-D ends.
        image: A picture before those; give it again for more.
        temperature: 0 takes the most probable words, always the same; higher draws among others.
        max_new_tokens: Longer answers are cut.
        device: auto, cpu, cuda, ...
        precision: What the model computes in; auto is bf16 on GPUs that have it, its file's elsewhere.
    """
    from qlip.apps.ask import answer_question, answer_settings, chat, pictures_and_question

    images, question = pictures_and_question(words, images=image)
    settings = answer_settings(temperature=temperature, max_new_tokens=max_new_tokens)
    if question is None:
        chat(model, images, settings, device=device, precision=precision)
    else:
        print(answer_question(model, images, question, settings, device=device, precision=precision))
