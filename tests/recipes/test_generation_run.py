"""Text-to-image recipes build; their runs train from tokens or pictures, resume bit for bit, and refuse in one line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qlip.apps.encoding import TokenizeOptions
from qlip.apps.tokenize import tokenize_images
from qlip.core.config import from_json, to_json
from qlip.core.errors import UserError
from qlip.core.log import read_metrics
from qlip.data.scene_shards import write_scene_shards
from qlip.data.scenes import SceneConfig
from qlip.engine.optim import parameter_groups
from qlip.engine.trainer import Trainer
from qlip.models import caption_encoder, opening
from qlip.models.generator import open_generator
from qlip.models.image_tokenizer import ImageTokenizer, open_image_tokenizer
from qlip.models.qlip.loading import save_model
from qlip.models.qlip.modeling import QLIPModel
from qlip.models.qlip.processing import QLIPProcessor
from qlip.models.qlip.tokenizer import clip_tokenizer
from qlip.models.text_to_image import TextToImageModel
from qlip.recipes import RECIPES, find_recipe
from qlip.recipes.generation_run import GenerationRunConfig, GeneratorSize, generator_config, run_generation
from qlip.recipes.model import ModelConfig, TowerSize
from qlip.tasks.next_token import NextTokenTask

PAPER = {  # millions of parameters, positions of a picture
    "t2i_xl_256": (819.6, 512),
    "t2i_xl_256_bsqvit": (819.6, 512),
    "t2i_xl_256_vqgan": (777.7, 256),
}
GENERATORS = [name for name in RECIPES if isinstance(find_recipe(name), GenerationRunConfig)]


@pytest.fixture(autouse=True, scope="module")
def vocabularies() -> Iterator[None]:
    """Reading CLIP's vocabulary is most of the time that opening a tiny model takes."""
    processor = QLIPProcessor.for_size(16, context_length=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caption_encoder, "clip_tokenizer", cache(clip_tokenizer))
        patch.setattr(opening, "load_processor", lambda source: processor)
        yield


def save_tokenizer(folder: Path, *, seed: int) -> str:
    """A QLIP of 16 px, 2 x 2 tokens."""
    torch.manual_seed(seed)
    tower = TowerSize(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24)
    sizes = ModelConfig(
        image_size=16, patch_size=8, encoder=tower, decoder=tower, text=tower, context_length=16, projection_dim=16
    )
    processor = QLIPProcessor.for_size(16, context_length=16)
    save_model(QLIPModel(sizes.build_config()), folder=folder, processor=processor, step=0)
    return str(folder)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, 24 scenes in shards, and their tokens."""
    folder = tmp_path_factory.mktemp("home")
    save_tokenizer(folder / "tokenizer", seed=0)
    write_scene_shards(folder / "scenes", num=24, split="train", config=SceneConfig(image_size=16))
    options = TokenizeOptions(
        model=str(folder / "tokenizer"), out=folder / "tokens", caption_fields=("prompts",), device="cpu"
    )
    tokenize_images(str(folder / "scenes"), options)
    return folder


def tiny(home: Path, *, data: str = "tokens", steps: int = 3, **size: Any) -> GenerationRunConfig:
    """`scenes_t2i_tiny` of width 16 and one block; batches of 4."""
    config = find_recipe("scenes_t2i_tiny")
    small: dict[str, Any] = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 24}
    for name, value in (small | {"caption_width": 8} | size).items():
        setattr(config.model, name, value)
    config.tokenizer = str(home / "tokenizer")
    if data == "tokens":
        config.data.tokens = str(home / "tokens")
    else:
        config.images.train, config.images.num_workers, config.images.shuffle_buffer = str(home / "scenes"), 0, 8
    config.data.batch_size, config.task.optimizer.warmup_steps = 4, 1
    config.trainer.steps, config.trainer.log_every, config.trainer.save_every = steps, 1, 2
    config.trainer.device, config.trainer.precision, config.trainer.tracker = "cpu", "fp32", "none"
    return config


def weights_of(run: Path) -> dict[str, Tensor]:
    return load_file(run / "export" / "model.safetensors")


def figures_of(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the speed, which is never the same twice."""
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in read_metrics(run / "metrics.jsonl")]


class DescribedTokenizer:
    """What a recipe needs to know of a tokenizer that is not here."""

    image_size, grid, encoder_fingerprint = 256, (16, 16), "0" * 64

    def __init__(self, name: str) -> None:
        self.name, self.num_bits = name, 14 if name == "LlamaGenVQ" else 28


