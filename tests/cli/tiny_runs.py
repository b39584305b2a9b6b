"""Commands as a user gives them, in this process, and what makes a training take seconds."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from qlip.cli import main
from qlip.core.log import read_metrics

TOWER = {"hidden-size": "16", "num-layers": "1", "num-heads": "2", "intermediate-size": "24"}
OVERRIDES = {
    "model.image-size": "16",
    "model.patch-size": "8",
    "model.context-length": "16",
    "model.projection-dim": "16",
    **{f"model.{part}.{name}": value for part in ("encoder", "decoder", "text") for name, value in TOWER.items()},
    "data.batch-size": "4",
    "data.shuffle-buffer": "8",
    "trainer.steps": "3",
    "trainer.log-every": "1",
    "trainer.device": "cpu",
}


def tiny(**changes: str) -> list[str]:
    """Options that cut a recipe down to 16 px and three steps; `changes` with _ for - and __ for a dot."""
    named = {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
    return [word for name, value in (OVERRIDES | named).items() for word in (f"--{name}", value)]


class Shell:
    """Runs `qlip ...` through `main` and keeps what it printed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capfd = monkeypatch, capfd

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        """Exit code, standard output and standard error, those of child processes too."""
        self.monkeypatch.setattr(sys, "argv", ["qlip", *map(str, arguments)])
        self.capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *self.capfd.readouterr()

    def refused(self, *arguments: object) -> str:
        """The one line of a mistake, without `qlip: `."""
        code, _, err = self(*arguments)
        assert (code, err.count("\n")) == (2, 1), err
        assert err.startswith("qlip: ")
        return err.removeprefix("qlip: ").strip()

    def works(self, *arguments: object) -> str:
        """What a command that succeeds prints."""
        code, out, err = self(*arguments)
        assert code == 0, err
        return out


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    """A tar of files in the given order."""
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def stopped_by_ctrl_c(words: list[str], run: Path, *, lines: int) -> int:
    """Train in another process, press Ctrl-C once the run has logged so many steps; one line must be what it says.

    Returns the step of the newest checkpoint.
    """
    start = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from qlip.cli import main; main()"
    process = subprocess.Popen(  # the handler: a suite started in the background hands down an ignored SIGINT
        [sys.executable, "-c", start, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        while process.poll() is None and len(read_metrics(run / "metrics.jsonl")) < lines:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert err == "qlip: stopped; start the same command again to go on\n"
    assert process.returncode == 130
    return max(int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_*[0-9]"))
