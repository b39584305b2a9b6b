"""The commands that write text: ask, of an assistant; caption and complete, of a UM3. As `commands.py`.

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


def caption(
    model: Positional[Path],
    images: Positional[tuple[Path, ...]] = (),
    *,
    temperature: float = 0.0,
    top_p: float = 0.95,
    max_new_tokens: int = 128,
    seed: int = 0,
    batch_size: int = 16,
    json: Path | None = None,
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
) -> None:
    """Write captions of pictures with a UM3: the caption alone for one, `picture.png: caption` for each of several.

    Example: qlip caption runs/scenes_um3_tiny/export picture.png

    Args:
        model: Folder of a UM3, the export of a run.
        images: Picture files. A broken or missing one is refused before any is captioned.
        temperature: 0 takes the most probable words, always the same; 1 with top-p .95 is how the paper draws.
        top_p: Above temperature 0, draw among the most probable ids that together reach this.
        max_new_tokens: Longer captions are cut.
        seed: Above temperature 0, another seed gives other captions.
        batch_size: Pictures captioned together.
        json: Also write a line {"image": ..., "caption": ...} for each to this .jsonl file, which is replaced.
        device: auto, cpu, cuda, ...
        precision: What the model computes in; auto is bf16 on GPUs that have it, fp32 elsewhere.
    """
    from qlip.apps.caption import caption_pictures
    from qlip.models.unified_model import WritingSettings

    settings = WritingSettings(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens)
    caption_pictures(
        model,
        images,
        settings,
        seed=seed,
        batch_size=batch_size,
        json_path=json,
        device=device,
        precision=precision,
    )


def complete(
    model: Positional[Path],
    parts: Positional[tuple[str, ...]] = (),
    *,
    images: bool = False,
    out: Path | None = None,
    num: int = 1,
    seed: int = 0,
    temperature: float = 1.0,
    top_p: float = 0.95,
    max_new_tokens: int | None = None,
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
) -> None:
    """Go on behind a text, or behind texts and pictures in any order, with a UM3; it prints what comes next alone.

    Example: qlip complete runs/scenes_um3_tiny/export "A red star" picture.png "and" --images --out drawn

    Args:
        model: Folder of a UM3, the export of a run.
        parts: Texts in quotes and picture files, in order; they are joined as they are, without spaces. "" begins anew.
        images: Let the model draw too; [0.png] stands in the text where a picture belongs.
        out: Folder for the pictures, needed with --images; they get the next free numbers.
        num: Continuations, each under a line with its number and seed.
        seed: Of the first continuation; the next ones have the next seeds.
        temperature: Logits are divided by it; 0 takes the most probable id. 1 and top-p .95 are the paper's.
        top_p: Draw among the most probable ids that together reach this.
        max_new_tokens: Most ids written, those of pictures included; a picture that does not fit is left out. 128 if
            not given, and with --images one whole picture more.
        device: auto, cpu, cuda, ...
        precision: What the model computes in; auto is bf16 on GPUs that have it, fp32 elsewhere.
    """
    from qlip.apps.complete import complete as complete_parts

    complete_parts(
        model,
        parts,
        images=images,
        out=out,
        num=num,
        seed=seed,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        device=device,
        precision=precision,
    )
