"""Captions scored as COCO does: beside pycocoevalcap's own programs, closed forms, and programs that misbehave."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_sources import Halver, ListSource, png
from tiny_writers import Speaker

from qlip.core.errors import UserError
from qlip.data.items import Item
from qlip.data.sources import open_source
from qlip.evals import caption_scores as scoring
from qlip.evals.caption_scores import FIGURES, caption_scores, meteor_scores, require_scorers, tokenized
from qlip.evals.captioning import CaptionEvaluator
from qlip.evals.inputs import EvalInput
from qlip.evals.protocols import find_protocol

CPU = torch.device("cpu")
TEXTS = [
    "A Red (star), isn't it?",
    "",
    "Zwölf Männer\N{HORIZONTAL ELLIPSIS} \N{GRINNING FACE} aren't here",
    "two\nlines\u2028and\x85more",
    "a | b ||| c",
    "$3.50 & 50% <x> -- \"quoted\" 'so'",
    "...",
    "",
]
CAPTIONS = ["a red star on a table", "two dogs run in the park", "", "a man rides a brown horse at night"]
REFERENCES = [
    ["a red star on a table", "the star is red"],
    ["dogs are running through a park", "two dogs in the park", "animals"],
    ["a plate of food"],
    ["a man riding a horse", "a man on his brown horse at night"],
]
FAKE = """#!{python}
import sys, time
if "-version" in sys.argv:
    sys.exit({version})
for number, line in enumerate(sys.stdin):
    kind = line.split(" ||| ")[0].strip()
    if number == {ends_after}:
        sys.exit(1)
    if number == {hangs_after}:
        time.sleep(60)
    answers = line.count("|||") + 1 if kind == "EVAL" else 1
    for i in range(answers):
        print("{answer}" or number, flush=True)
