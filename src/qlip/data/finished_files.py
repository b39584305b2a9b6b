"""Files that appear whole or not at all, and folders that belong to one job: what lets a stopped job go on."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from qlip.core.config import differences
from qlip.core.errors import UserError


@contextlib.contextmanager
def finished_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which has its name once the block has ended; an error in the block leaves nothing.

    Its folder is made. Raises `UserError` when it cannot be written, as on a full disk.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            text = " ".join(str(error).split())[:200]
            raise UserError(f"cannot write {path}: {text}; free disk space or choose another OUT") from None
        raise


def claim_folder(folder: Path, name: str, said: dict[str, Any], *, writes: Iterable[str]) -> None:
    """Write what a job is (JSON values) as `folder/name`, unless that file says the same already.

    Raises `UserError` when it says something else, and when the folder has one of the entries that the job `writes`
    without that file: what is there would be taken for finished.
    """
    path = folder / name
    if not path.exists():
        foreign = next((entry for entry in writes if (folder / entry).exists()), None)
        if foreign is not None:
            raise UserError(f"{folder} has {foreign}, but no {name} that says what it is of; choose another OUT")
        with finished_file(path) as file:
            file.write(json.dumps(said, indent=1).encode())
        return
    try:
        before = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        before = None
    if not isinstance(before, dict):
        raise UserError(f"{path} is damaged, so what is in {folder} is not known; choose another OUT or delete it")
    changed = differences(before, json.loads(json.dumps(said)))
    if changed:
        lines = "; ".join(line if len(line) <= 200 else f"{line[:200]} ..." for line in changed[:3])
        raise UserError(f"{folder} holds something else: {lines}; choose another OUT or delete it")
