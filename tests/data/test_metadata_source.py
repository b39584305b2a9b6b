"""Folders whose metadata.jsonl or metadata.csv gives captions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from shard_files import encoded, picture

from qlip.core.errors import UserError
from qlip.data.items import Item, Source
from qlip.data.sources import open_source

PNG = encoded(picture(4, 4))


def put(root: Path, *names: str) -> Path:
    """A small picture under each of these names."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(PNG)
    return root


def items_of(source: Source) -> list[Item]:
    found = list(source.items())
    assert source.num_items in (None, len(found))
    return [item for item in found if isinstance(item, Item)]


def refused(spec: str | Path, **options) -> str:
    """The one line that a user sees."""
    with pytest.raises(UserError) as error:
        list(open_source(str(spec), **options).items())
    assert "\n" not in str(error.value)
    return str(error.value)


def test_metadata_of_both_kinds_agree(tmp_path):
    for kind in ("jsonl", "csv"):
        put(tmp_path / kind, "a.png", "sub/b.png", "unlisted.png")
    rows = [("sub/b.png", 'two, "words"', "5"), ("a.png", "one", "6"), ("sub/b.png", "again", "7"), ("a.png", " ", "8")]
    lines = [json.dumps({"file_name": name, "text": text, "seed": seed}) for name, text, seed in rows]
    (tmp_path / "jsonl" / "metadata.jsonl").write_text("\n".join(lines[:2]) + "\n\n" + "\n".join(lines[2:]))
    quoted = ['{},"{}",{}'.format(name, text.replace('"', '""'), seed) for name, text, seed in rows]
    (tmp_path / "csv" / "metadata.csv").write_text("\ufefffile_name,text,seed\r\n" + "\r\n".join(quoted))
    found = {kind: items_of(open_source(str(tmp_path / kind))) for kind in ("jsonl", "csv")}
    for kind, items in found.items():
        assert [(item.key, item.captions, item.record, item.label) for item in items] == [
            ("sub/b.png", ('two, "words"', "again"), {"seed": "5"}, None),
            ("a.png", ("one",), {"seed": "6"}, None),
        ]
        assert items[0].image == tmp_path / kind / "sub/b.png"


def test_metadata_without_captions_and_with_several(tmp_path):
    put(tmp_path, "a.png", "b.png")
    lines = [{"file_name": "a.png", "captions": ["one", "two\0", ""]}, {"file_name": "b.png"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [item.captions for item in items_of(open_source(str(tmp_path)))] == [("one", "two"), ()]
    before = open_source(str(tmp_path)).identity()
    (tmp_path / "metadata.jsonl").write_text(json.dumps(lines[0]))
    assert open_source(str(tmp_path)).identity() != before


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("jsonl", '{"file_name": "a.png"}\n{"file_name": "../a.png"}', "line 2: '../a.png' leads out"),
        ("jsonl", '{"file_name": "/etc/passwd"}', "line 1: '/etc/passwd' leads out"),
        ("jsonl", '{"file_name": "x\\\\..\\\\a.png"}', "leads out"),
        ("jsonl", '{"file_name": "a.png", "text": 5}', "line 1: text is neither a text nor a list"),
        ("jsonl", '{"file_name": ["a.png"]}', "line 1 has no file_name"),
        ("jsonl", '{"text": "x"}', "line 1 has no file_name"),
        ("jsonl", '{"file_name": "a.png"', "line 1 is not a json object"),
        ("jsonl", "[" * 100_000, "line 1 is not a json object"),
        ("jsonl", "\n", "lists no pictures"),
        ("jsonl", '{"file_name": "a.png"}\n{"file_name": "b.png"}', "names b.png, which is not there (1 of 2"),
        ("csv", "file_name,text\na.png,one,two", "line 2 has not as many cells"),
        ("csv", "file_name,text\na.png", "line 2 has not as many cells"),
        ("csv", 'file_name,text\na.png,"one', "line 2: unexpected end of data; mend it"),
        ("csv", "name,text\na.png,x", "line 2 has no file_name"),
        ("csv", "file_name,text\n../../a.png,x", "line 2: '../../a.png' leads out"),
        ("csv", "file_name,text\na.png," + "x" * 200_000, "field larger than field limit"),
        ("csv", "", "lists no pictures"),
    ],
)
def test_hostile_metadata(tmp_path, name, text, said):
    put(tmp_path, "a.png")
    (tmp_path / f"metadata.{name}").write_text(text)
    assert said in refused(tmp_path)


def test_metadata_in_another_encoding(tmp_path):
    put(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_bytes(b"file_name,text\na.png,\xe9t\xe9")
    assert "is not UTF-8; save it as UTF-8" in refused(tmp_path)
