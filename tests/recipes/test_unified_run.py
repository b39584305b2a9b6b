"""Runs of UM3: recipes as Table 9 says, training, exact resume, both sources of pictures, refusals in one line."""

from __future__ import annotations

import importlib
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_assistant_runs import changed, figures_of, moved, weights_of
from torch import Tensor

from qlip.apps.encoding import TokenizeOptions
from qlip.apps.tokenize import tokenize_images
from qlip.core.config import from_json, to_json
from qlip.core.errors import UserError
from qlip.data.mixing import mixing_ratio
from qlip.data.scene_shards import write_scene_shards
from qlip.data.scenes import SceneConfig
from qlip.engine.optim import schedule_factor
from qlip.engine.trainer import Trainer
from qlip.models.image_tokenizer import open_image_tokenizer
from qlip.models.language_model import TinyLanguageModel, open_language_model
from qlip.models.unified_model import open_unified, save_unified
from qlip.models.widening import WideningConfig, widen
from qlip.recipes import RECIPES, find_recipe
from qlip.recipes.unified_run import UnifiedRunConfig, run_unified
from ranks import on_ranks
from tiny_tokenizer import save_tiny_tokenizer
from tiny_unified import DIVISION, IMAGE_LENGTH, tiny_llama_folder

UNIFIED = [name for name in RECIPES if isinstance(find_recipe(name), UnifiedRunConfig)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tower`, a QLIP of 16 px and 2 x 2 tokens; `scenes`, shards; `tokens`, their token store with dense captions."""
    folder = tmp_path_factory.mktemp("home")
    save_tiny_tokenizer(folder / "tower")
    write_scene_shards(folder / "scenes", num=40, split="train", config=SceneConfig(image_size=16))
    options = TokenizeOptions(
        model=str(folder / "tower"), out=folder / "tokens", caption_fields=("captions.dense",), device="cpu"
    )
    tokenize_images(str(folder / "scenes"), options)
    return folder


def tiny(home: Path, *, steps: int = 3, **changes: Any) -> UnifiedRunConfig:
    """`scenes_um3_tiny` at width 16 and rows of 64; `changes` with __ for a dot."""
    config = find_recipe("scenes_um3_tiny")
    assert isinstance(config, UnifiedRunConfig)
    config.tokenizer, config.widening.division = str(home / "tower"), DIVISION
    config.tiny = TinyLanguageModel(
        hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24, vocab_size=400, max_positions=128
    )
    config.data.text, config.data.text_field = str(home / "scenes"), "story"
    config.data.tokens, config.data.captioned_tokens = str(home / "tokens"), ""
    config.data.batch_size, config.data.sequence_length, config.data.shuffle_window = 2, 96, 10
    config.data.max_caption_tokens = 60
    config.data.calm_down_steps, config.task.optimizer.warmup_steps = 2, 1
    config.trainer.steps, config.trainer.log_every, config.trainer.save_every = steps, 1, 2
    config.trainer.device, config.trainer.precision, config.trainer.tracker = "cpu", "fp32", "none"
    return changed(config, **changes)


@pytest.fixture(scope="module")
def trained(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    run_unified(tiny(home, steps=4), folder=folder)
    return folder


@pytest.mark.parametrize("name", UNIFIED)
def test_a_recipes_config_survives_json_and_says_what_it_needs(name):
    config = find_recipe(name)
    again = from_json(UnifiedRunConfig, json.loads(json.dumps(to_json(config))))
    assert again == config and config.recipe == name and find_recipe(name) is not config
    text = getattr(importlib.import_module(RECIPES[name][0]), name).__doc__
    for heading in ("Command", "Hardware", "Time", "Expect", "Open"):
        assert re.search(rf"^    {heading}: +[^@\s]", text, re.MULTILINE), heading
    assert f"train {name} " in text


def test_the_numbers_are_those_of_table_9():
    config = find_recipe("um3_1_5b")
    assert isinstance(config, UnifiedRunConfig)
    optimizer, data = config.task.optimizer, config.data
    assert (optimizer.name, optimizer.lr, optimizer.betas) == ("adamw", 1e-4, (0.9, 0.95))
    assert (optimizer.weight_decay, optimizer.clip_norm, optimizer.warmup_steps) == (0.1, 1.0, 2000)
    assert (config.trainer.steps, data.batch_size, data.global_batch_size, data.sequence_length) == (
        *(600_000, 8, 512, 4096),
    )
    start, end = mixing_ratio(0, data), mixing_ratio(10_000, data)
    assert [512 * share for share in start] == pytest.approx([480, 8, 24])
    assert [512 * share for share in end] == pytest.approx([384, 32, 96])
    last = schedule_factor(600_000, warmup_steps=2000, total_steps=600_000, final_share=optimizer.final_lr_share)
    assert last == pytest.approx(0.1)
    assert config.widening.softmax == "separate" and config.widening.qk_norm and not config.task.z_loss


def test_a_run_trains_and_its_export_writes_and_draws(trained):
    lines = figures_of(trained)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    unified = open_unified(trained / "export")
    assert lines[0]["text_nll"] == pytest.approx(math.log(unified.model.vocabulary.text_size), rel=0.1)
    assert lines[0]["visual_nll"] == pytest.approx(math.log(unified.model.vocabulary.visual_size), rel=0.1)
    assert {"text_task_nll", "text_to_image_task_nll", "text_share", "token_loss"} <= lines[0].keys()
    assert unified.generate(["a red star"], seeds=[0]).shape == (1, 3, 16, 16)
    assert not (trained / "skipped.jsonl").exists()
    record = json.loads((trained / "config.json").read_text())
    assert "tiny.hidden_size: 128 -> 16" in record["changes_from_recipe"]


def test_a_finished_run_says_so(home, trained, capsys):
    assert run_unified(tiny(home, steps=4), folder=trained) == trained / "export"
    assert "is finished (4 steps)" in capsys.readouterr().out.replace("\n", " ")


def test_a_stopped_run_ends_as_one_that_was_never_stopped(home, trained, tmp_path, monkeypatch):
    step = Trainer.train_step

    def stopped(trainer: Trainer, batches: list) -> dict[str, Tensor]:
        if trainer.step == 3:  # a checkpoint lies at 2
            raise KeyboardInterrupt
        return step(trainer, batches)

    monkeypatch.setattr(Trainer, "train_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_unified(tiny(home, steps=4), folder=tmp_path)
    monkeypatch.undo()
    run_unified(tiny(home, steps=4), folder=tmp_path)
    assert moved(weights_of(trained), weights_of(tmp_path)) == set()
    assert figures_of(trained) == figures_of(tmp_path)


def test_pictures_without_a_store_are_encoded_on_the_fly(home, tmp_path):
    config = tiny(home, data__tokens="", images__train=str(home / "scenes"), images__num_workers=0, steps=2)
    run_unified(config, folder=tmp_path)
    for line in figures_of(tmp_path):
        assert line["visual_nll"] == pytest.approx(math.log(4 * 128), rel=0.1)
    assert open_unified(tmp_path / "export").model.vocabulary.image_length == IMAGE_LENGTH


def imported(home: Path, folder: Path) -> str:
    """A random Llama 3, widened."""
    language_model, tokenizer = open_language_model(tiny_llama_folder(folder / "llama"))
    images = open_image_tokenizer(home / "tower")
    model = widen(language_model, tokenizer, images, WideningConfig(division=DIVISION))
    save_unified(model, folder=folder / "um3", tokenizer=tokenizer, image_tokenizer=str(home / "tower"), step=None)
    return str(folder / "um3")


def test_an_imported_llama_goes_on_and_with_a_rate_of_zero_stays(home, tmp_path):
    start = imported(home, tmp_path)
    recipe = find_recipe("scenes_um3_tiny")
    assert isinstance(recipe, UnifiedRunConfig)
    kept = {"widening": recipe.widening, "tiny": recipe.tiny, "fresh_language_model": False}
    changes: dict[str, Any] = {"init": start, "tokenizer": "", "steps": 1, **kept}
    with pytest.raises(UserError, match="--init brings its vocabulary with it: leave --widening and --tiny out"):
        run_unified(tiny(home, **changes | {"widening": WideningConfig(softmax="joint")}), folder=tmp_path / "no")
    run_unified(tiny(home, **changes, task__optimizer__lr=0.0), folder=tmp_path / "still")
    assert moved(weights_of(Path(start)), weights_of(tmp_path / "still")) == set()
    run_unified(tiny(home, **changes, task__z_loss=1e-3), folder=tmp_path / "run")
    assert moved(weights_of(Path(start)), weights_of(tmp_path / "run")) == set(weights_of(Path(start)))
    assert figures_of(tmp_path / "run")[0]["z_loss"] > 0


def train_both_ways(home: str, folder: str) -> None:
    for parallel in ("ddp", "fsdp"):
        run_unified(tiny(Path(home), steps=2, trainer__parallel=parallel), folder=Path(folder) / parallel)


def test_two_sharded_ranks_train_as_two_replicas(home, tmp_path):
    on_ranks(train_both_ways, str(home), str(tmp_path), num_ranks=2, folder=tmp_path / "said")
    replicas, shards = weights_of(tmp_path / "ddp"), weights_of(tmp_path / "fsdp")
    for name, tensor in replicas.items():
        torch.testing.assert_close(shards[name], tensor, rtol=0, atol=1e-6, msg=name)


IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "no tokenizer": ({"tokenizer": ""}, "no image tokenizer: add --tokenizer QLIP"),
    "tokenizer that is not there": ({"tokenizer": "nowhere"}, "nowhere"),
    "no model": ({"fresh_language_model": False}, "no model to start from: add --init FOLDER"),
    "init that is no UM3": (
        {"init": "nowhere", "tokenizer": "", "recipe": "my own"},
        "nowhere is no UM3: make one with qlip import llama",
    ),
    "both": ({"init": "nowhere"}, "--init brings its image tokenizer with it: leave --tokenizer out"),
    "no text": ({"data__text": ""}, "data.text"),
    "text that is not there": ({"data__text": "nowhere/*.jsonl"}, "nowhere"),
    "no pictures": ({"data__tokens": ""}, "data.tokens"),
    "store that is not there": ({"data__tokens": "nowhere"}, "no token store at nowhere"),
    "rows too long": (
        {"data__sequence_length": 129},
        "data.sequence_length 129 is more than the model's 128 positions: lower it",
    ),
    "rows too short": ({"data__sequence_length": 20}, "sequence_length"),
    "division": ({"widening__division": (14, 7)}, "does not make num_bits 28; change --division"),
    "z-loss": ({"task__z_loss": -1.0}, "task.z_loss is -1.0: give 0 or more"),
    "evaluation": ({"trainer__eval_every": 5}, "trainer.eval_every: a UM3 is evaluated when its run has ended"),
    "nothing to draw": ({"trainer__images_every": 5, "sample_prompts": ()}, "add --sample-prompts, or set it to 0"),
    "batch": ({"data__batch_size": 0}, "data.batch_size is 0: give at least 1"),
    "ratios": ({"data__text_start": -1.0}, "text_start"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_settings_of_a_unified_run_are_one_line(home, tmp_path, case):
    changes, said = IMPOSSIBLE[case]
    with pytest.raises(UserError) as error:
        run_unified(tiny(home, **changes), folder=tmp_path / "run")
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_store_of_another_tokenizer_is_refused_with_both_fingerprints(home, tmp_path):
    other = save_tiny_tokenizer(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"was made by encoder [0-9a-f]{64}, this model's is [0-9a-f]{64}"):
        run_unified(tiny(home, tokenizer=str(other)), folder=tmp_path / "run")


def test_pictures_of_training_are_drawn(home, tmp_path):
    config = tiny(home, steps=1, trainer__images_every=1, sample_prompts=("a star", "a ring"))
    run_unified(config, folder=tmp_path)
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["step_00000001.png"]
