"""Nearest pictures and near-duplicates in a token store, by exact comparison with every picture.

Of a store with several views of each picture only first views count: a mirrored copy is no other picture.

Shapes: `r` rows, `n` tokens, `L` bits of a token, `e` width of embeddings.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from qlip.core.errors import UserError
from qlip.data.token_files import REMEDY, TokenRows
from qlip.data.token_keys import read_column
from qlip.data.token_store import TokenStore

TILE = 1024  # rows compared with as many at a time: 29 MB as float32 at 256 tokens of 28 bits


@dataclass(kw_only=True, slots=True, frozen=True)
class Hit:
    """A picture that was found."""

    index: int
    """Its row in the store."""
    key: str
    """Its name."""
    score: float
    """Cosine in [-1, 1], or number of bits that differ."""
    captions: tuple[str, ...]
    """Its texts."""
    packed: np.ndarray = field(compare=False)
    """(ceil(n L / 8),) uint8, its bits."""


@dataclass(kw_only=True, slots=True)
class Duplicates:
    """Pictures of a store that hardly differ."""

    pairs: list[tuple[Hit, Hit]]
    """The closest, earlier rows first; the score of both is the number of bits in which they differ."""
    num_pairs: int
    """How many there are, those that `pairs` has no room for among them."""
    groups: list[list[str]]
    """Keys of pictures that are joined by pairs, also through others: all groups, each once, in the order of rows."""
    num_in_groups: int
    """Pictures that are in any pair."""
    num_pictures: int
    """All that were compared."""
    most_bits: int
    """Pairs differ in at most so many bits."""


def num_pictures(store: TokenStore) -> int:
    """Pictures of a store, each with all its views."""
    return len(store) // len(store.info.views)


def nearest_by_bits(store: TokenStore, query: np.ndarray, *, num: int) -> list[Hit]:
    """The `num` pictures with the fewest bits that differ from packed bits (ceil(n L / 8),) uint8; ties in row order.

    Raises `UserError` for damaged files.
    """
    assert query.shape == (store.info.row_bytes,) and query.dtype == np.uint8

    def differing(rows: TokenRows, _: str) -> np.ndarray:
        return np.bitwise_count(rows.packed ^ query).sum(1, dtype=np.int64)

    return _best(store, differing, num=num, sign=1, with_embeddings=False)


def nearest_by_embedding(store: TokenStore, query: np.ndarray, *, num: int) -> list[Hit]:
    """The `num` pictures of largest cosine with an embedding (e,), in float32; ties in row order.

    Raises `UserError` for a store without embeddings, for damaged files, and for embeddings without a direction.
    """
    if not store.info.embedding_width:
        raise UserError(f"{store.path} has no embeddings: make it with qlip tokenize --embeddings, or search by bits")
    if query.shape != (store.info.embedding_width,):
        raise UserError(
            f"{store.path} has embeddings of {store.info.embedding_width} numbers, the query is one of {len(query)}: "
            "give the model that made the store"
        )
    direction = query.astype(np.float32) / np.linalg.norm(query.astype(np.float32))

    def cosines(rows: TokenRows, where: str) -> np.ndarray:
        assert rows.embeddings is not None
        embeddings = rows.embeddings.astype(np.float32)
        norms = np.sqrt((embeddings * embeddings).sum(1))
        if not (np.isfinite(norms) & (norms > 0)).all():
            raise UserError(f"{where} has embeddings that are zero or not finite; {REMEDY}")
        # A matrix product may round by place, and equal rows must tie.
        return np.clip((embeddings * direction).sum(1) / norms, -1, 1)

    return _best(store, cosines, num=num, sign=-1, with_embeddings=True)


def _best(
    store: TokenStore,
    scores_of: Callable[[TokenRows, str], np.ndarray],
    *,
    num: int,
    sign: int,
    with_embeddings: bool,
) -> list[Hit]:
    """The `num` rows of smallest `sign` times score; no more than a row group and so many hits are in memory."""
    best: list[Hit] = []
    for start, is_first, rows, where in _row_groups(store, with_embeddings=with_embeddings):
        scores = scores_of(rows, where)
        worst = sign * best[-1].score if len(best) == num else math.inf
        places = np.flatnonzero(is_first & (sign * scores < worst))  # of equals the earlier row stays
        places = places[np.argsort(sign * scores[places], kind="stable")[:num]]
        best += [_hit(rows, place, start=start, score=scores[place].item()) for place in places.tolist()]
        best = sorted(best, key=lambda hit: sign * hit.score)[:num]  # stable, so equals stay in row order
    return best


def _hit(rows: TokenRows, place: int, *, start: int, score: float) -> Hit:
    return Hit(
        index=start + place,
        key=rows.keys[place],
        score=score,
        captions=rows.captions[place],
        packed=rows.packed[place].copy(),  # a view would keep the row group in memory
    )


def _row_groups(
    store: TokenStore, *, with_embeddings: bool = False
) -> Iterator[tuple[int, np.ndarray, TokenRows, str]]:
    """Every row group: number of its first row, which rows are first views (r,), rows, and where they are."""
    num_views = len(store.info.views)
    rows_of_file: Counter[int] = Counter()
    for file, _, num_rows in store.row_groups:
        rows_of_file[file] += num_rows
    for file, total in rows_of_file.items():
        if total % num_views:
            raise UserError(f"{store.files[file]} has not all {num_views} views of each picture; {REMEDY}")
    start = 0
    for file, group, num_rows in store.row_groups:
        rows = store.read_rows(file, group, with_embeddings=with_embeddings)
        is_first = np.arange(start, start + num_rows) % num_views == 0  # all files hold whole pictures
        yield start, is_first, rows, f"{store.files[file]} row group {group}"
        start += num_rows


@torch.inference_mode()
def near_duplicates(
    store: TokenStore,
    *,
    max_share: float,
    num: int,
    device: torch.device | None = None,
    on_pairs: Callable[[int], None] = lambda _: None,
) -> Duplicates:
    """All pairs of pictures of which at most `max_share` of the bits differ; the `num` closest of them by name.

    Exact: bits as +1 and -1 have the inner product n L - 2 differing bits, a whole number that float32 holds up to
    2^24. Every picture is compared with every other one, on `device`; `on_pairs` hears how many comparisons are done,
    in the end r (r - 1) / 2. The packed bits of all pictures stay in memory: 896 MB for a million of 256 x 28 bits.

    Pairs come by distance, then in row order. Raises `UserError` for damaged files.
    """
    place = device or torch.device("cpu")
    packed, indices = _first_views(store)
    most = math.floor(max_share * store.info.num_tokens * store.info.num_bits + 1e-6)  # 0.29 * 100 is 28.999...
    found, groups = _Closest(num), _Groups(len(packed))
    num_done, num_pairs = 0, 0
    for top in range(0, len(packed), TILE):
        rows = _signs(packed[top : top + TILE], place)
        for left in range(top, len(packed), TILE):
            columns = rows if left == top else _signs(packed[left : left + TILE], place)
            distances = (rows.shape[1] - rows @ columns.T) / 2  # (tile, tile)
            near = torch.nonzero(distances <= most)
            if left == top:
                near = near[near[:, 0] < near[:, 1]]
            values = distances[near[:, 0], near[:, 1]].to(torch.int64).cpu().numpy()
            first, second = (near + torch.tensor([top, left], device=place)).T.cpu().numpy()
            num_pairs += len(values)
            groups.join(first, second)
            found.add(values, first, second)
            height, width = len(rows), len(columns)
            num_done += height * (height - 1) // 2 if left == top else height * width
            on_pairs(num_done)
    return Duplicates(
        pairs=_with_names(store, found, packed, indices),
        num_pairs=num_pairs,
        groups=_keys_of_groups(store, groups.roots()),
        num_in_groups=int(groups.is_in_pair.sum()),
        num_pictures=len(packed),
        most_bits=most,
    )


def _first_views(store: TokenStore) -> tuple[np.ndarray, np.ndarray]:
    """Packed bits of all pictures (r, ceil(n L / 8)) uint8, and their rows in the store (r,)."""
    packed = np.empty((num_pictures(store), store.info.row_bytes), np.uint8)
    indices = np.empty(len(packed), np.int64)
    num = 0
    for start, is_first, rows, _ in _row_groups(store):
        places = np.flatnonzero(is_first)
        packed[num : num + len(places)] = rows.packed[places]
        indices[num : num + len(places)] = start + places
        num += len(places)
    return packed, indices


def _signs(packed: np.ndarray, device: torch.device) -> Tensor:
    """(r, bytes) uint8 -> (r, 8 bytes) float32 of +1 and -1; the zeros behind the last bit agree in all rows."""
    shifts = torch.arange(8, dtype=torch.uint8, device=device)
    bits = (torch.from_numpy(packed).to(device)[:, :, None] >> shifts) & 1
    return bits.flatten(1).float() * 2 - 1


class _Closest:
    """The `num` closest pairs of pictures so far."""

    def __init__(self, num: int) -> None:
        self.num = num
        self.pairs = np.empty((0, 3), np.int64)
        """Distance, first and second picture, sorted by them in this order."""

    def add(self, distances: np.ndarray, first: np.ndarray, second: np.ndarray) -> None:
        worst = self.pairs[-1, 0] if len(self.pairs) == self.num else np.iinfo(np.int64).max
        keep = distances <= worst
        pairs = np.concatenate([self.pairs, np.stack([distances, first, second], axis=1)[keep]])
        self.pairs = pairs[np.lexsort((pairs[:, 2], pairs[:, 1], pairs[:, 0]))][: self.num]


class _Groups:
    """Which pictures are joined by pairs: union-find, in which a picture's root is the first of its group."""

    def __init__(self, num: int) -> None:
        self.is_in_pair = np.zeros(num, bool)
        self._parents = np.arange(num)

    def join(self, first: np.ndarray, second: np.ndarray) -> None:
        self.is_in_pair[first] = self.is_in_pair[second] = True
        tops = np.unique(np.stack([self._roots(first), self._roots(second)], axis=1), axis=0)
        for pair in tops[tops[:, 0] != tops[:, 1]]:  # of many pairs in one group nothing is left to do
            low, high = sorted(self._roots(pair).tolist())
            self._parents[high] = low

    def _roots(self, pictures: np.ndarray) -> np.ndarray:
        roots = self._parents[pictures]
        while (higher := self._parents[roots] != roots).any():
            roots[higher] = self._parents[roots[higher]]
        self._parents[pictures] = roots
        return roots

    def roots(self) -> dict[int, int]:
        """Root of every picture that is in a pair."""
        pictures = np.flatnonzero(self.is_in_pair)
        return dict(zip(pictures.tolist(), self._roots(pictures).tolist(), strict=True))


def _keys_of_groups(store: TokenStore, roots: dict[int, int]) -> list[list[str]]:
    """Keys of each group; they are read a second time, so that only those of groups are in memory."""
    found: dict[int, list[str]] = {}
    files = store.files if roots else []
    keys = itertools.chain.from_iterable(rows for file in files for rows in read_column(file, "key"))
    for picture, key in enumerate(itertools.islice(keys, 0, None, len(store.info.views))):
        if picture in roots:
            found.setdefault(roots[picture], []).append(key)
    return list(found.values())


def _with_names(store: TokenStore, found: _Closest, packed: np.ndarray, indices: np.ndarray) -> list[tuple[Hit, Hit]]:
    """Pairs with the keys and captions of their pictures; reads each row group at most once."""
    rows = {picture: store[int(indices[picture])] for picture in np.unique(found.pairs[:, 1:]).tolist()}

    def hit(picture: int, distance: int) -> Hit:
        return Hit(
            index=int(indices[picture]),
            key=rows[picture].key,
            score=distance,
            captions=rows[picture].captions,
            packed=packed[picture].copy(),
        )

    return [(hit(first, distance), hit(second, distance)) for distance, first, second in found.pairs.tolist()]