def described(name: str, folder: Path) -> TextToImageModel:
    """The model of a recipe, on the meta device."""
    (folder / "config.json").write_text(json.dumps({"d_model": 2048}))
    tokenizer: Any = DescribedTokenizer("LlamaGenVQ" if "vqgan" in name else "QLIPModel")
    config = generator_config(find_recipe(name).model, tokenizer, caption_encoder=str(folder))
    with torch.device("meta"):
        return TextToImageModel(config)


@pytest.mark.parametrize("name", GENERATORS)
def test_a_recipe_builds_its_model_task_and_optimizers_on_the_meta_device(tmp_path, name):
    config, model = find_recipe(name), described(name, tmp_path)
    assert config.recipe == name and RECIPES[name][1]
    task = NextTokenTask(model, config.task, captions=None)  # type: ignore[arg-type]
    (phase,) = task.phases(0)
    named = [(f"model.{part}", parameter) for part, parameter in model.named_parameters()]
    assert sum(len(group["params"]) for group in parameter_groups(named, phase.optimizer)) == len(named) > 0
    if name in PAPER:
        of_bits = sum(part.numel() for key, part in named if ".head.tables.bit_" in key)  # ours alone
        millions, positions = PAPER[name]
        assert (sum(part.numel() for _, part in named) - of_bits) / 1e6 == pytest.approx(millions, abs=0.1)
        assert model.config.num_tokens * model.head.positions_per_token == positions
        assert (model.config.caption_length, model.config.caption_width, model.config.guidance) == (120, 2048, 7.5)


@pytest.mark.parametrize("name", GENERATORS)
def test_a_recipes_config_survives_json(name):
    config = find_recipe(name)
    again = from_json(GenerationRunConfig, json.loads(json.dumps(to_json(config))))
    assert again == config and find_recipe(name) == config and find_recipe(name) is not config


