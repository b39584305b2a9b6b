"""`qlip tokens verify|merge|export`: what is in a token store, several as one, and files of other projects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from json import dumps
from pathlib import Path
from typing import Any

from qlip.core.errors import UserError
from qlip.core.log import console, progress
from qlip.data.finished_files import finished_file
from qlip.data.ledger import read_ledger
from qlip.data.token_exports import ExportFormat, export_tokens
from qlip.data.token_files import TokenRows
from qlip.data.token_merge import check_merged_keys, plan_merge, skipped_ledgers, write_merge
from qlip.data.token_store import TokenStore
from qlip.engine.run_folder import make_writable

DIFFERING = {"versions": "versions", "picture_decoder": "read by", "encoding": "device"}


def verify_store(store: str | Path, *, model: str = "", json: Path | None = None) -> dict[str, Any]:
    """Read every row, print what was found, and return it; `json` is a file for the same facts.

    Raises `UserError`, naming the file, for damage (`TokenStore.verify`), for a store that `model` has not made, and,
    once all is printed and written, for one that is not finished.
    """
    tokens = TokenStore(store)
    if model:
        from qlip.models.opening import open_measured  # seconds, which the other tools need not wait

        said = open_measured(model).identity()
        tokens.require(said.get("encoder_fingerprint") or said.get("model_fingerprint", ""))
    seen = _Seen()
    with _rows_bar("verify", len(tokens)) as on_rows:

        def look(rows: TokenRows) -> None:
            seen.add(rows)
            on_rows(len(rows.keys))

        tokens.verify(on_rows=look)
    facts = _facts(tokens, seen) | {"model": model}
    for name, text in _lines(facts):
        console.print(f"{name:<13} {text}", markup=False)
    if json is not None:
        with finished_file(Path(json)) as file:
            file.write(dumps(facts, indent=1).encode() + b"\n")
    if tokens.num_missing_parts:
        there = f"{len(tokens.files)} of {tokens.num_parts} parts are there"
        raise UserError(f"{tokens.path}: {there}: start the same qlip tokenize again")
    return facts


def merge_stores(
    stores: tuple[Path, ...], *, out: str | Path, rows_per_file: int = 100_000, compress: bool = False
) -> Path:
    """Write the rows of all stores, in order, into files of so many pictures each; returns the folder.

    Finished files of an earlier call are kept. Raises `UserError` for stores of different kinds, a key that comes
    twice, damage, a folder of other tokens, and a full disk; before a row is written where it can be known.
    """
    folder = Path(out).expanduser()
    opened = [TokenStore(store) for store in stores]
    merge = plan_merge(opened, out=folder, rows_per_file=rows_per_file, compress=compress)
    for store in opened:
        store.warn_of_missing_parts()
    with _rows_bar("keys", merge.num_rows) as on_rows:
        check_merged_keys(merge, on_rows=on_rows)
    make_writable(folder)
    with _rows_bar("merge", merge.num_rows) as on_rows:
        num_there = write_merge(merge, on_rows=on_rows)
    there = f", {num_there} of them from an earlier call" if num_there else ""
    of_stores = f"{len(opened)} store{'s' * (len(opened) > 1)}"
    console.print(f"{merge.num_rows} rows of {of_stores} in {len(merge.files)} files{there}: {folder}", markup=False)
    return folder


def export_store(store: str | Path, out: str | Path, *, format: ExportFormat) -> Path:
    """Write a token store in the format of another project; returns the folder. Raises as `export_tokens` does."""
    tokens, folder = TokenStore(store), Path(out).expanduser()
    tokens.warn_of_missing_parts()
    with _rows_bar(format, len(tokens)) as on_rows:
        num_left_out = export_tokens(tokens, folder, format=format, on_rows=on_rows)
    left_out = f", {num_left_out} left out, which have no caption" if num_left_out else ""
    console.print(f"{len(tokens) - num_left_out} rows as {format} in {folder}{left_out}", markup=False)
    return folder


@contextmanager
def _rows_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar that is told how many rows came."""
    done = 0
    with progress(title, total, unit="rows") as bar:

        def on_rows(num: int) -> None:
            nonlocal done
            done += num
            bar.update(done)

        yield on_rows


class _Seen:
    """Counts over the rows of a store."""

    def __init__(self) -> None:
        self.num_captioned, self.num_captions = 0, 0
        self.labels: Counter[int] = Counter()

    def add(self, rows: TokenRows) -> None:
        self.num_captioned += sum(map(bool, rows.captions))
        self.num_captions += sum(map(len, rows.captions))
        self.labels.update(label for label in rows.labels or () if label is not None)


def _facts(store: TokenStore, seen: _Seen) -> dict[str, Any]:
    info, num_rows = store.info, len(store)
    folder = store.path if store.path.is_dir() else store.path.parent
    file_bytes = sum(file.stat().st_size for file in store.files)
    packing, bits_bytes = _bits_of(store)
    size = info.transform.get("size")
    pixels = size * size if isinstance(size, int) else 0
    return {
        "store": str(store.path),
        "pictures": num_rows // len(info.views),
        "rows": num_rows,
        "files": len(store.files),
        "grid": list(info.grid),
        "num_tokens": info.num_tokens,
        "num_bits": info.num_bits,
        "encoder_fingerprint": info.encoder_fingerprint,
        "decoder": info.decoder,
        "views": list(info.views),
        "embedding_width": info.embedding_width,
        "rows_with_caption": seen.num_captioned,
        "captions": seen.num_captions,
        "rows_with_label": seen.labels.total(),
        "labels": len(seen.labels),
        "class_names": len(info.class_names),
        "bits_are": packing,
        "packed_bytes_per_row": info.row_bytes,
        "bits_bytes_per_row": bits_bytes / num_rows if num_rows else None,
        "file_bytes_per_row": file_bytes / num_rows if num_rows else None,
        "bits_per_pixel": 8 * bits_bytes / num_rows / pixels if num_rows and pixels else None,
        "packed_bits_per_pixel": 8 * info.row_bytes / pixels if pixels else None,
        "differing": _differing(store),
        "missing_parts": store.num_missing_parts,
        "skipped": _skipped(store),
        "attempts": _attempts(folder) if store.path.is_dir() else {},
        "unfinished": sorted(file.name for file in folder.glob("*.tmp")) if store.path.is_dir() else [],
    }


