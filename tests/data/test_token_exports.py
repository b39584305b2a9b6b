"""Exports read back with numpy, json and our tar reader against ids computed by hand."""

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from qlip.core.errors import UserError
from qlip.data import finished_files
from qlip.data.finished_files import claim_folder, finished_file, only_writer
from qlip.data.tar_reader import RawSample, iterate_tar
from qlip.data.token_exports import ExportFormat, export_tokens
from qlip.data.token_files import TokenRows, pack_bits
from qlip.data.token_store import TokenStore
from small_token_stores import CLASSES, HOSTILE_KEYS, INFO, make_store


def refused(*words: str):
    return pytest.raises(UserError, match=".*".join(words))


def ids_by_hand(bits: torch.Tensor) -> list[list[int]]:
    return [[int("".join(str(int(bit)) for bit in token), 2) for token in row] for row in bits]


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def samples_of(file: Path) -> list[RawSample]:
    samples = []
    for sample in iterate_tar(file):
        assert isinstance(sample, RawSample), sample.reason
        samples.append(sample)
    return samples


@pytest.fixture(params=[False, True], ids=["packed", "compressed"])
def compress(request: pytest.FixtureRequest) -> bool:
    return request.param


def test_numpy_has_exact_ids_and_their_keys(tmp_path: Path, compress: bool) -> None:
    bits = make_store(tmp_path / "store", labels=True, compress=compress)
    seen: list[int] = []
    assert export_tokens(TokenStore(tmp_path / "store"), tmp_path / "out", format="npy", on_rows=seen.append) == 0
    expected = ids_by_hand(bits)
    assert expected[0][0] == 2**28 - 1 and sum(seen) == 17
    for stem, start, stop in (("00000", 0, 11), ("00001", 11, 17)):
        ids = np.load(tmp_path / "out" / f"{stem}.npy", allow_pickle=False)
        assert ids.dtype == np.int64 and ids.tolist() == expected[start:stop]
        lines = lines_of(tmp_path / "out" / f"{stem}.jsonl")
        assert [line["key"] for line in lines] == [f"n/{place}.png" for place in range(start, stop)]
        assert [line["label"] for line in lines] == [place % 3 for place in range(start, stop)]
    assert lines[0]["captions"] == ["no. 11", "another"] and not list((tmp_path / "out").glob("*.tmp"))


@pytest.mark.parametrize("num_bits", [1, 62], ids=["1 bit", "62 bits"])
def test_ids_of_few_and_of_many_bits_are_exact(tmp_path: Path, num_bits: int) -> None:
    bits = make_store(tmp_path / "store", info=replace(INFO, num_bits=num_bits))
    export_tokens(TokenStore(tmp_path / "store"), tmp_path / "out", format="npy")
    assert np.load(tmp_path / "out" / "00000.npy").tolist() == ids_by_hand(bits[:11])


def test_llamagen_with_classes_counts_pictures_and_stacks_views(tmp_path: Path) -> None:
    info = replace(INFO, views=("centre", "centre, mirrored", "corner"), class_names=CLASSES)
    bits = make_store(tmp_path / "store", info=info, rows=(15, 6), labels=True)  # views reach over row groups
    export_tokens(TokenStore(tmp_path / "store"), tmp_path / "out", format="llamagen")
    codes, labels, expected = tmp_path / "out/imagenet48_codes", tmp_path / "out/imagenet48_labels", ids_by_hand(bits)
    assert len(list(codes.iterdir())) == len(list(labels.iterdir())) == 7
    for number in range(7):
        code, label = np.load(codes / f"{number}.npy"), np.load(labels / f"{number}.npy")
        assert code.dtype == label.dtype == np.int64 and code.shape == (1, 3, 6) and label.shape == (1,)
        assert code[0].tolist() == expected[3 * number : 3 * number + 3] and label[0] == number % 3
    listed = [line for file in sorted((tmp_path / "out/keys").iterdir()) for line in lines_of(file)]
    assert [line["index"] for line in listed] == list(range(7))
    assert listed[5] == {"index": 5, "key": "n/5.png", "label": 2, "class_name": "owl"}


def test_llamagen_with_captions_numbers_lines(tmp_path: Path) -> None:
    bits = make_store(tmp_path / "store")
    assert export_tokens(TokenStore(tmp_path / "store"), tmp_path / "out", format="llamagen") == 1
    with_caption = [place for place in range(11) if place != 1]
    lines, expected = lines_of(tmp_path / "out/00000.jsonl"), ids_by_hand(bits)
    assert [line["image_path"] for line in lines] == [f"n/{place}.png" for place in with_caption]
    assert lines[2]["text"] == ["no. 3", "another"] and lines[0]["text"] == ["no. 0"]
    for number, place in enumerate(with_caption):
        code = np.load(tmp_path / f"out/codes/00000/{number}.npy")
        assert code.dtype == np.int64 and code.tolist() == [expected[place]]
    assert len(list((tmp_path / "out/codes/00001").iterdir())) == 6


