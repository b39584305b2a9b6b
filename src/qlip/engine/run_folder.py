"""The run folder: made and checked before training starts, so that no hour is lost to a full disk.

runs/<name>/  config.json  metrics.jsonl  checkpoints/  export/  samples/  tensorboard/  skipped.jsonl
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qlip.core.config import differences
from qlip.core.errors import UserError
from qlip.engine.checkpoint import checkpoint_folders

VERSIONS = ("qlip", "torch", "torchvision", "transformers", "pillow", "timm")


def make_writable(folder: Path) -> None:
    """Make the folder. Raises `UserError` when it cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write_test"
        probe.write_bytes(b"")
        probe.unlink(missing_ok=True)  # another rank may have been here too
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another folder") from None


def prepare_run_folder(
    folder: Path, config: dict[str, Any], *, changes: list[str], bytes_needed: int, accept_changes: bool
) -> None:
    """Make the folder and write config.json, or check that a resumed run still has the same config.

    `changes` are the lines in which the config differs from its recipe; they are only recorded.

    Raises `UserError` before anything is trained: no permission, no space, or, once there is a checkpoint to resume,
    a changed config without `accept_changes` (each difference is named).
    """
    make_writable(folder)
    free = shutil.disk_usage(folder).free
    if free < bytes_needed:
        raise UserError(
            f"{folder} has {free / 1e9:.2f} GB free, the run needs about {bytes_needed / 1e9:.2f} GB "
            "(checkpoints and export); free space or choose another --out"
        )
    path = folder / "config.json"
    if path.exists():
        changed = differences(json.loads(path.read_text())["config"], config)
        if not changed:
            return  # commit and versions stay those the run was started with
        if checkpoint_folders(folder) and not accept_changes:
            shown = "; ".join(changed[:5]) + (f"; and {len(changed) - 5} more" if len(changed) > 5 else "")
            raise UserError(
                f"{folder} was started with another config: {shown}; "
                "add --accept-changes to go on with the new one, or choose another --out"
            )
    content = {"config": config, "changes_from_recipe": changes, "git_commit": git_commit(), "versions": versions()}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1))
    temporary.replace(path)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number."""
    return {"python": platform.python_version(), **{name: version(name) for name in VERSIONS}}


def git_commit() -> str | None:
    """The commit of the source this runs from, or None outside a checkout of qlip."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():  # installed: a repository above would be the user's, not ours
        return None
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
