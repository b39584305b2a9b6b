"""Sources of evaluation: every picture once, in an order and under keys that depend on the data alone; wrong data say
what they are."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path

import pytest
from shard_files import encoded, picture, write_tar

from qlip.core.errors import UserError
from qlip.core.images import ImageLimits, ImageRejected, open_image
from qlip.data.items import Item, Source
from qlip.data.sources import open_source, require_classes
from qlip.data.tar_reader import Skip

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
    assert [item.key for item in source.items()] == [item.key for item in found], "sources are read many times"
    return [item for item in found if isinstance(item, Item)]


def refused(spec: str | Path, **options) -> str:
    """The one line that a user sees."""
    with pytest.raises(UserError) as error:
        list(open_source(str(spec), **options).items())
    assert "\n" not in str(error.value)
    return str(error.value)


def test_class_folders_equal_torchvision(tmp_path):
    from torchvision.datasets import ImageFolder

    names = ["b/2.png", "b/10.png", "B/x.JPEG", "a b/deep/er/y.png", "a b/z.webp", "ü/1.jpg"]
    put(tmp_path, *names)
    theirs = ImageFolder(str(tmp_path))
    put(tmp_path, "b/.hidden.png", ".cache/x.png")
    (tmp_path / "b" / "notes.txt").write_text("no picture")
    source = open_source(str(tmp_path))
    found = items_of(source)
    assert source.class_names == tuple(theirs.classes) == ("B", "a b", "b", "ü")
    assert {str(item.image): item.label for item in found} == dict(theirs.samples)
    assert sorted(item.key for item in found) == sorted(names) and source.num_items == len(names)
    assert [item.key for item in found] == sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())


def test_the_first_so_many_pictures_are_of_all_classes(tmp_path):
    put(tmp_path, *(f"{folder}/{i}.png" for folder in "abcd" for i in range(25)))
    labels = [item.label for item in items_of(open_source(str(tmp_path)))]
    assert min(labels[:40].count(label) for label in range(4)) >= 4


def test_the_same_pictures_elsewhere_are_the_same_data(tmp_path):
    here = put(tmp_path / "one" / "pets", "cat/1.png", "dog/1.png")
    there = shutil.copytree(here, tmp_path / "two" / "pets")
    first, second = open_source(str(here)), open_source(str(there))
    assert first.identity() == second.identity() and first.name == second.name == "pets"
    assert [item.key for item in items_of(first)] == [item.key for item in items_of(second)]
    (there / "cat" / "1.png").write_bytes(PNG + b"!")
    assert open_source(str(there)).identity() != first.identity()
    (there / "cat" / "1.png").rename(there / "cat" / "2.png")
    assert open_source(str(there)).identity() != first.identity()


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (["b.png", "a.jpg", "c.txt"], ["a.jpg", "b.png"]),
        (["b/x.png", "loose.png", "a/x.png"], ["a/x.png", "b/x.png", "loose.png"]),
    ],
    ids=["flat", "loose pictures beside folders"],
)
def test_pictures_without_classes(tmp_path, names, keys):
    source = open_source(str(put(tmp_path, *names)))
    assert source.class_names == ()
    assert sorted((item.key, item.label) for item in items_of(source)) == [(key, None) for key in keys]


def test_names_that_say_nothing_are_shown_with_their_folder(tmp_path):
    assert open_source(str(put(tmp_path / "imagenet" / "val", "n01440764/x.png"))).name == "imagenet/val"


def test_links_are_followed_but_not_round_in_circles(tmp_path):
    put(tmp_path / "store", "x.png")
    put(tmp_path / "data", "real/y.png")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "store")
    (tmp_path / "data" / "real" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "real" / "broken.png").symlink_to(tmp_path / "nowhere.png")
    source = open_source(str(tmp_path / "data"))
    found = sorted(items_of(source), key=lambda item: item.key)
    assert [item.key for item in found] == ["linked/x.png", "real/broken.png", "real/y.png"]
    with pytest.raises(ImageRejected, match="no such file"):  # a lost picture is counted, not forgotten
        open_image(found[1].image, limits=ImageLimits())


def test_a_name_that_is_no_text_is_skipped(tmp_path):
    put(tmp_path, "a.png")
    try:
        Path(os.fsdecode(bytes(tmp_path) + b"/\xff.png")).write_bytes(PNG)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    source = open_source(str(tmp_path))
    assert [item.key for item in items_of(source)] == ["a.png"]
    assert [item.reason for item in source.items() if isinstance(item, Skip)] == ["name not UTF-8"]
    assert len(source.identity()) == 64


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], r"holds no pictures, \.tar or \.parquet files \(found: nothing\); give a folder of pictures"),
        (["a.txt", "b.txt", "c.txt", "d.txt"], r"found: a\.txt, b\.txt, c\.txt and 1 more"),
        (["val2014.zip", "x.txt"], r"unpack val2014\.zip and give the folder"),
        (["a/x.png", "b/readme.txt"], r"class folder .*b holds no picture \(1 of 2 are empty\).*take it away"),
        (["train/a/x.png", "val/a/x.png"], r"holds train and val; give one of them: --data .*val"),
        (["x.tar", "val/a/x.png"], r"holds val; give one of them"),
        (["val2014/x.png", "other/x.png"], r"looks like COCO: give its dataset_coco\.json"),
        (["dataset_coco.json", "pictures/x.png"], r"give that file: --data .*dataset_coco\.json"),
        (["n01440764.tar", "n01443537.tar"], r"one tar per class: unpack each"),
        (["metadata.csv", "metadata.jsonl"], r"holds metadata\.jsonl and metadata\.csv; give the one that counts"),
    ],
    ids=lambda value: "+".join(value) or "empty" if isinstance(value, list) else "",
)
def test_folders_of_something_else(tmp_path, names, said):
    put(tmp_path, *names)
    assert re.search(said, refused(tmp_path))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("x.zip", "is an archive; unpack it"),
        ("x.tar.gz", "is an archive; unpack it"),
        ("x.png", "is one picture; give the folder"),
        ("x.jsonl", "must be called metadata.jsonl or metadata.csv; rename it"),
        ("x.bin", "unknown kind; give a folder of pictures"),
        ("x.parquet", "is no whole parquet file"),
        ("x.json", "is not json"),
    ],
)
def test_files_of_something_else(tmp_path, name, said):
    put(tmp_path, name)
    assert said in refused(tmp_path / name)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("", "no data given: give a folder"),
        ("nowhere", "nowhere is not there; give a folder"),
        ("dataset_coco.json", "come in https://cs.stanford.edu/people/karpathy"),
        ("https://host/x.parquet?key=secret", "x.parquet: only tar shards are read from afar"),
        ("{00..03}.tar", "4 of 4 missing"),
        ("*.tar", "no file matches"),
        ("x" * 300, "cannot be looked at"),
        ("pipe:cat x.tar::y.tar", "commands are not run"),
    ],
    ids=lambda text: text[:20],
)
def test_what_is_not_there(tmp_path, monkeypatch, spec, said):
    monkeypatch.chdir(tmp_path)
    line = refused(spec)
    assert said in line and "secret" not in line


def test_images_and_labels_without_use_are_refused(tmp_path):
    put(tmp_path, "a.png")
    (tmp_path / "names.txt").write_text("cat\n")
    assert "leave it out" in refused(tmp_path, images="elsewhere")
    assert "has no classes; leave it out" in refused(tmp_path, labels=tmp_path / "names.txt")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("tench\ngold fish\n\n", ("tench", "gold fish")),
        ("\ufefftench\r\ngoldfish", ("tench", "goldfish")),
        ("n2\tgoldfish\nn1\ttench\nn3\tshark\n", ("tench", "goldfish")),
    ],
    ids=["lines", "Windows", "by folder"],
)
def test_labels_rename_classes(tmp_path, text, names):
    put(tmp_path / "data", "n1/a.png", "n2/a.png")
    (tmp_path / "names.txt").write_text(text)
    source = open_source(str(tmp_path / "data"), labels=tmp_path / "names.txt")
    assert source.class_names == names and [item.label for item in items_of(source)] == [0, 1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"one\ntwo\nthree", "has 3 names, .*data 2 classes"),
        (b"one\n\ntwo", "line 2 is empty"),
        (b"", "line 1 is empty"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"n1\ttench\nn1\tshark", "line 2 is not a new"),
        (b"n1\ttench\ngoldfish", "line 2 is not a new"),
        (b"n1\ttench", "no name for n2 \\(1 of 2 classes\\)"),
        (None, "cannot be read"),
    ],
    ids=["too many", "gap", "empty", "UTF-16", "twice", "mixed", "missing", "no file"],
)
def test_labels_that_do_not_fit(tmp_path, text, said):
    put(tmp_path / "data", "n1/a.png", "n2/a.png")
    if text is not None:
        (tmp_path / "names.txt").write_bytes(text)
    assert re.search(said, refused(tmp_path / "data", labels=tmp_path / "names.txt"))


def needs(source: Source, num_classes: int) -> str:
    with pytest.raises(UserError) as error:
        require_classes(source, num_classes)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_required_classes(tmp_path):
    classes = open_source(str(put(tmp_path / "two", "a/x.png", "b/x.png")))
    require_classes(classes, 2)
    require_classes(classes, 0)
    assert "two: 2 classes found, 3 needed; give a folder" in needs(classes, 3)
    assert "give ImageNet's 1000 wnid folders" in needs(classes, 1000)
    flat = open_source(str(put(tmp_path / "flat", "x.png")))
    assert "0 classes found, some needed; sort the pictures into one folder per class (x.png lies in none)" in needs(
        flat, 0
    )


def test_unsorted_imagenet_says_how_to_sort_it(tmp_path):
    flat = put(tmp_path / "val", "ILSVRC2012_val_00000001.JPEG", "ILSVRC2012_val_00000002.JPEG")
    line = needs(open_source(str(flat)), 1000)
    assert "0 classes found, 1000 needed" in line and "ImageNet('FOLDER', split='val')" in line
    tar = write_tar(tmp_path / "ILSVRC2012_img_val.tar", [("ILSVRC2012_val_00000001.JPEG", PNG)])
    source = open_source(str(tar))  # good enough for reconstruction as it is
    assert [item.key for item in items_of(source)] == ["ILSVRC2012_val_00000001"]
    assert "ILSVRC2012_devkit_t12.tar.gz" in needs(source, 1000)


def test_a_thousand_folders_need_imagenets_order(tmp_path):
    for number in range(1000):
        (tmp_path / "wnids" / f"n{number:08d}").mkdir(parents=True)
        (tmp_path / "numbers" / str(number)).mkdir(parents=True)  # sorts as 0, 1, 10, 100
    for folder in (tmp_path / "wnids", tmp_path / "numbers"):
        for name in folder.iterdir():
            (name / "x.png").touch()
    require_classes(open_source(str(tmp_path / "wnids")), 1000)
    assert "class folder 0 is no wnid" in needs(open_source(str(tmp_path / "numbers")), 1000)


def test_patterns_of_mixed_files(tmp_path):
    put(tmp_path, "a.png", "b.tar")
    assert "a.png is no tar shard" in refused(f"{tmp_path}/*")
