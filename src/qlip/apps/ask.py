"""`qlip ask`: pictures and a question -> an answer, or a chat at the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from qlip.apps.first_look import open_picture
from qlip.core.errors import UserError
from qlip.core.log import console
from qlip.data.folders import PICTURE_ENDINGS
from qlip.engine.parallel import pick_device
from qlip.models.assistant import AnswerSettings, Assistant, ChatPrompt, Message, open_assistant

Precision = Literal["auto", "fp32", "bf16"]
"""What the assistant computes in: auto is bfloat16 on GPUs that have it, the dtype of its file elsewhere."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
USAGE = 'qlip ask MODEL picture.png "What is in the picture?"'


def pictures_and_question(words: Sequence[str], *, images: Sequence[Path]) -> tuple[list[Path], str | None]:
    """Words of the command line -> pictures, those of `images` first, and the question; None where there is none.

    The last word is the question unless it is a file or is called like a picture. Raises `UserError` for an empty one.
    """
    pictures, question = [*images, *map(Path, words)], None
    for word in words[:-1]:
        if not _names_picture(word):
            raise UserError(f"no picture at {word}; give pictures, and last the question, in quotes: {USAGE}")
    if words and not _names_picture(words[-1]):
        question = words[-1].strip()
        pictures.pop()
        if not question:
            raise UserError(f"the question is empty: {USAGE}")
    return pictures, question


def _names_picture(word: str) -> bool:
    if Path(word).suffix.lower() in PICTURE_ENDINGS and not any(character.isspace() for character in word):
        return True
    try:
        return Path(word).is_file()
    except (OSError, ValueError):  # a question longer than a name may be
        return False


def answer_settings(*, temperature: float, max_new_tokens: int) -> AnswerSettings:
    """The numbers of the command line. Raises `UserError` for impossible ones."""
    if not 0 <= temperature < float("inf"):
        raise UserError(f"--temperature is {temperature}: give 0 or more")
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {max_new_tokens}: give at least 1")
    return AnswerSettings(temperature=temperature, max_new_tokens=max_new_tokens)


def answer_question(
    model: Path,
    images: Sequence[Path],
    question: str,
    settings: AnswerSettings | None = None,
    *,
    device: str = "auto",
    precision: Precision = "auto",
) -> str:
    """The assistant's answer, as transformers' `generate` gives it, without white space around it.

    Raises `UserError` for a picture or an assistant that is not there or is broken, and a question that leaves no room
    in the context.
    """
    prompt = ChatPrompt(messages=[_turn(question, len(images))], images=[open_picture(path) for path in images])
    return _open(model, device=device, precision=precision).answer([prompt], settings)[0]


def chat(
    model: Path,
    images: Sequence[Path],
    settings: AnswerSettings | None = None,
    *,
    device: str = "auto",
    precision: Precision = "auto",
) -> None:
    """Each line from the terminal is a turn that the next ones remember; Ctrl-D or Ctrl-C ends, empty lines do nothing.

    The pictures belong to the first turn. A turn that cannot be answered is said and forgotten. Raises `UserError`
    where there is no terminal, and as `answer_question`.
    """
    pictures = [open_picture(path) for path in images]
    if not sys.stdin.isatty():
        raise UserError(f"no question given: {USAGE}")
    assistant = _open(model, device=device, precision=precision)
    console.print("Ask; each line is a question, Ctrl-D ends.")
    messages: list[Message] = []
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not question:
            continue
        turn = _turn(question, 0 if messages else len(pictures))
        try:
            answer = assistant.answer([ChatPrompt(messages=[*messages, turn], images=pictures)], settings)[0]
        except UserError as error:
            console.print(f"{error} (or start again)", markup=False)
            continue
        messages += [turn, {"role": "assistant", "content": answer}]
        print(answer)


def _turn(question: str, num_images: int) -> Message:
    """A user's message, pictures first. Without one it is a text, which every chat template takes."""
    if not num_images:
        return {"role": "user", "content": question}
    pictures = [{"type": "image"} for _ in range(num_images)]
    return {"role": "user", "content": [*pictures, {"type": "text", "text": question}]}


def _open(model: Path, *, device: str, precision: Precision) -> Assistant:
    place = pick_device(device)
    assistant = open_assistant(model)
    assistant.to(place, dtype=DTYPES.get(precision))
    return assistant