"""


@pytest.fixture
def java(tmp_path, monkeypatch):
    """A program of that name, which counts lines or misbehaves as it is told."""

    def make(*, version: int = 0, ends_after: int = -1, hangs_after: int = -1, answer: str = "") -> None:
        choices = {"version": version, "ends_after": ends_after, "hangs_after": hangs_after, "answer": answer}
        file = tmp_path / "bin" / "java"
        file.parent.mkdir(exist_ok=True)
        file.write_text(FAKE.format(python=sys.executable, **choices))
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(file.parent))

    return make


@pytest.fixture
def processes(monkeypatch) -> list[Any]:
    """All long-lived programs that were started."""
    found: list[Any] = []
    real = scoring._start
    monkeypatch.setattr(scoring, "_start", lambda program: found.append(real(program)) or found[-1])
    return found


@pytest.fixture
def without_java(monkeypatch):
    """Words between spaces, and METEOR of 0.5, 0.25, ..."""
    monkeypatch.setattr("qlip.evals.captioning.require_scorers", lambda: "test")
    plain = [lambda texts: [" ".join(text.lower().split()) for text in texts]]
    monkeypatch.setattr("qlip.evals.captioning.tokenized", plain[0])
    monkeypatch.setattr(
        "qlip.evals.captioning.tokenized_references", lambda references: [plain[0](texts) for texts in references]
    )
    monkeypatch.setattr(scoring, "meteor_scores", lambda sets, right, title: [0.5 / (i + 1) for i in range(len(sets))])


def captioned(references: list[list[str]], *, first_number: int | None = 500) -> ListSource:
    return ListSource(
        [
            Item(
                key=f"{i}.png",
                image=png(np.full((16, 16, 3), i, np.uint8)),
                captions=tuple(texts),
                record={} if first_number is None else {"cocoid": first_number + 10 * i},
            )
            for i, texts in enumerate(references)
        ]
    )


def run(source: Any, model: Any, *, name: str = "coco-captions-v1", count: int = 5000, **options: Any) -> Any:
    protocol = replace(find_protocol(name), count=count)
    evaluator = CaptionEvaluator(protocol, EvalInput(source=source, batch_size=3, **options))
    return evaluator.run(model, CPU), evaluator


def test_the_tokenizer_is_cocos():
    from pycocoevalcap.tokenizer import ptbtokenizer

    found = tokenized(TEXTS)
    assert found[0] == "a red -lrb- star -rrb- is n't it" and found[1] == found[-1] == found[-2] == ""
    assert found[3] == "two lines and more" and found[4] == "a | b | | | c"
    if not os.access(Path(ptbtokenizer.__file__).parent, os.W_OK):  # it writes beside itself
        pytest.skip("pycocoevalcap's own tokenizer cannot write")
    kept = [0, 2, 4, 5, 6]  # it takes other ends of lines for more captions, and drops empty ones at the end
    given = {i: [{"caption": TEXTS[i]}] for i in kept}
    assert ptbtokenizer.PTBTokenizer().tokenize(given) == {i: [found[i]] for i in kept}


def test_meteor_is_cocos(monkeypatch):
    """Without paraphrases, whose table alone takes ten seconds to read; with them both agree too."""
    from pycocoevalcap.meteor.meteor import Meteor

    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda program, **rest: real([*program, "-m", "exact stem"], **rest))
    others = [texts[0] for texts in REFERENCES[1:] + REFERENCES[:1]]
    found = meteor_scores([CAPTIONS, others], REFERENCES, title="test")
    right, theirs = dict(enumerate(REFERENCES)), Meteor()
    for score, captions in zip(found, (CAPTIONS, others), strict=True):
        assert score == theirs.compute_score(right, {i: [text] for i, text in enumerate(captions)})[0]
    assert found[0] > 0.3 > found[1]


def test_the_right_captions_score_full_and_empty_ones_nothing(java):
    java(answer="0.25")
    firsts = [f"word{i} and so on {i} times" for i in range(6)]
    full, empty = caption_scores([firsts, [""] * 6], [[text] for text in firsts], title="test")
    assert set(full) == set(FIGURES)
    assert [full[name] for name in ("bleu_1", "bleu_4", "rouge_l")] == pytest.approx([100] * 3, rel=1e-6)
    assert full["cider"] == pytest.approx(1000) and full["meteor"] == 25
    assert [empty[name] for name in FIGURES if name != "meteor"] == pytest.approx([0] * 6, abs=1e-6)


def test_meteor_is_asked_for_all_statistics_and_then_for_the_score_of_each_set(java, processes):
    java()
    assert meteor_scores([["a", "b"], ["c", "d"]], [["x"], ["y", "z"]], title="test") == [3, 6]
    assert [process.returncode is not None for process in processes] == [True]


@pytest.mark.parametrize(
    ("choices", "said"),
    [({"ends_after": 1}, "METEOR ended before its time"), ({"answer": "ERROR"}, "METEOR said 'ERROR' for a score")],
    ids=["ends", "nonsense"],
)
def test_a_meteor_that_fails_is_one_line_and_ends(java, processes, choices, said):
    java(**choices)
    with pytest.raises(UserError, match=said) as error:
        meteor_scores([["a", "b"]], [["x"], ["y"]], title="test")
    assert "\n" not in str(error.value) and processes[0].returncode is not None


def test_a_meteor_that_hangs_ends_with_ctrl_c(java, processes, monkeypatch):
    java(hangs_after=2)

    def interrupted(self: Any, line: str, *, answers: int = 1) -> str:
        if line.endswith("b"):
            self.questions.write(f"{line}\n")
            self.questions.flush()
            raise KeyboardInterrupt
        return real(self, line, answers=answers)

    real = scoring.Ask.__call__
    monkeypatch.setattr(scoring.Ask, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        meteor_scores([["a", "b"]], [["x"], ["y"]], title="test")
    assert processes[0].returncode is not None


def test_what_is_missing_is_named_before_any_work(java, monkeypatch, tmp_path):
    model, source = Speaker(CAPTIONS), captioned(REFERENCES)

    def refused(said: str) -> None:
        with pytest.raises(UserError, match=said) as error:
            run(source, model)
        assert "\n" not in str(error.value) and not model.seeds

    java(version=3)
    refused("java failed.*install a Java runtime")
    monkeypatch.setenv("PATH", str(tmp_path))
    refused("there is no java: install a Java runtime")
    spec = ModuleSpec("pycocoevalcap", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(scoring, "find_spec", lambda name: spec)
    refused("stanford-corenlp-3.4.1.jar is missing: reinstall")
    monkeypatch.setattr(scoring, "find_spec", lambda name: None)
    refused(r"not installed: pip install 'qlip\[captions\]'")


def test_what_is_there_is_said():
    assert require_scorers().startswith("pycocoevalcap 1.")


def test_captions_are_scored_beside_those_of_the_next_picture(without_java, tmp_path):
    model = Speaker(CAPTIONS)
    figures, evaluator = run(captioned(REFERENCES), model)
    firsts = [texts[0] for texts in REFERENCES]
    wanted = caption_scores([CAPTIONS, firsts[1:] + firsts[:1]], REFERENCES, title="test")
    assert {name: figures[name] for name in FIGURES} == wanted[0]
    assert {name: figures[f"{name}_baseline"] for name in FIGURES} == wanted[1]
    assert figures["cider"] > figures["cider_baseline"] and (figures["meteor"], figures["meteor_baseline"]) == (50, 25)
    card = evaluator.card()
    assert (card["count"], card["complete"], card["empty_captions"]) == (4, False, 1)
    assert (card["references_per_picture"], card["num_captions"]) == ([1, 3], 8)
    assert card["duplicates"] == 0 and len(card["pixels_sha256"]) == 64
    assert card["sampling"] == {"temperature": 1.0, "top_p": 0.95, "top_k": 0} and "seeds" in card
    assert {(one.temperature, one.top_p, one.max_new_tokens) for one in model.settings} == {(1.0, 0.95, 64)}
    evaluator.write_answers(tmp_path)
    rows = json.loads((tmp_path / "coco-captions-v1_captions.json").read_text())
    assert rows == [{"image_id": 500 + 10 * i, "caption": caption} for i, caption in enumerate(CAPTIONS)]


def test_the_greedy_protocol_is_greedy(without_java):
    model = Speaker(CAPTIONS)
    card = run(captioned(REFERENCES), model, name="coco-captions-greedy-v1")[1].card()
    assert {one.temperature for one in model.settings} == {0} and card["decoding"] == "greedy" and "seeds" not in card


@pytest.mark.parametrize("ids", [[None] * 4, [7, 7, 8, 9], ["a", "b", "c", "d"]], ids=["none", "twice", "texts"])
def test_pictures_without_numbers_are_counted(without_java, tmp_path, ids):
    source = captioned(REFERENCES)
    for item, number in zip(source.found, ids, strict=True):
        item.record["cocoid"] = number
    _, evaluator = run(source, Speaker(CAPTIONS))
    assert evaluator.card()["image_ids"] == "place among the pictures to be captioned, from 0"
    evaluator.write_answers(tmp_path)
    rows = json.loads((tmp_path / "coco-captions-v1_captions.json").read_text())
    assert [row["image_id"] for row in rows] == [0, 1, 2, 3]


def test_a_skipped_picture_leaves_its_place_free(without_java):
    source = captioned([*REFERENCES[:2], [], *REFERENCES[2:]], first_number=None)
    source.found[1] = Item(key="1.png", image=b"broken", captions=("a star",))
    model = Speaker([CAPTIONS[0], "", "", *CAPTIONS[2:]])
    evaluator = run(source, model, max_skip_share=0.5)[1]
    assert evaluator._numbers == [0, 2, 3] and evaluator.card()["skipped"] == 1  # the third has no captions


@pytest.mark.parametrize(
    ("name", "count", "complete"),
    [
        ("dataset_coco.json test", 4, True),
        ("dataset_coco.json test", 5, False),
        ("captions_val2014.json", 4, False),
        ("dataset_coco.json val", 4, False),
    ],
)
def test_only_the_split_of_the_protocol_is_complete(without_java, capsys, name, count, complete):
    source = captioned(REFERENCES)
    source.name = name
    card = run(source, Speaker(CAPTIONS), count=count)[1].card()
    said = " ".join(capsys.readouterr().out.split())
    assert card["complete"] is complete and ("compare only with figures of the same pictures" in said) is not complete
    assert (f"{name} does not say that it is the test split" in said) is (count == 4 and not complete)


def test_a_split_of_karpathys_json_is_captioned_whole(without_java, tmp_path):
    entries = []
    for i, texts in enumerate(REFERENCES):
        (tmp_path / f"{i}.png").write_bytes(png(np.full((16, 16, 3), i, np.uint8)))
        sentences = [{"raw": text} for text in texts]
        split = "test" if i else "val"
        entries.append({"filename": f"{i}.png", "cocoid": 90 - i, "split": split, "sentences": sentences})
    file = tmp_path / "dataset_coco.json"
    file.write_text(json.dumps({"images": entries}))
    source = open_source(str(file), images=str(tmp_path), split="test")
    _, evaluator = run(source, Speaker(CAPTIONS), split="test", count=3)
    assert evaluator.card()["complete"] is True
    assert evaluator._numbers == [89, 88, 87] and evaluator.card()["image_ids"] == "the data"
    with pytest.raises(UserError, match="of the test split: leave out --split val"):
        run(source, Speaker(CAPTIONS), split="val")


def test_other_models_and_data_without_captions_are_refused(without_java):
    with pytest.raises(UserError, match="a Halver writes no captions"):
        run(captioned(REFERENCES), Halver())
    for references, found in (([[], []], 0), ([["a"], []], 1)):
        with pytest.raises(UserError, match=f"list: {found} pictures with captions; give at least 2"):
            run(captioned(references), Speaker(CAPTIONS))
