"""`qlip caption`: pictures -> what a UM3 writes about each."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

from qlip.apps.first_look import open_picture
from qlip.apps.generate import Precision, dtype_of
from qlip.core.errors import UserError
from qlip.engine.parallel import pick_device
from qlip.models.unified_model import Unified, WritingSettings, open_unified

JSON_ENDINGS = (".jsonl", ".json")  # so that no picture is written over


def caption_pictures(
    model: Path,
    images: Sequence[Path],
    settings: WritingSettings,
    *,
    seed: int = 0,
    batch_size: int = 16,
    json_path: Path | None = None,
    device: str = "auto",
    precision: Precision = "auto",
) -> None:
    """Print the caption of one picture, or `picture: caption` for each of several; an empty one is said on stderr.

    A caption depends on its own picture and the seed alone. `json_path` gets a line `{"image", "caption"}` for each, in
    order, as soon as it is written. All pictures are read before the model is: raises `UserError` for a broken or
    missing one before any caption is written, for a folder that is no UM3 and for impossible numbers.
    """
    if not images:
        raise UserError("no pictures given: qlip caption MODEL picture.png")
    if batch_size < 1:
        raise UserError(f"--batch-size is {batch_size}: give at least 1")
    settings.sampling()
    check_seed(seed)
    if json_path is not None and json_path.suffix not in JSON_ENDINGS:
        raise UserError(f"--json {json_path}: give the file a name that ends in {' or '.join(JSON_ENDINGS)}")
    for path in images:
        open_picture(path)
    unified = open_to_write(model, device=device, precision=precision)
    with ExitStack() as stack:
        lines = None if json_path is None else stack.enter_context(_open_lines(json_path))
        for first in range(0, len(images), batch_size):
            batch = images[first : first + batch_size]
            pictures = [open_picture(path) for path in batch]
            captions = unified.caption(pictures, settings, seeds=[seed] * len(batch))
            for path, caption in zip(batch, captions, strict=True):
                name = str(path).encode("utf-8", "backslashreplace").decode()  # it may be no UTF-8
                print(caption if len(images) == 1 else f"{name}: {caption}", flush=True)
                if not caption:
                    print(f"{name}: the model wrote no caption", file=sys.stderr)
                if lines is not None:
                    lines.write(json.dumps({"image": name, "caption": caption}, ensure_ascii=False) + "\n")
                    lines.flush()


def check_seed(seed: int) -> None:
    """Raise `UserError` for a number that is no seed."""
    if not 0 <= seed < 1 << 63:
        raise UserError(f"--seed is {seed}: give a whole number from 0 to {(1 << 63) - 1}")


def open_to_write(model: Path, *, device: str, precision: Precision) -> Unified:
    """A UM3 on its device. Raises `UserError` for any other folder."""
    place = pick_device(device)
    unified = open_unified(model)
    unified.to(place, dtype=dtype_of(precision, place))
    return unified


def _open_lines(path: Path) -> TextIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another --json") from None
