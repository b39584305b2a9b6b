"""The paper's recipes hold the paper's numbers, and their docstrings say what is true."""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
from pathlib import Path

import pytest
import torch
from paper_budget import hours

from qlip.core.arguments import parse_arguments
from qlip.core.config import differences, to_json
from qlip.engine.optim import has_decay, learning_rate
from qlip.models.qlip.modeling import QLIPModel
from qlip.recipes import RECIPES, find_recipe
from qlip.recipes.model import ModelConfig
from qlip.recipes.run import RunConfig, TrainOptions
from qlip.recipes.running import split_batch
from qlip.tasks.align import AlignConfig
from qlip.tasks.reconstruct import ReconstructConfig

PAPER = [name for name in RECIPES if not name.startswith("scenes_") and isinstance(find_recipe(name), RunConfig)]
FULL = [name for name in PAPER if not name.endswith("_small")]


def documentation(name: str) -> dict[str, str]:
    """The labelled lines of a recipe's docstring."""
    text = inspect.getdoc(getattr(importlib.import_module(RECIPES[name][0]), name)) or ""
    return dict(re.findall(r"^(\w+): +(.*)$", text, flags=re.MULTILINE))


def gpus_of(name: str) -> int:
    number = documentation(name)["Hardware"].split()[0]
    return 1 if number == "one" else int(number)


@pytest.mark.parametrize(
    ("name", "total", "encoder", "decoder"),
    [
        ("qlip_b_16_256", 239_434_013, 85_915_392, 88_471_808),
        ("qlip_b_8_256", 238_991_069, 86_062_848, 87_881_408),
        ("qlip_l_14_392", 738_111_243, 303_858_624, 307_657_518),
    ],
)
def test_models_have_the_papers_parameters(name, total, encoder, decoder):
    def count(*modules: torch.nn.Module) -> int:
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    with torch.device("meta"):
        model = QLIPModel(find_recipe(name).model.build_config())
    vision = model.vision_model
    assert count(model) == total and count(model.vision_decoder) == decoder
    assert count(vision) - count(vision.quant_embed, vision.quant_embed_post) == encoder
    assert (vision.config.num_bits, vision.config.quantizer_group_size, vision.config.quantizer) == (28, 1, "bsq")


@pytest.mark.parametrize("name", ["qlip_b_16_256", "qlip_b_8_256", "qlip_l_14_392"])
def test_table_8(name):
    one, two = find_recipe(name), find_recipe(f"{name}_stage2")
    assert isinstance(one.task, AlignConfig) and isinstance(two.task, ReconstructConfig)
    weights = (
        one.task.pixel_weight,
        one.task.contrastive_weight,
        one.task.quantizer_weight,
        one.task.commitment_weight,
    )
    assert weights == (1e3, 1, 1, 1)
    assert (two.task.pixel_weight, two.task.quantizer_weight, two.task.perceptual_weight) == (1, 1, 0.1)
    assert (two.task.gan_weight, two.task.perceptual, two.task.gan_loss) == (0.1, "lpips", "nonsaturating")
    settings = [one.task.optimizer, two.task.optimizer, two.task.discriminator_optimizer]
    assert [part.name for part in settings] == ["lamb", "adamw", "adamw"]
    assert [part.clip_norm for part in settings] == [5, 1, 1]
    assert {(part.betas, part.weight_decay, part.warmup_steps) for part in settings} == {((0.9, 0.95), 0.05, 2000)}
    assert [part.lr for part in settings] == [5e-4, 5e-4, 1e-4]
    assert (one.data.global_batch_size, two.data.global_batch_size) == (65_536, 16_384)
    for config in (one, two):
        assert config.trainer.steps == 120_000 and config.data.crop_scale == (0.9, 1.0)
        assert (config.trainer.precision, config.trainer.ema_decay) == ("bf16", 0)
        assert config.trainer.activation_checkpointing and config.trainer.compile and config.trainer.async_save


