"""Several token stores of one encoder as one store, whose files have equal numbers of rows.

    rows of all stores in order -> cut every so many rows -> OUT/00000.parquet, 00001.parquet, ...

Row groups go through one by one. Where a file begins is known beforehand, so a stopped merge goes on after the files
that are finished.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qlip.core.config import differences, to_json
from qlip.core.errors import UserError
from qlip.data.finished_files import finished_file, only_writer
from qlip.data.token_files import TokenRows, TokenStoreInfo, open_tokens
from qlip.data.token_keys import KeyCheck, read_column
from qlip.data.token_store import TokenStore
from qlip.data.token_writer import TokenWriter

MUST_AGREE = ("encoder_fingerprint", "num_bits", "grid", "views", "embedding_width", "class_names", "transform")
LEDGER = "merged.skipped.jsonl"
MIXED = "mixed"


@dataclass(kw_only=True, slots=True)
class Merge:
    """What goes where."""

    stores: list[TokenStore]
    out: Path
    info: TokenStoreInfo
    """Of the new files."""
    rows_per_file: int
    """A multiple of the views of a picture, so that they stay together."""
    compress: bool

    @property
    def num_rows(self) -> int:
        """Of all stores."""
        return sum(map(len, self.stores))

    @property
    def files(self) -> list[Path]:
        """Of the new store."""
        num_files = -(-self.num_rows // self.rows_per_file)
        return [self.out / f"{number:05d}.parquet" for number in range(num_files)]


def plan_merge(stores: list[TokenStore], *, out: Path, rows_per_file: int, compress: bool) -> Merge:
    """Check everything that can be known before a row is written.

    `rows_per_file` counts pictures. Raises `UserError` for stores that do not belong together, a folder that is one of
    them, a folder of other tokens, and as `check_merged_keys` does.
    """
    if not stores or rows_per_file < 1:
        raise UserError(f"{len(stores)} stores, {rows_per_file} rows a file: give at least one of each")
    for store in stores:
        folder = store.path if store.path.is_dir() else store.path.parent
        if out.resolve() == folder.resolve():
            raise UserError(f"{out} is one of the stores, whose files would be overwritten; choose another --out")
    _require_one_kind(stores)
    merge = Merge(
        stores=stores,
        out=out,
        info=_merged_info(stores, rows_per_file=rows_per_file, compress=compress),
        rows_per_file=rows_per_file * len(stores[0].info.views),
        compress=compress,
    )
    if not merge.num_rows:
        raise UserError(f"{', '.join(str(store.path) for store in stores)}: no rows; give stores that have some")
    _refuse_other_tokens(merge)
    return merge


def check_merged_keys(merge: Merge, *, on_rows: Callable[[int], None] = lambda num: None) -> None:
    """Read all keys. Raises `UserError` for one that comes twice, with both files, and for views that lie apart."""
    check = KeyCheck(num_views=len(merge.info.views))
    for store in merge.stores:
        for file in store.files:
            for keys in read_column(file, "key"):
                check.add(file, keys)
                on_rows(len(keys))
    again = check.repeated()
    if again is not None:
        raise UserError(f"key {again.key} is in {again.first} and in {again.again}; merge stores of different pictures")


def write_merge(merge: Merge, *, on_rows: Callable[[int], None] = lambda num: None) -> int:
    """Write the files that are missing; returns how many were there.

    A compressed file's rows are in memory until it is written, else a row group. Raises `UserError` for damage, a full
    disk, and a folder that another process writes to or has written other tokens to.
    """
    with only_writer(merge.out):
        _refuse_other_tokens(merge)  # again: until here another merge could write there
        _write_ledger(merge)
        return _write_files(merge, on_rows)


def _write_files(merge: Merge, on_rows: Callable[[int], None]) -> int:
    num_there, size = 0, merge.rows_per_file
    for number, path in enumerate(merge.files):
        start, stop = number * size, min((number + 1) * size, merge.num_rows)
        if path.exists():
            num_there += 1
            on_rows(stop - start)
            continue
        with TokenWriter(path, merge.info, compress=merge.compress) as writer:
            for rows in _rows_between(merge.stores, start, stop):
                writer.write(rows)
                on_rows(len(rows.keys))
    return num_there


def _require_one_kind(stores: list[TokenStore]) -> None:
    """Also file by file, since a store itself is not asked to have one set of classes."""
    first_file, first = stores[0].files[0], stores[0].info
    for file, info in ((file, info) for store in stores for file, info in zip(store.files, store.infos, strict=True)):
        for name in MUST_AGREE:
            here, there = getattr(info, name), getattr(first, name)
            if here != there:
                raise _cannot_merge(name, file, here, first_file, there)
        models = info.decoder.get("fingerprint", ""), first.decoder.get("fingerprint", "")
        if first.embedding_width and models[0] != models[1]:
            raise _cannot_merge("embeddings of model", file, models[0], first_file, models[1])


def _cannot_merge(name: str, file: Path, here: Any, first_file: Path, there: Any) -> UserError:
    texts = [str(value) if len(str(value)) <= 200 else f"{str(value)[:200]} ..." for value in (here, there)]
    return UserError(f"{file} has {name} {texts[0]}, {first_file} has {texts[1]}; merge stores of one kind only")


def _merged_info(stores: list[TokenStore], *, rows_per_file: int, compress: bool) -> TokenStoreInfo:
    merged = [
        {
            "name": store.path.name,
            "identity": store.identity(),
            "rows": len(store),
            "encoding": _common([info.encoding for info in store.infos]),
            "picture_decoder": _common([info.picture_decoder for info in store.infos]),
            "versions": _common([info.versions for info in store.infos]),
            "source": dict(store.info.source),
        }
        for store in stores
    ]
    infos = [info for store in stores for info in store.infos]
    return replace(
        stores[0].info,
        encoding=_common([info.encoding for info in infos]) | {"compressed": compress},
        picture_decoder=_common([info.picture_decoder for info in infos]),
        versions=_common([info.versions for info in infos]),
        source={"merged": merged, "rows_per_file": rows_per_file, "compress": compress},
        codec={},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _common(dictionaries: list[dict[str, Any]]) -> dict[str, Any]:
    """What all say, with "mixed" for values that differ."""
    first = dictionaries[0]
    names = dict.fromkeys(name for values in dictionaries for name in values)
    return {
        name: first[name] if all(name in v and v[name] == first.get(name) for v in dictionaries) else MIXED
        for name in names
    }


def _refuse_other_tokens(merge: Merge) -> None:
    """Raise `UserError` when the folder holds files that this merge would not have made."""
    there = sorted(merge.out.glob("*.parquet")) if merge.out.is_dir() else []
    for file in there:
        info, _ = open_tokens(file)
        changed = differences(to_json(replace(info, codec={}, created="")), to_json(replace(merge.info, created="")))
        if changed:
            shown = changed[0] if len(changed[0]) <= 300 else f"{changed[0][:300]} ..."
            raise UserError(f"{file} holds other tokens: {shown}; choose another --out or delete it")
        if file not in merge.files:
            raise UserError(f"{file} is no file of this merge; choose another --out or delete it")


def _rows_between(stores: list[TokenStore], start: int, stop: int) -> Iterator[TokenRows]:
    """Rows number `start` to `stop` of all stores in order; row groups outside are not read."""
    place = 0
    for store in stores:
        for file, group, num_rows in store.row_groups:
            first, last = max(start - place, 0), min(stop - place, num_rows)
            place += num_rows
            if first < last:
                rows = store.read_rows(file, group, with_embeddings=True)
                yield rows if last - first == num_rows else rows.between(first, last)
            if place >= stop:
                return


def _write_ledger(merge: Merge) -> None:
    """The skipped pictures of all stores, line after line; no file where there are none."""
    ledgers = [ledger for store in merge.stores for ledger in skipped_ledgers(store)]
    if not ledgers:
        return
    with finished_file(merge.out / LEDGER) as merged:
        for ledger in ledgers:
            with ledger.open("rb") as lines:
                merged.writelines(line.rstrip() + b"\n" for line in lines if _is_json(line))


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False  # cut off by a kill
    return True


def skipped_ledgers(store: TokenStore) -> list[Path]:
    """Where a store lists the pictures it left out: all of its folder's, or that of the one file."""
    if store.path.is_dir():
        return sorted(store.path.glob("*.skipped.jsonl"))
    ledger = store.path.with_suffix(".skipped.jsonl")
    return [ledger] if ledger.exists() else []