def test_titok_has_a_line_for_every_view(tmp_path: Path) -> None:
    info = replace(INFO, views=("centre", "centre, mirrored"))
    bits = make_store(tmp_path / "store", info=info, rows=(6, 4), labels=True)
    export_tokens(TokenStore(tmp_path / "store"), tmp_path / "out", format="titok")
    lines = lines_of(tmp_path / "out/pretokenized.jsonl")
    assert [line["tokens"] for line in lines] == ids_by_hand(bits)
    assert [line["class_id"] for line in lines] == [place // 2 % 3 for place in range(10)]
    assert {tuple(line) for line in lines} == {("class_id", "tokens")}


def test_webdataset_comes_back_through_a_tar_reader(tmp_path: Path, compress: bool) -> None:
    bits = make_store(tmp_path / "store", info=replace(INFO, class_names=CLASSES), labels=True, compress=compress)
    export_tokens(TokenStore(tmp_path / "store"), tmp_path / "out", format="webdataset")
    assert json.loads((tmp_path / "out/sizes.json").read_text()) == {"00000.tar": 11, "00001.tar": 6}
    samples = [sample for stem in ("00000", "00001") for sample in samples_of(tmp_path / f"out/{stem}.tar")]
    assert [sample.fields["bits.bin"] for sample in samples] == [bytes(row) for row in pack_bits(bits)]
    assert samples[0].fields["txt"] == b"no. 0" and "txt" not in samples[1].fields
    assert json.loads(samples[5].fields["json"]) == {
        "key": "n/5.png",
        "captions": ["no. 5", "another"],
        "label": 2,
        "class_name": "owl",
        "width": 6,
        "height": 11,
        "num_bits": 28,
        "grid": [2, 3],
        "encoder_fingerprint": "a" * 64,
    }


def test_webdataset_itself_reads_the_tars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WDS_SECURE", "1")
    webdataset = pytest.importorskip("webdataset")
    keys = [key for key in HOSTILE_KEYS if "\0" not in key]
    bits = make_store(tmp_path / "store", rows=(len(keys),), keys=keys)
    export_tokens(TokenStore(tmp_path / "store"), tmp_path / "out", format="webdataset")
    samples = list(webdataset.WebDataset(str(tmp_path / "out/00000.tar"), shardshuffle=False))
    assert [json.loads(sample["json"])["key"] for sample in samples] == keys
    assert [sample["bits.bin"] for sample in samples] == [bytes(row) for row in pack_bits(bits)]


def test_hostile_keys_travel_through_a_tar(tmp_path: Path) -> None:
    make_store(tmp_path / "store", rows=(len(HOSTILE_KEYS),), keys=list(HOSTILE_KEYS))
    export_tokens(TokenStore(tmp_path / "store"), tmp_path / "out", format="webdataset")
    samples = samples_of(tmp_path / "out/00000.tar")
    assert [json.loads(sample.fields["json"])["key"] for sample in samples] == list(HOSTILE_KEYS)
    assert len({sample.key for sample in samples}) == len(HOSTILE_KEYS)


@pytest.mark.parametrize("format", ["llamagen", "titok", "webdataset", "npy"])
def test_a_stopped_export_goes_on_and_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: ExportFormat
) -> None:
    make_store(tmp_path / "store", info=replace(INFO, class_names=CLASSES), labels=True)
    export_tokens(TokenStore(tmp_path / "store"), tmp_path / "whole", format=format)
    store, read = TokenStore(tmp_path / "store"), TokenStore.read_rows

    def stops(self: TokenStore, file: int, row_group: int) -> TokenRows:
        if (file, row_group) == (1, 1):
            raise KeyboardInterrupt
        return read(self, file, row_group)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TokenStore, "read_rows", stops)
        export_tokens(store, tmp_path / "out", format=format)
    assert not list((tmp_path / "out").rglob("*.tmp"))
    first_file = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*") if file.is_file()}
    export_tokens(store, tmp_path / "out", format=format)
    assert all(file.stat().st_mtime_ns == time for file, time in first_file.items())
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def contents(folder: Path) -> dict[Path, bytes]:
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_what_a_format_needs_is_asked_for(tmp_path: Path) -> None:
    make_store(tmp_path / "plain", captions=False)
    with refused("no labels", "--format npy"):
        export_tokens(TokenStore(tmp_path / "plain"), tmp_path / "out", format="titok")
    with refused("neither labels nor captions", "--format npy"):
        export_tokens(TokenStore(tmp_path / "plain"), tmp_path / "out", format="llamagen")
    make_store(tmp_path / "large", info=replace(INFO, num_bits=63))
    with refused("63 bits do not fit int64", "--format webdataset"):
        export_tokens(TokenStore(tmp_path / "large"), tmp_path / "out", format="npy")
    make_store(tmp_path / "sizeless", info=replace(INFO, transform={}), labels=True)
    with refused("does not say how large", "--format npy"):
        export_tokens(TokenStore(tmp_path / "sizeless"), tmp_path / "out", format="llamagen")
    make_store(tmp_path / "none", rows=(0,))
    with refused("has no rows", "qlip tokenize"):
        export_tokens(TokenStore(tmp_path / "none"), tmp_path / "out", format="npy")
    (tmp_path / "mixed").mkdir()
    make_store(tmp_path / "labelled", labels=True)
    (tmp_path / "plain/00000.parquet").rename(tmp_path / "mixed/a.parquet")
    (tmp_path / "labelled/00001.parquet").rename(tmp_path / "mixed/b.parquet")
    with refused("11 of 17 rows have no label", "stores of their own"):
        export_tokens(TokenStore(tmp_path / "mixed"), tmp_path / "out", format="titok")
    assert not (tmp_path / "out").exists()


