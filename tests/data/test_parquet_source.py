"""Parquet: Hugging Face's and img2dataset's layouts, read a few rows at a time, damage lost alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shard_files import encoded, picture

from qlip.core.errors import UserError
from qlip.data.items import Item, Source
from qlip.data.sources import open_source, require_classes
from qlip.data.tar_reader import Skip

PICTURES = [encoded(picture(4, 4, seed=seed)) for seed in range(6)]


def struct(data: bytes | None, path: str | None = None) -> dict[str, Any]:
    return {"bytes": data, "path": path}


def write(path: Path, columns: dict[str, Any], *, names: list[str] | None = None, rows_per_group: int = 2) -> Path:
    """A file as Hugging Face writes it: class names in the schema's metadata, page checksums."""
    table = pa.table(columns)
    if names is not None:
        features = {"label": {"names": names, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}  # every byte is there once
    pq.write_table(table, path, row_group_size=rows_per_group, write_page_checksum=True, **plain)
    return path


def items_of(source: Source) -> list[Item]:
    found = list(source.items())
    assert len(found) == source.num_items and found == list(source.items())
    return [item for item in found if isinstance(item, Item)]


def refused(spec: str | Path, **options) -> str:
    with pytest.raises(UserError) as error:
        list(open_source(str(spec), **options).items())
    assert "\n" not in str(error.value)
    return str(error.value)


def test_hugging_face_classes(tmp_path):
    for part in range(2):
        chosen = [struct(data, f"ILSVRC_{part}.JPEG") for data in PICTURES[3 * part : 3 * part + 3]]
        columns = {"image": chosen, "label": [part, 1, -1], "when": [1.5, None, 2.0], "raw": [b"x", b"y", b"z"]}
        write(tmp_path / "data" / f"validation-{part:05d}-of-00002-abc0.parquet", columns, names=["cat", "dog"])
    write(tmp_path / "data" / "train-00000-of-00001.parquet", {"image": [struct(PICTURES[0])], "label": [0]})
    source = open_source(str(tmp_path), split="val")
    found = items_of(source)
    assert source.class_names == ("cat", "dog") and source.name == f"{tmp_path.name} val"
    require_classes(source, 2)
    assert [item.image for item in found] == PICTURES
    assert [item.label for item in found] == [0, 1, None, 1, 1, None]
    assert [item.key for item in found[2:4]] == [
        "validation-00000-of-00002-abc0/00000002",
        "validation-00001-of-00002-abc0/00000000",
    ]
    assert found[1].record == {"when": None}, "json cannot hold bytes"
    assert refused(tmp_path).endswith("no parquet files of split 'test': give --split train or validation")
    pattern = open_source(f"{tmp_path}/data/validation-*.parquet")
    assert [item.key for item in items_of(pattern)] == [item.key for item in found]
    assert pattern.name == "data/validation-*.parquet"
    (tmp_path / "names.txt").write_text("tabby\nhound")
    assert open_source(str(tmp_path), split="val", labels=tmp_path / "names.txt").class_names == ("tabby", "hound")


@pytest.mark.parametrize(
    ("column", "values", "captions"),
    [
        ("text", ["one", " ", None], [("one",), (), ()]),
        ("captions", [["one", "two"], [], None], [("one", "two"), (), ()]),
        (
            "sentences",
            pa.array([["a"], ["b", "c"], ["d"]], pa.large_list(pa.large_string())),
            [("a",), ("b", "c"), ("d",)],
        ),
    ],
    ids=["text", "list", "large"],
)
def test_captions(tmp_path, column, values, captions):
    path = write(tmp_path / "pairs.parquet", {"jpg": PICTURES[:3], column: values, "width": [4, 4, 4]})
    source = open_source(str(path))
    assert [(item.captions, item.record) for item in items_of(source)] == [(texts, {"width": 4}) for texts in captions]
    assert source.name == "pairs.parquet" and source.class_names == ()
    assert "has no classes" in refused(path, labels=path)


def test_img2dataset_keys(tmp_path):
    for shard in range(2):
        columns = {"key": [f"{shard}{row}" for row in range(2)], "jpg": PICTURES[:2], "caption": ["x", "y"]}
        write(tmp_path / f"{shard:05d}.parquet", columns)
    assert [item.key for item in items_of(open_source(str(tmp_path)))] == ["00", "01", "10", "11"]
    write(tmp_path / "00001.parquet", columns | {"key": ["10", "00"]})
    assert "key 00 comes twice" in refused(tmp_path)


def test_keys_of_files_with_the_same_name(tmp_path):
    for part in ("a", "b"):
        write(tmp_path / part / "0.parquet", {"png": PICTURES[:1]})
    first = open_source(f"{tmp_path}/*/0.parquet")
    assert [item.key for item in items_of(first)] == ["a/0/00000000", "b/0/00000000"]
    assert "given twice" in refused(f"{tmp_path}/a/0.parquet::{tmp_path}/a/0.parquet")
    assert first.identity() != open_source(f"{tmp_path}/a/0.parquet").identity()


def test_a_column_may_say_the_split(tmp_path):
    splits = ["test", "train", "restval", "val", "test", "train"]
    path = write(tmp_path / "flickr.parquet", {"image": [struct(data) for data in PICTURES], "split": splits})
    for split, rows in (("test", [0, 4]), ("train", [1, 2, 5]), ("validation", [3])):
        source = open_source(str(path), split=split)
        assert [item.key for item in items_of(source)] == [f"flickr/{row:08d}" for row in rows]
        assert source.name == f"flickr.parquet {split}"
    assert open_source(str(path)).identity() != open_source(str(path), split="val").identity()
    assert refused(path, split="dev2").endswith("no rows of split 'dev2': give --split restval or test or train or val")


def test_rows_without_pictures_are_skipped(tmp_path):
    images = [struct(PICTURES[0]), struct(None, "/etc/passwd"), None, struct(PICTURES[1], "x.png")]
    source = open_source(str(write(tmp_path / "x.parquet", {"image": images})))
    assert [item.key for item in items_of(source)] == ["x/00000000", "x/00000003"]
    assert [(skip.key, skip.reason) for skip in source.items() if isinstance(skip, Skip)] == [
        ("x/00000001", "missing image: only its path is in the file"),
        ("x/00000002", "missing image"),
    ]


def test_a_flipped_byte_loses_its_row_group_alone(tmp_path):
    path = write(tmp_path / "x.parquet", {"image": [struct(data) for data in PICTURES], "label": [0, 1, 2, 3, 4, 5]})
    data = bytearray(path.read_bytes())
    data[data.index(PICTURES[2]) + 30] ^= 1
    assert data.count(PICTURES[3]) == 1
    path.write_bytes(data)
    found = list(open_source(str(path)).items())
    assert [item.label for item in found if isinstance(item, Item)] == [0, 1, 4, 5]
    assert [item.image for item in found if isinstance(item, Item)][2:] == PICTURES[4:]
    skips = [item for item in found if isinstance(item, Skip)]
    assert [(skip.count, skip.reason.split(":")[0]) for skip in skips] == [(2, "damaged parquet")]


def test_text_that_is_not_utf8_is_damage(tmp_path):
    texts = pa.array([b"good", b"\xff\xfe"]).view(pa.string())
    path = write(tmp_path / "x.parquet", {"image": PICTURES[:2], "text": texts}, rows_per_group=1)
    found = list(open_source(str(path)).items())
    assert [type(item).__name__ for item in found] == ["Item", "Skip"]


@pytest.mark.parametrize("keep", [0, 3, 200, -8], ids=["empty", "start", "half", "no footer"])
def test_cut_files(tmp_path, keep):
    path = write(tmp_path / "x.parquet", {"image": PICTURES})
    path.write_bytes(path.read_bytes()[:keep])
    assert "x.parquet is no whole parquet file" in refused(path)
    assert "fetch it again" in refused(tmp_path)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (
            {"url": ["x"], "caption": ["y"]},
            "no column of pictures (columns: url, caption); give a file with one column",
        ),
        ({"image": ["x.png"]}, "no column of pictures"),
        ({"left": [struct(PICTURES[0])], "right": [struct(PICTURES[0])]}, "several columns of pictures"),
    ],
    ids=["urls", "paths", "two"],
)
def test_other_tables(tmp_path, columns, said):
    assert said in refused(write(tmp_path / "x.parquet", columns))


def test_files_and_labels_that_do_not_fit(tmp_path):
    write(tmp_path / "a.parquet", {"image": PICTURES[:1], "label": [3]}, names=["cat"])
    assert "a/00000000 has label 3, but there are only 1 class names" in refused(tmp_path)
    write(tmp_path / "b.parquet", {"image": PICTURES[:1]})
    assert "different columns or classes" in refused(tmp_path)
    nameless = write(tmp_path / "c.parquet", {"image": PICTURES[:1], "label": [3]})
    with pytest.raises(UserError, match="column label has class names"):
        require_classes(open_source(str(nameless)), 4)


@pytest.mark.parametrize("about", [b"{", b"[]", b'{"info": 5}', b'{"info": {"features": {"label": {"names": [1]}}}}'])
def test_other_metadata_name_no_classes(tmp_path, about):
    table = pa.table({"image": PICTURES[:1], "label": [0]}).replace_schema_metadata({"huggingface": about})
    pq.write_table(table, tmp_path / "x.parquet")
    assert open_source(str(tmp_path)).class_names == ()
