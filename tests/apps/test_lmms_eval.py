"""The plug-in inside the harness it is for: `make test-lmms` runs this file where lmms-eval is installed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: `make test-lmms` runs these tests")

import yaml
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model, get_model_manifest
from lmms_eval.protocol import ChatMessages
from lmms_eval.utils import load_yaml_config

from qlip.apps.lmms_assistant import FILLER, LmmsAssistant, answer_settings, chat_prompt
from qlip.core.errors import UserError
from qlip.models.assistant import AnswerSettings, ChatPrompt, open_assistant
from tiny_assistants import save_tiny_assistant, some_picture

ROOT = Path(__file__).parents[2]
QUESTIONS = ("What color is the star?", "How many shapes are there?", "Is there a blue ring in the picture?", "Why?",
             "What color is the circle?", "Is it red?", "two")  # odd, so that two ranks differ  # fmt: skip
POST_PROMPT = "\nAnswer with a word."
TASK = {
    "task": "pictures",
    "dataset_path": "parquet",
    "output_type": "generate_until",
    "test_split": "test",
    "doc_to_visual": "!function functions.pictures",
    "doc_to_text": "!function functions.text",
    "doc_to_target": "answer",
    "process_results": "!function functions.score",
    "generation_kwargs": {"max_new_tokens": 12, "temperature": 0, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "lmms_eval_specific_kwargs": {"default": {"post_prompt": "?"}, "qlip_llava": {"post_prompt": POST_PROMPT}},
}
FUNCTIONS = """
def pictures(document):
    return [document["image"].convert("RGB")]

def text(document, lmms_eval_specific_kwargs):
    return document["question"] + lmms_eval_specific_kwargs["post_prompt"]

def score(document, results):
    return {"exact_match": float(results[0] == document["answer"])}
"""
OFFLINE = """
import socket

def refuse(*_):
    raise AssertionError("a test reached for the network")

socket.socket.connect = socket.getaddrinfo = refuse
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_assistant(tmp_path_factory.mktemp("an assistant") / "export")


def prompt(index: int, text: str) -> ChatPrompt:
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return ChatPrompt(messages=[{"role": "user", "content": content}], images=[some_picture(index)])


def write_task(place: Path, answers: list[str]) -> None:
    """A task file as lmms-eval's own are: documents with pictures in Parquet, functions beside the YAML."""
    features = Features({"image": ImageFeature(), "question": Value("string"), "answer": Value("string")})
    rows = [
        {"image": some_picture(index), "question": question, "answer": answer}
        for index, (question, answer) in enumerate(zip(QUESTIONS, answers, strict=True))
    ]
    Dataset.from_list(rows, features=features).to_parquet(place / "test.parquet")
    text = yaml.safe_dump(TASK | {"dataset_kwargs": {"data_files": {"test": str(place / "test.parquet")}}})
    (place / "pictures.yaml").write_text(re.sub(r"'(!function [\w.]+)'", r"\1", text))
    (place / "functions.py").write_text(FUNCTIONS)


def offline(place: Path) -> dict[str, str]:
    """Environment of a command that must not reach for the network."""
    (place / "offline").mkdir()
    (place / "offline" / "sitecustomize.py").write_text(OFFLINE)
    wanted = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return os.environ | wanted | {"HF_HOME": str(place / "cache"), "PYTHONPATH": str(place / "offline")}