def test_labels_outside_the_classes_and_cut_views_are_refused(tmp_path: Path) -> None:
    make_store(tmp_path / "classes", info=replace(INFO, class_names=CLASSES[:2]), labels=True)
    with refused("n/2.png is of class 2, there are 2", "tokens verify"):
        export_tokens(TokenStore(tmp_path / "classes"), tmp_path / "out", format="webdataset")
    make_store(tmp_path / "views", info=replace(INFO, views=("a", "b")), rows=(5, 5), labels=True)
    with refused("00000.parquet has 5 rows of 2 views"):
        export_tokens(TokenStore(tmp_path / "views"), tmp_path / "out2", format="llamagen")


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    make_store(tmp_path / "store")
    with refused("store is the store itself", "another OUT"):
        export_tokens(TokenStore(tmp_path / "store"), tmp_path / "store", format="npy")
    make_store(tmp_path / "other", rows=(3,))
    export_tokens(TokenStore(tmp_path / "store"), tmp_path / "out", format="npy")
    with refused("out holds something else: format: 'npy' -> 'webdataset'", "another OUT"):
        export_tokens(TokenStore(tmp_path / "store"), tmp_path / "out", format="webdataset")
    with refused("out holds something else: store", "another OUT"):
        export_tokens(TokenStore(tmp_path / "other"), tmp_path / "out", format="npy")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/00000.npy").write_bytes(b"mine")
    with refused("mine has 00000.npy, but no export.json", "another OUT"):
        export_tokens(TokenStore(tmp_path / "store"), tmp_path / "mine", format="npy")
    assert (tmp_path / "mine/00000.npy").read_bytes() == b"mine"
    (tmp_path / "out/export.json").write_text("[")
    with refused("export.json is damaged", "delete it"):
        export_tokens(TokenStore(tmp_path / "store"), tmp_path / "out", format="npy")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/dev/full")
