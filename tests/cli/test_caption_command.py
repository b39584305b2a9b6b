"""`qlip caption` as a user gives it: transformers' own captions, one line each, mistakes in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_runs import Shell
from transformers import AutoModelForCausalLM, AutoProcessor

from qlip.models import opening
from qlip.models.qlip.loading import load_processor
from qlip.models.unified_model import Unified
from tiny_assistants import some_picture
from tiny_unified import tiny_unified_folder

PICTURES = ("0.png", "1.png", "2.png")
OPTIONS = ("--max-new-tokens", 12, "--device", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A UM3, three pictures."""
    place = tmp_path_factory.mktemp("captioned")
    tiny_unified_folder(place / "um3")
    for number, name in enumerate(PICTURES):
        some_picture(number).save(place / name)
    return place


@pytest.fixture(autouse=True, scope="module")
def vocabulary(folder: Path) -> Iterator[None]:
    """Reading CLIP's vocabulary is half of the time that opening a tiny model takes."""
    processor = load_processor(folder / "um3_images")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "load_processor", lambda source: processor)
        yield


def plain_captions(folder: Path, *, most: int) -> list[str]:
    """By transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder / "um3")
    processor = AutoProcessor.from_pretrained(folder / "um3")
    captions = []
    for name in PICTURES:
        inputs = processor([folder / name])
        with torch.inference_mode():
            written = model.generate(**inputs, do_sample=False, images=False, max_new_tokens=most, pad_token_id=1)
        text = processor.tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        captions.append(" ".join(text.split()))
    return captions


def test_captions_are_those_of_transformers_whatever_the_batch(qlip: Shell, folder, monkeypatch):
    monkeypatch.chdir(folder)
    captions = plain_captions(folder, most=12)
    assert any(captions)
    printed = qlip.works("caption", "um3", *PICTURES, *OPTIONS)
    assert printed.splitlines() == [f"{name}: {caption}" for name, caption in zip(PICTURES, captions, strict=True)]
    assert qlip.works("caption", "um3", *PICTURES, *OPTIONS, "--batch-size", 1) == printed
    last = PICTURES[captions.index(max(captions, key=len))]
    assert qlip.works("caption", "um3", last, *OPTIONS) == max(captions, key=len) + "\n"


def test_a_drawn_caption_depends_on_its_picture_and_the_seed(qlip: Shell, folder, monkeypatch):
    monkeypatch.chdir(folder)
    drawn = (*OPTIONS, "--temperature", 1, "--top-p", 1)
    together = qlip.works("caption", "um3", *PICTURES, *drawn).splitlines()
    assert qlip.works("caption", "um3", "1.png", *drawn).strip() == together[1].removeprefix("1.png: ").strip()
    assert qlip.works("caption", "um3", *PICTURES, *drawn, "--seed", 1).splitlines() != together


def test_lines_of_json_and_captions_without_words(qlip: Shell, folder, monkeypatch, tmp_path):
    written = iter(["", "ein roter Stern ★", "a\u2028b"])
    monkeypatch.setattr(Unified, "caption", lambda self, pictures, *rest, **options: [next(written) for _ in pictures])
    monkeypatch.chdir(folder)
    shutil.copy("2.png", "\udcff.png")  # a name that is no UTF-8
    target = tmp_path / "new" / "captions.jsonl"
    code, out, err = qlip("caption", "um3", "0.png", "1.png", "\udcff.png", "--json", target, "--device", "cpu")
    assert code == 0 and out.startswith("0.png: \n1.png: ein roter Stern ★\n")
    assert err == "0.png: the model wrote no caption\n"
    records = [json.loads(line) for line in target.read_text(encoding="utf-8").rstrip("\n").split("\n")]
    assert records == [
        {"image": "0.png", "caption": ""},
        {"image": "1.png", "caption": "ein roter Stern ★"},
        {"image": "\\udcff.png", "caption": "a\u2028b"},
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("um3",), "no pictures given: qlip caption MODEL picture.png"),
        (("um3", "0.png", "gone.png"), "no picture at gone.png"),
        (("um3", "0.png", "text.png"), "text.png: not an image"),
        (("um3", "."), "no picture at ."),
        (("um3_images", "0.png"), "um3_images holds no unified model: give the export of `qlip train"),
        (("nowhere", "0.png"), "nowhere holds no unified model"),
        (("um3", "0.png", "--temperature", "-1"), "temperature is -1.0: give 0"),
        (("um3", "0.png", "--temperature", "nan"), "temperature is nan"),
        (("um3", "0.png", "--seed", "-1"), "--seed is -1: give a whole number from 0"),
        (("um3", "0.png", "--top-p", "0"), "top_p is 0.0"),
        (("um3", "0.png", "--max-new-tokens", "0"), "max_new_tokens is 0: give at least 1"),
        (("um3", "0.png", "--batch-size", "0"), "--batch-size is 0: give at least 1"),
        (("um3", "0.png", "--json", "1.png"), "--json 1.png: give the file a name that ends in .jsonl"),
        (("um3", "0.png", "--json", "text.png/x.jsonl"), "cannot write text.png/x.jsonl"),
        (("um3", "0.png", "--guidance", "2"), "option --guidance is unknown"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_mistakes_of_caption_are_one_line(qlip: Shell, folder, monkeypatch, arguments, said):
    monkeypatch.chdir(folder)
    Path("text.png").write_text("text")
    picture = Path("1.png").read_bytes()
    assert said in qlip.refused("caption", *arguments)
    assert Path("1.png").read_bytes() == picture
