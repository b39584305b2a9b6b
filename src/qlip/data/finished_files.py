"""Files that appear whole or not at all, and folders that belong to one job: what lets a stopped job go on."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from qlip.core.config import differences
from qlip.core.errors import UserError, one_line

LOCK = ".lock"
TEMPORARY = re.compile(r"\.qlip-(\d+)\.tmp$")  # ends the name of a file that is being written, with the process
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Write to a folder, which is made, as the only process; the kernel ends this for one that is killed.

    What a killed one has left of `finished_file` is removed. On file systems without locks nothing keeps others out.
    Raises `UserError` while another process is writing, and when the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise _cannot_write(folder, error) from None
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another qlip command is writing to {folder}; wait for it or stop it") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise _cannot_write(folder, error) from None
        _remove_leftovers(folder)
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)  # a forked process may still have the file open
        os.close(file)


@contextlib.contextmanager
def finished_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which is on the disk under its name once the block has ended; an error in it leaves nothing.

    Its folder is made. Raises `UserError` when it cannot be written, as on a full disk.
    """
    temporary = path.with_name(f"{path.name}.qlip-{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a name may outlive a power cut that its content does not
        temporary.replace(path)
        _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _cannot_write(path, error) from None
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
    except IsADirectoryError as error:
        raise _cannot_write(path, error) from None
    except (OSError, ValueError, RecursionError):
        before = None
    if not isinstance(before, dict):
        raise UserError(f"{path} is damaged, so what is in {folder} is not known; choose another OUT or delete it")
    changed = differences(before, json.loads(json.dumps(said)))
    if changed:
        lines = "; ".join(line if len(line) <= 200 else f"{line[:200]} ..." for line in changed[:3])
        raise UserError(f"{folder} holds something else: {lines}; choose another OUT or delete it")


def _cannot_write(path: Path, error: OSError) -> UserError:
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return UserError(f"cannot write {path}: a file is in the way; choose another OUT")
    if error.errno == errno.EISDIR:
        return UserError(f"cannot write {path}: a folder is in the way; choose another OUT")
    return UserError(f"cannot write {path}: {one_line(error)}; free disk space or choose another OUT")


def _sync_folder(folder: Path) -> None:
    """Put a new name on the disk too, where folders can be synced."""
    with contextlib.suppress(OSError):
        file = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def _remove_leftovers(folder: Path) -> None:
    for place, _, names in os.walk(folder):
        for found in filter(None, map(TEMPORARY.search, names)):
            if not _is_running(int(found[1])):
                with contextlib.suppress(OSError):
                    (Path(place) / found.string).unlink()


def _is_running(process: int) -> bool:
    """Here; asked because on a file system without locks another command may be at work."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is another user's
        return True
    return True
