"""`qlip train scenes_llava_tiny` as a user runs it: help, Ctrl-C, wrong flags, commands that do not apply."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tiny_runs import stopped_by_ctrl_c

from qlip.core.log import read_metrics
from qlip.data.scene_conversations import write_scene_conversations
from qlip.data.scene_shards import write_scene_shards
from qlip.data.scenes import SceneConfig
from qlip.models.assistant import open_assistant

SIZES = {
    "tiny.hidden-size": "16",
    "tiny.num-layers": "1",
    "tiny.num-heads": "2",
    "tiny.intermediate-size": "24",
    "data.batch-size": "4",
    "trainer.steps": "3",
    "trainer.log-every": "1",
    "trainer.device": "cpu",
}


def options(**changes: str) -> list[str]:
    """Three steps of a language model of width 16; `changes` with _ for - and __ for a dot."""
    named = {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
    return [word for name, value in (SIZES | named).items() for word in (f"--{name}", value)]


@pytest.fixture(scope="module")
def command(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """`train scenes_llava_tiny` with a tower and 24 scenes, whose conversations a command has written."""
    folder = tmp_path_factory.mktemp("my scenes ü")
    write_scene_shards(folder / "train", num=24, split="train", config=SceneConfig(image_size=16))
    write_scene_conversations(str(folder / "train"), folder / "scenes.json")
    found = ["train", "scenes_llava_tiny", "--tower", str(model_folder)]
    return [*found, "--data.conversations", str(folder / "scenes.json"), "--data.images", str(folder / "train")]


def test_help_teaches(qlip):
    said = qlip.works("train", "scenes_llava_tiny", "--help")
    for option in ("--tower", "--language-model", "--init", "--features", "--layer", "--lora.rank", "--task.trains"):
        assert option in said
    for words in ("hidden,post_quantizer,codes", "QLIP folder", "Table 6", "LLaVA's .json list"):
        assert words in said
    assert "scenes_llava_tiny" in qlip.works("train", "--help")


@pytest.mark.parametrize("command_name", ["check", "balance"])
def test_commands_of_tokenizers_point_to_the_page_of_assistants(qlip, command_name):
    said = qlip.refused(command_name, "scenes_llava_tiny")
    assert f"`qlip {command_name}` knows recipes of tokenizers" in said
    assert "an assistant that sees through one" in said and "docs/understanding.md" in said


def test_a_run_is_trained_asked_and_started_again(qlip, command, tmp_path):
    run = tmp_path / "run"
    qlip.works(*command, "--out", run, *options())
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == [1, 2, 3]
    assert open_assistant(run / "export").abilities == {"answer"}
    assert "is finished (3 steps)" in qlip.works(*command, "--out", run, *options()).replace("\n", " ")
    said = qlip.refused(*command, "--out", run, *options(lora__rank="2"))
    assert "lora.rank: 0 -> 2" in said and "--accept-changes" in said
    assert "resuming" in qlip.works(*command, "--out", run, *options(trainer__steps="4"), "--accept-changes")
    record = json.loads((run / "config.json").read_text())
    assert any(re.fullmatch(r"trainer\.steps: \d+ -> 4", line) for line in record["changes_from_recipe"])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--features", "pixels"], "features"),
        (["--towr", "x"], "towr"),
        (["--lora.rank", "many"], "lora.rank"),
        (["--task.trains", "tower"], "task.trains"),
        (["--tower", "nowhere"], "nowhere"),
        (["--data.images", "nowhere"], "images nowhere is not there"),
        (["--model.image-size", "16"], "model.image-size"),
        (["--trainer.eval-every", "2"], "trainer.eval_every"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(qlip, command, tmp_path, wrong, said):
    assert said in qlip.refused(*command, "--out", tmp_path / "run", *options(), *wrong)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_ctrl_c_is_one_line_and_the_run_goes_on(qlip, command, tmp_path):
    run = tmp_path / "run"
    changes = {"trainer__save_every": "20", "trainer__tracker": "none"}
    endless = [*command, "--out", str(run), *options(trainer__steps="1000000", **changes)]
    newest = stopped_by_ctrl_c(endless, run, lines=23)  # between two checkpoints
    more = options(trainer__steps=str(newest + 1), **changes)
    assert f"at step {newest}" in qlip.works(*command, "--out", run, *more, "--accept-changes")
    assert read_metrics(run / "metrics.jsonl")[-1]["step"] == newest + 1