def test_rates_by_part():
    """Of every trained parameter, decayed or not; the longest prefix decides."""
    rates = {
        "vision_model.embeddings": 2e-4,
        "vision_model.encoder": 2e-4,
        "vision_model.post_layernorm": 2e-4,
        "visual_projection": 2e-4,
        "text_model": 2e-5,
        "text_projection": 2e-5,
        "vision_model.quant_embed": 5e-4,
        "vision_model.quant_embed_post": 5e-4,
        "vision_decoder": 2e-3,
        "logit_scale": 5e-4,
    }
    one, two = find_recipe("qlip_b_16_256").task, find_recipe("qlip_b_16_256_stage2").task
    with torch.device("meta"):
        named = dict(QLIPModel(ModelConfig().build_config()).named_parameters())
    for name, parameter in named.items():
        part = max((part for part in rates if name == part or name.startswith(f"{part}.")), key=len)
        assert learning_rate(f"model.{name}", one.optimizer) == rates[part], name
        assert has_decay(name, parameter) == (parameter.ndim > 1 and "position_embedding" not in name), name
    assert learning_rate("model.vision_decoder.norm.weight", two.optimizer) == 1e-4
    assert learning_rate("model.vision_model.quant_embed.c_fc.weight", two.optimizer) == 5e-4


@pytest.mark.parametrize("name", PAPER)
def test_what_a_docstring_says_is_so(name):
    said, config = documentation(name), find_recipe(name)
    assert said.keys() >= {"Command", "Hardware", "Time", "Expect"}
    words = shlex.split(said["Command"].split("    ")[0])
    assert words[:3] == ["qlip", "train", name]
    options = parse_arguments(TrainOptions, words[3:], prog="qlip", default=TrainOptions(run=config, out=Path("run")))
    assert bool(options.run.task.init) == (not name.startswith("table3b_none"))
    gpus = gpus_of(name)
    number, unit = re.search(r"about ([\d.]+) (hours|days) .*\(estimate\)", said["Time"]).groups()
    assert float(number) * (24 if unit == "days" else 1) == pytest.approx(hours(config, gpus=gpus), rel=0.1)
    if name.endswith("_small"):
        assert gpus == 1 and hours(config, gpus=1) < 24


@pytest.mark.parametrize("name", PAPER)
def test_batches_can_be_shared_and_logits_fit(name):
    config, gpus = find_recipe(name), gpus_of(name)
    total, micro_batches = split_batch(config.data, num_ranks=gpus)
    assert total == config.data.global_batch_size
    if gpus > 1 and config.model.image_size == 256:
        fitting = {16: 1, 8: 2}[config.model.patch_size] if isinstance(config.task, AlignConfig) else 4
        assert micro_batches == fitting  # `qlip check`: more do not fit 80 GB
    if isinstance(config.task, AlignConfig):
        rows, columns = total // gpus, config.task.contrastive_chunk or total
        assert rows * columns * 4 < 1e9


def test_table_3_differs_in_what_its_columns_say():
    chosen = find_recipe("table3a_1_1e3")
    assert chosen.data.global_batch_size * chosen.trainer.steps == pytest.approx(2.0e9, rel=0.02)
    weights = {
        "1_0": (1, 0),
        "1_1": (1, 1),
        "1_1e2": (1, 100),
        "1_1e3": (1, 1000),
        "1_1e4": (1, 10_000),
        "0_1": (0, 1e3),
    }
    for ratio, (contrastive, pixel) in weights.items():
        row = find_recipe(f"table3a_{ratio}")
        assert (row.task.contrastive_weight, row.task.pixel_weight) == (contrastive, pixel)
        row.task.contrastive_weight, row.task.pixel_weight = 1.0, 1e3
        assert [line.split(":")[0] for line in differences(to_json(chosen), to_json(row))] in ([], ["recipe"])
    for start in ("none", "mim", "clip"):
        changed = differences(to_json(chosen), to_json(find_recipe(f"table3b_{start}")))
        assert [line.split(":")[0] for line in changed] == ["recipe"]


@pytest.mark.parametrize("name", FULL)
def test_every_recipe_has_a_small_one_that_differs_in_size_alone(name):
    changed = differences(to_json(find_recipe(name)), to_json(find_recipe(f"{name}_small")))
    allowed = {"recipe", "data.batch_size", "data.global_batch_size", "task.contrastive_chunk", "trainer.steps"}
    allowed |= {"task.optimizer.warmup_steps", "task.discriminator_optimizer.warmup_steps"}
    allowed |= {"trainer.parallel", "trainer.log_every", "trainer.save_every"}
    assert {"recipe", "trainer.steps"} <= {line.split(":")[0] for line in changed} <= allowed
