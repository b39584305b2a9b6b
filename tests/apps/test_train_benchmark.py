"""The benchmark for a GPU runs on a CPU at tiny size: every part, its page, and what happens when a part fails."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from qlip.core.log import read_metrics
from qlip.models.qlip.modeling import QLIPModel
from qlip.recipes import find_recipe

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark() -> Iterator[SimpleNamespace]:
    """The script and its parts, imported as the script itself does it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        names = ("page", "record", "scenes", "step")
        parts = {name: importlib.import_module(f"train_parts.{name}") for name in names}
        yield SimpleNamespace(train=importlib.import_module("train"), **parts)


@pytest.fixture(scope="module")
def costs(benchmark):
    """Of the tiny model."""
    return benchmark.step.Costs(benchmark.step.recipe_config("cpu", tiny=True))


@pytest.fixture(scope="module")
def steps(benchmark, costs, tmp_path_factory) -> Path:
    """Records of the tiny rows."""
    path = tmp_path_factory.mktemp("step") / "step_cpu.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark.step, "Costs", lambda config: costs)
        benchmark.step.run_step(path, device="cpu", tiny=True, time_left=lambda: 100.0)
    return path


@pytest.fixture(scope="module")
def trained(benchmark, tmp_path_factory) -> Path:
    """Both stages at tiny size."""
    out = tmp_path_factory.mktemp("scenes")
    benchmark.scenes.run_scenes(out, device="cpu", tiny=True, processes=1)
    return out


def test_rates_are_set_against_the_flops_of_the_planner(benchmark, steps):
    record = json.loads(steps.read_text())
    recomputed, kept, several = record["rows"]
    assert record["finished"] and record["recipe"] == "qlip_b_16_256"
    for row in record["rows"]:
        pictures = row["batch_size"] * row["micro_batches"]
        assert row["images_per_s"] == pytest.approx(pictures / row["step_s"], rel=1e-2)
        share = row["needed_gflop_per_image"] * row["images_per_s"] / record["matrix_product_tflop_per_s"] / 1e3
        assert row["share_of_peak"] == pytest.approx(share, rel=1e-2)
    assert kept["computed_gflop_per_image"] == kept["needed_gflop_per_image"] == recomputed["needed_gflop_per_image"]
    assert several["computed_gflop_per_image"] > recomputed["computed_gflop_per_image"]
    assert recomputed["computed_gflop_per_image"] > kept["computed_gflop_per_image"]
    (accumulated,) = record["best"]["accumulation"]
    assert accumulated["time_x_single"] == pytest.approx(recomputed["images_per_s"] / several["images_per_s"], rel=1e-2)
    assert record["best"]["share_of_peak"] == max(row["share_of_peak"] for row in (recomputed, kept))


def test_flops_are_three_forward_passes_and_one_more_for_what_is_done_twice(benchmark, costs):
    config = costs.config.model
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        ids = torch.zeros(1, config.context_length, dtype=torch.int64)
        QLIPModel(config.build_config())(torch.empty(1, 3, 32, 32), ids, torch.ones_like(ids))
    forward = counter.get_total_flops()
    job = benchmark.step.Job(batch_size=512)
    needed, computed = costs.needed_flops(job), costs.computed_flops(job)
    assert needed == pytest.approx(3 * forward, rel=0.05)
    assert 0.6 * forward < computed - needed < forward  # blocks are recomputed but for their last product
    several = benchmark.step.Job(batch_size=512, micro_batches=4)
    more_pairs = 12 * config.projection_dim * (2048 - 512)
    assert costs.computed_flops(several) - computed == pytest.approx(forward + more_pairs, rel=0.01)
    assert costs.needed_flops(several) == needed
    assert costs.predicted_gb(job) < costs.predicted_gb(several) < 1.5 * costs.predicted_gb(job)


