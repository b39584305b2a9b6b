"""The tar reader on hostile and damaged shards: nothing is extracted or executed, good samples are kept."""

import gzip
import io
import json
import tarfile
from pathlib import Path
from random import Random

import pytest
from shard_files import encoded, pair, picture, write_tar

from qlip.data.ledger import kind_of
from qlip.data.tar_reader import RawSample, iterate_tar


def read(path, **options) -> tuple[list[str], dict[str, str]]:
    """Keys of good samples in order, and kinds of skips by key."""
    found = list(iterate_tar(path, **options))
    good = [sample.key for sample in found if isinstance(sample, RawSample)]
    return good, {skip.key: kind_of(skip.reason) for skip in found if not isinstance(skip, RawSample)}


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def test_samples_as_webdataset_groups_them(tmp_path):
    members = [
        ("./train/a.JPG", b"1"),
        ("./train/a.seg.png", b"2"),
        ("train/b.txt", b"3"),
        ("other/b.txt", b"4"),
        ("no_field", b""),
        (".hidden.jpg", b""),
        (".git/x.jpg", b""),
        ("__meta__.json", b""),
        (special("folder.x", tarfile.DIRTYPE), b""),
    ]
    samples = list(iterate_tar(write_tar(tmp_path / "a.tar", members)))
    assert all(isinstance(sample, RawSample) for sample in samples)
    assert [(s.key, s.fields) for s in samples] == [
        ("train/a", {"jpg": b"1", "seg.png": b"2"}),
        ("train/b", {"txt": b"3"}),
        ("other/b", {"txt": b"4"}),
    ]
    assert samples[0].shard == str(tmp_path / "a.tar")


def end_of(path: Path) -> int:
    """Where the end mark of a whole tar starts."""
    with tarfile.open(path) as tar:
        tar.getmembers()
        return tar.offset


