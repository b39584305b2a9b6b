"""The folder of a running playground: uploads and results lie in it, and it goes with its process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PREFIX = "qlip-app-"
LOCK = "lock"  # held while the owner lives; the kernel lets it go with a killed one
SETTLED_SECONDS = 60  # a younger folder's owner may be about to lock it


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that is removed in the end; those of owners that were killed are removed in the beginning."""
    for left in Path(tempfile.gettempdir()).glob(PREFIX + "*"):
        _remove_leftover(left)
    with (
        tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as name,
        (Path(name) / LOCK).open("w") as lock,
    ):
        with contextlib.suppress(OSError):  # file systems without locks
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        files = Path(name) / "files"  # gradio serves all that lies in it
        files.mkdir()
        yield files


def _remove_leftover(folder: Path) -> None:
    """Remove a folder of this user's whose owner is gone."""
    with contextlib.suppress(OSError):
        status = folder.lstat()
        if status.st_uid != os.getuid() or time.time() - status.st_mtime < SETTLED_SECONDS:
            return
        with (folder / LOCK).open("r") as lock:  # folders without one are not known to be dead
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)  # refuses a link
