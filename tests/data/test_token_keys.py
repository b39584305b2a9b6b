"""Keys of token stores: repeated ones, views that lie apart, names of files; what verify asks of other columns."""

import random
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from qlip.core.errors import UserError
from qlip.data.token_files import TokenRows, pack_bits
from qlip.data.token_keys import KeyCheck, file_name_of, sample_name_of
from qlip.data.token_store import TokenStore
from qlip.data.token_writer import TokenWriter
from small_token_stores import CLASSES, HOSTILE_KEYS, INFO, make_store


def refused(*words: str):
    return pytest.raises(UserError, match=".*".join(words))


def test_names_of_keys_are_safe_and_differ(tmp_path: Path) -> None:
    numbers = random.Random(0)
    signs = "a/.%~_#2E\\\n\N{WHITE STAR}"
    keys = [*HOSTILE_KEYS, *("".join(numbers.choices(signs, k=numbers.randint(1, 6))) for _ in range(2000))]
    keys += [f"{'y' * 300}{place}" for place in range(50)]
    keys = list(dict.fromkeys(keys))
    files, samples = [file_name_of(key) for key in keys], [sample_name_of(key) for key in keys]
    assert len(set(files)) == len(set(samples)) == len(keys)
    for key, file, sample in zip(keys, files, samples, strict=True):
        assert file.isascii() and file.isprintable() and 0 < len(file) <= 200
        assert not file.startswith(".") and not set(file) & set("/\\:")
        assert "~" in file or unquote(file) == (key or "%")
        assert unquote(sample) == (key or "%") and "." not in sample
        assert all(part and not part.startswith("__meta__") for part in sample.split("/"))
    (tmp_path / f"{file_name_of('z' * 5000)}.webp.tmp").touch()
    assert file_name_of("n01440764/x.JPEG") == "n01440764%2Fx.JPEG" and sample_name_of("n01/x.JPEG") == "n01/x%2EJPEG"


def test_repeated_keys_are_found_whatever_their_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(tmp_path / "store", keys=[f"key {place}" for place in [*range(16), 3]])
    files = TokenStore(tmp_path / "store").files

    def looked_at() -> KeyCheck:
        check = KeyCheck(num_views=1)
        for file in files:
            for group in range(pq.ParquetFile(file).num_row_groups):
                check.add(file, pq.ParquetFile(file).read_row_group(group)["key"].to_pylist())
        return check

    again = looked_at().repeated()
    assert again is not None and again == ("key 3", files[0], files[1], 1)
    monkeypatch.setattr("qlip.data.token_keys._hashes", lambda keys: np.zeros(len(keys), np.uint64))
    assert looked_at().repeated() == again  # every hash equal: the keys decide
    make_store(tmp_path / "store")
    assert looked_at().repeated() is None


@pytest.mark.parametrize(
    "keys,words",
    [
        (["a", "a#1", "b", "b#1"], ""),
        (["a", "b", "a#1", "b#1"], "the 2 views of a do not follow each other, after it come b"),
        (["a", "a#1", "b"], "ends with 1 of the 2 views of b"),
        (["a#1", "a"], "the 2 views of a#1"),
    ],
    ids=["in order", "mixed", "cut", "reversed"],
)
def test_views_stand_together(tmp_path: Path, keys: list[str], words: str) -> None:
    info = replace(INFO, views=("centre", "mirrored"))
    make_store(tmp_path, info=info, rows=(len(keys),), keys=keys)
    if not words:
        assert TokenStore(tmp_path).verify() == 4
        return
    with refused("00000.parquet", words, "remove it"):
        TokenStore(tmp_path).verify()


def test_verify_looks_at_embeddings_and_classes(tmp_path: Path) -> None:
    info = replace(INFO, embedding_width=4, class_names=CLASSES)
    rows = TokenRows(
        keys=["a", "b"],
        packed=pack_bits(torch.zeros(2, 6, 28, dtype=torch.bool)),
        captions=[(), ()],
        sizes=[None, None],
        labels=[0, 2],
        embeddings=np.array([[1, 0, 0, 0], [0.5, 0.5, 0.5, 0.5]], np.float16),
    )
    for name, change, words in (
        ("good", {}, ""),
        ("nan", {"embeddings": np.array([[1, 0, 0, 0], [np.nan, 0, 0, 0]], np.float16)}, "embedding of b"),
        ("long", {"embeddings": np.array([[2, 0, 0, 0], [1, 0, 0, 0]], np.float16)}, "embedding of a"),
        ("class", {"labels": [0, 3]}, "b is of class 3, there are 3"),
    ):
        with TokenWriter(tmp_path / f"{name}.parquet", info) as writer:
            writer.write(replace(rows, **change))
        store = TokenStore(tmp_path / f"{name}.parquet")
        seen: list[TokenRows] = []
        if not words:
            assert store.verify(on_rows=seen.append) == 2 and seen[0].embeddings is not None
        else:
            with refused(f"{name}.parquet", words, "remove it"):
                store.verify()
