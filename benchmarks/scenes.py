"""How many scenes per second the renderer paints, and how many shards' samples per second are written.

.venv/bin/python benchmarks/scenes.py            # writes benchmarks/results/scenes.json
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from qlip.apps.demo import machine
from qlip.data.scene_shards import write_scene_shards
from qlip.data.scenes import SceneConfig, render, sample_scenes

RESULT = Path(__file__).parent / "results" / "scenes.json"
NUM_SCENES, REPEATS = 1000, 7


def scenes_per_second(image_size: int) -> float:
    """Median rate over `REPEATS` shards of sampling and rendering, after one shard of warm-up."""
    config = SceneConfig(image_size=image_size)
    rates = []
    for shard in range(REPEATS + 1):
        started = time.perf_counter()
        render(sample_scenes(NUM_SCENES, split="train", shard=shard, config=config), image_size=image_size)
        rates.append(NUM_SCENES / (time.perf_counter() - started))
    return median(rates[1:])


def shard_samples_per_second(image_size: int) -> float:
    """Rate of the whole writer: render, captions, PNG, tar, parquet."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        write_scene_shards(Path(folder), num=3000, split="train", config=SceneConfig(image_size=image_size))
        return 3000 / (time.perf_counter() - started)


def main() -> None:
    """Measure, print, write."""
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "rendered_scenes_per_second": {str(size): round(scenes_per_second(size)) for size in (48, 64, 256)},
        "written_samples_per_second_48px": round(shard_samples_per_second(48)),
    }
    print(json.dumps(result, indent=1))
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