LAUNCHERS = {
    "one process": [str(Path(sys.executable).with_name("lmms-eval"))],
    "two processes": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "lmms_eval"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_command_line_scores_a_local_task_as_our_own_answers_do(launcher, folder, tmp_path):
    settings = AnswerSettings(max_new_tokens=12)
    assistant = open_assistant(folder)
    own = [
        assistant.answer([prompt(index, question + POST_PROMPT)], settings)[0]
        for index, question in enumerate(QUESTIONS)
    ]
    assert len(set(own)) > len(own) // 2, "answers that hardly differ would hide a wrong order"
    truth = [answer if index % 3 else "something else" for index, answer in enumerate(own)]
    write_task(tmp_path, truth)
    command = [*LAUNCHERS[launcher], "--model", "qlip_llava", "--model_args", f"pretrained={folder}",
               "--tasks", "pictures", "--include_path", str(tmp_path), "--batch_size", "2",
               "--output_path", str(tmp_path / "out"), "--log_samples"]  # fmt: skip
    done = subprocess.run(command, env=offline(tmp_path), cwd=tmp_path, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr[-3000:]
    assert ("Running on rank 1" in done.stdout) == (launcher == "two processes")
    results = [*tmp_path.rglob("out/**/*_results.json")]
    assert len(results) == 1, done.stdout[-3000:] + done.stderr[-3000:]
    score = json.loads(results[0].read_text())["results"]["pictures"]["exact_match,none"]
    assert score == pytest.approx(sum(a == b for a, b in zip(own, truth, strict=True)) / len(own))
    (samples,) = tmp_path.rglob("out/**/*_samples_pictures.jsonl")
    written = [json.loads(line) for line in samples.read_text().splitlines()]
    assert {line["doc_id"]: line["filtered_resps"] for line in written} == dict(enumerate(own))


def test_the_installed_harness_finds_the_class():
    assert get_model_manifest("qlip_llava").chat_class_path == "qlip.apps.lmms_assistant.LmmsAssistant"
    assert get_model("qlip_llava") is LmmsAssistant
    assert get_model("qlip_llava", force_simple=True) is LmmsAssistant


def user_turn(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def requests_of(wanted: list[dict[str, Any]]) -> list[Instance]:
    """One chat request a document, each with its own generation settings."""

    def messages(document: dict[str, Any]) -> list[dict[str, Any]]:
        return user_turn({"type": "image", "url": document["image"]}, {"type": "text", "text": document["question"]})

    return [
        Instance(
            request_type="generate_until",
            arguments=("", messages, gen_kwargs, index, "pictures", "test"),
            idx=0,
            metadata={"task": "pictures", "doc_id": index, "repeats": 1},
        )
        for index, gen_kwargs in enumerate(wanted)
    ]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_answers_keep_the_order_of_requests_with_mixed_settings(batch_size, folder):
    kinds = [{"until": ["\n\n"], "max_new_tokens": 6}, {"max_new_tokens": 9, "until": ["e"]}, {"num_beams": 2}]
    wanted = [kinds[index % 3] for index in range(len(QUESTIONS))]
    model = LmmsAssistant(pretrained=str(folder), device="cpu", batch_size=batch_size, max_new_tokens=5)
    documents = [{"image": some_picture(index), "question": question} for index, question in enumerate(QUESTIONS)]
    model.task_dict["pictures"] = {"test": documents}
    answers = model.generate_until(requests_of(wanted))
    settings = [AnswerSettings(max_new_tokens=6), AnswerSettings(max_new_tokens=9, until=("e",)),
                AnswerSettings(max_new_tokens=5, num_beams=2)]  # fmt: skip
    alone = open_assistant(folder)
    assert answers == [
        alone.answer([prompt(index, question)], settings[index % 3])[0] for index, question in enumerate(QUESTIONS)
    ]
    assert len(set(answers)) > len(answers) // 2


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({}, AnswerSettings(max_new_tokens=7)),
        ({"until": FILLER, "do_sample": False}, AnswerSettings(max_new_tokens=7)),  # a task without settings
        ({"until": ["ASSISTANT:"]}, AnswerSettings(max_new_tokens=7, until=("ASSISTANT:",))),  # textvqa_val
        ({"until": None}, AnswerSettings(max_new_tokens=7)),
        ({"until": "a"}, AnswerSettings(max_new_tokens=7, until=("a",))),
        ({"until": ["\n\n", "Q:"]}, AnswerSettings(max_new_tokens=7, until=("\n\n", "Q:"))),
        ({"max_new_tokens": 128, "temperature": 0.0, "top_p": 0, "num_beams": 1, "do_sample": False},
         AnswerSettings(max_new_tokens=128)),  # pope_adv
        ({"max_new_tokens": 1024, "temperature": 0.2, "top_p": 1.0, "do_sample": False},
         AnswerSettings(max_new_tokens=1024)),  # mmvet
        ({"temperature": 0.2, "top_p": None}, AnswerSettings(max_new_tokens=7, temperature=0.2)),
        ({"do_sample": True, "top_p": 0.9}, AnswerSettings(max_new_tokens=7, temperature=1.0, top_p=0.9)),
        ({"do_sample": True, "temperature": 0}, AnswerSettings(max_new_tokens=7)),
        ({"num_beams": 3}, AnswerSettings(max_new_tokens=7, num_beams=3)),
    ],
)  # fmt: skip
def test_greedy_unless_told(wanted, expected):
    assert answer_settings(wanted, max_new_tokens=7) == expected


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"temperature": -1}, "temperature of 0 or more"),
        ({"do_sample": True, "top_p": 0}, r"top_p in \(0, 1\]"),
        ({"max_new_tokens": "many"}, "max_new_tokens 'many'"),
        ({"num_beams": 1.5}, "num_beams 1.5"),
    ],
)
def test_settings_without_sense_are_refused(wanted, words):
    with pytest.raises(UserError, match=words):
        answer_settings(wanted, max_new_tokens=7)


