"""Merged stores row by row against what went in; what must not be merged is refused before anything is written."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from qlip.apps.token_tools import merge_stores
from qlip.core.errors import UserError
from qlip.data.finished_files import only_writer
from qlip.data.token_files import TokenRows, TokenStoreInfo
from qlip.data.token_merge import plan_merge, write_merge
from qlip.data.token_store import TokenStore
from small_token_stores import INFO, make_store

VIEWS = replace(INFO, views=("centre", "mirrored", "corner"), embedding_width=4, class_names=("cat", "dog", "owl"))


def refused(*words: str):
    return pytest.raises(UserError, match=".*".join(words))


def rows_of(*folders: Path) -> list[tuple]:
    rows: list[tuple] = []
    for store in map(TokenStore, folders):
        for file, group, _ in store.row_groups:
            part = store.read_rows(file, group, with_embeddings=True)
            numbers = part.embeddings if part.embeddings is not None else np.zeros((len(part.keys), 0))
            labels = part.labels or [None] * len(part.keys)
            packed = [row.tobytes() for row in part.packed]
            rows += zip(part.keys, packed, part.captions, part.sizes, labels, numbers.tolist(), strict=True)
    return rows


def two(folder: Path, *, info: TokenStoreInfo = INFO, **how) -> tuple[Path, Path]:
    make_store(folder / "a", info=info, **how)
    make_store(folder / "b", info=replace(info, source={"name": "other"}), prefix="m", **how)
    return folder / "a", folder / "b"


@pytest.mark.parametrize("pictures", [3, 8, 100], ids=lambda num: f"{num} a file")
def test_rows_come_out_in_order_and_views_stay_together(tmp_path: Path, pictures: int) -> None:
    stores = two(tmp_path, info=VIEWS, rows=(15, 9), labels=True)
    out = merge_stores(stores, out=tmp_path / "out", rows_per_file=pictures)
    assert rows_of(out) == rows_of(*stores)
    merged = TokenStore(out)
    assert merged.verify() == 48
    sizes = [len(TokenStore(file)) for file in merged.files]
    assert sizes == [3 * min(pictures, 16 - first) for first in range(0, 16, pictures)]
    assert [file.name for file in merged.files] == [f"{number:05d}.parquet" for number in range(len(sizes))]
    said = merged.info.source["merged"]
    assert [(store["name"], store["source"]["name"]) for store in said] == [("a", "pictures"), ("b", "other")]
    same = replace(merged.info, source=VIEWS.source, created=VIEWS.created)
    assert same == replace(VIEWS, encoding={"compressed": False})


@pytest.mark.parametrize("into", [False, True], ids=["packed", "compressed"])
def test_packed_and_compressed_become_one_another(tmp_path: Path, into: bool) -> None:
    make_store(tmp_path / "a")
    make_store(tmp_path / "b", prefix="m", compress=True)
    out = merge_stores((tmp_path / "a", tmp_path / "b"), out=tmp_path / "out", rows_per_file=20, compress=into)
    merged = TokenStore(out)
    assert rows_of(out) == rows_of(tmp_path / "a", tmp_path / "b") and bool(merged.info.codec) == into
    assert merged.info.encoding["compressed"] == into


def test_what_differs_between_stores_is_mixed(tmp_path: Path) -> None:
    said = {"dtype": "float32", "device": "cuda", "batch_size": 100, "batch_invariant": True, "compressed": True}
    reader, versions = {"library": "pillow", "version": "12.3.0"}, {"pillow": "12.3.0", "torch": "2.12"}
    first = replace(INFO, encoding=said, picture_decoder=reader, versions=versions)
    second = replace(
        INFO,
        encoding=said | {"device": "cpu", "batch_size": 8},
        picture_decoder=reader | {"version": "13.0.0"},
        versions={"pillow": "13.0.0", "torch": "2.12", "extra": "1"},
    )
    make_store(tmp_path / "a", info=first, rows=(4,))
    make_store(tmp_path / "b", info=second, rows=(4,), prefix="m")
    make_store(tmp_path / "c", info=second, rows=(4,), prefix="o")
    (tmp_path / "c/00000.parquet").rename(tmp_path / "a/00001.parquet")  # files of one store may differ too
    merged = TokenStore(merge_stores((tmp_path / "b", tmp_path / "a"), out=tmp_path / "out")).info
    mixed = said | {"device": "mixed", "batch_size": "mixed"}
    assert merged.encoding == mixed | {"compressed": False}
    assert merged.picture_decoder == {"library": "pillow", "version": "mixed"}
    assert merged.versions == {"pillow": "mixed", "torch": "2.12", "extra": "mixed"}
    of_b, of_a = merged.source["merged"]
    assert of_b["encoding"] == second.encoding and of_a["encoding"] == mixed
    assert of_b["versions"] == second.versions and of_b["picture_decoder"] == second.picture_decoder
    same = TokenStore(merge_stores((tmp_path / "b",), out=tmp_path / "same", compress=True)).info
    assert (same.encoding, same.versions) == (second.encoding, second.versions)


def test_a_stopped_merge_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = two(tmp_path)
    read = TokenStore.read_rows

    def stops(self: TokenStore, file: int, row_group: int, *, with_embeddings: bool = False) -> TokenRows:
        if self.path.name == "b" and file == 1:
            raise KeyboardInterrupt
        return read(self, file, row_group, with_embeddings=with_embeddings)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TokenStore, "read_rows", stops)
        merge_stores(stores, out=tmp_path / "out", rows_per_file=10)
    there = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*")}
    assert [file.name for file in sorted(there)] == [".lock", "00000.parquet", "00001.parquet"]
    merge_stores(stores, out=tmp_path / "out", rows_per_file=10)
    assert all(file.stat().st_mtime_ns == time for file, time in there.items())
    assert rows_of(tmp_path / "out") == rows_of(*stores) and TokenStore(tmp_path / "out").verify() == 34
    for pictures, compress, what in ((11, False, "source"), (10, True, "encoding.compressed")):
        with refused(f"00000.parquet holds other tokens: {what}", "another --out"):
            merge_stores(stores, out=tmp_path / "out", rows_per_file=pictures, compress=compress)
    with refused("00000.parquet holds other tokens", "another --out"):
        merge_stores(stores[::-1], out=tmp_path / "out", rows_per_file=10)
    (tmp_path / "out/00000.parquet").rename(tmp_path / "out/more.parquet")
    with refused("more.parquet is no file of this merge"):
        merge_stores(stores, out=tmp_path / "out", rows_per_file=10)


@pytest.mark.parametrize(
    "change,words",
    [
        ({"encoder_fingerprint": "b" * 64}, "encoder_fingerprint b{64}.* has a{64}"),
        ({"grid": (3, 2)}, r"grid \(3, 2\).* has \(2, 3\)"),
        ({"num_bits": 14}, "num_bits 14.* has 28"),
        ({"views": ("whole", "mirrored", "corner")}, "views .*whole.*centre"),
        ({"embedding_width": 8}, "embedding_width 8.* has 4"),
        ({"class_names": ("cat", "owl", "dog")}, "class_names .*owl.*dog.*dog.*owl"),
        ({"transform": {"size": 64}}, "transform .*64.*48"),
        ({"decoder": {"fingerprint": "new"}}, "embeddings of model new"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_kinds_are_refused_with_both_values(tmp_path: Path, change: dict, words: str) -> None:
    make_store(tmp_path / "a", info=VIEWS, rows=(6,), labels=True)
    make_store(tmp_path / "b", info=replace(VIEWS, **change), rows=(6,), labels=True, prefix="m")
    with refused(f"b/00000.parquet has {words}", "one kind"):
        merge_stores((tmp_path / "a", tmp_path / "b"), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_keys_that_repeat_and_cut_views_are_found_before_anything_is_written(tmp_path: Path) -> None:
    make_store(tmp_path / "a")
    make_store(tmp_path / "b", keys=[f"m{place}" for place in range(16)] + ["n/12.png"])
    with refused("key n/12.png is in .*a/00001.parquet and in .*b/00001.parquet", "different pictures"):
        merge_stores((tmp_path / "a", tmp_path / "b"), out=tmp_path / "out")
    with refused("key n/0.png is in"):
        merge_stores((tmp_path / "a", tmp_path / "a"), out=tmp_path / "out")
    make_store(tmp_path / "cut", info=replace(INFO, views=("a", "b")), rows=(5, 5))
    with refused("cut/00000.parquet ends with 1 of the 2 views of n/2.png"):
        merge_stores((tmp_path / "cut",), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_store_is_not_merged_into_itself_and_nothing_is_refused(tmp_path: Path) -> None:
    stores = two(tmp_path)
    for of_it in (stores, (stores[0], stores[1] / "00001.parquet")):
        with refused("b is one of the stores", "another --out"):
            merge_stores(of_it, out=tmp_path / "a" / ".." / "b")
    for given, rows in (((), 10), (stores, 0)):
        with refused("at least one"):
            merge_stores(given, out=tmp_path / "out", rows_per_file=rows)
    make_store(tmp_path / "none", rows=(0, 0))
    with refused("no rows"):
        merge_stores((tmp_path / "none",), out=tmp_path / "out")
    (tmp_path / "file").touch()
    with refused("cannot write to .*file", "another folder"):
        merge_stores(stores, out=tmp_path / "file" / "out")
    with only_writer(tmp_path / "out"), refused("another qlip command is writing to .*out"):
        merge_stores(stores, out=tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == [".lock"]


def test_a_merge_that_came_between_is_not_joined(tmp_path: Path) -> None:
    stores = two(tmp_path)
    planned = [
        plan_merge([TokenStore(store)], out=tmp_path / "out", rows_per_file=10, compress=False) for store in stores
    ]
    write_merge(planned[0])
    with refused("00000.parquet holds other tokens"):
        write_merge(planned[1])
    assert rows_of(tmp_path / "out") == rows_of(stores[0])


def test_skipped_pictures_are_listed_together(tmp_path: Path) -> None:
    stores = two(tmp_path)
    lines = [json.dumps({"key": f"k{n}", "reason": "cut: short", "shard": "", "count": 1}) for n in range(3)]
    (stores[0] / "00000.skipped.jsonl").write_text(lines[0] + "\n")
    (stores[1] / "00000.skipped.jsonl").write_text(lines[1] + "\n" + lines[2][:9])
    merge_stores(stores, out=tmp_path / "out")
    assert (tmp_path / "out/merged.skipped.jsonl").read_text() == lines[0] + "\n" + lines[1] + "\n"


def test_damage_is_named_and_leaves_no_half_file(tmp_path: Path) -> None:
    bits = make_store(tmp_path / "a")
    file = tmp_path / "a/00001.parquet"
    content = bytearray(file.read_bytes())
    content[content.index(np.packbits(bits[12].numpy().reshape(-1)).tobytes())] ^= 1
    file.write_bytes(content)
    with refused("a/00001.parquet row group 0 is damaged"):
        merge_stores((tmp_path / "a",), out=tmp_path / "out", rows_per_file=10)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [".lock", "00000.parquet"]
    assert torch.equal(TokenStore(tmp_path / "out")[9].bits, bits[9])