def test_a_row_that_fails_and_rows_without_time_leave_the_others(benchmark, tmp_path, monkeypatch):
    step = benchmark.step
    jobs = tuple(step.Job(batch_size=size, compiled=False) for size in (4, 5, 6))
    left = iter([100.0, 100.0, -1.0])

    def fails_at_first(job, *args, **options):
        if job.batch_size == 4:
            raise RuntimeError("CUDA out of memory\nand more")
        rates = dict.fromkeys(
            ("images_per_s", "share_of_peak", "share_of_peak_computed", "needed_gflop_per_image"), 0.25
        )
        return rates | {"peak_gb": 10.04, "predicted_gb": 9.96}

    monkeypatch.setattr(step, "measure_job", fails_at_first)
    monkeypatch.setattr(step, "Costs", lambda config: None)
    monkeypatch.setattr(step, "matrix_product_flops", lambda device, dtype: 1e12)
    record = step.run_step(tmp_path / "s.json", device="cpu", tiny=True, time_left=lambda: next(left), jobs=jobs)
    assert [row.get("failed") for row in record["rows"]] == [
        "RuntimeError: CUDA out of memory", None, "left out: no time",
    ]  # fmt: skip
    assert record["best"]["batch_size"] == 5
    lines = "\n".join(benchmark.page.step_lines(record))
    assert "| eager, recomputed, 1 x 4 | RuntimeError: CUDA out of memory |" in lines and "NOT reached" in lines
    assert "| eager, recomputed, 1 x 5 | 0 | 0.0 | 25.0% | 25.0% | 10.0 (10.0) |" in lines


def test_the_verdict_says_what_was_required_and_reached(benchmark):
    row = {"mode": "compiled, kept", "batch_size": 128, "micro_batches": 1, "share_of_peak": 0.412}
    best = benchmark.step.compare([row, {**row, "batch_size": 64, "share_of_peak": 0.38}])
    said = benchmark.step.verdict(best)
    assert said == ">= 35% of the matrix product's rate: reached, 41.2% (compiled, kept, 128 pairs at once)"
    assert "NOT reached, 34.9%" in benchmark.step.verdict(benchmark.step.compare([{**row, "share_of_peak": 0.349}]))
    assert benchmark.step.verdict(benchmark.step.compare([{**row, "failed": "x"}])).endswith("not measured")


