"""The benchmark that measures what `qlip check` predicts runs on a CPU too."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from check_options import options

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "memory.py"


def test_the_benchmark_measures_both_variants_and_draws_them(tmp_path):
    spec = importlib.util.spec_from_file_location("benchmark_memory", BENCHMARK)
    benchmark = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = benchmark  # dataclasses look their module up
    spec.loader.exec_module(benchmark)
    config = options("scenes_tiny_stage2", "--task.discriminator-max-channels", "4").run
    points = benchmark.run_all(config, [4, 8], "cpu")
    assert [(point.variant.split()[0], point.batch_size) for point in points] == [
        ("without", 4), ("without", 8), ("with", 4), ("with", 8),
    ]  # fmt: skip
    assert all(point.measured_gb > 0 and point.predicted_gb > 0 for point in points)
    assert points[3].predicted_gb > points[2].predicted_gb > points[0].predicted_gb
    benchmark.draw(points, tmp_path / "memory.svg", title="a title")
    drawn = (tmp_path / "memory.svg").read_text()
    assert drawn.startswith("<?xml") and "line2d" in drawn
