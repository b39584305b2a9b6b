"""A UM3's folder inside lm-evaluation-harness, offline: its scores and continuations are those of the model."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'qlip[eval]'")

import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from qlip.apps.lm_harness import UnifiedHarness, register
from qlip.core.errors import UserError
from qlip.models.unified_model import Unified, WritingSettings, open_unified
from tiny_unified import tiny_llama_folder, tiny_unified_folder

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    {"question": "What color is the star?", "choices": ["red", "a blue ring", "two"], "answer": 0},
    {"question": "How many", "choices": ["two small stars", "red", "one"], "answer": 1},
    {"question": "Once upon a time <|image_begin|> there", "choices": ["was", "were </s>", "is"], "answer": 2},
    {"question": "a", "choices": ["b", "c", "green circle"], "answer": 0},
    {"question": "Is there a star?", "choices": ["no", "yes", "maybe"], "answer": 1},
]
CHOICE: dict[str, Any] = {
    "task": "tiny_choice",
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
CONTINUE: dict[str, Any] = {
    "task": "tiny_continue",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[0]}}",
    "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
ROLLING: dict[str, Any] = {
    "task": "tiny_rolling",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}} {{choices[1]}}",
    "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
}
TASKS = [CHOICE, CONTINUE, ROLLING]
NAMES = [task["task"] for task in TASKS]
OFFLINE = """
import socket

def refuse(*_):
    raise AssertionError("a test reached for the network")

socket.socket.connect = socket.getaddrinfo = refuse
"""

QUICKLY = """
import functools, runpy, torch.utils.collect_env
from lm_eval.tasks import TaskManager

TaskManager.__init__ = functools.partialmethod(TaskManager.__init__, include_defaults=False)
torch.utils.collect_env.get_pretty_env_info = str
runpy.run_module("qlip.apps.lm_harness", run_name="__main__", alter_sys=True)
"""
"""`python -m qlip.apps.lm_harness` without reading the 13,000 tasks of the harness and asking pip for its packages."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_unified_folder(tmp_path_factory.mktemp("a model") / "um3")


@pytest.fixture(scope="module")
def unified(folder: Path) -> Unified:
    return open_unified(folder)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of task files and their documents."""
    place = tmp_path_factory.mktemp("tasks")
    (place / "documents.jsonl").write_text("\n".join(map(json.dumps, DOCUMENTS)))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(place / "documents.jsonl")}},
        "test_split": "test",
        "num_fewshot": 0,
    }
    for task in TASKS:
        (place / f"{task['task']}.yaml").write_text(yaml.safe_dump(task | shared))
    return place


# --- what the harness must find, computed with the network alone ----------------------------------------------------


def score(unified: Unified, context: str, continuation: str) -> float:
    """ln p of `continuation` behind ``BOS context``, with a softmax over the text rows of the output table."""
    processor = unified.processor
    before, whole = processor.encode([context]), processor.encode([context + continuation])
    states = unified.model.model(input_ids=torch.tensor([whole]), use_cache=False).last_hidden_state[0]
    log_p = (states @ unified.model.lm_head.weight[: unified.model.config.text_vocab_size].T).log_softmax(-1)
    places = range(len(before) - 1, len(whole) - 1)
    return math.fsum(log_p[place, whole[place + 1]].item() for place in places)


@torch.inference_mode()
def own_scores(unified: Unified) -> list[list[float]]:
    """Of every choice of every document."""
    return [
        [score(unified, f"Question: {one['question']}\nAnswer:", f" {choice}") for choice in one["choices"]]
        for one in DOCUMENTS
    ]


def own_accuracies(scores: list[list[float]]) -> tuple[float, float]:
    """Share of documents whose best choice is right; with scores by length in characters as well."""
    right = normed = 0
    for document, row in zip(DOCUMENTS, scores, strict=True):
        right += row.index(max(row)) == document["answer"]
        by_length = [value / len(choice) for value, choice in zip(row, document["choices"], strict=True)]
        normed += by_length.index(max(by_length)) == document["answer"]
    return right / len(DOCUMENTS), normed / len(DOCUMENTS)


def own_bits_per_byte(unified: Unified) -> float:
    texts = [f"{one['question']} {one['choices'][1]}" for one in DOCUMENTS]
    nats = -math.fsum(score(unified, "", text) for text in texts)
    return nats / sum(len(text.encode()) for text in texts) / math.log(2)


def evaluate(model: Any, tasks: Path) -> dict[str, Any]:
    """In this process."""
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return simple_evaluate(model=model, tasks=NAMES, task_manager=manager, bootstrap_iters=0)


def choice_scores(samples: list[dict[str, Any]]) -> list[list[float]]:
    """ln p of every choice, from the samples that the harness keeps."""
    ordered = sorted(samples, key=lambda sample: sample["doc_id"])
    return [[float(response[0][0]) for response in sample["resps"]] for sample in ordered]


def assert_scores(found: list[list[float]], wanted: list[list[float]]) -> None:
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), atol=1e-4, rtol=1e-5)


# --- the command line -----------------------------------------------------------------------------------------------


def test_the_command_line_finds_what_the_model_computes(folder, unified, tasks, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(OFFLINE)
    command = [sys.executable, "-c", QUICKLY, "--model", "qlip_um3",
               "--model_args", f"pretrained={folder}", "--tasks", *NAMES, "--include_path", str(tasks),
               "--batch_size", "2", "--output_path", str(tmp_path / "out"), "--log_samples"]  # fmt: skip
    wanted = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
              "HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)}  # fmt: skip
    done = subprocess.run(command, env=os.environ | wanted, cwd=tmp_path, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (json.loads(file.read_text()) for file in (tmp_path / "out").rglob("results_*.json"))
    (samples,) = (tmp_path / "out").rglob("samples_tiny_choice_*.jsonl")
    scores = own_scores(unified)
    assert_scores(choice_scores([json.loads(line) for line in samples.read_text().splitlines()]), scores)
    found = results["results"]
    assert (found["tiny_choice"]["acc,none"], found["tiny_choice"]["acc_norm,none"]) == own_accuracies(scores)
    assert found["tiny_rolling"]["bits_per_byte,none"] == pytest.approx(own_bits_per_byte(unified), rel=1e-5)
    assert results["config"]["model_sha"] == unified.identity()["model_fingerprint"]
    (lines,) = (tmp_path / "out").rglob("samples_tiny_continue_*.jsonl")
    for sample in map(json.loads, lines.read_text().splitlines()):
        greedy = WritingSettings(temperature=0.0, max_new_tokens=12)
        own = "".join(unified.continue_from([sample["doc"]["question"]], greedy))
        assert sample["resps"][0][0] == own.split("\n\n")[0]


def test_hf_in_memory_finds_the_same(folder, unified, tasks):
    """transformers' own road, for whoever has imported `qlip.models`; its tokenizer has to put BOS before texts."""
    own = UnifiedHarness(str(folder), batch_size=3, device="cpu")
    tokenizer = open_unified(folder).processor.tokenizer
    tokenizer.add_bos_token = True
    theirs = HFLM(pretrained=unified.model, tokenizer=tokenizer, batch_size=2)
    first, second = evaluate(own, tasks), evaluate(theirs, tasks)
    plain = [place for place, one in enumerate(DOCUMENTS) if "<" not in str(one)]  # it parses markers in texts
    scores = [choice_scores(found["samples"]["tiny_choice"]) for found in (first, second)]
    assert_scores([scores[0][place] for place in plain], [scores[1][place] for place in plain])
    assert_scores(scores[0], own_scores(unified))
    for kind in ("tiny_continue",):
        answers = [
            [sample["resps"][0][0] for sample in sorted(found["samples"][kind], key=lambda one: one["doc_id"])]
            for found in (first, second)
        ]
        assert [answers[0][place] for place in plain] == [answers[1][place] for place in plain]


