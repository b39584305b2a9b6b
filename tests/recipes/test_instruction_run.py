"""Runs of assistants: they train, resume bit for bit, go on in a second stage, and refuse in one line."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_assistant_runs import changed, figures_of, moved, second_stage, tiny, weights_of, write_home
from torch import Tensor
from transformers import AutoModelForImageTextToText

from qlip.core.errors import UserError
from qlip.engine.trainer import Trainer
from qlip.models.assistant import AnswerSettings, open_assistant
from qlip.recipes.instruction_run import InstructionRunConfig, run_instruction
from tiny_assistants import question

PROJECTOR, TOWER, LANGUAGE_MODEL = "multi_modal_projector.", "vision_tower.", "language_model."


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def trained(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps, which pass over the end of a first epoch of three."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run_instruction(tiny(home, steps=4, data__batch_size=8), folder=folder)
    return folder


def tower_of(home: Path) -> dict[str, Tensor]:
    """The tower as the QLIP folder has it, by the names of an export."""
    weights = load_file(home / "tower" / "model.safetensors")
    own = {
        name.replace("vision_model.", TOWER, 1): tensor
        for name, tensor in weights.items()
        if name.startswith("vision_model.")
    }
    return {name: tensor for name, tensor in own.items() if "rope" not in name}


def part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.items() if name.startswith(prefix)}


def test_a_run_trains_and_its_export_answers(home, trained, capsys):
    lines = figures_of(trained)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[0]["token_loss"] == pytest.approx(math.log(302), abs=0.1)  # fresh weights guess uniformly
    assert moved(tower_of(home), part(weights_of(trained), TOWER)) == set()
    assistant = open_assistant(trained / "export")
    prompts = [question("Is there a red star?", seed=1), question("How many shapes are there?", seed=2)]
    answers = assistant.answer(prompts, AnswerSettings(max_new_tokens=4))
    assert len(answers) == 2
    plain = AutoModelForImageTextToText.from_pretrained(trained / "export", local_files_only=True)
    inputs = assistant.inputs(prompts)
    ids = plain.generate(**inputs, max_new_tokens=4)[:, inputs["input_ids"].shape[1] :]
    assert answers == [text.strip() for text in assistant.processor.batch_decode(ids, skip_special_tokens=True)]
    record = json.loads((trained / "config.json").read_text())
    assert "tiny.hidden_size: 128 -> 16" in record["changes_from_recipe"]
    assert not (trained / "skipped.jsonl").exists()


def test_a_finished_run_says_so_and_changes_nothing(home, trained, capsys):
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    capsys.readouterr()
    again = run_instruction(tiny(home, steps=4, data__batch_size=8), folder=trained)
    assert again == trained / "export"
    assert "is finished (4 steps)" in capsys.readouterr().out.replace("\n", " ")
    assert before == {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_stopped_run_ends_as_one_that_was_never_stopped(home, trained, tmp_path, monkeypatch, num_workers):
    config = {"steps": 4, "data__batch_size": 8, "data__num_workers": num_workers}
    step = Trainer.train_step

    def stopped(trainer: Trainer, batches: list) -> dict[str, Tensor]:
        if trainer.step == 3:  # a checkpoint lies at 2
            raise KeyboardInterrupt
        return step(trainer, batches)

    monkeypatch.setattr(Trainer, "train_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_instruction(tiny(home, **config), folder=tmp_path)
    monkeypatch.undo()
    run_instruction(tiny(home, **config), folder=tmp_path)
    assert moved(weights_of(trained), weights_of(tmp_path)) == set()
    assert figures_of(trained) == figures_of(tmp_path)


@pytest.mark.parametrize("features", ["post_quantizer", "codes"])
def test_features_of_codes_train_through_a_resumed_run(home, tmp_path, features):
    run_instruction(tiny(home, features=features, steps=2, trainer__save_every=1), folder=tmp_path)
    config = open_assistant(tmp_path / "export").model.config
    assert config.vision_config.features == features
    weights = weights_of(tmp_path)
    assert weights[f"{PROJECTOR}linear_1.weight"].shape == (16, 16 if features == "post_quantizer" else 28)


@pytest.fixture(scope="module")
def first_stage(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A projector trained on captions before the language model of `trained`, which is nobody's first choice."""
    folder = tmp_path_factory.mktemp("stages") / "first"
    config = tiny(home, task__trains="projector", data__plain=True, pad_to_square=False)
    config.data.conversations = str(home / "captions.json")
    run_instruction(config, folder=folder)
    return folder


def test_the_first_stage_trains_the_projector_alone(home, first_stage, tmp_path):
    config = tiny(home, task__trains="projector", data__plain=True, task__optimizer__lr=0.0)
    config.data.conversations = str(home / "captions.json")
    run_instruction(config, folder=tmp_path)  # what it starts from: the same seed
    changes = moved(weights_of(tmp_path), weights_of(first_stage))
    assert changes == set(part(weights_of(tmp_path), PROJECTOR))
    assert moved(tower_of(home), part(weights_of(first_stage), TOWER)) == set()
    assert open_assistant(first_stage / "export").processor.image_processor.do_pad is False


