"""Harnesses find qlip through the installed entry point, and looking costs nothing."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

import pytest


def test_the_entry_point_is_installed():
    (found,) = [point for point in entry_points(group="lmms_eval.models") if point.dist.name == "qlip"]
    assert found.value == "qlip.apps.harnesses:lmms_models"


@pytest.mark.parametrize("missing", ["torch", "lmms_eval", "transformers", "accelerate"])
def test_loading_the_entry_point_imports_neither_torch_nor_a_harness(missing):
    code = f"""
import sys
sys.modules[{missing!r}] = None  # importing it now raises
from importlib.metadata import entry_points
(point,) = [point for point in entry_points(group="lmms_eval.models") if point.dist.name == "qlip"]
assert callable(point.load())
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
