"""COCO's and Karpathy's json: which pictures, whose captions, and what is said when something is missing or wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from shard_files import encoded, picture

from qlip.core.errors import UserError
from qlip.data.items import Item, Source
from qlip.data.sources import open_source

PNG = encoded(picture(4, 4))
NAMES = [f"COCO_val2014_{number:012d}.jpg" for number in (9, 2, 5)]


def coco() -> dict[str, Any]:
    """Three pictures; captions are not in their order, one picture has none."""
    return {
        "images": [{"id": number, "file_name": name} for number, name in zip((9, 2, 5), NAMES, strict=True)],
        "annotations": [
            {"id": number, "image_id": image, "caption": text}
            for number, (image, text) in enumerate([(2, "b1"), (9, "a1 \n"), (2, "b0"), (9, "a0"), (2, "")])
        ],
    }


def karpathy() -> dict[str, Any]:
    splits = ("test", "restval", "train", "val", "test")
    return {
        "dataset": "coco",
        "images": [
            {
                "filepath": "train2014" if split == "train" else "val2014",
                "filename": f"{number}.jpg",
                "cocoid": 100 + number,
                "split": split,
                "sentences": [{"raw": f"{number} {i}", "tokens": [], "sentid": i} for i in range(6)],
            }
            for number, split in enumerate(splits)
        ],
    }


def write(path: Path, table: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table))
    return path


def put(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(PNG)
    return folder


def items_of(source: Source) -> list[Item]:
    found = [item for item in source.items() if isinstance(item, Item)]
    assert len(found) == source.num_items and source.class_names == ()
    assert all(item.image.is_file() for item in found if isinstance(item.image, Path))
    return found


def refused(path: Path, **options) -> str:
    with pytest.raises(UserError) as error:
        open_source(str(path), **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("table", "pictures", "images"),
    [
        ("annotations/captions_val2014.json", "val2014", ""),
        ("captions_val2014.json", "", ""),
        ("captions_val2014.json", "val2014", ""),
        ("here/captions.json", "there/of all/images", "there/of all"),
        ("here/captions.json", "there", "there"),
    ],
    ids=["as unpacked", "beside", "below", "given root", "given folder"],
)
def test_coco_captions(tmp_path, table, pictures, images):
    path = write(tmp_path / table, coco())
    put(tmp_path / pictures, *NAMES)
    source = open_source(str(path), images=str(tmp_path / images) if images else "")
    assert [(item.key, item.captions, item.record) for item in items_of(source)] == [
        (NAMES[0], ("a1", "a0"), {"cocoid": 9}),
        (NAMES[1], ("b1", "b0"), {"cocoid": 2}),
        (NAMES[2], (), {"cocoid": 5}),
    ]
    assert source.name == path.name and len(source.identity()) == 64


@pytest.mark.parametrize(
    ("split", "numbers"), [("test", [0, 4]), ("val", [3]), ("train", [1, 2]), ("restval", [1])], ids=lambda value: value
)
def test_karpathy_splits(tmp_path, split, numbers):
    path = write(tmp_path / "dataset_coco.json", karpathy())
    put(tmp_path / "val2014", "0.jpg", "1.jpg", "3.jpg", "4.jpg")
    put(tmp_path / "train2014", "2.jpg")
    source = open_source(str(path), split=split)
    found = items_of(source)
    assert [item.key for item in found] == [f"{number}.jpg" for number in numbers]
    assert found[0].captions == tuple(f"{numbers[0]} {i}" for i in range(6))
    assert found[0].record == {"cocoid": 100 + numbers[0]}
    assert source.name == f"dataset_coco.json {split}"


def test_identity_is_of_the_split_the_table_and_the_pictures(tmp_path):
    path = write(tmp_path / "dataset_coco.json", karpathy())
    put(tmp_path / "val2014", "0.jpg", "1.jpg", "3.jpg", "4.jpg")
    test, val = open_source(str(path)).identity(), open_source(str(path), split="val").identity()
    assert test != val and test == open_source(str(path)).identity()
    (tmp_path / "val2014" / "4.jpg").write_bytes(PNG + b"!")
    assert open_source(str(path)).identity() != test
    (tmp_path / "val2014" / "4.jpg").write_bytes(PNG)
    path.write_text(path.read_text() + " ")
    assert open_source(str(path)).identity() != test


def test_flickr_has_neither_folders_nor_numbers(tmp_path):
    table = karpathy()
    for image in table["images"]:
        del image["filepath"], image["cocoid"]
    path = write(tmp_path / "dataset_flickr30k.json", table)
    line = refused(path)
    assert "2 of 2 pictures missing, first 0.jpg" in line and "flickr30k-images/0.jpg is there" in line
    put(tmp_path / "flickr30k-images", "0.jpg", "4.jpg")
    assert [(item.key, item.record) for item in items_of(open_source(str(path)))] == [("0.jpg", {}), ("4.jpg", {})]


def test_missing_pictures_say_how_many_and_where_they_come_from(tmp_path):
    path = write(tmp_path / "annotations" / "captions_val2014.json", coco())
    line = refused(path)
    assert f"3 of 3 pictures missing, first {NAMES[0]}" in line
    assert f"unpack http://images.cocodataset.org/zips/val2014.zip so that {tmp_path}/val2014/{NAMES[0]}" in line
    put(tmp_path / "val2014", *NAMES[:2])
    assert f"1 of 3 pictures missing, first {NAMES[2]}" in refused(path)
    assert "is no folder; give the one that holds" in refused(path, images=str(tmp_path / "nowhere"))
    put(tmp_path / "empty")
    assert f"(looked below {tmp_path}/empty)" in refused(path, images=str(tmp_path / "empty"))
    karpathys = write(tmp_path / "dataset_coco.json", karpathy())
    both = refused(karpathys, split="train")
    assert "zips/train2014.zip and http" in both and both.endswith(
        f"zips/val2014.zip so that {tmp_path}/train2014/2.jpg is there"
    )
    other = {"images": [{"id": 1, "file_name": "x.jpg"}], "annotations": []}
    assert refused(write(tmp_path / "mine.json", other)).endswith("--images FOLDER")


def test_unknown_split(tmp_path):
    path = write(tmp_path / "dataset_coco.json", karpathy())
    assert refused(path, split="tset").endswith("no split 'tset': give --split restval or test or train or val")


def without(table: dict[str, Any], part: str, name: str) -> dict[str, Any]:
    del table[part][1][name]
    return table


def having(table: dict[str, Any], part: str, name: str, value: object) -> dict[str, Any]:
    table[part][0][name] = value
    return table


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ([{"image_id": 1, "caption": "a result"}], "has no list of images; give COCO's captions_val2014.json"),
        ({"images": []}, "has no list of images"),
        ({"images": {"1": {}}}, "has no list of images"),
        (without(coco(), "images", "id"), "images[1] has no id (int or str)"),
        (without(coco(), "images", "file_name"), "images[1] has no file_name (str)"),
        (without(coco(), "annotations", "image_id"), "annotations[1] has no image_id"),
        (without(coco(), "annotations", "caption"), "annotations[1] is no caption: give captions_val2014.json"),
        (having(coco(), "annotations", "caption", 5), "annotations[0] has no caption (str)"),
        (having(coco(), "annotations", "image_id", 77), "belongs to image 77, which is not listed"),
        (having(coco(), "images", "file_name", NAMES[1]), "pictures of the same name twice"),
        (having(coco(), "images", "file_name", "../../x.jpg"), "images[0]: '../../x.jpg' leads out"),
        (having(coco(), "images", "file_name", "/etc/passwd"), "'/etc/passwd' leads out"),
        (having(karpathy(), "images", "filepath", ".."), "images[0]: '..' leads out"),
        (having(karpathy(), "images", "filename", "..\\x"), "leads out"),
        (having(karpathy(), "images", "sentences", [5]), "images[0] has no raw (str)"),
        (having(karpathy(), "images", "sentences", None), "images[0] has no sentences (list)"),
        (without(karpathy(), "images", "split"), "images[1] has no split (str)"),
        ({"images": [5]}, "images[0] has no split"),
        ({"images": coco()["images"]}, "images[0] has no split"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_malformed_tables(tmp_path, table, said):
    put(tmp_path, *NAMES)
    assert said in refused(write(tmp_path / "table.json", table))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty; fetch it again"),
        (b" <!DOCTYPE html>", "is a web page; fetch it again"),
        (b'{"images": [', "is not json"),
        (b"\xff\xfe{}", "is not json"),
        (b"[" * 100_000, "is not json"),
    ],
    ids=["empty", "web page", "cut", "binary", "deep"],
)
def test_broken_files(tmp_path, content, said):
    (tmp_path / "captions.json").write_bytes(content)
    assert said in refused(tmp_path / "captions.json")


def test_hostile_captions_are_cleaned(tmp_path):
    table = having(coco(), "annotations", "caption", "\0 a \ud800b" + "x" * 6000)
    put(tmp_path, *NAMES)
    source = open_source(str(write(tmp_path / "captions.json", table)))
    text = items_of(source)[1].captions[0]
    assert text.startswith("a bxx") and len(text) <= 5000 and text.encode()