def test_both_stages_are_trained_and_scored(benchmark, trained):
    record = json.loads((trained / "scenes_small.json").read_text())
    first, second = record["stages"]["stage1"], record["stages"]["stage2"]
    assert record["finished"] and record["stage_2"]["zero_shot_same"] is True
    fall = 1 - second["figures"]["encoder_distance"] / first["figures"]["encoder_distance"]
    assert record["stage_2"]["encoder_distance_fall"] == pytest.approx(fall, abs=2e-3)
    assert first["figures"]["top1"] == second["figures"]["top1"]
    assert [line["step"] for line in first["curve"] if "top1" in line] == [6, 12]
    assert [line["decoder/encoder"] for line in second["curve"] if "decoder/encoder" in line]
    lines = read_metrics(trained / "work" / "stage1" / "metrics.jsonl")
    seconds = sum(2 * first["batch_size"] / line["images_per_second"] for line in lines if "images_per_second" in line)
    assert first["training_s"] == pytest.approx(seconds, rel=1e-3)
    assert str(trained) not in (trained / "scenes_small.json").read_text()
    drawn = (trained / "scenes_small.svg").read_text()
    assert drawn.count('id="axes_') == len(benchmark.scenes.PANELS) and "line2d" in drawn
    for stage in ("stage1", "stage2"):
        assert (trained / f"scenes_small_{stage}.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_training_is_kept(benchmark, trained, monkeypatch):
    weights = [trained / "work" / stage / "export" / "model.safetensors" for stage in ("stage1", "stage2")]
    written = [path.stat().st_mtime_ns for path in weights]
    figures = json.loads((trained / "scenes_small.json").read_text())["stages"]["stage2"]["figures"]
    scored = {"eval": "reconstruction", "figures": figures, "card": {"model": "m", "command": "c", "count": 3}}
    monkeypatch.setattr(benchmark.scenes, "run_evals", lambda export, request, **options: [scored])
    for name in ("print_results", "draw_curves"):
        monkeypatch.setattr(benchmark.scenes, name, lambda *_: None)
    record = benchmark.scenes.run_scenes(trained, device="cpu", tiny=True, processes=1)
    assert [path.stat().st_mtime_ns for path in weights] == written
    assert record["stages"]["stage2"]["cards"] == {"reconstruction": {"count": 3}}
    assert [line["step"] for line in record["stages"]["stage1"]["curve"] if "mse" in line] == [2, 4, 6, 8, 10, 12]


def test_workers_have_cores_and_shared_memory(benchmark):
    config = find_recipe("scenes_small")  # a batch is 512 x 3 x 128 x 128 x 4 bytes: 100 MB
    workers = benchmark.scenes.data_workers
    assert workers(config, num_cores=16, shared_memory=64e9) == 14
    assert workers(config, num_cores=64, shared_memory=64e9) == 16
    assert workers(config, num_cores=16, shared_memory=3e9) == 4
    assert workers(config, num_cores=2, shared_memory=64e6) == 1
    assert benchmark.scenes.FULL.folders * -(-benchmark.scenes.FULL.scenes // 1000) >= 16  # a shard for each


def test_the_page_tells_what_was_measured_and_what_not(benchmark, steps, trained, tmp_path):
    for path in (steps, trained / "scenes_small.json"):
        (tmp_path / path.name).write_text(path.read_text())
    page = benchmark.page.write_page(tmp_path, device="cpu", failures={"memory": "ended with code 1"})
    text = page.read_text()
    assert page.name == "scenes_small.md" and text.startswith("# ")
    assert "no figure of this page means anything" in text
    assert "## Memory of a training step\n\nNot finished: ended with code 1.\n" in text
    figures = json.loads((trained / "scenes_small.json").read_text())["stages"]["stage1"]["figures"]
    assert f"| PSNR, dB | {figures['psnr']:.2f} |" in text
    for table in text.split("\n\n"):
        if table.startswith("|"):
            assert len({line.count("|") for line in table.splitlines()}) == 1
    for name in ("scenes_small.svg", "scenes_small_stage1.png", "scenes_small_stage2.png"):
        assert f"]({name})" in text and (trained / name).exists()
    points = [{"variant": "with", "batch_size": 4, "measured_gb": 1.5, "predicted_gb": 1.25}]
    memory = {"machine": {}, "recipe": "r", "compiled": False, "activation_checkpointing": True, "points": points}
    assert "| with | 4 | 1.50 | 1.25 |" in "\n".join(benchmark.page.memory_lines(memory))


def test_a_part_that_fails_or_takes_too_long_is_ended_with_its_children(benchmark, tmp_path):
    run_part = benchmark.train.run_part
    assert run_part([sys.executable, "-c", "pass"], limit=60) is None
    assert run_part([sys.executable, "-c", "raise SystemExit(3)"], limit=60) == "ended with code 3"
    child = tmp_path / "child"
    script = f"sleep 100 & echo $! > {child}; wait"
    assert run_part(["bash", "-c", script], limit=1) == "stopped after 1 seconds"
    pid = int(child.read_text())
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the part's child lived on")


def test_parts_run_one_after_the_other_and_a_failure_is_the_exit_code(benchmark, tmp_path, monkeypatch, capsys):
    train, ran = benchmark.train, []

    def run_part(command, *, limit, environment):
        ran.append((command, limit, environment))
        return "ended with code 1" if len(ran) == 1 else None

    monkeypatch.setattr(train, "run_part", run_part)
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(tmp_path), "--device", "cuda", "--limit", "500"])
    assert train.main() == 1
    (step, *_), (memory, *_), (scenes, *_) = ran
    assert [limit for _, limit, _ in ran] == [480, 240, 500]
    assert step[2:4] == ["--one", "step"] and scenes[2:4] == ["--one", "scenes"] and "--tiny" not in step
    assert memory[1].endswith("memory.py") and memory[-2:] == ["--", "--trainer.no-compile"]
    assert ran[1][2] == {"OUT": str(tmp_path)}
    assert "step: ended with code 1" in capsys.readouterr().out
    assert "Not finished: ended with code 1." in (tmp_path / "scenes_small.md").read_text()
    assert sum(train.LIMITS.values()) < 28 * 60


@pytest.mark.parametrize(
    ("words", "said"), [(["--parts", "step,speed"], "speed is none of step, memory, scenes"), (["--limit", "5"], "20")]
)
def test_impossible_words_are_refused(benchmark, words, said, capsys):
    with pytest.raises(SystemExit):
        benchmark.train.arguments(words)
    assert said in capsys.readouterr().err
