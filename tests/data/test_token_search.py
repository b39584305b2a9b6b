"""Searches of token stores against loops over all rows; ties, views, several files, and embeddings that are none."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from qlip.core.errors import UserError
from qlip.data import token_search
from qlip.data.token_files import TokenRows, TokenStoreInfo, pack_bits
from qlip.data.token_search import near_duplicates, nearest_by_bits, nearest_by_embedding, num_pictures
from qlip.data.token_store import TokenStore
from qlip.data.token_writer import TokenWriter

INFO = TokenStoreInfo(encoder_fingerprint="a" * 64, num_bits=7, grid=(2, 3), embedding_width=5)
NUM_BITS = 42  # 6 bytes, the last of them with 6 zeros behind


def random_bits(num: int, *, seed: int = 0) -> np.ndarray:
    """(r, 42) bool of which every third row is a copy of an earlier one with few bits flipped, or none."""
    random = np.random.default_rng(seed)
    bits = random.random((num, NUM_BITS)) < 0.5
    for row in range(3, num, 3):
        bits[row] = bits[random.integers(row)]
        bits[row, random.integers(NUM_BITS, size=random.integers(5))] ^= True
    return bits


def random_embeddings(num: int) -> np.ndarray:
    embeddings = np.random.default_rng(1).normal(size=(num, 5))
    embeddings[5::4] = embeddings[1:2]
    return (embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)).astype(np.float16)


def write_store(
    folder: Path, bits: np.ndarray, *, embeddings: np.ndarray | None = None, views: int = 1, compress: bool = False
) -> TokenStore:
    """Files of 22 rows in row groups of 8."""
    embeddings = random_embeddings(len(bits)) if embeddings is None else embeddings
    info = replace(INFO, views=tuple(f"view {number}" for number in range(views)))
    for place in range(0, max(1, len(bits)), 22):
        with TokenWriter(folder / f"{place:04d}.parquet", info, row_group_rows=8, compress=compress) as writer:
            part = bits[place : place + 22]
            rows = TokenRows(
                keys=[f"key {place + row}" for row in range(len(part))],
                packed=pack_bits(torch.from_numpy(part.reshape(-1, 6, 7))),
                captions=[(f"caption {place + row}", "more")[: row % 3] for row in range(len(part))],
                sizes=[None] * len(part),
                embeddings=embeddings[place : place + 22],
            )
            writer.write(rows)
    return TokenStore(folder)


@pytest.mark.parametrize("num", [1, 7, 1000])
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("compress", [False, True], ids=["packed", "compressed"])
def test_nearest_by_bits_is_a_count_of_unequal_bits(tmp_path: Path, num: int, views: int, compress: bool) -> None:
    if compress:
        pytest.importorskip("constriction")
    bits = random_bits(52)
    store = write_store(tmp_path, bits, views=views, compress=compress)
    query = random_bits(1, seed=9)
    hits = nearest_by_bits(store, pack_bits(torch.from_numpy(query))[0], num=num)
    wanted = sorted((int((bits[row] != query[0]).sum()), row) for row in range(0, 52, views))[:num]
    assert [(hit.score, hit.index) for hit in hits] == wanted
    assert [hit.key for hit in hits] == [f"key {row}" for _, row in wanted]
    assert all(hit.captions == (f"caption {hit.index}", "more")[: hit.index % 22 % 3] for hit in hits)
    assert all((store.unpack(hit.packed[None])[0] == store[hit.index].bits).all() for hit in hits)
    assert num_pictures(store) == 52 // views


@pytest.mark.parametrize("num", [1, 9, 1000])
@pytest.mark.parametrize("views", [1, 2])
def test_nearest_by_embedding_is_the_cosine_and_equals_keep_their_order(tmp_path: Path, num: int, views: int) -> None:
    embeddings = random_embeddings(52)
    store = write_store(tmp_path, random_bits(52), embeddings=embeddings, views=views)
    query = embeddings[1].astype(np.float32) * 3 + 0.1
    hits = nearest_by_embedding(store, query, num=num)
    exact = embeddings.astype(np.float64) @ query / np.linalg.norm(embeddings.astype(np.float64), axis=1)
    exact /= np.linalg.norm(query.astype(np.float64))
    wanted = sorted(range(0, 52, views), key=lambda row: (-exact[row].round(6), row))[:num]
    assert [hit.index for hit in hits] == wanted
    np.testing.assert_allclose([hit.score for hit in hits], exact[wanted], atol=1e-6)
    assert max(hit.score for hit in hits) <= 1


def loops(bits: np.ndarray, rows: range, most: int) -> tuple[list[tuple[int, int, int]], list[set[int]]]:
    """Pairs by distance, and the groups that they make."""
    pairs = [(int((bits[a] != bits[b]).sum()), a, b) for a, b in itertools.combinations(rows, 2)]
    pairs = sorted(pair for pair in pairs if pair[0] <= most)
    groups: list[set[int]] = []
    for _, a, b in pairs:
        joined = [group for group in groups if group & {a, b}]
        groups = [group for group in groups if group not in joined] + [{a, b}.union(*joined)]
    return pairs, groups


@pytest.mark.parametrize("tile", [7, 1024], ids=["many tiles", "one tile"])
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("share,most", [(0, 0), (2 / 42, 2), (0.12, 5), (0.35, 14), (1, 42)])
def test_duplicates_are_those_of_two_loops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tile: int, views: int, share: float, most: int
) -> None:
    monkeypatch.setattr(token_search, "TILE", tile)
    bits = random_bits(52)
    store = write_store(tmp_path, bits, views=views)
    done: list[int] = []
    found = near_duplicates(store, max_share=share, num=10, on_pairs=done.append)
    pairs, groups = loops(bits, range(0, 52, views), most)
    assert [(one.score, one.index, two.index) for one, two in found.pairs] == pairs[:10]
    assert all(hit.key == f"key {hit.index}" and hit.score == pair[0].score for pair in found.pairs for hit in pair)
    assert all(
        (store.unpack(hit.packed[None])[0] == store[hit.index].bits).all() for pair in found.pairs for hit in pair
    )
    pictures = 52 // views
    assert (found.num_pairs, found.most_bits) == (len(pairs), most)
    assert found.groups == [[f"key {row}" for row in group] for group in sorted(map(sorted, groups))]
    assert (found.num_pictures, found.num_in_groups) == (pictures, sum(map(len, groups)))
    assert done == sorted(done) and done[-1] == pictures * (pictures - 1) // 2


def test_pictures_that_are_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_search, "TILE", 16)
    store = write_store(tmp_path, np.ones((50, NUM_BITS), bool))
    found = near_duplicates(store, max_share=0.0, num=20)
    assert [(one.index, two.index) for one, two in found.pairs] == [(0, second) for second in range(1, 21)]
    assert (found.num_pairs, found.num_in_groups) == (1225, 50)
    assert found.groups == [[f"key {row}" for row in range(50)]]


def test_a_long_chain_is_one_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_search, "TILE", 5)
    chain = np.tri(43, NUM_BITS, -1, dtype=bool)[np.random.default_rng(0).permutation(43)]
    found = near_duplicates(write_store(tmp_path, chain), max_share=1 / 42, num=100)
    assert (found.num_pairs, found.num_in_groups, len(found.pairs)) == (42, 43, 42)
    assert found.groups == [[f"key {row}" for row in range(43)]]


def test_a_store_without_rows_has_nothing(tmp_path: Path) -> None:
    store = write_store(tmp_path, np.empty((0, NUM_BITS), bool))
    assert nearest_by_bits(store, np.zeros(6, np.uint8), num=3) == []
    found = near_duplicates(store, max_share=0.5, num=3)
    assert (found.pairs, found.num_pairs, found.groups, found.num_pictures) == ([], 0, [], 0)
    store.info = replace(store.info, num_bits=1, grid=(10, 10))
    assert near_duplicates(store, max_share=0.29, num=3).most_bits == 29, "0.29 * 100 is 28.999 in floats"


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf], ids=str)
def test_embeddings_without_a_direction_are_refused(tmp_path: Path, value: float) -> None:
    embeddings = random_embeddings(30)
    embeddings[27] = value
    store = write_store(tmp_path, random_bits(30), embeddings=embeddings)
    with pytest.raises(UserError, match=r"0022\.parquet row group 0 has embeddings.*; remove it"):
        nearest_by_embedding(store, np.ones(5, np.float32), num=3)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    store = write_store(tmp_path, random_bits(9), views=2)
    with pytest.raises(UserError, match=r"0000\.parquet has not all 2 views of each picture; remove it"):
        nearest_by_bits(store, np.zeros(6, np.uint8), num=1)
    with pytest.raises(UserError, match=r"embeddings of 5 numbers, the query is one of 4: give the model"):
        nearest_by_embedding(store, np.ones(4, np.float32), num=1)
    store.info = replace(store.info, embedding_width=0)
    with pytest.raises(UserError, match=r"has no embeddings: make it with qlip tokenize --embeddings"):
        nearest_by_embedding(store, np.ones(5, np.float32), num=1)