@pytest.mark.parametrize("name", ["../evil.jpg", "a/../../evil.jpg", "/etc/evil.jpg", "..\\evil.jpg", "a\n.jpg"])
def test_names_that_leave_the_folder_are_not_read(tmp_path, name):
    path = write_tar(tmp_path / "a.tar", [*pair("good"), (name, b"x"), *pair("last")])
    good, skips = read(path)
    assert good == ["good", "last"] and list(skips.values()) == ["unsafe name"]
    assert [file.name for file in tmp_path.iterdir()] == ["a.tar"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_not_read(tmp_path, kind):
    path = write_tar(
        tmp_path / "a.tar", [*pair("good"), (special("bad.jpg", kind, "/etc/passwd"), b""), ("bad.txt", b"t")]
    )
    assert read(path) == (["good"], {"bad": "not a regular file"})


def test_sparse_members_are_not_read(tmp_path):
    member = tarfile.TarInfo("bad.jpg")
    member.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": "1000000000000", "GNU.sparse.name": "bad.jpg"}
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(member)
    assert read(path) == ([], {"bad": "not a regular file"})


@pytest.mark.parametrize("name", ["pkl", "pyd", "pth", "pickle", "PKL", "emb.pth"])
def test_fields_that_can_run_code_spoil_their_sample(tmp_path, name):
    path = write_tar(tmp_path / "a.tar", [*pair("good"), *pair("bad"), (f"bad.{name}", b"cos\nsystem\n.")])
    assert read(path) == (["good"], {"bad": "unsafe field"})


def test_repeated_fields_and_returning_keys(tmp_path):
    twice = write_tar(tmp_path / "twice.tar", [("a.jpg", b"1"), ("a.jpg", b"2"), ("b.jpg", b"3")])
    assert read(twice) == (["b"], {"a": "field twice"})
    later = write_tar(tmp_path / "later.tar", [*pair("a"), *pair("b"), *pair("a")])
    assert read(later) == (["a", "b"], {"a": "key returns"})
    woven = write_tar(tmp_path / "woven.tar", [("a.jpg", b"1"), ("b.jpg", b"1"), ("a.txt", b"1"), ("b.txt", b"1")])
    assert read(woven)[1] == {"a": "key returns", "b": "key returns"}


def test_samples_over_the_size_cap_are_not_read(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.jpg", bytes(600)), ("a.npy", bytes(600)), ("b.jpg", bytes(600))])
    assert read(path, max_sample_bytes=1000) == (["b"], {"a": "sample too large"})


def test_no_tar_at_all(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", pair("a")).read_bytes()
    for name, data, reason in (
        ("zero", b"", "zero bytes"),
        ("html", b"<html><body>404 not found</body></html>" * 40, "a web page"),
        ("gzip", gzip.compress(whole), "gzip"),
    ):
        path = tmp_path / f"{name}.tar"
        path.write_bytes(data)
        (skip,) = iterate_tar(path)
        assert not isinstance(skip, RawSample) and skip.key == ""
        assert skip.reason.startswith("not a tar") and reason in skip.reason
    assert read(write_tar(tmp_path / "empty.tar", [])) == ([], {"": "empty shard"})


def test_every_cut_keeps_the_good_samples_and_says_so(tmp_path):
    members = [member for key in "abc" for member in ((f"{key}.jpg", bytes(700)), (f"{key}.txt", b"text"))]
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    size = (512 + 1024) + (512 + 512)  # of one sample with its headers and padding
    for cut in range(1, 3 * size, 97):
        path = tmp_path / "cut.tar"
        path.write_bytes(whole[:cut])
        found = list(iterate_tar(path))
        kept = [s.key for s in found if isinstance(s, RawSample) and s.fields.keys() == {"jpg", "txt"}]
        assert kept[: cut // size] == list("abc")[: cut // size]
        assert all(s.fields.get("jpg", bytes(700)) == bytes(700) for s in found if isinstance(s, RawSample))
        last = found[-1]
        assert not isinstance(last, RawSample) and kind_of(last.reason) == "truncated tar", cut


def test_cut_between_members_raises_nothing_but_counts_do(tmp_path):
    whole = write_tar(tmp_path / "00000.tar", [*pair("a"), *pair("b")])
    data = whole.read_bytes()
    with tarfile.open(whole) as tar:
        start = next(member.offset for member in tar if member.name == "b.jpg")
    whole.write_bytes(data[:start] + bytes(10240))  # with an end mark, as if nothing had happened
    assert read(whole) == (["a"], {})
    (tmp_path / "00000_stats.json").write_text(json.dumps({"successes": 5}))
    *_, skip = iterate_tar(whole)
    assert kind_of(skip.reason) == "samples missing" and skip.count == 4 and "5" in skip.reason
    (tmp_path / "sizes.json").write_text(json.dumps({"00000.tar": 2}))  # wins over the other
    *_, skip = iterate_tar(whole)
    assert skip.count == 1
    (tmp_path / "sizes.json").write_text("broken")
    (tmp_path / "00000_stats.json").write_text("[]")
    assert read(whole) == (["a"], {})


def test_crafted_headers_end_the_shard_and_never_loop(tmp_path):
    good_tar = write_tar(tmp_path / "good.tar", pair("a"))
    first = good_tar.read_bytes()[: end_of(good_tar)]
    path = tmp_path / "bad.tar"
    member = tarfile.TarInfo("bad.jpg")
    for size in (-512, -(2**40), 2**62):
        member.size = size
        header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
        path.write_bytes(first + bytes(header) + bytes(2048))
        good, skips = read(path)
        assert good == ["a"] and kind_of(skips[""]) == "truncated tar"
    broken = bytearray(first + first)  # key a again, but its header is broken
    broken[len(first) + 148 : len(first) + 156] = b"99999999"  # the checksum of the second header
    path.write_bytes(bytes(broken))
    good, skips = read(path)
    assert good == ["a"] and skips[""] == "truncated tar"


@pytest.mark.parametrize("seed", range(3))
def test_random_damage_never_raises(tmp_path, seed):
    path = write_tar(tmp_path / "a.tar", [*pair("a"), *pair("b")])
    data = path.read_bytes()
    random = Random(seed)
    for _ in range(60):
        broken = bytearray(data)
        for _ in range(3):
            broken[random.randrange(end_of(path))] = random.randrange(256)
        (tmp_path / "b.tar").write_bytes(bytes(broken))
        list(iterate_tar(tmp_path / "b.tar"))


def test_names_in_any_script_and_bytes_that_are_not_utf8(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", encoding="latin-1", format=tarfile.USTAR_FORMAT) as tar:
        member = tarfile.TarInfo("M\xfcller.jpg")
        member.size = 1
        tar.addfile(member, io.BytesIO(b"x"))
    good, skips = read(path)
    assert good == [] and list(skips.values()) == ["unsafe name"]
    assert json.dumps(list(skips))  # still a line of the ledger
    assert read(write_tar(tmp_path / "b.tar", [("画像\u3000一.jpg", encoded(picture()))]))[0] == ["画像\u3000一"]
