"""`qlip ask` and `qlip eval ASSISTANT` as a user gives them: transformers' own answers, chats, mistakes in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_runs import Shell
from transformers import AutoModelForImageTextToText, AutoProcessor

from qlip.data.scene_shards import write_scene_shards
from qlip.data.scenes import SceneConfig
from tiny_assistants import save_tiny_assistant, some_picture

QUESTION = "What color is the star?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An assistant, two pictures."""
    place = tmp_path_factory.mktemp("asked")
    save_tiny_assistant(place / "assistant")
    for number in (0, 1):
        some_picture(number).save(place / f"{number}.png")
    return place


def plain_answer(folder: Path, *images: Path, question: str = QUESTION, most: int = 12) -> str:
    """By transformers alone."""
    model = AutoModelForImageTextToText.from_pretrained(folder / "assistant")
    processor = AutoProcessor.from_pretrained(folder / "assistant")
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=text, images=[Image.open(image) for image in images] or None, return_tensors="pt")
    with torch.inference_mode():
        written = model.generate(**inputs, do_sample=False, max_new_tokens=most)
    return processor.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("pictures", [("0.png",), ("0.png", "1.png"), ()], ids=["one", "two", "none"])
def test_answers_are_those_of_transformers_and_nothing_else_is_printed(qlip: Shell, folder, pictures):
    images = [folder / name for name in pictures]
    printed = qlip.works("ask", folder / "assistant", *images, QUESTION, "--max-new-tokens", 12, "--device", "cpu")
    assert printed == plain_answer(folder, *images) + "\n"
    assert printed.strip()


def test_pictures_may_be_options(qlip: Shell, folder):
    options = ("--max-new-tokens", 12, "--device", "cpu")
    images = [word for name in ("0.png", "1.png") for word in ("--image", folder / name)]
    asked = qlip.works("ask", folder / "assistant", QUESTION, *images, *options)
    assert asked == qlip.works("ask", folder / "assistant", folder / "0.png", folder / "1.png", QUESTION, *options)


def test_a_chat_remembers_its_turns(qlip: Shell, folder, monkeypatch):
    class Terminal:
        def isatty(self) -> bool:
            return True

    lines = iter([QUESTION, "", "many words " * 300, "How many?"])

    def line(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    asked: list[list[str]] = []

    def answer(self, prompts, settings):
        messages = prompts[0].messages
        asked.append([message["role"] for message in messages])
        assert len(prompts[0].images) == 1 and messages[0]["content"][0] == {"type": "image"}
        return real(self, prompts, settings)

    from qlip.models.assistant import Assistant

    real = Assistant.answer
    monkeypatch.setattr(Assistant, "answer", answer)
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", line)
    printed = qlip.works("ask", folder / "assistant", folder / "0.png", "--max-new-tokens", 12, "--device", "cpu")
    assert asked == [["user"], ["user", "assistant", "user"], ["user", "assistant", "user"]]
    assert plain_answer(folder, folder / "0.png") in printed and "shorten it (or start again)" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("assistant", "gone.png", QUESTION), "no picture at gone.png"),
        (("assistant", "gone.png"), "no picture at gone.png"),
        (("assistant", "0.png", " "), "the question is empty: qlip ask MODEL"),
        (("assistant", "0.png"), "no question given: qlip ask MODEL"),
        (("assistant",), "no question given: qlip ask MODEL"),
        (("assistant", "text.png", QUESTION), "text.png: not an image"),
        (("0.png", QUESTION), "holds no assistant: give the export of `qlip train"),
        (("nowhere", "0.png", QUESTION), "holds no assistant"),
        (("assistant", QUESTION, "--temperature", "-1"), "--temperature is -1.0: give 0 or more"),
        (("assistant", QUESTION, "--temperature", "nan"), "--temperature is nan"),
        (("assistant", QUESTION, "--max-new-tokens", "0"), "--max-new-tokens is 0"),
        (("assistant", "blue " * 600), "the context 512: shorten it"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_mistakes_of_ask_are_one_line(qlip: Shell, folder, monkeypatch, arguments, said):
    monkeypatch.chdir(folder)
    Path("text.png").write_text("text")
    assert said in qlip.refused("ask", *arguments)


def test_evaluating_an_assistant_asks_the_questions_of_scenes(qlip: Shell, folder, model_folder, tmp_path):
    write_scene_shards(tmp_path / "scenes", num=2, split="test", config=SceneConfig(image_size=16))
    printed = qlip.works("eval", folder / "assistant", "--data", tmp_path / "scenes", "--out", tmp_path / "out")
    assert "accuracy_existence" in printed and "majority answer" in printed
    [result] = json.loads((tmp_path / "out/results.json").read_text())
    assert result["card"]["batch_size"] == 8 and len(result["card"]["chat_template_sha256"]) == 64
    answers = (tmp_path / "out/scenes-questions-v1_answers.jsonl").read_text().splitlines()
    assert len(answers) == result["card"]["count"] >= 4
    assert not (tmp_path / "out/.parts").exists()
    qlip.works("eval", "compare", tmp_path / "out", tmp_path / "out")
    out = ("--data", tmp_path / "scenes", "--out", tmp_path / "other")
    refused = qlip.refused("eval", folder / "assistant", *out, "--evals", "scenes-reconstruction-v1")
    assert "has no decoder: leave scenes-reconstruction-v1 out" in refused
    refused = qlip.refused("eval", model_folder, *out, "--evals", "scenes-questions-v1")
    assert "answers no questions: leave scenes-questions-v1 out" in refused


def test_popes_file_is_evaluated_twice_into_one_folder(qlip: Shell, folder):
    """The second run reads figures back that could not be measured."""
    row = {"question_id": 1, "image": "0.png", "text": "Is there a dog?", "label": "no", "category": "random"}
    (folder / "q.jsonl").write_text(json.dumps(row))
    for name in ("pope-v1", "vqa-match-v1"):
        common = ("--data", folder / "q.jsonl", "--images", folder, "--out", folder / "out", "--batch-size", 1)
        qlip.works("eval", folder / "assistant", *common, "--evals", name, "--device", "cpu")
    pope, _ = json.loads((folder / "out/results.json").read_text())
    assert pope["figures"]["recall"] is None and pope["card"]["categories"] == {"random": 1}
