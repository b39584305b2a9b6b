"""What a token store costs on disk and in time, packed and entropy-coded, beside what other projects write.

.venv/bin/python benchmarks/token_store.py --model runs/demo/stage2/export --data runs/demo/data/test

Writes results/token_store_cpu.json; two minutes on one core. Two stores of one file each: 10,000 rows of random bits,
256 tokens of 28 (a picture of 256 px at patch 16; nothing can compress them), and the tokens that the model makes of
the data; without --model and --data only the first. `bytes_per_picture` is of whole files. `int64_npy` is one array a
picture, LlamaGen's; llamagen, titok, webdataset and npy are folders as `qlip tokens export` writes them (TiTok's needs
classes). `bits_per_pixel` has the packed bits, the codes, and what codes would take under simpler models, without their
tables: of each bit's share of ones, of the left and upper token, and those with partners, which is what is coded.
`rows_per_second` are of processor time, medians over turns that packed and coded files take one after the other;
`random` opens the store and reads one row, for which the row group around it is read and decoded.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, get_args

import numpy as np
import pyarrow.parquet as pq
import torch
from rich.table import Table
from torch import Tensor

from qlip.apps.demo import machine
from qlip.apps.encoding import TokenizeOptions
from qlip.apps.tokenize import tokenize_images
from qlip.core.log import console
from qlip.data.bit_codec import BitModel
from qlip.data.token_exports import ExportFormat, export_tokens
from qlip.data.token_files import TokenRows, TokenStoreInfo
from qlip.data.token_store import TokenStore
from qlip.data.token_writer import TokenWriter
from qlip.engine.run_folder import versions

RESULTS = Path(os.environ.get("OUT", Path(__file__).parent / "results"))


def random_rows(num: int) -> tuple[TokenStoreInfo, TokenRows]:
    """Of ImageNet's kind: a key and a class."""
    random = np.random.default_rng(0)
    info = TokenStoreInfo(
        encoder_fingerprint="0" * 64,
        num_bits=28,
        grid=(16, 16),
        transform={"size": 256},
        class_names=tuple(f"class {number}" for number in range(1000)),
    )
    rows = TokenRows(
        keys=[f"{number:09d}" for number in range(num)],
        packed=random.integers(0, 256, (num, info.row_bytes), dtype=np.uint8),
        captions=[()] * num,
        sizes=[(500, 375)] * num,
        labels=random.integers(0, 1000, num).tolist(),
    )
    return info, rows


def real_rows(model: str, data: str, *, max_samples: int, folder: Path) -> tuple[TokenStoreInfo, TokenRows]:
    """What the model makes of the data."""
    store = TokenStore(tokenize_images(data, TokenizeOptions(model=model, out=folder), max_samples=max_samples))
    parts = [store.read_rows(file, group) for file, group, _ in store.row_groups]
    rows = TokenRows(
        keys=[key for part in parts for key in part.keys],
        packed=np.concatenate([part.packed for part in parts]),
        captions=[texts for part in parts for texts in part.captions],
        sizes=[size for part in parts for size in part.sizes],
    )
    return replace(store.info, source={}, decoder={}, class_names=()), rows