def test_the_second_stage_goes_on_from_the_first(home, first_stage, tmp_path):
    """With rates of zero it is what it was, and nothing is drawn afresh; with others all but the tower moves."""
    still = second_stage(home, first_stage / "export", task__optimizer__lr=0.0)
    run_instruction(still, folder=tmp_path / "still")
    assert moved(weights_of(first_stage), weights_of(tmp_path / "still")) == set()
    run_instruction(second_stage(home, first_stage / "export"), folder=tmp_path / "second")
    changes = moved(weights_of(first_stage), weights_of(tmp_path / "second"))
    whole = weights_of(first_stage)
    assert changes == set(whole) - set(part(whole, TOWER))
    assert moved(tower_of(home), part(weights_of(tmp_path / "second"), TOWER)) == set()
    assert open_assistant(tmp_path / "second" / "export").processor.image_processor.do_pad is True


def test_lora_is_gone_from_its_export(home, first_stage, tmp_path, monkeypatch):
    changes: dict[str, Any] = {"lora__rank": 2, "lora__alpha": 4.0, "task__optimizer__lr": 1e-2}
    export = run_instruction(second_stage(home, first_stage / "export", **changes), folder=tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)  # as where it is not installed
    assert not any("lora" in path.read_text() for path in export.glob("*.json"))
    changes_of_weights = moved(weights_of(first_stage), weights_of(tmp_path))
    layers = {name for name in weights_of(tmp_path) if name.startswith(LANGUAGE_MODEL) and "_proj." in name}
    assert changes_of_weights == layers | set(part(weights_of(tmp_path), PROJECTOR))
    assert len(open_assistant(export).answer([question()], AnswerSettings(max_new_tokens=2))) == 1
    with pytest.raises(UserError, match=r"LoRA needs peft: pip install 'qlip\[lora\]'"):
        run_instruction(second_stage(home, first_stage / "export", **changes), folder=tmp_path / "other")


def refused(config: InstructionRunConfig, folder: Path) -> str:
    """The one line with which a run is refused before its first step."""
    with pytest.raises(UserError) as error:
        run_instruction(config, folder=folder)
    assert "\n" not in str(error.value)
    assert not (folder / "checkpoints").exists() and not (folder / "metrics.jsonl").exists()
    return str(error.value)


def test_a_second_stage_that_does_not_fit_the_first_is_one_line(home, first_stage, trained, tmp_path):
    export = first_stage / "export"
    both = "--init brings tower and language model with it"
    assert both in refused(second_stage(home, export, tower=str(home / "tower")), tmp_path)
    assert both in refused(changed(second_stage(home, export), language_model="LLM"), tmp_path)
    for other in ({"features": "codes"}, {"layer": -1}):
        said = refused(second_stage(home, export, **other), tmp_path)
        assert "reads other features than this run would: give --features hidden --layer -2" in said
    assert "holds no assistant" in refused(second_stage(home, home / "tower"), tmp_path)
    assert f"holds no assistant: give {export}" in refused(second_stage(home, first_stage), tmp_path)
    said = refused(tiny(home, language_model=str(export)), tmp_path)
    assert "holds a 'llava' model, no language model: give the folder of a Vicuna" in said
    assert "nowhere" in refused(second_stage(home, tmp_path / "nowhere"), tmp_path)


def test_a_disk_has_to_hold_moments_of_what_trains_alone(home, tmp_path, monkeypatch):
    """Two checkpoints and one being written, each with two moments, and the export; 4 bytes a number."""
    config = tiny(home, task__trains="projector", steps=1)
    weights = weights_of(run_instruction(config, folder=tmp_path / "run"))
    num = sum(tensor.numel() for tensor in weights.values())
    trained = sum(tensor.numel() for tensor in part(weights, PROJECTOR).values())
    real, free = shutil.disk_usage, 4 * ((num + 2 * trained) * 3 + num)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=free))
    run_instruction(config, folder=tmp_path / "enough")
    assert "GB free, the run needs about" in refused(tiny(home), tmp_path / "all")
    free -= 1
    assert "GB free, the run needs about" in refused(config, tmp_path / "less")


IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "no tower": ({"tower": ""}, "no vision tower: add --tower QLIP"),
    "tower that is not there": ({"tower": "nowhere"}, "nowhere"),
    "no conversations": ({"data__conversations": ""}, "no conversations: give --data.conversations FILE.json"),
    "conversations that are not there": ({"data__conversations": "nowhere.json"}, "nowhere.json"),
    "no pictures": ({"data__images": ""}, "set data.images to their folder or shards"),
    "pictures that are not there": ({"data__images": "nowhere"}, "images nowhere is not there"),
    "language model that is not there": ({"language_model": "nowhere"}, "no language model at nowhere: download"),
    "length": (
        {"data__max_length": 513},
        "data.max_length 513 is more than the fresh language model's 512 positions: add --language-model FOLDER, or",
    ),
    "length 0": ({"data__max_length": 0}, "data.max_length is 0: give at least 8"),
    "layer": ({"layer": -4}, "layer -4: the encoder has states -3 to 2"),
    "evaluation": ({"trainer__eval_every": 5}, "trainer.eval_every: an assistant is evaluated when its run has ended"),
    "pictures of training": ({"trainer__images_every": 5}, "trainer.images_every: an assistant draws no pictures"),
    "unknown features": ({"features": "pixels"}, "features 'pixels' are unknown: give hidden, post_quantizer, codes"),
    "LoRA of a projector": ({"task__trains": "projector", "lora__rank": 4}, "set --lora.rank 0"),
    "dropout": ({"lora__dropout": 2.0}, "lora.dropout is 2.0: give 0 or more, below 1"),
    "rank": ({"lora__rank": -1}, "lora.rank is -1: give at least 0"),
    "template": ({"chat_template": "nowhere.jinja"}, "chat template 'nowhere.jinja' is neither known nor a file"),
    "markers": ({"chat_template": "chatml"}, "chat template chatml needs <|im_start|> <|im_end|>"),
    "steps": ({"trainer__steps": 0}, "trainer.steps is 0: give at least 1"),
    "batch": ({"data__batch_size": 0}, "data.batch_size is 0: give at least 1"),
    "too few": ({"data__batch_size": 25}, "has 24 usable conversations, too few for 1 x 25"),
    "shares": ({"data__global_batch_size": 6}, "take --data.batch-size 3"),
    "heads": ({"tiny__num_heads": 3}, "tiny.hidden_size 16 is not an even multiple of tiny.num_heads 3: take 12"),
    "no blocks": ({"tiny__num_layers": 0}, "tiny.num_layers is 0: give at least 1"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_settings_are_one_line(home, tmp_path, case):
    changes, said = IMPOSSIBLE[case]
    assert said in refused(tiny(home, **changes), tmp_path / "run")


def write_records(file: Path, home: Path, change: Callable[[int, dict[str, Any]], None]) -> str:
    """The scenes' conversations, changed one by one."""
    records = json.loads((home / "scenes.json").read_text())
    for number, record in enumerate(records):
        change(number, record)
    file.write_text(json.dumps(records))
    return str(file)


def without_picture(number: int, record: dict[str, Any]) -> None:
    del record["image"]
    record["conversations"][0]["value"] = record["conversations"][0]["value"].removeprefix("<image>\n")


def test_texts_alone_train_a_language_model_but_no_projector(home, tmp_path):
    texts = write_records(tmp_path / "texts.json", home, without_picture)
    config = tiny(home, data__conversations=texts, data__images="", task__trains="projector")
    assert "no pictures, and only the projector is trained" in refused(config, tmp_path / "run")
    run_instruction(tiny(home, data__conversations=texts, data__images="", steps=2), folder=tmp_path / "run")
    assert all(0 < line["token_loss"] < math.inf for line in figures_of(tmp_path / "run"))


def test_a_few_missing_pictures_are_skipped_and_counted_and_many_stop_the_run(home, tmp_path):
    def lose(every: int) -> Callable[[int, dict[str, Any]], None]:
        return lambda number, record: record.update(image=f"lost{number}.png") if number % every == 0 else None

    few = write_records(tmp_path / "few.json", home, lose(12))
    config = tiny(home, data__conversations=few, data__max_skip_share=0.2, steps=6)
    run_instruction(config, folder=tmp_path / "few")
    assert all(0 < line["token_loss"] < math.inf for line in figures_of(tmp_path / "few"))
    skipped = [json.loads(line) for line in (tmp_path / "few" / "skipped.jsonl").read_text().splitlines()]
    assert {line["reason"] for line in skipped} == {"missing image: lost0.png", "missing image: lost12.png"}
    assert {line["key"] for line in skipped} == {"000000000", "000000012"}
    many = write_records(tmp_path / "many.json", home, lose(2))
    with pytest.raises(UserError) as error:
        run_instruction(tiny(home, data__conversations=many, data__batch_size=8, steps=50), folder=tmp_path / "many")
    said = str(error.value)
    assert "\n" not in said and "samples skipped, more than max_skip_share 0.05: missing image" in said
    assert str(tmp_path / "many" / "skipped.jsonl") in said
    assert all(0 < line["token_loss"] < math.inf for line in figures_of(tmp_path / "many"))


def test_pictures_that_are_all_lost_stop_before_the_first_step(home, tmp_path):
    lost = write_records(tmp_path / "lost.json", home, lambda number, record: record.update(image=f"{number}.gif"))
    with pytest.raises(UserError, match=r"missing image \(\d+\); every one is in"):
        run_instruction(tiny(home, data__conversations=lost), folder=tmp_path / "run")
    assert torch.isfinite(torch.tensor([line["token_loss"] for line in figures_of(tmp_path / "run")])).all()