@pytest.mark.parametrize(
    "format,file",
    [
        ("titok", "pretokenized.jsonl"),
        ("webdataset", "00001.tar"),
        ("npy", "00001.npy"),
        ("npy", "00001.jsonl"),
        ("llamagen", "imagenet48_codes/5.npy"),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_no_half_file(tmp_path: Path, format: ExportFormat, file: str) -> None:
    make_store(tmp_path / "store", labels=True)
    temporary = tmp_path / "out" / f"{file}.qlip-{os.getpid()}.tmp"
    temporary.parent.mkdir(parents=True)
    temporary.symlink_to("/dev/full")
    if format == "llamagen":
        (tmp_path / "out/export.json").write_bytes(marker_of(tmp_path, format=format))
    with refused(f"cannot write .*{file}", "No space left on device", "free disk space") as caught:
        export_tokens(TokenStore(tmp_path / "store"), tmp_path / "out", format=format)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").rglob("*.tmp")) and not (tmp_path / "out" / file).exists()
    export_tokens(TokenStore(tmp_path / "store"), tmp_path / "out", format=format)
    assert (tmp_path / "out" / file).exists()


def marker_of(tmp_path: Path, *, format: ExportFormat) -> bytes:
    export_tokens(TokenStore(tmp_path / "store"), tmp_path / "elsewhere", format=format)
    return (tmp_path / "elsewhere/export.json").read_bytes()


def test_a_finished_file_is_whole_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(KeyError), finished_file(tmp_path / "deep/a.bin") as file:
        file.write(b"half")
        raise KeyError
    assert not list((tmp_path / "deep").iterdir())
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for name, what in (("file/a.bin", "file"), ("file/deep/a.bin", "file"), ("folder", "folder")):
        in_the_way = refused(f"cannot write .*{name}: a {what} is in the way; choose another OUT")
        with in_the_way, finished_file(tmp_path / name) as file:
            file.write(b"all")
    with refused("file/job.json: a file is in the way; choose another OUT"):
        claim_folder(tmp_path / "file", "job.json", {}, writes=["a.bin"])
    (tmp_path / "folder/job.json").mkdir()
    with refused("folder/job.json: a folder is in the way; choose another OUT"):
        claim_folder(tmp_path / "folder", "job.json", {}, writes=[])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deep", "file", "folder", "job.json"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
def test_a_finished_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced = tmp_path / "a.bin", []

    def sync(file: int) -> None:
        link = Path(f"/proc/self/fd/{file}").readlink()
        synced.append((link, path.exists(), link.stat().st_size if link.is_file() else 0))
        if link.is_dir():
            raise OSError(errno.EINVAL, "some file systems sync no folders")

    monkeypatch.setattr(finished_files.os, "fsync", sync)
    with finished_file(path) as file:
        file.write(b"whole")
    assert [(named, size) for _, named, size in synced] == [(False, 5), (True, 0)]
    assert synced[0][0].parent == synced[1][0] == tmp_path and path.read_bytes() == b"whole"


def test_two_processes_that_write_one_file_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with finished_file(tmp_path / "a.bin") as mine:
        mine.write(b"mine")
        with monkeypatch.context() as patch:
            patch.setattr(finished_files.os, "getpid", lambda: 1)
            with finished_file(tmp_path / "a.bin") as other:
                other.write(b"the other's")
        assert (tmp_path / "a.bin").read_bytes() == b"the other's"
    assert (tmp_path / "a.bin").read_bytes() == b"mine" and len(list(tmp_path.iterdir())) == 1


WRITER = """
import sys
from pathlib import Path
from qlip.data.finished_files import finished_file, only_writer
with only_writer(Path(sys.argv[1])), finished_file(Path(sys.argv[1]) / "deep/a.bin") as file:
    print("here", flush=True)
    sys.stdin.read()
"""


def test_one_process_writes_to_a_folder_until_it_is_killed(tmp_path: Path) -> None:
    make_store(tmp_path / "store")
    out, store = tmp_path / "out", TokenStore(tmp_path / "store")
    with subprocess.Popen([sys.executable, "-c", WRITER, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"here\n"
        with refused("another qlip command is writing to .*out; wait for it or stop it"):
            export_tokens(store, out, format="npy")
        assert not (out / "export.json").exists() and len(list(out.glob("deep/*.tmp"))) == 1
        other.kill()
    (out / "deep/my.1.tmp").touch()
    (out / f"a.qlip-{os.getppid()}.tmp").touch()  # where there are no locks, another one may be at work
    export_tokens(store, out, format="npy")
    assert {file.name for file in out.rglob("*.tmp")} == {"my.1.tmp", f"a.qlip-{os.getppid()}.tmp"}
    assert (out / "00001.npy").exists()


def test_the_lock_ends_with_its_block(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyError), only_writer(tmp_path / "deep/out"):
            with refused("another qlip command"), only_writer(tmp_path / "deep/out"):
                pass
            raise KeyError
    (tmp_path / "file").touch()
    with refused("cannot write .*file: a file is in the way"), only_writer(tmp_path / "file"):
        pass


@pytest.mark.parametrize("number", ["ENOLCK", "EOPNOTSUPP", "EIO"])
def test_file_systems_without_locks_go_on_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: str) -> None:
    def no_lock(file: int, how: int) -> None:
        raise OSError(getattr(errno, number), number)

    monkeypatch.setattr(finished_files.fcntl, "flock", no_lock)
    if number == "EIO":
        with refused("cannot write .*EIO"), only_writer(tmp_path):
            pass
    else:
        with only_writer(tmp_path), only_writer(tmp_path):
            pass


def test_damage_is_named(tmp_path: Path) -> None:
    bits = make_store(tmp_path / "store")
    file = tmp_path / "store/00001.parquet"
    content = bytearray(file.read_bytes())
    content[content.index(bytes(pack_bits(bits[12:13])[0]))] ^= 1
    file.write_bytes(content)
    with refused("00001.parquet row group 0 is damaged", "qlip tokenize"):
        export_tokens(TokenStore(tmp_path / "store"), tmp_path / "out", format="npy")
    assert not list((tmp_path / "out").glob("00001*")) and (tmp_path / "out/00000.npy").exists()
