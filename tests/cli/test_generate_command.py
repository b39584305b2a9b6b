"""`qlip train scenes_t2i_tiny`, `qlip generate`, `qlip eval results` as a user gives them; mistakes are one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_runs import Shell

from qlip.cli import dispatch
from qlip.data.scene_shards import write_scene_shards
from qlip.data.scenes import SceneConfig
from qlip.models import caption_encoder, opening
from qlip.models.qlip.loading import load_processor
from qlip.models.qlip.tokenizer import clip_tokenizer

SIZES = {"hidden-size": 16, "num-layers": 1, "num-heads": 2, "intermediate-size": 24, "caption-width": 8}
TINY = [word for name, value in SIZES.items() for word in (f"--model.{name}", str(value))]
TINY += ["--data.batch-size", "4", "--trainer.steps", "3", "--trainer.log-every", "1", "--trainer.device", "cpu"]


@pytest.fixture(autouse=True, scope="module")
def vocabularies(model_folder: Path) -> Iterator[None]:
    """Reading CLIP's vocabulary is most of the time that opening a tiny model takes."""
    processor = load_processor(model_folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caption_encoder, "clip_tokenizer", cache(clip_tokenizer))
        patch.setattr(opening, "load_processor", lambda source: processor)
        yield


@pytest.fixture(scope="module")
def generator(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained for three steps by the commands of the documentation."""
    home = tmp_path_factory.mktemp("a generator")
    write_scene_shards(home / "scenes", num=8, split="train", config=SceneConfig(image_size=16))
    model, tokens, run = str(model_folder), str(home / "tokens"), str(home / "run")
    dispatch(["tokenize", model, str(home / "scenes"), tokens, "--caption-fields", "prompts", "--device", "cpu"])
    dispatch(["train", "scenes_t2i_tiny", "--tokenizer", model, "--data.tokens", tokens, "--out", run, *TINY])
    return home / "run" / "export"


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.array(picture)


def test_pictures_a_sheet_and_a_record(qlip: Shell, generator: Path, tmp_path: Path):
    out, again = tmp_path / "pictures", tmp_path / "again"
    prompts = ["a red star", "红色的星星 ★\0", "a red star"]
    said = qlip.works("generate", generator, *prompts, "--num", 2, "--out", out, "--preview", "--device", "cpu")
    assert "6 pictures in" in said.replace("\n", " ")
    names = [f"{stem}_{index}.png" for stem in ("a-red-star", "红色的星星", "a-red-star-2") for index in (0, 1)]
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, "sheet.png", "generation.json"])
    assert {pixels(out / name).shape for name in names} == {(16, 16, 3)}
    assert pixels(out / "sheet.png").shape == (3 * (256 + 22), 2 * 256, 3)
    record = json.loads((out / "generation.json").read_text(encoding="utf-8"))
    assert [line["file"] for line in record["pictures"]] == names
    assert record["pictures"][2]["prompt"] == "红色的星星 ★" and record["sampling"]["guidance"] == 3.0
    assert record["seed"] == 0 and len(record["encoder_fingerprint"]) == len(record["model_fingerprint"]) == 64
    qlip.works("generate", generator, "a red star", "--num", 2, "--out", again, "--batch-size", 1, "--device", "cpu")
    for index in (0, 1):  # the same seed, whatever else is drawn
        first = pixels(out / f"a-red-star_{index}.png")
        assert (first == pixels(again / f"a-red-star_{index}.png")).all()
        assert (first == pixels(out / f"a-red-star-2_{index}.png")).all()
    assert (pixels(out / "a-red-star_0.png") != pixels(out / "a-red-star_1.png")).any()
    same = ("generate", generator, "a red star", "--num", 2, "--out", again, "--device", "cpu")
    kept = (again / "a-red-star_0.png").stat().st_mtime_ns
    (again / "a-red-star_1.png").unlink()
    qlip.works(*same)  # goes on where it was stopped
    assert (again / "a-red-star_0.png").stat().st_mtime_ns == kept
    assert (pixels(again / "a-red-star_1.png") == pixels(out / "a-red-star_1.png")).all()
    assert "of another model, prompts or settings" in qlip.refused(*same, "--seed", 1)
    other = tmp_path / "other"
    qlip.works("generate", generator, "a red star", "--num", 1, "--out", other, "--seed", 1, "--device", "cpu")
    assert (pixels(other / "a-red-star_0.png") != pixels(out / "a-red-star_0.png")).any()


def test_what_is_not_read_of_a_prompt_is_said(qlip: Shell, generator: Path, tmp_path: Path):
    options = ("--num", 1, "--out", tmp_path / "out", "--device", "cpu")
    said = qlip.works("generate", generator, "star " * 300, "...", *options).replace("\n", " ")
    assert "of its tokens are not read, the model takes 12" in said
    names = sorted(path.name for path in (tmp_path / "out").glob("*_0.png"))
    assert names[0] == "prompt-1_0.png" and names[1].startswith("star-star") and len(names[1]) < 80


SAMPLING = ("--guidance", 1.5, "--temperature", 0, "--top-k", 5, "--top-p", 0.9)


def test_settings_are_taken_and_recorded(qlip: Shell, generator: Path, tmp_path: Path):
    qlip.works("generate", generator, "a star", "--num", 2, "--out", tmp_path, "--device", "cpu", *SAMPLING)
    record = json.loads((tmp_path / "generation.json").read_text())
    wanted = {"guidance": 1.5, "temperature": 0, "top_k": 5, "top_p": 0.9}
    assert record["sampling"] == wanted | {"head": record["sampling"]["head"]}
    assert (pixels(tmp_path / "a-star_0.png") == pixels(tmp_path / "a-star_1.png")).all()  # nothing is drawn at random


REFUSED = {
    "empty prompt": ((" ",), "the prompt is empty: say what the picture should show, in quotes"),
    "nothing printable": (("a star", "\t\n"), "the prompt is empty"),
    "endless prompt": (("x" * 100_001,), "the prompt has 100001 characters: give at most 100000"),
    "no prompt": ((), 'no prompt given: qlip generate MODEL "a red star" --out DIR'),
    "prompt and benchmark": (
        ("a star", "--benchmark", "geneval", "--prompts", "here"),
        "give --prompts PATH, no prompt",
    ),
    "benchmark without prompts": (("--benchmark", "dpg"), "--benchmark dpg takes its prompts from its files"),
    "preview of a benchmark": (("--benchmark", "dpg", "--prompts", "here", "--preview"), "--preview is for prompts"),
    "invisible characters": (("\u200b\u202e",), "the prompt is empty"),
    "prompts without benchmark": (
        ("a star", "--prompts", "here"),
        "--prompts is read for a benchmark: add --benchmark",
    ),
    "no pictures": (("a star", "--num", "0"), "--num is 0: give at least 1"),
    "no batch": (("a star", "--batch-size", "0"), "--batch-size is 0: give at least 1"),
    "guidance": (("a star", "--guidance", "-1"), "guidance is -1.0: give 0 or more"),
    "guidance without end": (("a star", "--guidance", "inf"), "guidance is inf: give 0 or more"),
    "temperature": (("a star", "--temperature", "nan"), "temperature is nan: give 0"),
    "top k": (("a star", "--top-k", "-5"), "top_k is -5"),
    "top p": (("a star", "--top-p", "0"), "top_p is 0.0"),
    "no number": (("a star", "--guidance", "much"), "much"),
    "other benchmark": (("--benchmark", "genevil", "--prompts", "here"), "genevil"),
    "device": (("a star", "--device", "tpu:9"), "tpu:9"),
    "no such file": (("--benchmark", "geneval", "--prompts", "nowhere.jsonl"), "nowhere.jsonl"),
    "tiles": (("--benchmark", "dpg", "--prompts", "nowhere", "--num", "3"), "has 4 tiles: leave --num out"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_mistakes_are_one_line_and_leave_nothing(qlip: Shell, generator: Path, tmp_path: Path, mistake: str):
    arguments, said = REFUSED[mistake]
    assert said in qlip.refused("generate", generator, *arguments, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_folders_are_one_line(qlip: Shell, model_folder: Path, generator: Path, tmp_path: Path):
    for folder in (model_folder, tmp_path, tmp_path / "nowhere", generator.parent):
        said = qlip.refused("generate", folder, "a star", "--out", tmp_path / "out")
        assert said.startswith(f"{folder} holds no text-to-image model: give the export of")
    (tmp_path / "file").write_text("")
    said = qlip.refused("generate", generator, "a star", "--out", tmp_path / "file" / "out")
    assert "cannot write to" in said


PROMPTS = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "tv", "count": 2}], "prompt": "a photo of two tvs"},
]


def test_geneval_from_prompts_to_scores(qlip: Shell, generator: Path, tmp_path: Path):
    prompts, out = tmp_path / "evaluation_metadata.jsonl", tmp_path / "out"
    prompts.write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    command = ("generate", generator, "--benchmark", "geneval", "--prompts", prompts, "--out", out, "--device", "cpu")
    said = qlip.works(*command, "--num", 2).replace("\n", " ")
    assert "4 pictures of 2 prompts in" in said
    for place, prompt in enumerate(PROMPTS):
        assert json.loads((out / f"{place:05d}" / "metadata.jsonl").read_text()) == prompt
        samples = sorted((out / f"{place:05d}" / "samples").iterdir())
        assert [path.name for path in samples] == ["0000.png", "0001.png"]
        assert pixels(samples[0]).shape == (16, 16, 3)
    assert "guidance 3.0 -> 2.0" in qlip.refused(*command, "--num", 2, "--guidance", 2)
    lines = [
        {
            "filename": str(out / f"{place:05d}" / "samples" / f"{sample:04d}.png"),
            "tag": prompt["tag"],
            "prompt": prompt["prompt"],
            "correct": place == sample == 0,
            "reason": "",
            "metadata": json.dumps(prompt),
            "details": "{}",
        }
        for place, prompt in enumerate(PROMPTS)
        for sample in range(2)
    ]
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = " ".join(qlip.works("eval", "results", "geneval", results).split())
    assert (
        "│ overall │ 25.0 │ 32.0 │ 31.0 │ 48.0 │" in said
        and "prompts: 2 of 553" in said
        and "without two_object" in said
    )
    results.write_text("{}\n")
    assert "line 1" in qlip.refused("eval", "results", "geneval", results)
    assert "no file at" in qlip.refused("eval", "results", "geneval", tmp_path / "nowhere")


def test_dpg_bench_from_prompts_to_scores(qlip: Shell, generator: Path, tmp_path: Path):
    prompts, out = tmp_path / "prompts", tmp_path / "out"
    prompts.mkdir()
    (prompts / "12.txt").write_text("A red truck on a beach.\n")
    command = ("generate", generator, "--benchmark", "dpg", "--prompts", prompts, "--out", out, "--device", "cpu")
    assert "score with --resolution 16 --pic-num 4" in qlip.works(*command).replace("\n", " ")
    assert [path.name for path in out.iterdir()] == ["12.png"] and pixels(out / "12.png").shape == (32, 32, 3)
    results = tmp_path / "results.txt"
    results.write_text(
        f"{out}/12.png, 1.0, 0.5, 0.5, 1.0, 0.75\nModel: out\nL1 category scores:\n\tglobal: 80.5\n\trelation: nan\n"
        f"Image path: {out}\nSave results to: {results}\nDPG-Bench score: 75.0\n"
    )
    said = " ".join(qlip.works("eval", "results", "dpg", results).split())
    assert "│ overall │ 75.0 │ 43.2 │ 34.0 │ 78.2 │" in said and "│ global │ 80.5 │ 76.6 │" in said
    results.write_text(f"{out}/12.png, 1.0, 0.5, 0.5, 1.0, 0.75\n")
    assert "line 1: the file ends without" in qlip.refused("eval", "results", "dpg", results)
