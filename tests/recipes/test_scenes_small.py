"""`scenes_small` says of itself what is so, and both its stages train on what its docstring asks for."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path

import pytest
import torch

from qlip.apps.check_measure import measure, training_flops
from qlip.core.arguments import parse_arguments
from qlip.core.config import differences, to_json
from qlip.core.log import read_metrics
from qlip.data.scene_shards import write_scene_shards
from qlip.data.scenes import SceneConfig
from qlip.engine.planner import Speed
from qlip.models.qlip.loading import load_model
from qlip.models.qlip.modeling import QLIPModel
from qlip.recipes import find_recipe, scenes
from qlip.recipes.model import ModelConfig, TowerSize
from qlip.recipes.run import RunConfig, TrainOptions, run_recipe
from qlip.tasks.align import AlignConfig
from qlip.tasks.reconstruct import ReconstructConfig

RECIPES = {"scenes_small": scenes.scenes_small, "scenes_small_stage2": scenes.scenes_small_stage2}


@pytest.mark.parametrize("name", RECIPES)
def test_the_docstrings_command_memory_and_time_are_those_of_the_recipe(name):
    said = inspect.getdoc(RECIPES[name]) or ""
    words = shlex.split(re.search(r"^Command: +(.*)$", said, flags=re.MULTILINE)[1])
    assert words[:3] == ["qlip", "train", name]
    config = find_recipe(name)
    options = parse_arguments(TrainOptions, words[3:], prog="qlip", default=TrainOptions(run=config, out=Path("run")))
    assert bool(options.run.task.init) == name.endswith("stage2")
    variant = measure("as it is", config, perceptual=True, num_gpus=1)
    plan, batch_size = variant.plan, config.data.batch_size
    assert plan.largest_batch(24e9) >= batch_size
    gigabytes = re.search(r"24 GB with fast bf16 \((\d+) GB by `qlip check`\)", said)[1]
    assert float(gigabytes) == pytest.approx(plan.total(batch_size) / 1e9, abs=1.0)
    seconds = re.search(r"computing alone is\s+about (\d+) seconds on one H100", said)[1]
    per_picture = Speed(tflops=989.0, mfu=0.35).seconds(training_flops(variant, config))
    assert float(seconds) == pytest.approx(per_picture * batch_size * config.trainer.steps, rel=0.05)


def test_its_sizes():
    config = find_recipe("scenes_small")
    with torch.device("meta"):
        model = QLIPModel(config.model.build_config())
    vision = [*model.vision_model.parameters(), *model.vision_decoder.parameters()]
    assert round(sum(parameter.numel() for parameter in vision) / 1e5) / 10 == 23.2
    assert model.config.vision_config.grid_size**2 == 64 and model.config.vision_config.num_bits == 28
    assert config.data.batch_size * config.trainer.steps == pytest.approx(2.0e6, rel=0.03)
    assert config.trainer.compile and config.trainer.precision == "bf16"


def test_it_is_scenes_tiny_in_sizes_and_rate_alone():
    for name in RECIPES:
        changed = differences(to_json(find_recipe(name.replace("small", "tiny"))), to_json(find_recipe(name)))
        fields = {line.split(":")[0] for line in changed}
        kept = {field for field in fields if field.startswith(("task.", "data."))}
        assert kept <= {
            "task.optimizer.lr",
            "task.optimizer.warmup_steps",
            "task.discriminator_optimizer.warmup_steps",
            "task.discriminator_channel_base",
            "task.discriminator_max_channels",
            "data.batch_size",
            "data.num_workers",
        }
    first, second = find_recipe("scenes_small"), find_recipe("scenes_small_stage2")
    assert isinstance(first.task, AlignConfig) and isinstance(second.task, ReconstructConfig)
    assert first.task.pixel_weight == 20 and first.data.caption_per_batch
    assert second.task.perceptual == "encoder" and second.model == first.model


def cut(config: RunConfig, data: str) -> RunConfig:
    """Small towers and few pictures; losses, optimizers and how data are read stay."""
    tower = TowerSize(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24)
    config.model = ModelConfig(
        image_size=16,
        patch_size=8,
        encoder=tower,
        decoder=tower,
        text=tower,
        context_length=config.model.context_length,
        projection_dim=16,
        initializer_range=0.25,  # 1/sqrt(width), the rule of the recipe
    )
    config.data.train, config.data.batch_size, config.data.num_workers = data, 8, 1
    config.trainer.steps, config.trainer.log_every, config.trainer.compile = 12, 4, False
    config.trainer.device, config.trainer.tracker = "cpu", "none"
    if isinstance(config.task, ReconstructConfig):
        config.task.discriminator_channel_base, config.task.discriminator_max_channels = 64, 8
    return config


def test_both_stages_train_in_bf16_with_a_worker(tmp_path: Path):
    data = write_scene_shards(tmp_path / "data", num=64, split="train", config=SceneConfig(image_size=16))[0].parent
    exports = []
    for number, name in enumerate(RECIPES, start=1):
        config = cut(find_recipe(name), str(data))
        config.task.init = str(exports[0]) if exports else ""
        exports.append(run_recipe(config, folder=tmp_path / f"stage{number}"))
        lines = read_metrics(tmp_path / f"stage{number}" / "metrics.jsonl")
        assert [line["step"] for line in lines] == [4, 8, 12] and not any("skipped_steps" in line for line in lines)
    first, second = (load_model(export).state_dict() for export in exports)
    moved = {name for name, tensor in second.items() if not torch.equal(first[name], tensor)}
    assert any(name.startswith("vision_decoder") for name in moved)
    assert not any(name.startswith(("vision_model.encoder", "text_model", "visual_projection")) for name in moved)