@pytest.mark.parametrize("bits", [1, 5, 14, 15, 28, 30])
def test_a_division_has_as_few_sub_codes_as_14_bits_allow(bits):
    tokenizer: Any = DescribedTokenizer("QLIPModel")
    tokenizer.num_bits = bits
    size = GeneratorSize(caption_encoder="learned")
    division = generator_config(size, tokenizer, caption_encoder="").division
    assert sum(division) == bits and len(division) == -(-bits // 14) and max(division) - min(division) <= 1


@pytest.mark.parametrize("data", ["tokens", "scenes"])
def test_a_run_trains_and_exports_from_tokens_and_from_pictures(home, tmp_path, data, capsys):
    """The sample pictures need guidance, preview and all; a finished run says so."""
    config = tiny(home, data=data)
    config.trainer.images_every = 2
    export = run_generation(config, folder=tmp_path / "run")
    lines = figures_of(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0]["bits_per_bit"] == pytest.approx(1, abs=1e-5)  # fresh weights guess uniformly
    assert sorted(path.name for path in (tmp_path / "run" / "samples").iterdir()) == [
        "step_00000002.png",
        "step_00000003.png",
    ]
    generator = open_generator(export)
    own: ImageTokenizer = open_image_tokenizer(home / "tokenizer")
    assert generator.tokenizer.encoder_fingerprint == own.encoder_fingerprint
    assert generator.generate(["a red star"], seeds=[0]).shape == (1, 3, 16, 16)
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert "model.hidden_size: 128 -> 16" in record["changes_from_recipe"]
    capsys.readouterr()
    again = tiny(home, data=data)
    again.trainer.images_every = 2
    assert run_generation(again, folder=tmp_path / "run") == export
    assert "is finished (3 steps)" in capsys.readouterr().out.replace("\n", " ")


def test_a_stopped_run_ends_as_one_that_was_never_stopped(home, tmp_path, monkeypatch):
    """With everything that is drawn at random: dropout, dropped captions, flipped bits; an average; checkpointing."""

    def config() -> GenerationRunConfig:
        made = tiny(home, steps=5, head="bitwise", dropout=0.3, caption_dropout=0.3, bit_flips=0.3)
        made.trainer.ema_decay, made.trainer.activation_checkpointing = 0.5, True
        return made

    run_generation(config(), folder=tmp_path / "straight")
    step = Trainer.train_step

    def stopped(trainer: Trainer, batches: list) -> dict[str, Tensor]:
        if trainer.step == 3:  # a checkpoint lies at 2
            raise KeyboardInterrupt
        return step(trainer, batches)

    monkeypatch.setattr(Trainer, "train_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_generation(config(), folder=tmp_path / "stopped")
    monkeypatch.undo()
    run_generation(config(), folder=tmp_path / "stopped")
    whole, resumed = weights_of(tmp_path / "straight"), weights_of(tmp_path / "stopped")
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    assert figures_of(tmp_path / "straight") == figures_of(tmp_path / "stopped")


def refused(config: GenerationRunConfig, folder: Path) -> str:
    """The one line with which a run is refused before its first step."""
    with pytest.raises(UserError) as error:
        run_generation(config, folder=folder)
    assert "\n" not in str(error.value)
    assert not (folder / "checkpoints").exists() and not (folder / "metrics.jsonl").exists()
    return str(error.value)


def test_tokens_of_another_tokenizer_are_refused_with_both_fingerprints(home, tmp_path):
    config = tiny(home)
    config.tokenizer = save_tokenizer(tmp_path / "other", seed=1)
    own, other = (open_image_tokenizer(path).encoder_fingerprint for path in (home / "tokenizer", tmp_path / "other"))
    said = refused(config, tmp_path / "run")
    assert own in said and other in said and own != other


def test_missing_parts_are_one_line(home, tmp_path):
    config = tiny(home)
    config.images.train = str(home / "scenes")
    both = "give --data.tokens STORE (`qlip tokenize` makes it), or --images.train SHARDS alone"
    assert refused(config, tmp_path / "run") == f"both --data.tokens and --images.train are given: {both}"
    config.data.tokens = config.images.train = ""
    assert refused(config, tmp_path / "run") == f"no training data: {both}"
    config.data.tokens = str(tmp_path / "nowhere")
    assert "nowhere" in refused(config, tmp_path / "run")
    config = tiny(home)
    config.tokenizer = ""
    assert "no image tokenizer: add --tokenizer RUN/export" in refused(config, tmp_path / "run")
    config.tokenizer = str(tmp_path / "nowhere")
    assert "nowhere" in refused(config, tmp_path / "run")
    config = tiny(home, caption_encoder="t5")
    assert "no T5 encoder in the empty path: download google/flan-t5-xl" in refused(config, tmp_path / "run")
    config.caption_encoder = str(tmp_path)
    assert f"no T5 encoder in {tmp_path}: download" in refused(config, tmp_path / "run")
    config = tiny(home, caption_encoder="qlip", caption_length=17)
    assert "captions of 17 slots, but the text tower has 16" in refused(config, tmp_path / "run")


IMPOSSIBLE: dict[str, tuple[Callable[[GenerationRunConfig], None], str]] = {
    "division": (
        lambda config: vars_of(config, division=(14, 13), head="flat"),
        "model: division [14, 13] does not make num_bits 28; change the --model options",
    ),
    "one sub-code": (lambda config: vars_of(config, division=(28,), head="depth"), "give sub-codes of 1 to 16 bits"),
    "heads": (lambda config: vars_of(config, num_heads=3), "must be a whole multiple of 4"),
    "no heads": (lambda config: vars_of(config, num_heads=0), "num_attention_heads is 0: give at least 1"),
    "captions": (lambda config: vars_of(config, caption_length=0), "caption_length is 0: give at least 1"),
    "dropout": (lambda config: vars_of(config, dropout=1.5), "dropout is 1.5: give 0 or more, below 1"),
    "width": (lambda config: vars_of(config, caption_width=0), "caption_width is 0: give at least 1"),
    "steps": (lambda config: setattr(config.trainer, "steps", 0), "trainer.steps is 0: give at least 1"),
    "batch": (lambda config: setattr(config.data, "batch_size", 0), "data.batch_size is 0: give at least 1"),
    "too few": (lambda config: setattr(config.data, "batch_size", 25), "has 24 pictures, too few for 1 x 25"),
    "shares": (lambda config: setattr(config.data, "global_batch_size", 6), "take --data.batch-size 3"),
    "window": (lambda config: setattr(config.data, "shuffle_window", 0), "data.shuffle_window is 0"),
    "size": (lambda config: setattr(config, "tokenizer_image_size", 32), "leave --image-size out"),
    "rate": (lambda config: setattr(config.task.optimizer, "lr", -1.0), "task.optimizer.lr is -1.0"),
    "evaluation": (lambda config: setattr(config.trainer, "eval_every", 5), "qlip eval"),
    "blank prompt": (lambda config: setattr(config, "sample_prompts", ("a star", " ")), "the prompt is empty"),
}


def vars_of(config: GenerationRunConfig, **values: Any) -> None:
    for name, value in values.items():
        setattr(config.model, name, value)


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_settings_are_one_line(home, tmp_path, case):
    change, said = IMPOSSIBLE[case]
    config = tiny(home)
    change(config)
    assert said in refused(config, tmp_path / "run")


def test_pictures_of_no_prompt_are_one_line(home, tmp_path):
    config = tiny(home)
    config.trainer.images_every, config.sample_prompts = 1, ()
    assert "trainer.images_every has nothing to draw: add --sample-prompts" in refused(config, tmp_path / "run")
