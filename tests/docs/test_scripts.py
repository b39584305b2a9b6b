"""Scripts outside the package still find what they import: benchmarks, and what draws docs and results."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path for pattern in ("benchmarks/*.py", "docs/**/*.py") for path in ROOT.glob(pattern))
SCRIPTS = [path for path in FILES if "__main__" in path.read_text(encoding="utf-8")]  # the others are imported by them


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_imports(script, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
    assert callable(runpy.run_path(str(script))["main"])
