"""Shards as a source: keys, labels and names of classes, and what is skipped or refused."""

from __future__ import annotations

from pathlib import Path
from tarfile import TarInfo

import pytest
from shard_files import encoded, pair, picture, write_shards, write_tar

from qlip.core.errors import UserError
from qlip.data.items import Item, Source
from qlip.data.sources import open_source, require_classes
from qlip.data.tar_reader import Skip

PNG = encoded(picture(4, 4))


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


def needs(source: Source, num_classes: int) -> str:
    with pytest.raises(UserError) as error:
        require_classes(source, num_classes)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_shards_keep_their_keys_and_captions(tmp_path):
    keys = write_shards(tmp_path, num_shards=3, per_shard=2)
    for spec in (str(tmp_path), f"{tmp_path}/*.tar", f"{tmp_path}/{{00000..00002}}.tar", f"file://{tmp_path}/*.tar"):
        found = items_of(open_source(spec))
        assert [item.key for item in found] == keys
        assert found[0].captions == (f"caption of {keys[0]}",) and found[0].record["key"] == keys[0]
        assert isinstance(found[0].image, bytes) and found[0].label is None
    joined = open_source(f"{tmp_path}/00002.tar::{tmp_path}/00000.tar")
    assert [item.key for item in items_of(joined)] == keys[4:] + keys[:2]
    assert joined.name == "00002.tar + 00000.tar" and joined.num_items is None
    one = open_source(str(tmp_path / "00001.tar"))
    assert one.name == "00001.tar" and one.identity() != joined.identity()


def test_promised_counts(tmp_path):
    write_shards(tmp_path, num_shards=2, per_shard=3)
    (tmp_path / "00000_stats.json").write_text('{"successes": 3}')
    assert open_source(str(tmp_path)).num_items is None
    (tmp_path / "sizes.json").write_text('{"00001.tar": 3}')
    assert open_source(str(tmp_path)).num_items == 6


def test_labels_and_names_of_shards(tmp_path):
    """CLIP_benchmark's layout: `cls` beside each picture, classnames.txt in the folder above the shards."""
    members: list[tuple[str | TarInfo, bytes]] = [
        ("a.webp", PNG), ("a.cls", b"1\n"),
        ("b.jpg", PNG), ("b.json", b'{"label": 0}'),
        ("c.png", PNG), ("c.json", b'{"cls": 2}'),
        ("d.png", PNG), ("d.json", b'{"label": "a word"}'), ("d.txt", b" "),
        ("e.png", PNG), ("e.cls", b"x"),
        ("f.png", PNG), ("f.cls", b"-1"),
        ("g.txt", b"no picture"),
        ("h.png", PNG), ("h.json", b"{"),
        ("i.png", PNG), ("i.txt", b"\xff"),
    ]  # fmt: skip
    (tmp_path / "test").mkdir()
    write_tar(tmp_path / "test" / "0.tar", members)
    (tmp_path / "classnames.txt").write_text("cat\ndog\nfish\n")
    source = open_source(str(tmp_path / "test"))
    assert source.class_names == ("cat", "dog", "fish")
    require_classes(source, 3)
    assert [(item.key, item.label) for item in items_of(source)] == [("a", 1), ("b", 0), ("c", 2), ("d", None)]
    assert {item.key: item.reason.partition(":")[0] for item in source.items() if isinstance(item, Skip)} == {
        "e": "bad label", "f": "bad label", "g": "missing image", "h": "broken json", "i": "undecodable caption",
    }  # fmt: skip
    (tmp_path / "two.txt").write_text("cat\ndog")
    assert "has 2 names, " in refused(tmp_path / "test", labels=tmp_path / "two.txt")
    (tmp_path / "test" / "classnames.txt").write_text("cat\ndog")
    assert "c has label 2, but there are only 2 class names" in refused(tmp_path / "test")


def test_shards_without_names_ask_for_them(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.png", PNG), ("a.cls", b"1")])
    assert "put the names into classnames.txt beside the shards" in needs(open_source(str(tmp_path)), 1000)
    (tmp_path / "names.txt").write_text("cat\ndog")
    source = open_source(str(tmp_path), labels=tmp_path / "names.txt")
    require_classes(source, 2)
    (tmp_path / "names.txt").write_text("n1\tcat")
    assert "names folders" in refused(tmp_path, labels=tmp_path / "names.txt")


def test_shards_of_different_classes(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "x").mkdir(parents=True)
        write_tar(tmp_path / name / "x" / "0.tar", [(f"{name}.png", PNG)])
        (tmp_path / name / "classnames.txt").write_text(name)
    assert "name different classes; score the shards one set" in refused(f"{tmp_path}/one/x::{tmp_path}/two/x")


def test_a_key_in_two_shards_is_refused(tmp_path):
    for shard in ("0", "1"):
        write_tar(tmp_path / f"{shard}.tar", pair("same"))
    line = refused(tmp_path)
    assert "key same is in" in line and "0.tar" in line and "1.tar" in line


def test_damaged_shards_are_skips(tmp_path):
    write_shards(tmp_path, num_shards=2, per_shard=2)
    (tmp_path / "00000.tar").write_bytes((tmp_path / "00000.tar").read_bytes()[:3000])
    found = list(open_source(str(tmp_path)).items())
    assert any(isinstance(item, Skip) and "truncated" in item.reason for item in found)
    assert [item.key for item in found if isinstance(item, Item)][-2:] == ["000010000", "000010001"]