def test_continuations_never_begin_a_picture(folder):
    """Of a model that would begin one at every step."""
    harness = UnifiedHarness(str(folder), device="cpu")
    processor, settings = harness.unified.processor, {"until": [], "max_gen_toks": 8, "do_sample": False}
    begin = processor.vocabulary.image_begin
    harness.unified.model.lm_head.register_forward_hook(
        lambda _, __, logits: logits.index_fill(-1, torch.tensor([begin]), 1e4)
    )
    drawn = harness.unified.model.generate(**processor("a"), max_new_tokens=1, do_sample=False)
    assert drawn[0, -1] == begin
    seen: list[torch.Tensor] = []
    generate = harness.unified.model.generate
    harness.unified.model.generate = lambda **options: seen.append(generate(**options)) or seen[-1]
    harness.generate_until([Instance("generate_until", {}, ("a red", settings), 0)], disable_tqdm=True)
    assert seen and not (seen[0] == begin).any() and (seen[0] < processor.vocabulary.text_size).all()


def test_long_contexts_keep_bos_and_their_end(folder):
    harness = UnifiedHarness(str(folder), device="cpu", max_length=32)
    ids, mask = harness.tok_batch_encode(["word " * 50 + "star", "a"], left_truncate_len=20)
    bos = harness.unified.processor.tokenizer.bos_token_id
    assert ids.shape == (2, 20) and ids[0, 0] == bos and mask[1].sum() == 2
    assert ids[0, 1:].tolist() == harness.tok_encode("word " * 50 + "star")[-19:]
    assert harness.tok_encode("a red star", left_truncate_len=2) == harness.tok_encode("a red star")[-2:]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pretrained": ""}, "add --model_args pretrained=FOLDER"),
        ({"dtype": "float8"}, "dtype 'float8' is unknown: did you mean"),
        ({"add_bos_token": True}, "which qlip_um3 does not take: known"),
        ({"max_length": 100_000}, "give a number from 2 to 256"),
        ({"pretrained": "nowhere"}, "holds no unified model: give"),
    ],
    ids=["no model", "dtype", "unknown option", "beyond the context", "no folder"],
)
def test_mistakes_are_one_line(folder, options, words):
    with pytest.raises(UserError, match=words) as caught:
        UnifiedHarness(**({"pretrained": str(folder), "device": "cpu"} | options))
    assert "\n" not in str(caught.value)


def test_other_models_are_refused(tmp_path):
    with pytest.raises(UserError, match="holds no unified model"):
        UnifiedHarness(str(tiny_llama_folder(tmp_path / "llama")), device="cpu")


def test_the_harness_knows_its_name():
    from lm_eval.api.registry import get_model

    register()
    register()  # as when an entry point was there first
    assert get_model("qlip_um3") is UnifiedHarness


def test_the_entry_point_names_the_class():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lm_eval.models"]
    module, name = declared["qlip_um3"].split(":")
    assert getattr(import_module(module), name) is UnifiedHarness
