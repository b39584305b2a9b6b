"""Token stores as the files of other projects: LlamaGen, TiTok (1d-tokenizer), WebDataset, numpy.

Each file appears whole or not at all, and what is finished is kept; `export.json` says which store the folder is of.
Ids are int64, bit 0 of a token on top (`quantizers/ids.py`).

Shapes: `r` rows, `n` tokens, `L` bits of a token, `v` views of a picture.
"""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from qlip.core.config import to_json
from qlip.core.errors import UserError
from qlip.data.finished_files import claim_folder, finished_file, only_writer
from qlip.data.token_files import TokenRows
from qlip.data.token_keys import KeyCheck, read_column, sample_name_of
from qlip.data.token_store import TokenStore
from qlip.quantizers.ids import MAX_BITS, bits_to_ids

ExportFormat = Literal["llamagen", "titok", "webdataset", "npy"]
MARKER = "export.json"
OnRows = Callable[[int], None]


def export_tokens(store: TokenStore, out: Path, *, format: ExportFormat, on_rows: OnRows = lambda num: None) -> int:
    """Write the store into the folder `out`; returns the number of rows left out.

    Only rows without caption are left out, and only where LlamaGen's files of captions have no place for them.
    `on_rows` hears of every so many rows. Raises `UserError` for a store without what the format needs, a folder of
    another export or that another process writes to, damage, and a full disk.
    """
    if not len(store):
        raise UserError(f"{store.path} has no rows; make some with qlip tokenize")
    if out.resolve() == store.files[0].parent.resolve():
        raise UserError(f"{out} is the store itself; choose another OUT")
    if format != "webdataset" and store.info.num_bits > MAX_BITS:
        raise UserError(f"ids of {store.info.num_bits} bits do not fit int64; choose --format webdataset")
    stems = [file.stem for file in store.files]
    write: Callable[[TokenStore, Path, OnRows], int]
    if format == "llamagen" and _has_classes(store):
        write, writes = _write_classes, [_imagenet(store, "codes"), _imagenet(store, "labels"), "keys"]
    elif format == "llamagen":
        _require_captions(store)
        write, writes = _write_captioned, ["codes", *(f"{stem}.jsonl" for stem in stems)]
    elif format == "titok":
        if not _has_classes(store):
            raise UserError(f"{store.path} has no labels, which TiTok's files need; choose --format npy or webdataset")
        write, writes = _write_titok, ["pretokenized.jsonl"]
    elif format == "webdataset":
        write, writes = _write_webdataset, ["sizes.json", *(f"{stem}.tar" for stem in stems)]
    else:
        write, writes = _write_npy, [f"{stem}.{ending}" for stem in stems for ending in ("npy", "jsonl")]
    said = {"format": format, "store": store.identity(), **to_json(store.info)}
    with only_writer(out):
        claim_folder(out, MARKER, said, writes=writes)
        return write(store, out, on_rows)


class _Row(NamedTuple):
    key: str
    ids: np.ndarray
    """(n) int64."""
    captions: tuple[str, ...]
    label: int | None


def _has_classes(store: TokenStore) -> bool:
    """Whether rows have labels: all of them or none. Raises `UserError` for some."""
    missing = Counter(label is None for file in store.files for group in read_column(file, "label") for label in group)
    if missing[True] and missing[False]:
        raise UserError(
            f"{store.path}: {missing[True]} of {len(store)} rows have no label; "
            "export pictures with classes and without from stores of their own"
        )
    return not missing[True]


def _require_captions(store: TokenStore) -> None:
    if store.num_without_captions() == len(store):
        raise UserError(f"{store.path} has neither labels nor captions for LlamaGen to train on; choose --format npy")


def _imagenet(store: TokenStore, kind: str) -> str:
    """LlamaGen's name of the folder of codes or labels, which has the side of the pictures in it."""
    size = store.info.transform.get("size")
    if not isinstance(size, int):
        raise UserError(f"{store.path} does not say how large its pictures are, as LlamaGen does; choose --format npy")
    return f"imagenet{size}_{kind}"


def _write_classes(store: TokenStore, out: Path, on_rows: OnRows) -> int:
    """LlamaGen, class-conditional: `<i>.npy` of codes (1, v, n) and of labels (1,), pictures counted over all files.

    `keys/<file>.jsonl` says which picture is which number, and that a file of the store is finished.
    """
    codes, labels = out / _imagenet(store, "codes"), out / _imagenet(store, "labels")
    num_views = len(store.info.views)
    check, number = KeyCheck(num_views=num_views), 0
    for file, num_rows in enumerate(_file_rows(store)):
        if num_rows % num_views:
            raise UserError(f"{store.files[file]} has {num_rows} rows of {num_views} views; see qlip tokens verify")
        listing = out / "keys" / f"{store.files[file].stem}.jsonl"
        if listing.exists():
            number += num_rows // num_views
            on_rows(num_rows)
            continue
        with finished_file(listing) as lines:
            rows = _rows(store, file, on_rows, check=check)
            for views in zip(*[rows] * num_views, strict=True):  # one iterator: v rows at a time
                key, label = views[0].key, views[0].label
                _save(codes / f"{number}.npy", np.stack([view.ids for view in views])[None])
                _save(labels / f"{number}.npy", np.array([label], np.int64))
                lines.write(
                    _line({"index": number, "key": key, "label": label, "class_name": _class_name(store, key, label)})
                )
                number += 1
    return 0


