"""Pictures by name out of folders and shards: the right bytes, nothing from outside, and every fault with its name."""

import io
import os
import pickle
import tarfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from shard_files import pair, write_tar

from qlip.core.errors import UserError
from qlip.data.image_files import FolderImages, ShardImages, open_image_files
from qlip.data.tar_reader import SampleRejected


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    (root / "coco/train2017").mkdir(parents=True)
    (root / "coco/train2017/1.jpg").write_bytes(b"one")
    (root / "2.jpg").write_bytes(b"two")
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    return root


def test_folder_names_are_relative_paths(folder: Path) -> None:
    images = open_image_files(str(folder))
    assert isinstance(images, FolderImages)
    assert images.read("coco/train2017/1.jpg") == b"one" and images.read("./2.jpg") == b"two"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("3.jpg", "missing image: 3.jpg"),
        ("coco", "missing image: coco"),
        ("coco/pipe.jpg", "missing image: coco/pipe.jpg"),
        ("../secret.jpg", "image path leaves the folder"),
        ("coco/../../secret.jpg", "image path leaves the folder"),
        ("/etc/passwd", "image path leaves the folder"),
        ("C:/secret.jpg", "image path leaves the folder"),
        ("coco\\..\\..\\secret.jpg", "image path leaves the folder"),
        ("", "image path leaves the folder"),
        ("2.jpg\0", "image path leaves the folder"),
        ("link.jpg", "image path leaves the folder"),
        ("circle.jpg", "(missing|unreadable) image"),
        ("x" * 300 + ".jpg", "unreadable image file"),
    ],
)
def test_nothing_outside_the_folder_is_read(folder: Path, name: str, reason: str) -> None:
    (folder / "link.jpg").symlink_to(folder.parent / "secret.jpg")
    (folder / "circle.jpg").symlink_to(folder / "circle.jpg")
    os.mkfifo(folder / "coco/pipe.jpg")
    with pytest.raises(SampleRejected, match=f"^{reason}"):
        open_image_files(str(folder)).read(name)


def test_large_files_are_not_read(folder: Path) -> None:
    write_tar(folder.parent / "a.tar", [("a.jpg", b"x" * 100)])
    for images, name in (
        (open_image_files(str(folder)), "2.jpg"),
        (open_image_files(str(folder.parent / "a.tar")), "a"),
    ):
        with pytest.raises(SampleRejected, match=f"^image file too large: {name}"):
            images.read(name, max_bytes=2)


