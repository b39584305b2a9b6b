"""`qlip generate` with a UM3: its own defaults, pictures that depend on prompt and seed alone, benchmarks, refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_runs import Shell

from qlip.models import opening
from qlip.models.qlip.loading import load_processor
from tiny_unified import tiny_unified_folder

LONG = "a blue ring and a red star beside two small green circles"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A UM3."""
    place = tmp_path_factory.mktemp("a drawing one")
    tiny_unified_folder(place / "um3")
    return place


@pytest.fixture(autouse=True, scope="module")
def vocabulary(folder: Path) -> Iterator[None]:
    """Reading CLIP's vocabulary is half of the time that opening a tiny model takes."""
    processor = load_processor(folder / "um3_images")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "load_processor", lambda source: processor)
        yield


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.array(picture)


@pytest.mark.parametrize("guidance", [(), ("--guidance", 3)], ids=["unguided", "guided"])
def test_a_picture_is_the_same_alone_and_beside_a_longer_prompt(qlip: Shell, folder, tmp_path, guidance):
    alone, beside = tmp_path / "alone", tmp_path / "beside"
    options = ("--num", 2, "--device", "cpu", "--precision", "fp32", *guidance)
    qlip.works("generate", folder / "um3", "a star", "--out", alone, *options)
    said = qlip.works("generate", folder / "um3", LONG, "a star", "--out", beside, *options, "--batch-size", 4)
    assert "4 pictures in" in said
    for name in ("a-star_0.png", "a-star_1.png"):
        assert (pixels(alone / name) == pixels(beside / name)).all()
    assert (pixels(alone / "a-star_0.png") != pixels(alone / "a-star_1.png")).any()
    record = json.loads((alone / "generation.json").read_text())
    strength = guidance[1] if guidance else 1
    defaults = {"guidance": strength, "temperature": 1.0, "top_k": 0, "top_p": 0.95}
    assert record["sampling"] == defaults | {"head": "flat [7, 7, 7, 7]"}
    assert (record["dtype"], record["batch_size"]) == ("float32", "any")
    assert len(record["encoder_fingerprint"]) == len(record["model_fingerprint"]) == 64


def test_the_same_command_goes_on_and_says_that_previews_have_no_effect(qlip: Shell, folder, tmp_path):
    command = ("generate", folder / "um3", "a star", "--num", 2, "--out", tmp_path, "--temperature", 0)
    said = qlip.works(*command, "--device", "cpu", "--preview")
    assert said.startswith("--preview has no effect: a UM3 shows its pictures when they are done\n")
    assert not (tmp_path / "preview.png").exists()
    first = pixels(tmp_path / "a-star_0.png")
    assert (first == pixels(tmp_path / "a-star_1.png")).all()  # nothing is drawn at random
    kept = (tmp_path / "a-star_0.png").stat().st_mtime_ns
    (tmp_path / "a-star_1.png").unlink()
    qlip.works(*command, "--device", "cpu")
    assert (tmp_path / "a-star_0.png").stat().st_mtime_ns == kept and (pixels(tmp_path / "a-star_1.png") == first).all()


def test_benchmarks_are_written(qlip: Shell, folder, tmp_path):
    line = {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
    (tmp_path / "geneval.jsonl").write_text(json.dumps(line))
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/1.txt").write_text(LONG)
    for benchmark, prompts in (("geneval", "geneval.jsonl"), ("dpg", "prompts")):
        given = ("--benchmark", benchmark, "--prompts", tmp_path / prompts, "--out", tmp_path / benchmark)
        qlip.works("generate", folder / "um3", *given, "--device", "cpu")
    assert len(list((tmp_path / "geneval").rglob("samples/*.png"))) == 4
    assert pixels(tmp_path / "dpg/1.png").shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("a star", "--caption-encoder", "t5"), "is a UM3, which reads prompts itself: leave it out"),
        (("a star", "blue " * 300), "tokens, and beside a picture there is room for 239: shorten it"),
        ((" ",), "the prompt is empty"),
        (("a star", "--temperature", "-1"), "temperature is -1.0"),
        (("a star", "--guidance", "inf"), "guidance is inf"),
    ],
    ids=["caption encoder", "long prompt", "empty prompt", "temperature", "guidance"],
)
def test_mistakes_are_one_line_and_leave_nothing(qlip: Shell, folder, tmp_path, arguments, said):
    assert said in qlip.refused("generate", folder / "um3", *arguments, "--out", tmp_path / "out", "--device", "cpu")
    assert not (tmp_path / "out").exists()


def test_a_run_is_told_apart_from_its_export(qlip: Shell, folder, tmp_path):
    (tmp_path / "export").symlink_to(folder / "um3")
    refused = qlip.refused("generate", tmp_path, "a star", "--out", tmp_path / "out", "--device", "cpu")
    assert f"{tmp_path} holds no unified model: give {tmp_path / 'export'}" in refused
