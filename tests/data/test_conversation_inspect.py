"""What is said of conversation files, and the colours of a sample's labels."""

import json
from pathlib import Path

import pytest
from chat_processors import chat_processor, conversation

from qlip.apps.inspect_conversations import InspectSettings, inspect_conversations
from qlip.cli import dispatch
from qlip.core.errors import UserError
from qlip.data.chat_labels import ChatEncoder
from qlip.data.conversation_inspect import labelled_text, visible


def turns(*values: str) -> list[dict]:
    return [{"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(values)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/1.png").write_bytes(b"x")
    records = [
        {
            "id": "a",
            "image": "1.png",
            "conversations": turns("<image> What is it?", "red", "Why?", "it is \x1b[31mblue"),
        },
        {"id": "a", "image": "2.png", "conversations": turns("<image> A", "B")},
        {"id": "c", "conversations": [{"from": "gpt", "value": "A"}, *turns("A", "B")]},
        {"id": "\x1b[31m", "conversations": [{"from": "\x07", "value": "A"}]},
    ]
    (tmp_path / "c.json").write_text(json.dumps(records))
    processor = chat_processor("chatml")
    processor.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "c.json"


def test_the_report_counts_and_names(file: Path, capsys: pytest.CaptureFixture) -> None:
    dispatch(["data", "inspect", str(file), "--images", str(file.parent / "images")])
    out = capsys.readouterr().out
    for line in (
        "conversations     3 usable",
        "with pictures     2",
        "answers           1 / 1 / 2 (min / median / max)",
        "begin with gpt    1, that turn is dropped",
        "same ids          1",
        "rejected          1 (25.0%)",
        "c.json record 4  id \\x1b[31m  unknown role: '\\x07', known: human",
        "missing pictures  1 of the first 2",
        "id a  missing image: 2.png",
        "give --tokenizer",
    ):
        assert line in out
    assert "\x1b" not in out and "\x07" not in out


def test_a_sample_is_shown_with_its_labels(file: Path, capsys: pytest.CaptureFixture) -> None:
    folder = file.parent / "model"
    dispatch(["data", "inspect", str(file), "--tokenizer", str(folder), "--chat-template", "chatml", "--limit", "0"])
    out = capsys.readouterr().out
    assert "not looked for" in out and "<image> x 576⏎\n" in out and "supervised (green)" in out and "\x1b" not in out


def test_what_is_supervised_is_green() -> None:
    processor = chat_processor("chatml")
    chat = ChatEncoder(processor, max_length=99).encode(conversation("<image> What is it?", "it is red", images=1))
    text = labelled_text(chat, tokenizer=processor.tokenizer, image_token_id=processor.image_token_id)
    green = [text.plain[span.start : span.end] for span in text.spans if span.style == "green"]
    dim = [text.plain[span.start : span.end] for span in text.spans if span.style == "dim"]
    assert green == ["it is red<|im_end|>"]
    assert dim == ["<|im_start|>user⏎\n", "<image> x 4", "⏎\nWhat is it?<|im_end|>⏎\n<|im_start|>assistant⏎\n", "⏎\n"]


def test_control_characters_become_visible() -> None:
    assert visible("a\x1b[0m\r\u202eb\nc日本") == "a\\x1b[0m\\r\\u202eb⏎\nc日本"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample": 3}, "--sample 3: there are 3, counted from 0"),
        ({"sample": -1}, "--sample -1"),
        ({"tokenizer": Path("/nowhere")}, "no tokenizer at /nowhere"),
        ({"chat_template": "llama_3"}, "chat template llama_3 needs"),
        ({"max_length": 5}, "conversation 0 would be skipped: longer than the context.*--sample"),
        ({"images": "/nowhere"}, "images /nowhere is not there"),
    ],
)
def test_mistakes_are_one_line(file: Path, change: dict, message: str) -> None:
    settings = {"tokenizer": file.parent / "model", "chat_template": "chatml"} | change
    with pytest.raises(UserError, match=message):
        inspect_conversations(str(file), InspectSettings(**settings))
