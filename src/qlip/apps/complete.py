"""`qlip complete`: texts and pictures -> what a UM3 writes, and if it may draws, behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from qlip.apps.caption import check_seed, open_to_write
from qlip.apps.first_look import open_picture
from qlip.apps.generate import Precision
from qlip.core.errors import UserError
from qlip.core.log import console
from qlip.data.folders import PICTURE_ENDINGS
from qlip.engine.run_folder import make_writable
from qlip.models.modality import ids_since_begin
from qlip.models.unified_model import WritingSettings
from qlip.models.unified_processor import Part

USAGE = 'qlip complete MODEL "Once upon a time"'
TEXT_LENGTH = 128  # ids that are written where nothing else is asked for


def complete(
    model: Path,
    words: Sequence[str],
    *,
    images: bool = False,
    out: Path | None = None,
    num: int = 1,
    seed: int = 0,
    temperature: float = 1.0,
    top_p: float = 0.95,
    max_new_tokens: int | None = None,
    device: str = "auto",
    precision: Precision = "auto",
) -> None:
    """Print `num` continuations of the words and pictures, without these; continuation k has the seed `seed` + k.

    With `images` the model may draw: pictures are written to `out` under the next free numbers, and `[0.png]` stands in
    the text where each belongs. `max_new_tokens` bounds all that is written, pictures too; None is 128, and with
    `images` one whole picture more. Raises `UserError` for pictures that are not there or broken, a prompt that fills
    the context, and numbers that leave no room for a picture.
    """
    if not words:
        raise UserError(f"nothing given to continue: {USAGE}")
    if num < 1:
        raise UserError(f"--num is {num}: give at least 1")
    if images and out is None:
        raise UserError("--images needs a folder for the pictures: add --out DIR")
    if out is not None and not images:
        raise UserError("--out is for pictures that the model draws: add --images, or leave it out")
    settings = WritingSettings(
        temperature=temperature, top_p=top_p, max_new_tokens=TEXT_LENGTH if max_new_tokens is None else max_new_tokens
    )
    settings.sampling()
    check_seed(seed)
    check_seed(seed + num - 1)
    parts = parts_of(words)
    unified = open_to_write(model, device=device, precision=precision)
    vocabulary = unified.processor.vocabulary
    needed = vocabulary.image_length + 2  # with its markers
    if images and max_new_tokens is None:
        settings = replace(settings, max_new_tokens=TEXT_LENGTH + needed)
    elif images and settings.max_new_tokens < needed:
        raise UserError(
            f"--max-new-tokens is {max_new_tokens}, and a picture takes {needed}: give more, or leave --images out"
        )
    if out is not None:
        make_writable(out)
    drawn: list[Path] = []
    cut_off = 0
    for number in range(num):
        ids = unified.continue_ids(parts, settings, images=images, seed=seed + number)
        written = unified.processor.decode(ids)
        if num > 1:
            print(f"--- {number + 1} of {num}, --seed {seed + number}")
        print("".join(part if isinstance(part, str) else _kept(part, out, drawn) for part in written), flush=True)
        count = int(ids_since_begin(ids[None], vocabulary)[0, -1])
        cut_off += 0 <= count < vocabulary.image_length
    if cut_off:
        console.print(f"{cut_off} pictures were cut off and left out: one takes {needed} ids, raise --max-new-tokens")
    if out is not None:
        console.print(f"{len(drawn)} pictures in {out}" if drawn or cut_off else "no picture: the model began none")


def parts_of(words: Sequence[str]) -> list[Part]:
    """Words of the command line -> texts and pictures: what is called like a picture is one, all else is text.

    A name with white space in it that is no file is text; bytes that are no UTF-8 become U+FFFD. Raises `UserError` for
    pictures that are not there or broken.
    """
    return [open_picture(Path(word)) if _names_picture(word) else _readable(word) for word in words]


def _readable(word: str) -> str:
    return word.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _names_picture(word: str) -> bool:
    if Path(word).suffix.lower() not in PICTURE_ENDINGS:
        return False
    return not any(character.isspace() for character in word) or Path(word).is_file()


def _kept(picture: Image.Image, out: Path | None, drawn: list[Path]) -> str:
    """Write it under the next free number and say its name."""
    assert out is not None, "only --images lets the model draw"
    number = len(drawn)
    while (out / f"{number}.png").exists():
        number += 1
    path = out / f"{number}.png"
    try:
        picture.save(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free disk space or choose another --out") from None
    drawn.append(path)
    return f"[{path.name}]"
