"""LLaVA's files: what becomes of every kind of record, and how broken ones are named."""

import json
import pickle
from pathlib import Path

import pytest

from qlip.core.errors import UserError
from qlip.data.conversations import Conversations, open_conversations


def record(*turns: str, roles: tuple[str, ...] = ("human", "gpt"), **fields: object) -> dict:
    turns = turns or ("<image>\nWhat is it?", "A star.")
    listed = [{"from": roles[number % len(roles)], "value": value} for number, value in enumerate(turns)]
    return {"id": "r", "conversations": listed} | ({"image": "a/1.jpg"} if "<image>" in turns[0] else {}) | fields


def opened(tmp_path: Path, *records: object, name: str = "c.json") -> Conversations:
    text = json.dumps(records) if name.endswith("json") else "\n".join(map(json.dumps, records))
    (tmp_path / name).write_text(text, encoding="utf-8")
    return open_conversations(tmp_path / name)


def parts_of(conversations: Conversations, number: int = 0) -> list[tuple[str, list[str]]]:
    """Roles and parts, `[]` for a picture."""
    messages = conversations[number].messages
    return [
        (m["role"], ["[]" if part == {"type": "image"} else part["text"] for part in m["content"]]) for m in messages
    ]


@pytest.mark.parametrize("name", ["c.json", "c.jsonl"])
def test_both_kinds_of_file_hold_the_same(tmp_path: Path, name: str) -> None:
    records = [record(), record("Why?", "Because \u2028 of\n\nit. 日本", id=7), record("a b c", "d", id="")]
    conversations = opened(tmp_path, *records, name=name)
    assert len(conversations) == 3 and not conversations.rejected
    assert [conversation.key for conversation in conversations] == ["r", "7", "3"]
    assert conversations[0].images == ("a/1.jpg",) and conversations[1].images == ()
    assert parts_of(conversations, 1) == [("user", ["Why?"]), ("assistant", ["Because \u2028 of\n\nit. 日本"])]
    assert conversations.has_image.tolist() == [True, False, False]
    assert conversations.num_words.tolist() == [6, 5, 4]


@pytest.mark.parametrize(
    ("turns", "images", "expected"),
    [
        pytest.param(("<image>\nA?", "b"), "1.jpg", [("user", ["[]", "A?"]), ("assistant", ["b"])], id="in front"),
        pytest.param((" A? \n<image>", " b "), "1.jpg", [("user", ["[]", "A?"]), ("assistant", ["b"])], id="behind"),
        pytest.param(("A <image> B", "c"), ["1.jpg"], [("user", ["[]", "A\nB"]), ("assistant", ["c"])], id="within"),
        pytest.param(("<image>", "c"), "1.jpg", [("user", ["[]"]), ("assistant", ["c"])], id="alone"),
        pytest.param(
            ("A", "b", "C <image>", "d"),
            "1.jpg",
            [("user", ["[]", "A"]), ("assistant", ["b"]), ("user", ["C"]), ("assistant", ["d"])],
            id="in a later turn",
        ),
        pytest.param(
            ("A <image> B <image>", "c", "<image> D", "e"),
            ["1.jpg", "2.jpg", "3.jpg"],
            [("user", ["A", "[]", "B", "[]"]), ("assistant", ["c"]), ("user", ["[]", "D"]), ("assistant", ["e"])],
            id="several stay",
        ),
        pytest.param(("A", "say <image>"), None, [("user", ["A"]), ("assistant", ["say <image>"])], id="in an answer"),
        pytest.param(("A", "b", "C"), [], [("user", ["A"]), ("assistant", ["b"]), ("user", ["C"])], id="open end"),
    ],
)
def test_where_pictures_stand(tmp_path: Path, turns: tuple, images: object, expected: list) -> None:
    conversations = opened(tmp_path, record(*turns, image=images))
    assert parts_of(conversations) == expected


def test_a_first_answer_is_dropped_and_counted(tmp_path: Path) -> None:
    roles = ("gpt", "human")
    conversations = opened(tmp_path, record("Hello", "A", "b", roles=roles), record("A", "b"))
    assert parts_of(conversations) == [("user", ["A"]), ("assistant", ["b"])]
    assert conversations.num_leading_answers == 1