def test_places_of_pictures_stay_between_the_words(tmp_path):
    some_picture(1).save(tmp_path / "one.png")
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        *user_turn({"type": "text", "text": "Is "}, {"type": "image", "url": str(tmp_path / "one.png")},
                   {"type": "text", "text": " like "}, {"type": "image", "url": some_picture(2).convert("RGBA")}),
    ]  # fmt: skip
    found = chat_prompt(ChatMessages(messages=messages), place="document 0 of pictures")
    assert [message["role"] for message in found.messages] == ["system", "user"]
    assert [part["type"] for part in found.messages[1]["content"]] == ["text", "image", "text", "image"]
    assert [image.tobytes() for image in found.images] == [some_picture(n).tobytes() for n in (1, 2)]


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "video", "url": "a.mp4"}, "document 3 of clips has a part of kind video"),
        ({"type": "audio", "url": "a.wav"}, "kind audio"),
        ({"type": "image", "url": "nowhere.png"}, "document 3 of clips: .*nowhere.png"),
        ({"type": "image", "url": {"bytes": b""}}, "document 3 of clips"),
    ],
)
def test_what_cannot_be_seen_is_refused(part, words):
    with pytest.raises(UserError, match=words) as caught:
        chat_prompt(ChatMessages(messages=user_turn(part)), place="document 3 of clips")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("pretrained=nowhere", "nowhere holds no assistant"),
        ("dtype=float32", "add --model_args pretrained=FOLDER"),
        ("pretrained={folder},precision=fp32", "precision"),
        ("pretrained={folder},dtyp=float32", "did you mean 'dtype'"),
        ("pretrained={folder},dtype=float", "did you mean 'float"),
        ("pretrained={folder},max_new_tokens=0", "max_new_tokens 0"),
        ("pretrained={folder},device=tpu9", "device 'tpu9' is not usable here"),
    ],
)
def test_wrong_model_arguments_are_one_line(arguments, words, folder):
    with pytest.raises(UserError, match=words) as caught:
        LmmsAssistant.create_from_arg_string(arguments.format(folder=folder), {"batch_size": 1, "device": None})
    assert "\n" not in str(caught.value)


def test_automatic_batch_sizes_are_refused(folder):
    for given, words in ({"batch_size": "auto"}, "batch_size 'auto'"), ({"max_batch_size": 4}, "max_batch_size"):
        with pytest.raises(UserError, match=words):
            LmmsAssistant.create_from_arg_string(f"pretrained={folder}", given)


def test_other_kinds_of_requests_are_refused(folder):
    model = LmmsAssistant(pretrained=str(folder), device="cpu")
    for call in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(UserError, match="output_type is generate_until"):
            call([])


def test_the_task_files_of_the_page_load(monkeypatch, tmp_path):
    """docs/understanding.md changes prompts through task files, with the harness's own functions."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")  # the judge of mmvet is opened as soon as its functions are imported
    page = (ROOT / "docs" / "understanding.md").read_text()
    names = set()
    for block in re.findall(r"```yaml\n(task: .*?)```", page, flags=re.DOTALL):
        (tmp_path / "task.yaml").write_text(block)
        found = load_yaml_config(tmp_path / "task.yaml")
        names.add(found["task"])
        settings = found["lmms_eval_specific_kwargs"]["qlip_llava"]
        asked = found["doc_to_text"]({"question": "What does it say?", "ocr_tokens": ["STOP", "2"]}, settings)
        assert asked.startswith("What does it say?")
        assert ("Reference OCR token: STOP, 2" in asked) == (found["task"] == "textvqa_val_ocr")
        assert callable(found["doc_to_visual"]) and callable(found["process_results"])
    assert names == {"textvqa_val_ocr", "mmvet_plain"}