def test_folders_may_be_links(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Data sets lie on other disks; LLaVA's instructions collect them under one folder."""
    disk = tmp_path_factory.mktemp("disk")
    (disk / "1.jpg").write_bytes(b"far")
    (folder / "alias").symlink_to(folder / "coco")
    (folder / "vg").symlink_to(disk)
    images = open_image_files(str(folder))
    assert (images.read("alias/train2017/1.jpg"), images.read("vg/1.jpg")) == (b"one", b"far")


FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@pytest.mark.parametrize("format", FORMATS)
def test_members_are_found_by_name_and_by_key(tmp_path: Path, format: str) -> None:
    """Whatever the tar's dialect, with folders, long names and other alphabets; texts are no pictures."""
    names = [
        "000/0001.jpg",
        "000/0002.PNG",
        "deep/" * 17 + "0003.webp",
        "d" * 60 + "/" + "e" * 90 + ".jpg",
        "0004.a.jpg",
    ]
    names += [] if format == "ustar" else ["f" * 150 + "/日本.jpg"]
    with tarfile.open(tmp_path / "00000.tar", "w", format=FORMATS[format]) as tar:
        folder = tarfile.TarInfo("000")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in names:
            for ending, data in (("", name.encode()), (".json", b"{}")):
                member = tarfile.TarInfo(name + ending)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    images = open_image_files(str(tmp_path))
    assert isinstance(images, ShardImages) and len(images) == len(names)
    for name in names:
        slash = name.rfind("/") + 1
        key = name[:slash] + name[slash:].partition(".")[0]
        assert images.read(name) == images.read(key) == images.read(f"./{name}") == name.encode()
    for missing in ("000/0001.json", "000", "0001", "0001.jpg", "000/0001.png", "../000/0001.jpg"):
        with pytest.raises(SampleRejected, match=r"^missing image: "):
            images.read(missing)


def test_names_that_two_members_have_are_rejected(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a.jpg", b"1"), ("b.jpg", b"2"), ("b.png", b"3"), ("c.jpg", b"4"), ("c.jpg", b"5")])
    write_tar(tmp_path / "1.tar", [("a.jpg", b"6"), ("d.jpg", b"7"), ("d.txt", b"8")])
    images = open_image_files(str(tmp_path / "{0..1}.tar"))
    for name in ("a.jpg", "a", "b", "c.jpg", "c"):
        with pytest.raises(SampleRejected, match=f"^ambiguous image: {name} names 2 members"):
            images.read(name)
    assert (images.read("b.jpg"), images.read("b.png"), images.read("d")) == (b"2", b"3", b"7")


def test_only_regular_members_are_pictures(tmp_path: Path) -> None:
    link, hard, device = (tarfile.TarInfo(name) for name in ("link.jpg", "hard.jpg", "device.jpg"))
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard.type, hard.linkname = tarfile.LNKTYPE, "a.jpg"
    device.type = tarfile.CHRTYPE
    write_tar(tmp_path / "0.tar", [("a.jpg", b"a"), (link, b""), (hard, b""), (device, b""), ("z.jpg", b"z")])
    images = open_image_files(str(tmp_path / "0.tar"))
    assert (images.read("a"), images.read("z")) == (b"a", b"z")
    for name in ("link.jpg", "hard.jpg", "device.jpg"):
        with pytest.raises(SampleRejected, match=r"^missing image"):
            images.read(name)


@pytest.mark.parametrize("cut", [0, 100, 512, 700, 3 * 512 + 10])
def test_a_damaged_shard_keeps_what_is_whole(tmp_path: Path, cut: int, capsys: pytest.CaptureFixture) -> None:
    write_tar(tmp_path / "0.tar", [("a.jpg", b"a" * 600)])
    whole = write_tar(tmp_path / "1.tar", [("b.jpg", b"b" * 600), ("c.jpg", b"c" * 600)]).read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[:cut])
    images = open_image_files(str(tmp_path))
    assert images.read("a") == b"a" * 600
    assert "1 of 2 shards are damaged" in capsys.readouterr().out
    if cut >= 3 * 512:
        assert images.read("b") == b"b" * 600
    with pytest.raises(SampleRejected, match=r"^missing image: c"):
        images.read("c")


def test_hostile_headers_end_in_a_word(tmp_path: Path) -> None:
    good = write_tar(tmp_path / "0.tar", [("a.jpg", b"a" * 600), ("b.jpg", b"b")]).read_bytes()
    minus = bytearray(good)
    minus[1536 + 124 : 1536 + 136] = b"\xff" * 12  # size -1 of the second member
    for number, content in enumerate((bytes(minus), b"\x1f\x8b" + good, b"<html>" + good, b"\0" * 10)):
        (tmp_path / f"{number + 1}.tar").write_bytes(content)
    images = open_image_files(str(tmp_path))
    with pytest.raises(SampleRejected, match=r"^ambiguous"):  # the damaged copy's first member is whole
        images.read("a")
    assert images.read("b") == b"b"


def test_a_shard_that_became_shorter_is_noticed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", [("a.jpg", b"a" * 600)])
    images = open_image_files(str(path))
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(SampleRejected, match=r"unreadable image file: a, .*shorter"):
        images.read("a")
    path.unlink()
    with pytest.raises(SampleRejected, match="unreadable image file: a"):
        images.read("a")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "no images given"),
        ("{tmp}/nowhere", "is not there; give the folder"),
        ("s3://bucket/{{00000..00009}}.tar", "copy the shards"),
        ("{tmp}/a.tar::https://host/b.tar", "copy the shards"),
        ("{tmp}/nowhere.tar", "nowhere.tar is not there"),
        ("{tmp}/text.tar", "no pictures in 1 shards"),
    ],
)
def test_what_cannot_be_opened_is_refused_in_a_line(tmp_path: Path, spec: str, message: str) -> None:
    write_tar(tmp_path / "text.tar", [("a.txt", b"a")])
    with pytest.raises(UserError, match=message):
        open_image_files(spec.format(tmp=tmp_path))


def test_both_kinds_go_to_worker_processes(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards/0.tar", [*pair("x"), *pair("y", seed=1)])
    shards = open_image_files(str(tmp_path / "shards"))
    assert pickle.loads(pickle.dumps(open_image_files(str(folder)))).read("2.jpg") == b"two"
    assert pickle.loads(pickle.dumps(shards)).read("y.jpg") == shards.read("y")
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        assert list(pool.map(shards.read, ["x", "y", "x"])) == [shards.read(name) for name in ("x", "y", "x")]