def test_other_names_of_roles_and_a_system_turn(tmp_path: Path) -> None:
    roles = ("system", "user", "assistant")
    assert parts_of(opened(tmp_path, record("Be brief.", "A", "b", roles=roles))) == [
        ("system", ["Be brief."]),
        ("user", ["A"]),
        ("assistant", ["b"]),
    ]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("text", "not an object"),
        ({"id": "r"}, "no conversation"),
        (record(conversations=[]), "no conversation"),
        (record(conversations="A"), "no conversation"),
        (record(conversations=["A"]), "turn without text"),
        (record(conversations=[{"from": "human", "value": 1}]), "turn without text"),
        (record("A", "b", roles=("human", "bot")), "unknown role: 'bot'"),
        (record("A", "b", roles=("human", ["gpt"])), "unknown role"),
        (record("A", "b", roles=("human", "human")), "no alternation: turn 2 is of user"),
        (record("A", "b", "c", roles=("human", "gpt", "gpt")), "no alternation: turn 3 is of assistant"),
        (record("A", "b", "c", roles=("human", "gpt", "system")), "no alternation: turn 3 is of system"),
        (record("A"), "no assistant turn"),
        (record("A", roles=("gpt",)), "no assistant turn"),
        (record("A", "B", roles=("gpt", "gpt")), "no alternation"),
        (record("A", " \n "), "empty answer: turn 2"),
        (record("<image> A", "b", image=None), "wrong <image> count: 1 in the human turns for 0 images"),
        (record("A", "b", image="1.jpg"), "wrong <image> count: 0 in the human turns for 1 images"),
        (record("<image> A <image>", "b", image="1.jpg"), "wrong <image> count: 2"),
        (record("<image> A", "b", image=["1.jpg", "2.jpg"]), "wrong <image> count: 1"),
        (record(image=1), "image of a wrong type: int"),
        (record(image=[1]), "image of a wrong type"),
        (record(image={"a": 1}), "image of a wrong type"),
        (record(image="../1.jpg"), "image path leaves the folder: '../1.jpg'"),
        (record(image="/etc/passwd"), "image path leaves the folder"),
        (record(image=""), "image path leaves the folder"),
        (record(image="a\n.jpg"), "image path leaves the folder"),
    ],
)
@pytest.mark.parametrize("name", ["c.json", "c.jsonl"])
def test_a_bad_record_is_kept_as_rejected(tmp_path: Path, bad: object, reason: str, name: str) -> None:
    conversations = opened(tmp_path, record(id="1"), bad, record(id="3"), name=name)
    assert [conversation.key for conversation in conversations] == ["1", "3"]
    (skip,) = conversations.rejected
    assert skip.reason.startswith(reason) and "\n" not in skip.reason
    assert skip.shard.endswith("c.json record 2" if name == "c.json" else "c.jsonl line 2")


GOOD = json.dumps(record())


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        pytest.param("c.json", f"[{GOOD},\n{{'id'", "line 2 column 2", id="quotes"),
        pytest.param("c.json", f"[{GOOD},\n{GOOD[:40]}", "line 2 column", id="cut in a record"),
        pytest.param("c.json", f"[{GOOD},\n", "line 2 column 1", id="cut behind a comma"),
        pytest.param("c.json", f"[{GOOD}\n", "line 2 column 1", id="list without end"),
        pytest.param("c.json", f"[{GOOD}\n{GOOD}]", "line 2 column 1", id="no comma"),
        pytest.param("c.json", f"[{GOOD}]\n[]", "line 2 column 1", id="text behind"),
        pytest.param("c.json", f"[{GOOD},\n]", "line 2 column 1", id="comma too many"),
        pytest.param("c.jsonl", f"{GOOD}\n\n{GOOD[:-1]}\n", "line 3 column", id="broken line"),
        pytest.param("c.jsonl", f"{GOOD}\n{GOOD[:30]}\n{GOOD[30:]}\n", "line 2 column", id="record over two lines"),
        pytest.param("c.jsonl", f"{GOOD}\n{GOOD} {GOOD}\n", "line 2 column", id="two records a line"),
        pytest.param("c.jsonl", json.dumps(record(), indent=1), "line 1 column", id="pretty printed"),
        pytest.param("c.json", b"[" + GOOD.encode() + b",\n\n\xff]", "line 3 is not UTF-8", id="not UTF-8"),
        pytest.param("c.json", "[" * 200_000, "nested too deeply", id="nested"),
        pytest.param("c.json", "[" + "1" * 5000 + "]", "number too long", id="giant number"),
    ],
)
def test_broken_json_is_named_by_line(tmp_path: Path, name: str, text: str | bytes, place: str) -> None:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=place) as caught:
        open_conversations(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is not there"),
        ("", "no usable conversation"),
        ("[]", "no usable conversation"),
        (json.dumps([record("A")]), r"no usable conversation, the first \(.* record 1\): no assistant turn"),
    ],
)
def test_a_file_without_conversations_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "c.json").write_text(text)
    with pytest.raises(UserError, match=message):
        open_conversations(tmp_path / "c.json")


def test_several_files_follow_each_other(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("\ufeff  " + json.dumps([record(id="1")], indent=2) + " \n")
    (tmp_path / "b.jsonl").write_text(json.dumps(record(id="2")) + "\r\n" + json.dumps(record("A")))
    conversations = open_conversations(f"{tmp_path / 'a.json'}::{tmp_path / 'b.jsonl'}")
    assert [conversation.key for conversation in conversations] == ["1", "2"]
    assert conversations.rejected[0].shard == f"{tmp_path / 'b.jsonl'} line 2"
    (tmp_path / "b.jsonl").write_text(json.dumps(record(id="3")))
    assert open_conversations(f"{tmp_path / 'a.json'}::{tmp_path / 'b.jsonl'}").identity != conversations.identity
    with pytest.raises(UserError, match="no conversations given"):
        open_conversations("")


def test_escapes_and_halves_of_pairs_survive(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(
        '[{"conversations": [{"from": "human", "value": "\\ud800 \\"a\\""}, '
        '{"from": "gpt", "value": "\\u0000b\\ud83d\\ude00"}]}]'
    )
    conversations = open_conversations(tmp_path / "c.json")
    assert parts_of(conversations) == [("user", ['\ud800 "a"']), ("assistant", ["\0b😀"])]


def test_it_is_two_arrays_that_go_to_worker_processes(tmp_path: Path) -> None:
    conversations = opened(tmp_path, *(record(id=str(number)) for number in range(50)))
    copy = pickle.loads(pickle.dumps(conversations))
    assert list(copy) == list(conversations)
    with pytest.raises(IndexError):
        conversations[50]
