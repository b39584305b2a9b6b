"""`qlip complete` as a user gives it: what the model writes and draws, in order; nothing else is printed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_runs import Shell

from qlip.apps.complete import parts_of
from qlip.models import opening
from qlip.models.qlip.loading import load_processor
from qlip.models.unified import UM3Config
from qlip.models.unified_model import Unified, WritingSettings, open_unified
from tiny_assistants import some_picture
from tiny_unified import IMAGE_LENGTH, tiny_unified_folder

TEXT = "Once upon a time"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A UM3 that likes to draw, and a picture."""
    place = tmp_path_factory.mktemp("completed")
    weights = tiny_unified_folder(place / "um3") / "model.safetensors"
    tensors = load_file(weights)
    tensors["lm_head.weight"][UM3Config.from_pretrained(weights.parent).image_begin_id] *= 4
    save_file(tensors, weights, metadata={"format": "pt"})
    some_picture(0).save(place / "0.png")
    return place


@pytest.fixture(autouse=True, scope="module")
def vocabulary(folder: Path) -> Iterator[None]:
    """Reading CLIP's vocabulary is half of the time that opening a tiny model takes."""
    processor = load_processor(folder / "um3_images")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "load_processor", lambda source: processor)
        yield


@pytest.fixture(scope="module")
def unified(folder: Path) -> Unified:
    """The same, opened."""
    return open_unified(folder / "um3")


def test_texts_are_those_of_the_model_and_nothing_else_is_printed(qlip: Shell, folder, unified):
    options = ("--max-new-tokens", 12, "--device", "cpu")
    parts = [TEXT, Image.open(folder / "0.png").convert("RGB"), "and"]
    wanted = {}
    for seed in (4, 5):
        settings = WritingSettings(max_new_tokens=12)
        wanted[seed] = "".join(unified.continue_from(parts, settings, seed=seed))
        words = (TEXT, folder / "0.png", "and")
        printed = qlip.works("complete", folder / "um3", *words, *options, "--seed", seed)
        assert printed == wanted[seed] + "\n" and wanted[seed]
    assert wanted[4] != wanted[5]
    both = qlip.works("complete", folder / "um3", *words, *options, "--seed", 4, "--num", 2)
    assert both == f"--- 1 of 2, --seed 4\n{wanted[4]}\n--- 2 of 2, --seed 5\n{wanted[5]}\n"


def test_pictures_lie_in_the_folder_and_are_named_in_the_text(qlip: Shell, folder, monkeypatch, tmp_path):
    processor = open_unified(folder / "um3").processor
    ids = torch.tensor(processor.encode(["a star ", some_picture(1), " and ", some_picture(2)]))
    asked: list[tuple[int, bool]] = []
    written = [ids, ids, ids[:-3], ids[:4]]  # the third ends inside the second picture

    def draw(self, parts, settings, *, images, seed):
        asked.append((settings.max_new_tokens, images))
        return written[len(asked) - 1]

    monkeypatch.setattr(Unified, "continue_ids", draw)
    out = tmp_path / "deep" / "drawn"
    command = ("complete", folder / "um3", TEXT, "--images", "--out", out, "--device", "cpu")
    said = f"a star [0.png] and [1.png]\n2 pictures in {out}\n"
    assert qlip.works(*command) == said
    assert (np.array(Image.open(out / "1.png")) == np.array(processor.decode(ids)[3])).all()
    assert qlip.works(*command) == said.replace("[0.", "[2.").replace("[1.", "[3.")  # nothing is written over
    assert sorted(path.name for path in out.iterdir()) == ["0.png", "1.png", "2.png", "3.png"]
    assert asked == [(128 + IMAGE_LENGTH + 2, True)] * 2
    cut = f"1 pictures were cut off and left out: one takes {IMAGE_LENGTH + 2} ids, raise --max-new-tokens\n"
    assert qlip.works(*command) == f"a star [4.png] and \n{cut}1 pictures in {out}\n"
    assert qlip.works(*command, "--max-new-tokens", 20).endswith("\nno picture: the model began none\n")


def test_the_model_draws_by_itself(qlip: Shell, folder, tmp_path):
    """None runs on for ever, and each whole one is kept."""
    options = ("--images", "--out", tmp_path, "--max-new-tokens", 40, "--device", "cpu", "--top-p", 1)
    said = qlip.works("complete", folder / "um3", "", *options, "--num", 4)
    pictures = sorted(tmp_path.glob("*.png"))
    assert pictures and f"{len(pictures)} pictures in" in said
    assert all(f"[{path.name}]" in said for path in pictures)
    assert {Image.open(path).size for path in pictures} == {(16, 16)}


def test_what_is_called_like_a_picture_is_one(folder, monkeypatch):
    monkeypatch.chdir(folder)
    some_picture(3).save("with space.PNG")
    Path("notes.txt").write_text("a file of another kind")
    texts = ["see 0.png", "notes.txt", "a.b", "", "x" * 5000, "gone with space.png"]
    assert parts_of(texts) == texts
    assert parts_of(["bad \udcff byte"]) == ["bad \ufffd byte"]  # as Python gives arguments that are no UTF-8
    assert all(isinstance(part, Image.Image) for part in parts_of(["0.png", "with space.PNG"]))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("um3",), "nothing given to continue: qlip complete MODEL"),
        (("um3", TEXT, "gone.png"), "no picture at gone.png"),
        (("um3", "text.png", TEXT), "text.png: not an image"),
        (("nowhere", TEXT), "nowhere holds no unified model"),
        (("um3", TEXT, "--images"), "--images needs a folder for the pictures: add --out DIR"),
        (("um3", TEXT, "--out", "x"), "--out is for pictures that the model draws: add --images"),
        (("um3", TEXT, "--num", "0"), "--num is 0: give at least 1"),
        (("um3", TEXT, "--max-new-tokens", "0"), "max_new_tokens is 0: give at least 1"),
        (("um3", TEXT, "--temperature", "-1"), "temperature is -1.0"),
        (("um3", TEXT, "--seed", "-1"), "--seed is -1: give a whole number from 0"),
        (("um3", TEXT, "--top-p", "1.5"), "top_p is 1.5"),
        (
            ("um3", TEXT, "--images", "--out", "x", "--max-new-tokens", "17"),
            "--max-new-tokens is 17, and a picture takes 18: give more, or leave --images out",
        ),
        (("um3", "blue " * 300), "the context 256: shorten it"),
        (("um3", TEXT, "--images", "--out", "text.png"), "cannot write to text.png"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, tuple) else "",
)
def test_mistakes_of_complete_are_one_line(qlip: Shell, folder, monkeypatch, arguments, said):
    monkeypatch.chdir(folder)
    Path("text.png").write_text("text")
    assert said in qlip.refused("complete", *arguments)
    assert not Path("x").exists()
