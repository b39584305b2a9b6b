"""Each kind of the paper's recipes trains three steps at tiny size through the same code."""

from __future__ import annotations

import pytest
import torch
from tiny_recipes import tiny

from qlip.core.log import read_metrics
from qlip.data.scene_shards import write_scene_shards
from qlip.data.scenes import SceneConfig
from qlip.models.qlip.loading import load_model
from qlip.models.qlip.modeling import QLIPModel
from qlip.recipes import find_recipe
from qlip.recipes.run import run_recipe
from qlip.tasks.align import AlignTask


def test_baselines_train_what_they_are_made_of():
    trained = {}
    for name in ("bsqvit_b_16", "clip_b_16", "recipe2_b_16"):
        config = tiny(find_recipe(name), "")
        model = QLIPModel(config.model.build_config())
        AlignTask(model, config.task)
        names = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
        trained[name] = {part for key in names for part in key.split(".")}
    assert not trained["bsqvit_b_16"] & {"text_model", "logit_scale", "visual_projection"}
    assert {"vision_decoder", "quant_embed"} <= trained["bsqvit_b_16"]
    assert not trained["clip_b_16"] & {"vision_decoder", "quant_embed"} and "text_model" in trained["clip_b_16"]
    assert {"vision_decoder", "text_model"} <= trained["recipe2_b_16"] and "quant_embed" not in trained["recipe2_b_16"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return str(write_scene_shards(tmp_path_factory.mktemp("s"), num=24, split="train", config=SceneConfig())[0].parent)


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory) -> str:
    """A file as torchvision's, with random weights."""
    from torchvision.models import vgg16

    path = tmp_path_factory.mktemp("weights") / "vgg16.pth"
    with torch.device("meta"):
        trunk = vgg16().features
    generator = torch.Generator().manual_seed(0)
    shapes = {f"features.{name}": value.shape for name, value in trunk.state_dict().items()}
    torch.save({name: 0.03 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}, path)
    return str(path)


TERMS = {
    "qlip_b_16_256": {"contrastive", "mse", "commitment_loss", "quantizer_loss"},
    "qlip_l_14_392_small": {"contrastive", "mse", "commitment_loss", "quantizer_loss"},
    "bsqvit_b_16": {"mse", "commitment_loss", "quantizer_loss"},
    "clip_b_16": {"contrastive"},
    "recipe2_b_16": {"contrastive", "mse"},
}


@pytest.mark.parametrize("name", TERMS)
def test_stage_1_trains_three_steps(tmp_path, data, name):
    config = tiny(find_recipe(name), data)
    export = run_recipe(config, folder=tmp_path / "run")
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    logged = {"contrastive", "mse", "commitment_loss", "quantizer_loss"} & lines[-1].keys()
    assert logged == TERMS[name]
    torch.manual_seed(config.trainer.seed)
    start, end = QLIPModel(config.model.build_config()).state_dict(), load_model(export).state_dict()
    moved = {key for key in end if not torch.equal(start[key], end[key])}
    assert any(key.startswith("vision_model.encoder") for key in moved)
    assert any(key.startswith("text_model") for key in moved) == ("contrastive" in logged)
    assert any(key.startswith("vision_decoder") for key in moved) == ("mse" in logged)


@pytest.mark.parametrize(
    ("first", "second"),
    [("qlip_b_16_256_small", "qlip_b_16_256_stage2"), ("recipe2_b_16_small", "recipe2_b_16_stage2_small")],
)
def test_stage_2_trains_three_steps(tmp_path, data, vgg_file, first, second):
    start = run_recipe(tiny(find_recipe(first), data), folder=tmp_path / "one")
    config = tiny(find_recipe(second), data)
    config.task.init, config.task.vgg_weights = str(start), vgg_file
    export = run_recipe(config, folder=tmp_path / "two")
    line = read_metrics(tmp_path / "two" / "metrics.jsonl")[-1]
    assert {"decoder/lpips", "decoder/quantizer_loss", "discriminator/discriminator_loss"} <= line.keys()
    one, two = load_model(start), load_model(export)
    pixels = torch.randn(2, 3, 16, 16)
    assert torch.equal(one(pixels).image_embeds, two(pixels).image_embeds)
    assert two.config.vision_config.quantizer == "bsq" and two.encode(pixels).shape == (2, 4, 28)
    assert not torch.equal(one.vision_decoder.norm.weight, two.vision_decoder.norm.weight)