def write(file: Path, info: TokenStoreInfo, rows: TokenRows, *, compress: bool) -> None:
    """One file of a store."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with TokenWriter(file, info, compress=compress) as writer:
        writer.write(rows)


def sizes(folder: Path, store: TokenStore, *, coded: TokenStore) -> dict[str, Any]:
    """Bytes per picture of every form, and of the columns of the two files of ours."""
    num = len(store)
    found: dict[str, Any] = {}
    for name, ours in (("packed", store), ("coded", coded)):
        total = ours.files[0].stat().st_size
        groups = _row_groups(ours.files[0])
        columns = {column: sum(group.get(column, 0) for group in groups) / num for column in groups[0]}
        columns["footer"] = total / num - sum(columns.values())
        found[name] = total / num
        found[f"{name}_columns"] = {column: round(size, 2) for column, size in columns.items()}
    array = io.BytesIO()
    np.save(array, np.zeros((1, store.info.num_tokens), np.int64))
    found["int64_npy"] = len(array.getvalue())
    for format in get_args(ExportFormat):
        if format == "titok" and not store.info.class_names:
            continue
        export_tokens(store, folder / format, format=format)
        files = [file for file in (folder / format).rglob("*") if file.is_file()]
        found[format] = sum(file.stat().st_size for file in files) / num
    return found


def _row_groups(file: Path) -> list[dict[str, int]]:
    footer = pq.ParquetFile(file).metadata
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    return [
        {
            column.path_in_schema.partition(".")[0]: column.total_compressed_size
            for column in map(group.column, range(group.num_columns))
        }
        for group in groups
    ]


def bits_per_pixel(bits: Tensor, store: TokenStore, *, coded_bytes: float) -> dict[str, float]:
    """Packed, coded, and ideal code lengths under three models."""
    grid, pixels = store.info.grid, store.info.transform["size"] ** 2
    share = bits.double().mean((0, 1)).clamp(1e-9, 1 - 1e-9)
    marginal = -(share * share.log2() + (1 - share) * (1 - share).log2()).sum() * bits.shape[1]
    neighbours = BitModel.fit(bits, grid=grid, max_partners=0).code_lengths(bits, grid=grid).mean()
    partners = BitModel.fit(bits, grid=grid).code_lengths(bits, grid=grid).mean()
    return {
        "packed": bits.shape[1] * bits.shape[2] / pixels,
        "coded": 8 * coded_bytes / pixels,
        "ideal_marginal": float(marginal) / pixels,
        "ideal_neighbours": float(neighbours) / pixels,
        "ideal_partners": float(partners) / pixels,
    }


def speeds(folder: Path, info: TokenStoreInfo, rows: TokenRows, *, turns: int) -> dict[str, dict[str, float]]:
    """Rows per second of writing, reading in order and reading at random, packed and coded."""
    num, random = len(rows.keys), np.random.default_rng(0)
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(turns):
        for name in ("packed", "coded"):
            file = folder / f"{name}.parquet"
            took = timed(lambda: write(file, info, rows, compress=name == "coded"))  # noqa: B023
            seconds.setdefault((name, "written"), []).append(took / num)
            store = TokenStore(file)
            took = timed(lambda: [store.read_rows(part, group) for part, group, _ in store.row_groups])  # noqa: B023
            seconds.setdefault((name, "in_order"), []).append(took / num)
            places = random.integers(0, num, 5).tolist()
            took = timed(lambda: [TokenStore(file)[place] for place in places])  # noqa: B023
            seconds.setdefault((name, "random"), []).append(took / len(places))
    return {
        kind: {name: 1 / median(seconds[name, kind]) for name in ("packed", "coded")}
        for kind in ("written", "in_order", "random")
    }


def timed(work: Callable[[], object]) -> float:
    """Seconds of processor time, of all threads."""
    start = time.process_time()
    work()
    return time.process_time() - start


def measure(folder: Path, info: TokenStoreInfo, rows: TokenRows, *, turns: int) -> dict[str, Any]:
    """Everything about one store."""
    for name in ("packed", "coded"):
        write(folder / name / "0.parquet", info, rows, compress=name == "coded")
    store, coded = TokenStore(folder / "packed"), TokenStore(folder / "coded")
    codes = pq.read_table(coded.files[0], columns=["coded"])["coded"].to_pylist()
    bits = store.unpack(rows.packed)
    return {
        "rows": len(rows.keys),
        "grid": list(info.grid),
        "num_bits": info.num_bits,
        "image_size": info.transform["size"],
        "row_bytes": info.row_bytes,
        "coded_row_bytes": float(np.mean([len(code) for code in codes])),
        "model_bytes": len(json.dumps(coded.info.codec)),
        "bytes_per_picture": sizes(folder / "exports", store, coded=coded),
        "bits_per_pixel": bits_per_pixel(bits, store, coded_bytes=float(np.mean([len(code) for code in codes]))),
        "rows_per_second": speeds(folder, info, rows, turns=turns),
    }


def show(record: dict[str, Any]) -> None:
    """A table of each kind."""
    stores = record["stores"]
    table = Table("", *stores)
    for kind in ("bytes_per_picture", "bits_per_pixel"):
        for name, value in next(iter(stores.values()))[kind].items():
            if not isinstance(value, dict):
                digits = 1 if kind == "bytes_per_picture" else 4
                values = (store[kind].get(name, float("nan")) for store in stores.values())
                table.add_row(f"{kind} {name}", *(f"{value:,.{digits}f}" for value in values))
    for kind in ("written", "in_order", "random"):
        for name in ("packed", "coded"):
            values = (store["rows_per_second"][kind][name] for store in stores.values())
            table.add_row(f"rows/s {kind} {name}", *(f"{value:,.1f}" for value in values))
    console.print(table)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000, help="of random bits, and at most so many of the data")
    parser.add_argument("--model", default="", help="a tokenizer")
    parser.add_argument("--data", default="", help="pictures with captions, as qlip tokenize takes them")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--note", default="", help="kept in the results: what else ran")
    options = parser.parse_args()
    torch.set_num_threads(1)
    stores: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stores["random"] = measure(folder / "random", *random_rows(options.rows), turns=options.turns)
        if options.model and options.data:
            real = real_rows(options.model, options.data, max_samples=options.rows, folder=folder / "tokens")
            stores["real"] = measure(folder / "real", *real, turns=options.turns)
        else:
            console.print("no store of real tokens: give --model and --data")
    record = {"machine": machine(), "versions": versions(), "note": options.note, "stores": stores}
    show(record)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "token_store_cpu.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