def _bits_of(store: TokenStore) -> tuple[str, int]:
    """`packed`, `compressed` or `mixed`, and what the column of bits takes in all files, in bytes."""
    num_bytes, kinds = 0, set()
    for info, footer in zip(store.infos, store.footers, strict=True):
        name = "coded" if info.codec else "bits"
        kinds.add("compressed" if info.codec else "packed")
        for group in map(footer.row_group, range(footer.num_row_groups)):
            columns = (group.column(number) for number in range(group.num_columns))
            num_bytes += sum(c.total_compressed_size for c in columns if c.path_in_schema == name)
    return kinds.pop() if len(kinds) == 1 else "mixed", num_bytes


def _differing(store: TokenStore) -> dict[str, dict[str, dict[str, int]]]:
    """Where the files say different things: `versions` -> a package -> a version -> in how many files."""
    said: dict[str, list[dict[str, str]]] = {
        "versions": [info.versions for info in store.infos],
        "picture_decoder": [info.picture_decoder for info in store.infos],
        "encoding": [{"device": str(info.encoding.get("device", ""))} for info in store.infos],
    }
    differing: dict[str, dict[str, dict[str, int]]] = {}
    for name, of_files in said.items():
        for kind in dict.fromkeys(kind for values in of_files for kind in values):
            counts = Counter(values.get(kind) or "unknown" for values in of_files)
            if len(counts) > 1:
                differing.setdefault(name, {})[kind] = dict(counts.most_common())
    return differing


def _in_files(name: str, kind: str, counts: dict[str, int]) -> str:
    """`pillow 12.3.0 in 30 files, 13.0.0 in 10`."""
    first, *others = counts.items()
    texts = [f"{first[0]} in {first[1]} file{'s' * (first[1] > 1)}", *(f"{value} in {num}" for value, num in others)]
    return ", ".join(texts) if name == "encoding" else f"{kind} {', '.join(texts)}"


def _skipped(store: TokenStore) -> dict[str, int]:
    """Pictures that are not in the store, by kind of reason."""
    counts: Counter[str] = Counter()
    for ledger in skipped_ledgers(store):
        try:
            counts.update(read_ledger(ledger))
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{ledger} is no list of skipped pictures; restore it or delete it") from None
    return dict(counts.most_common())


def _attempts(folder: Path) -> dict[str, int]:
    """How often the Ray engine began each part that took more than one attempt."""
    ledgers = sorted(folder.glob("*.attempts.jsonl"))
    return {ledger.name.removesuffix(".attempts.jsonl"): len(ledger.read_bytes().splitlines()) for ledger in ledgers}


def _lines(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The same for people."""
    rows, views = facts["rows"], facts["views"]
    yield "store", f"{facts['store']}: {facts['pictures']} pictures in {facts['files']} files, every row whole"
    if len(views) > 1:
        yield "views", f"{len(views)} rows a picture: {'; '.join(views)}"
    grid = " x ".join(map(str, facts["grid"]))
    yield "tokens", f"{facts['num_tokens']} ({grid}) of {facts['num_bits']} bits"
    matches = ", of the model given" if facts["model"] else ""
    yield "encoder", f"{facts['encoder_fingerprint'][:12]}{matches}"
    decoder = facts["decoder"]
    if decoder.get("name"):
        yield "made by", " ".join(filter(None, (decoder["name"], decoder.get("path", ""))))
    width = facts["embedding_width"]
    yield "embeddings", f"{width} numbers of 16 bits" if width else "none"
    yield "captions", f"{_share(facts['rows_with_caption'], rows)}, {facts['captions']} in all"
    classes = f", {facts['labels']} classes" + (f" of {facts['class_names']}" if facts["class_names"] else "")
    yield "labels", _share(facts["rows_with_label"], rows) + (classes if facts["rows_with_label"] else "")
    if rows:
        size = f"{facts['file_bytes_per_row']:.1f} a row, of them bits {facts['bits_bytes_per_row']:.1f}"
        yield "bytes", f"{size} ({facts['bits_are']}; {facts['packed_bytes_per_row']} is packing alone)"
    if facts["bits_are"] != "packed" and facts["bits_per_pixel"]:
        yield "bits a pixel", f"{facts['bits_per_pixel']:.4f}, packed {facts['packed_bits_per_pixel']:.4f}"
    for name, said in facts["differing"].items():
        yield DIFFERING[name], "; ".join(_in_files(name, kind, counts) for kind, counts in said.items())
    skipped = facts["skipped"]
    kinds = ", ".join(f"{kind} ({count})" for kind, count in skipped.items())
    yield "skipped", f"{sum(skipped.values())} pictures" + (f": {kinds}" if skipped else "")
    if facts["attempts"]:
        yield "attempts", ", ".join(f"{name} {count}" for name, count in facts["attempts"].items())
    if facts["unfinished"]:
        yield "unfinished", f"{', '.join(facts['unfinished'])}: a run was stopped there, or is going on"


def _share(num: int, total: int) -> str:
    if num == total and total:
        return "of all rows"
    return f"of {num} rows ({100 * num / total:.1f} %)" if num else "of no row"
