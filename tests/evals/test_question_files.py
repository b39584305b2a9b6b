"""Question files as data: POPE's and LLaVA's lines, pictures that are not there, and what is no question."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_sources import png

from qlip.core.errors import UserError
from qlip.data.items import Item
from qlip.data.question_files import Question, QuestionFiles, is_question_file, questions_of
from qlip.data.sources import open_source
from qlip.data.tar_reader import Skip

GOOD: dict[str, Any] = {"question_id": 1, "image": "a.png", "text": "Is there a dog?", "label": "yes"}


def write(path: Path, *rows: dict[str, Any] | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png(np.zeros((4, 4, 3), np.uint8)))
    return tmp_path


def refused(spec: Path | str, **options: str) -> str:
    with pytest.raises(UserError) as error:
        open_source(str(spec), **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["coco_pope_popular.json", "any.jsonl"])
def test_popes_lines_are_read_whatever_the_ending(pictures, name):
    file = write(pictures / name, GOOD, "", GOOD | {"question_id": 2, "image": "b.png", "label": "no"})
    source = open_source(str(file))
    assert isinstance(source, QuestionFiles) and source.name == name and source.num_items == 2
    items = list(source.items())
    assert [item.key for item in items] == ["1", "2"]
    assert items[1].image == pictures / "b.png"
    kind = "popular" if "popular" in name else ""
    assert questions_of(items[0]) == [
        Question(question_id=1, text="Is there a dog?", kind=kind, answers=("yes",), file=file.stem)
    ]


def test_a_pattern_keeps_files_apart_and_takes_their_splits(pictures):
    for split in ("random", "adversarial"):
        write(pictures / f"coco_pope_{split}.json", GOOD)
    items = list(open_source(f"{pictures}/coco_pope_*.json").items())
    assert [item.key for item in items] == ["coco_pope_adversarial/1", "coco_pope_random/1"]
    assert [questions_of(item)[0].kind for item in items] == ["adversarial", "random"]


def test_llavas_category_and_peoples_answers(pictures):
    row = {key: value for key, value in GOOD.items() if key != "label"}
    rows = row | {"category": "random", "answers": ["a"] * 10}, row | {"question_id": "q2", "answer": "red"}
    questions = [questions_of(item)[0] for item in open_source(str(write(pictures / "q.jsonl", *rows))).items()]
    assert [(q.question_id, q.kind, len(q.answers)) for q in questions] == [(1, "random", 10), ("q2", "", 1)]


def test_pictures_are_looked_for_in_images_or_beside_the_file(pictures, tmp_path):
    file = write(tmp_path / "elsewhere/q.jsonl", GOOD, GOOD | {"question_id": 2, "image": "gone.png"})
    assert "none of its pictures is there, first a.png" in refused(file)
    first, second = open_source(str(file), images=str(pictures)).items()
    assert isinstance(first, Item) and isinstance(second, Skip) and second.reason == "missing picture: gone.png"
    assert "is no folder" in refused(file, images=str(pictures / "nowhere"))
    (tmp_path / "elsewhere/val2014").mkdir()
    (tmp_path / "elsewhere/val2014/a.png").write_bytes((pictures / "a.png").read_bytes())
    assert next(open_source(str(file)).items()).image == tmp_path / "elsewhere/val2014/a.png"


def test_identity_follows_file_and_pictures(pictures):
    file = write(pictures / "q.jsonl", GOOD)
    first = open_source(str(file)).identity()
    assert open_source(str(file)).identity() == first
    (pictures / "a.png").write_bytes(png(np.zeros((9, 9, 3), np.uint8)))
    second = open_source(str(file)).identity()
    write(file, GOOD | {"label": "no"})
    assert len({first, second, open_source(str(file)).identity()}) == 3


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{broken", "line 2 is not json"),
        ("[" * 100_000, "line 2 is not json"),
        ("[1]", "line 2 is no json object"),
        (GOOD, "line 2: question_id 1 asks the same in line 1"),
        ({"image": "a.png", "text": "x"}, "line 2 has no question_id"),
        (GOOD | {"question_id": True}, "line 2 has no question_id"),
        (GOOD | {"question_id": 2, "text": " "}, "line 2 has no text"),
        (GOOD | {"question_id": 2, "image": None}, "line 2 has no image"),
        (GOOD | {"question_id": 2, "image": "../a.png"}, "leads out of the folder"),
        (GOOD | {"question_id": 2, "image": "/etc/passwd"}, "leads out of the folder"),
        (GOOD | {"question_id": 2, "answer": "no"}, "line 2 has label and answer"),
        (GOOD | {"question_id": 2, "label": ["yes"]}, "line 2 has no label"),
        (GOOD | {"question_id": 2, "label": None, "answers": "yes"}, "line 2: answers is no list"),
        (GOOD | {"question_id": 2, "category": 3}, "line 2 has no category"),
    ],
    ids=[
        *(
            "broken",
            "deep",
            "list",
            "twice",
            "no_id",
            "bool_id",
            "blank",
            "no_image",
            "climbs",
            "absolute",
            "two_truths",
        ),
        *("label_list", "answers_text", "category_number"),
    ],
)
def test_what_is_no_question_is_named_with_its_line(pictures, row, said):
    assert said in refused(write(pictures / "q.jsonl", GOOD, row))


@pytest.mark.parametrize("content", ["", "{", '{"images": []}', "[1]", "\x00" * 100], ids=repr)
def test_other_files_are_no_question_files(tmp_path, content):
    file = tmp_path / "q.jsonl"
    file.write_text(content)
    assert not is_question_file(file)
    assert "its first line is no question" in refused(file)


@pytest.mark.parametrize(
    "questions",
    ["text", [1], [{"kind": "count", "question": "How many?"}], [{"kind": "count", "question": "", "answer": "1"}]],
    ids=["text", "number", "no_answer", "empty"],
)
def test_shards_with_other_questions_are_refused(questions):
    with pytest.raises(UserError, match=r"^0007: question 1 of its json"):
        questions_of(Item(key="0007", image=b"", record={"questions": questions}))
