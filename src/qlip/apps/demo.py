"""`qlip demo`: scenes -> stage 1 -> stage 2 -> text to image -> report.html, with the code of the paper's sizes.

    OUT/data/{train,test}  OUT/stage1  OUT/stage2  OUT/tokens  OUT/text_to_image  OUT/pictures  OUT/results/*.json
    OUT/report.html

Every part is skipped when its output is already there, so a stopped demo goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qlip.apps.encoding import TokenizeOptions
from qlip.apps.generate import generate_pictures
from qlip.apps.report import write_report
from qlip.apps.tokenize import default_workers, tokenize_images
from qlip.core.log import console
from qlip.data.scene_shards import write_scene_shards
from qlip.data.scenes import SceneConfig
from qlip.evals.results import print_results, write_results
from qlip.evals.run import EvalRequest, run_evals
from qlip.models.generator import open_generator
from qlip.models.qlip.fingerprint import model_fingerprint
from qlip.models.qlip.loading import load_model
from qlip.recipes import find_recipe
from qlip.recipes.downstream import scenes_t2i_tiny
from qlip.recipes.generation_run import run_generation
from qlip.recipes.run import RunConfig, run_recipe

PROMPTS = ("a star", "a red circle", "a blue square", "a heart and a ring")  # what the generator is shown by
NUM_TOKENIZED = 20_000  # scenes that the generator learns from
GENERATOR_STEPS = 1300  # not the recipe's 1,600: the demo should be over in a quarter of an hour
GENERATION_EVAL = "scenes-geneval-v1"
EVALS = ("scenes-reconstruction-v1", "scenes-zeroshot-v1", "scenes-linear-v1", "scenes-knn20-v1")
TRAIN_OBJECT_COUNTS = (0.85, 0.05, 0.05, 0.05)  # mostly single objects: their captions teach shapes soonest


class Timings:
    """Seconds per part, kept in results/timings.json over restarts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of this part."""
        started = time.monotonic()
        yield
        self.values[name] = round(self.values.get(name, 0.0) + time.monotonic() - started, 1)
        self.values["peak_memory_gb"] = max(self.values.get("peak_memory_gb", 0.0), round(peak_memory_gb(), 2))
        self.values["machine"] = machine()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")  # a kill must not leave half a file that stops the next start
        temporary.write_text(json.dumps(self.values, indent=1))
        temporary.replace(self.path)


def peak_memory_gb() -> float:
    """Largest resident memory of this process so far, in GB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if platform.system() == "Darwin" else peak * 1024 / 1e9  # bytes there, KiB on Linux


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return {"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version(), "torch": version("torch")}


def run_demo(out: Path, *, train_scenes: int, test_scenes: int, seed: int) -> None:
    """Train, evaluate, report. Raises `UserError` before training when `out` cannot be used."""
    started = time.monotonic()
    stage1, stage2 = find_recipe("scenes_tiny"), find_recipe("scenes_tiny_stage2")
    size = stage1.model.image_size
    train_data, test_data = out / "data" / "train", out / "data" / "test"
    train_config = SceneConfig(image_size=size, seed=seed, object_counts=TRAIN_OBJECT_COUNTS)
    test_config = SceneConfig(image_size=size, seed=seed)
    timings = Timings(out / "results" / "timings.json")
    with timings.part("scenes"):
        write_scene_shards(train_data, num=train_scenes, split="train", config=train_config)
        write_scene_shards(test_data, num=test_scenes, split="test", config=test_config)
    for name, config in (("stage1", stage1), ("stage2", stage2)):
        _train_and_evaluate(out, name, config, train_data, test_data, seed=seed, timings=timings)
    _text_to_image(out, train_data, test_data, seed=seed, timings=timings)
    with timings.part("report"):
        report = write_report(out)
    console.print(
        f"done in {(time.monotonic() - started) / 60:.1f} min, peak memory {peak_memory_gb():.1f} GB: {report}"
    )


def results_of(result_file: Path, fingerprint: str, evals: tuple[str, ...]) -> list[dict[str, Any]] | None:
    """Results written earlier, if they are all there and of these very weights; None when they must be measured."""
    if not result_file.exists():
        return None
    results = json.loads(result_file.read_text())
    of_these_weights = all(result["card"]["model_fingerprint"] == fingerprint for result in results)
    complete = {result["card"].get("protocol") for result in results} == set(evals)
    return results if of_these_weights and complete else None


def _train_and_evaluate(
    out: Path, name: str, config: RunConfig, train_data: Path, test_data: Path, *, seed: int, timings: Timings
) -> None:
    config.data.train = str(train_data)
    config.trainer.seed = seed
    if config.task.kind == "reconstruct":
        config.task.init = str(out / "stage1" / "export")
    with timings.part(f"{name} training"):
        export = run_recipe(config, folder=out / name)
    _evaluate(out, name, export, model_fingerprint(load_model(export)), EVALS, train_data, test_data, timings=timings)


def _evaluate(
    out: Path,
    name: str,
    export: Path,
    fingerprint: str,
    evals: tuple[str, ...],
    train_data: Path,
    test_data: Path,
    *,
    timings: Timings,
) -> None:
    """Print the figures of an export, measured now unless they have been."""
    result_file = out / "results" / f"{name}.json"
    results = results_of(result_file, fingerprint, evals)
    if results is None:
        with timings.part(f"{name} evaluation"):
            request = EvalRequest(
                data=str(test_data),
                train_data=str(train_data) if evals == EVALS else "",
                evals=evals,
                max_samples=2000,
                folder=out / "results" / name,
            )
            results = run_evals(export, request)
        write_results(result_file, results)
    console.print(f"{name}:")
    print_results(results)


def _text_to_image(out: Path, train_data: Path, test_data: Path, *, seed: int, timings: Timings) -> None:
    """Tokens of the stage-2 model, a generator over them, its figures, and pictures of `PROMPTS`."""
    name, tokenizer = "text_to_image", out / "stage2" / "export"
    config = scenes_t2i_tiny()
    config.tokenizer, config.data.tokens = str(tokenizer), str(out / "tokens")
    config.trainer.steps, config.trainer.seed = GENERATOR_STEPS, seed
    with timings.part("tokens"):
        options = TokenizeOptions(
            model=str(tokenizer), out=out / "tokens", caption_fields=("prompts",), workers=default_workers("auto")
        )
        tokenize_images(str(train_data), options, max_samples=NUM_TOKENIZED)
    with timings.part(f"{name} training"):
        export = run_generation(config, folder=out / name)
    fingerprint = open_generator(export).identity()["model_fingerprint"]
    _evaluate(out, name, export, fingerprint, (GENERATION_EVAL,), train_data, test_data, timings=timings)
    with timings.part("pictures"):
        generate_pictures(export, PROMPTS, num=4, out=out / "pictures", seed=seed, sampling={})
