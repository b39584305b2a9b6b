"""Every tokenizer's recipe builds, and what cannot run is refused in one line before anything is trained or written."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qlip.core.config import differences, from_json, to_json
from qlip.core.errors import UserError
from qlip.core.log import read_metrics
from qlip.data.scene_shards import write_scene_shards
from qlip.data.scenes import SceneConfig
from qlip.engine.optim import parameter_groups
from qlip.models.qlip.loading import load_model, load_processor
from qlip.models.qlip.modeling import QLIPModel
from qlip.recipes import RECIPES, find_recipe
from qlip.recipes.model import ModelConfig, TowerSize
from qlip.recipes.run import RunConfig, load_run, run_recipe
from qlip.tasks.align import AlignConfig, AlignTask
from qlip.tasks.reconstruct import ReconstructConfig, ReconstructTask

TOKENIZERS = [name for name in RECIPES if isinstance(find_recipe(name), RunConfig)]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return str(write_scene_shards(tmp_path_factory.mktemp("s"), num=24, split="train", config=SceneConfig())[0].parent)


def three_steps(name: str, data: str) -> RunConfig:
    """A recipe cut down to its kind of task: 16 px, one layer, three steps."""
    config = find_recipe(name)
    tower = TowerSize(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24)
    config.model = ModelConfig(
        image_size=16, patch_size=8, encoder=tower, decoder=tower, text=tower, context_length=16, projection_dim=16
    )
    config.data.train, config.data.batch_size, config.data.shuffle_buffer = data, 4, 8
    config.trainer.steps, config.trainer.log_every, config.trainer.device = 3, 1, "cpu"
    return config


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_recipe_builds_its_model_task_and_optimizers_on_the_meta_device(name):
    config = find_recipe(name)
    assert config.recipe == name
    module, summary = RECIPES[name]
    assert module.startswith("qlip.recipes.") and summary
    if isinstance(config.task, ReconstructConfig):
        config.task.perceptual = "encoder"  # LPIPS needs weights
        config.model.quantizer = config.task.add_quantizer or config.model.quantizer
    with torch.device("meta"):
        model = QLIPModel(config.model.build_config())
        task = (AlignTask if isinstance(config.task, AlignConfig) else ReconstructTask)(model, config.task)
    for phase in task.phases(0):
        named = [
            (f"{part}.{parameter_name}", parameter)
            for part in phase.modules
            for parameter_name, parameter in task.modules()[part].named_parameters()
            if parameter.requires_grad
        ]
        assert sum(len(group["params"]) for group in parameter_groups(named, phase.optimizer)) == len(named) > 0


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_recipes_config_survives_json(name):
    config = find_recipe(name)
    again = from_json(RunConfig, json.loads(json.dumps(to_json(config))))
    assert again == config
    assert type(again.task) is type(config.task)
    assert find_recipe(name) == config and find_recipe(name) is not config


def test_unknown_recipes_and_fields_are_named():
    with pytest.raises(UserError, match="recipe 'scenes_tinny' is unknown: did you mean 'scenes_tiny'"):
        find_recipe("scenes_tinny")
    values = to_json(find_recipe("scenes_tiny"))
    values["task"]["optimizer"]["momentum"] = 0.9
    with pytest.raises(UserError, match=r"config field task\.optimizer\.momentum is unknown"):
        from_json(RunConfig, values)


def test_the_default_model_is_b_16_256():
    config = ModelConfig().build_config()
    vision, decoder, text = config.vision_config, config.decoder_config, config.text_config
    assert (vision.image_size, vision.patch_size, vision.num_bits, vision.hidden_size_post_q) == (256, 16, 28, 768)
    sizes = [
        (part.hidden_size, part.num_hidden_layers, part.num_attention_heads, part.intermediate_size)
        for part in (vision, decoder, text)
    ]
    assert sizes == [(768, 12, 12, 2048), (768, 12, 12, 2048), (512, 12, 8, 2048)]
    assert (config.projection_dim, text.max_position_embeddings) == (512, 77)


def test_both_stages_train_three_steps_and_export_what_can_be_loaded(tmp_path, data):
    for name, stage in (("scenes_tiny", "stage1"), ("scenes_tiny_stage2", "stage2")):
        config = three_steps(name, data)
        if stage == "stage2":
            config.task.init = str(tmp_path / "stage1" / "export")
        export = run_recipe(config, folder=tmp_path / stage)
        assert export == tmp_path / stage / "export"
        assert load_model(export).config.vision_config.image_size == 16
        assert load_processor(export).tokenizer.model_max_length == 16
        assert [line["step"] for line in read_metrics(tmp_path / stage / "metrics.jsonl")] == [1, 2, 3]
        record = json.loads((tmp_path / stage / "config.json").read_text())
        assert from_json(RunConfig, record["config"]) == config
        assert "trainer.steps: " in " ".join(record["changes_from_recipe"])
        assert record["versions"].keys() >= {"python", "torch", "transformers"}
    first, second = (load_model(tmp_path / stage / "export") for stage in ("stage1", "stage2"))
    pixels = torch.randn(2, 3, 16, 16)
    assert torch.equal(first(pixels).image_embeds, second(pixels).image_embeds)
    again = load_run(tmp_path / "stage2", step=3)[0].state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in second.state_dict().items())
    with pytest.raises(UserError, match=r"has no checkpoint 2; it has \[3\]"):
        load_run(tmp_path / "stage2", step=2)
    with pytest.raises(UserError, match="is not a run folder"):
        load_run(tmp_path, step=None)


QUANTIZERS = {
    "none": {},
    "bsq": {"num_bits": 12, "group_size": 4},
    "fsq": {"num_bits": 9, "fsq_levels": (8, 8, 5)},
    "lfq": {"num_bits": 12, "group_size": 4},
    "vq": {"num_bits": 12, "group_size": 6},
}


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_a_field_switches_the_quantizer_of_both_stages(tmp_path, data, kind):
    exports = {}
    for name, stage in (("scenes_tiny", "stage1"), ("scenes_tiny_stage2", "stage2")):
        config = three_steps(name, data)
        config.model = replace(config.model, quantizer=kind, **QUANTIZERS[kind])
        config.evals.data, config.evals.max_samples = data, 8
        if stage == "stage2":
            config.task.init = str(exports["stage1"])
        exports[stage] = run_recipe(config, folder=tmp_path / stage)
    first, second = (load_model(export) for export in exports.values())
    assert second.config.vision_config.quantizer == kind
    moved = {name for name, tensor in second.state_dict().items() if not torch.equal(first.state_dict()[name], tensor)}
    assert any(name.startswith("vision_decoder") for name in moved)
    assert not any(name.startswith(("vision_model.encoder", "text_model", "visual_projection")) for name in moved)
    assert any("_codebook" in name for name in moved) == (kind == "vq")
    figures = [
        line
        for line in read_metrics(tmp_path / "stage2" / "metrics.jsonl")
        if line.get("eval") == "scenes-reconstruction-v1"
    ]
    assert len(figures) == 1 and ("bits_per_pixel" in json.dumps(figures[0])) == (kind != "none")


def refused(config: RunConfig, folder: Path) -> str:
    """The one line with which a run is refused before its first step."""
    with pytest.raises(UserError) as error:
        run_recipe(config, folder=folder)
    assert "\n" not in str(error.value)
    assert not (folder / "checkpoints").exists() and not (folder / "metrics.jsonl").exists()
    return str(error.value)


def test_missing_data_are_one_line(tmp_path, data):
    config = three_steps("scenes_tiny", "")
    assert "no training data: add --data.train" in refused(config, tmp_path / "a")
    config.data.train = str(tmp_path / "nowhere")
    assert "nowhere" in refused(config, tmp_path / "a")
    config.data.train, config.data.num_workers = data, 2
    assert "1 shards for 1 ranks x 2 workers" in refused(config, tmp_path / "a")
    config.data.num_workers, config.trainer.eval_every = 0, 5
    assert "add --evals.data" in refused(config, tmp_path / "a")


def test_a_mended_mistake_can_be_started_in_the_same_folder(tmp_path, data):
    """Nothing was trained, so there is nothing that another config could spoil."""
    config = three_steps("scenes_tiny", str(tmp_path / "typo"))
    refused(config, tmp_path / "run")
    config.data.train, config.task.optimizer.name = data, "adam"
    assert "did you mean 'adamw'" in refused(config, tmp_path / "run")
    config.task.optimizer.name = "adamw"
    run_recipe(config, folder=tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["data"]["train"] == data


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, data):
    (tmp_path / "file").write_text("")
    config = three_steps("scenes_tiny", data)
    with pytest.raises(UserError, match=r"cannot write to .*file/run: .*; choose another folder") as error:
        run_recipe(config, folder=tmp_path / "file" / "run")
    assert "\n" not in str(error.value)


def test_a_disk_without_room_for_the_checkpoints_is_one_line(tmp_path, data, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "0.01 GB free, the run needs about 0." in refused(three_steps("scenes_tiny", data), tmp_path / "run")


@pytest.mark.parametrize(
    ("part", "name", "value", "said"),
    [
        ("trainer", "save_every", 0, "trainer.save_every is 0: give at least 1"),
        ("trainer", "log_every", 0, "trainer.log_every is 0: give at least 1"),
        ("trainer", "keep_checkpoints", 0, "trainer.keep_checkpoints is 0: give at least 1"),
        ("data", "batch_size", 0, "data.batch_size is 0: give at least 1"),
        ("model", "image_size", 50, "image_size 50 is not a multiple of patch_size 8; change the --model options"),
        ("model", "group_size", 5, "group_size 5 must divide 28 bits"),
    ],
)
def test_impossible_numbers_are_one_line(tmp_path, data, part, name, value, said):
    config = three_steps("scenes_tiny", data)
    setattr(getattr(config, part), name, value)
    assert said in refused(config, tmp_path)


def test_stage_2_without_a_stage_1_model_is_one_line(tmp_path, data):
    config = three_steps("scenes_tiny_stage2", data)
    assert "add --task.init RUN/export" in refused(config, tmp_path)
    config.task.init = str(tmp_path)
    assert "is not a model folder" in refused(config, tmp_path)


def test_changes_from_a_recipe_are_its_differing_leaves():
    config = find_recipe("scenes_tiny")
    lr, steps = config.task.optimizer.lr, config.trainer.steps
    config.task.optimizer.lr, config.trainer.steps = 1e-4, 5
    lines = differences(to_json(find_recipe("scenes_tiny")), to_json(config))
    assert lines == [f"task.optimizer.lr: {lr} -> 0.0001", f"trainer.steps: {steps} -> 5"]