def _write_captioned(store: TokenStore, out: Path, on_rows: OnRows) -> int:
    """LlamaGen, text to image: `<file>.jsonl` of image_path and text, and codes (1, n) by file and line."""
    for file, num_rows in enumerate(_file_rows(store)):
        stem = store.files[file].stem
        listing = out / f"{stem}.jsonl"
        if listing.exists():
            on_rows(num_rows)
            continue
        with finished_file(listing) as lines:  # last: what it names is there
            captioned = (row for row in _rows(store, file, on_rows) if row.captions)
            for number, row in enumerate(captioned):
                _save(out / "codes" / stem / f"{number}.npy", row.ids[None])
                lines.write(_line({"image_path": row.key, "text": list(row.captions)}))
    return store.num_without_captions()


def _write_titok(store: TokenStore, out: Path, on_rows: OnRows) -> int:
    """One line a row, views among them, without keys; a stopped export starts this file again."""
    path = out / "pretokenized.jsonl"
    if path.exists():
        on_rows(len(store))
        return 0
    with finished_file(path) as lines:
        for file in range(len(store.files)):
            for row in _rows(store, file, on_rows):
                lines.write(_line({"class_id": row.label, "tokens": row.ids.tolist()}))
    return 0


def _write_webdataset(store: TokenStore, out: Path, on_rows: OnRows) -> int:
    """A tar for each file with rows: `bits.bin` as it is in the store, `json`, and `txt` where there is a caption."""
    sizes = {}
    for file, num_rows in enumerate(_file_rows(store)):
        path = out / f"{store.files[file].stem}.tar"
        if not num_rows:
            continue  # readers take a tar without samples for damage
        sizes[path.name] = num_rows
        if path.exists():
            on_rows(num_rows)
            continue
        with finished_file(path) as content, tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for rows in _groups(store, file, on_rows):
                for place, key in enumerate(rows.keys):
                    _add_sample(tar, sample_name_of(key), rows, place, store)
    with finished_file(out / "sizes.json") as content:
        content.write(json.dumps(sizes, indent=1).encode())
    return 0


def _add_sample(tar: tarfile.TarFile, name: str, rows: TokenRows, place: int, store: TokenStore) -> None:
    captions, size = rows.captions[place], rows.sizes[place]
    label = rows.labels[place] if rows.labels else None
    record: dict[str, Any] = {
        "key": rows.keys[place],
        "captions": captions,
        "label": label,
        "class_name": _class_name(store, rows.keys[place], label),
        "width": size and size[0],
        "height": size and size[1],
        "num_bits": store.info.num_bits,
        "grid": store.info.grid,
        "encoder_fingerprint": store.info.encoder_fingerprint,
    }
    fields = {"bits.bin": rows.packed[place].tobytes(), "json": json.dumps(record, ensure_ascii=False).encode()}
    if captions:
        fields["txt"] = captions[0].encode()
    for ending, content in fields.items():
        member = tarfile.TarInfo(f"{name}.{ending}")
        member.size, member.mode = len(content), 0o644  # time 0 and no owner: the same bytes every time
        tar.addfile(member, BytesIO(content))


def _write_npy(store: TokenStore, out: Path, on_rows: OnRows) -> int:
    """`<file>.npy` of (r, n) ids and `<file>.jsonl` of key, captions and label, for each file of the store."""
    for file, num_rows in enumerate(_file_rows(store)):
        stem = store.files[file].stem
        if (out / f"{stem}.jsonl").exists():
            on_rows(num_rows)
            continue
        with finished_file(out / f"{stem}.jsonl") as lines, finished_file(out / f"{stem}.npy") as ids:
            header = {"descr": "<i8", "fortran_order": False, "shape": (num_rows, store.info.num_tokens)}
            np.lib.format.write_array_header_1_0(ids, header)
            for row in _rows(store, file, on_rows):
                ids.write(row.ids.astype("<i8", copy=False).tobytes())
                lines.write(_line({"key": row.key, "captions": row.captions, "label": row.label}))
    return 0


def _class_name(store: TokenStore, key: str, label: int | None) -> str | None:
    names = store.info.class_names
    if label is None or not names:
        return None
    if not 0 <= label < len(names):
        raise UserError(f"{store.path}: {key} is of class {label}, there are {len(names)}; see qlip tokens verify")
    return names[label]


def _file_rows(store: TokenStore) -> list[int]:
    """Rows of each file."""
    counts = [0] * len(store.files)
    for file, _, num_rows in store.row_groups:
        counts[file] += num_rows
    return counts


def _groups(store: TokenStore, file: int, on_rows: OnRows) -> Iterator[TokenRows]:
    for here, group, num_rows in store.row_groups:
        if here == file:
            yield store.read_rows(file, group)
            on_rows(num_rows)


def _rows(store: TokenStore, file: int, on_rows: OnRows, *, check: KeyCheck | None = None) -> Iterator[_Row]:
    """The rows of a file with ids. Raises `UserError` for damage, and with `check` for views that lie apart."""
    for rows in _groups(store, file, on_rows):
        if check is not None:
            check.add(store.files[file], rows.keys)
        ids = bits_to_ids(store.unpack(rows.packed)).numpy()  # (r, n)
        yield from map(_Row, rows.keys, ids, rows.captions, rows.labels or [None] * len(rows.keys))


def _save(path: Path, array: np.ndarray) -> None:
    if not path.exists():
        with finished_file(path) as file:
            np.save(file, array)


def _line(values: dict[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False).encode() + b"\n"
