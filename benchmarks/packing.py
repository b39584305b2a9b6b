"""Ids per second of packing rows for UM3, and what packing pairs saves in padding.

.venv/bin/python benchmarks/packing.py      # two minutes on one core; writes results/packing_cpu.json

Rows of 4,096 ids, 8 at a time, of texts (log-normal, median 400 words), and of pictures of 512 ids with captions
(median 30 words): texts alone, pairs alone, and the paper's mixes before and after calming down, each with pairs packed
and with a row for every pair. `ids_per_second` are ids that are no padding; variants take turns, batch by batch, and a
figure is the median over batches. `tokenizing` is the share of the time that is the tokenizer's, `padding` the share of
positions that nothing stands on, `rows_saved` how many rows a pair a row takes for one packed row of as many samples.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from qlip.apps.demo import machine
from qlip.core.log import console
from qlip.data.mixing import MixDataConfig, mixing_loader
from qlip.data.packing import SequenceLayout
from qlip.data.token_files import TokenRows, TokenStoreInfo
from qlip.data.token_writer import TokenWriter
from qlip.engine.run_folder import versions

RESULTS = Path(os.environ.get("OUT", Path(__file__).parent / "results"))
FINGERPRINT = "0" * 64
MIXES = {"text": (1, 0, 0), "pairs": (0, 1, 3), "60:1:3": (60, 1, 3), "12:1:3": (12, 1, 3)}
NUM_TOKENS, NUM_BITS, DIVISION, TEXT_SIZE = 256, 28, 14, 4096


class Timed:
    """A tokenizer that knows how long it took."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.seconds = tokenizer, 0.0

    def __call__(self, text: str) -> list[int]:
        """Ids of a text."""
        start = time.process_time()
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        self.seconds += time.process_time() - start
        return ids


def sentences(num: int, *, words: int, seed: int) -> list[str]:
    """Texts of made-up words whose frequencies are a clipped Zipf's (the last word has the whole tail); lengths are
    log-normal around the median `words`."""
    random = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlucmfwyp"))
    lexicon = np.array(["".join(random.choice(letters, random.integers(2, 9))) for _ in range(20_000)])
    lengths = random.lognormal(np.log(words), 0.8, num).astype(int) + 1
    return [" ".join(lexicon[np.minimum(random.zipf(1.3, length) - 1, len(lexicon) - 1)]) for length in lengths]


def learned_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE, as Llama 3's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=TEXT_SIZE - 4, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )
    return tokenizer


def write_store(folder: Path, *, num: int) -> None:
    """Random tokens with captions."""
    info = TokenStoreInfo(encoder_fingerprint=FINGERPRINT, num_bits=NUM_BITS, grid=(16, 16))
    folder.mkdir()
    packed = np.random.default_rng(0).integers(0, 256, (num, info.row_bytes), dtype=np.uint8)
    captions: list[tuple[str, ...]] = [(text,) for text in sentences(num, words=30, seed=2)]
    keys = [f"{number:05d}" for number in range(num)]
    with TokenWriter(folder / "00000.parquet", info) as writer:
        writer.write(TokenRows(keys=keys, packed=packed, captions=captions, sizes=[None] * num))


def visual_ids(bits: Tensor) -> Tensor:
    """(b, n, L) bool -> (b, 2 n): two sub-codes of 14 bits a token, with ids of their own."""
    parts = bits.unflatten(-1, (-1, DIVISION)).long()
    codes = (parts << torch.arange(DIVISION - 1, -1, -1)).sum(-1)
    return (TEXT_SIZE + codes + (torch.arange(codes.shape[-1]) << DIVISION)).flatten(1)


def compare(data: Path, tokenizer: Tokenizer, *, batches: int) -> list[dict[str, Any]]:
    """Figures of every mix, with pairs packed and not."""
    variants: dict[tuple[str, bool], tuple[Timed, Iterator[dict[str, Tensor]]]] = {}
    for mix, (text, image_to_text, text_to_image) in MIXES.items():
        for packed in (True, False):
            timed = Timed(tokenizer)
            layout = SequenceLayout(
                tokenize=timed,
                begin=TEXT_SIZE - 4,
                end=TEXT_SIZE - 3,
                image_begin=TEXT_SIZE - 2,
                image_end=TEXT_SIZE - 1,
                image_length=2 * NUM_TOKENS,
                visual_ids=visual_ids,
            )
            config = MixDataConfig(
                text=str(data / "texts.jsonl") if text else "",
                tokens=str(data / "store"),
                text_start=text,
                text_end=text,
                image_to_text=image_to_text,
                text_to_image=text_to_image,
                pack_pairs=packed,
            )
            loader = mixing_loader(config, layout=layout, encoder_fingerprint=FINGERPRINT, seed=0)
            variants[mix, packed] = timed, iter(loader)
    found: dict[tuple[str, bool], list[dict[str, float]]] = {name: [] for name in variants}
    for _ in range(batches + 1):  # the first opens files
        for name, (timed, loader_batches) in variants.items():
            timed.seconds, start = 0.0, time.process_time()
            batch = next(loader_batches)
            seconds = time.process_time() - start
            filled = float((batch["task_ids"] >= 0).float().mean())
            figures = {"seconds": seconds, "tokenizing": timed.seconds / seconds, "padding": 1 - filled}
            figures["ids_per_second"] = filled * batch["task_ids"].numel() / seconds
            found[name].append(figures | {"samples": float(batch["sample_counts"].sum())})
    rows: list[dict[str, Any]] = []
    for (mix, packed), figures_of in found.items():
        row: dict[str, Any] = {"mix": mix, "packed": packed}
        row |= {key: median(f[key] for f in figures_of[1:]) for key in ("ids_per_second", "tokenizing", "seconds")}
        row |= {key: float(np.mean([f[key] for f in figures_of[1:]])) for key in ("padding", "samples")}
        rows.append(row)
    for packed_row, plain_row in zip(rows[::2], rows[1::2], strict=True):
        packed_row["rows_saved"] = packed_row["samples"] / plain_row["samples"]
    return rows


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        texts = sentences(5000, words=400, seed=1)
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        (Path(folder) / "texts.jsonl").write_text("".join(lines), encoding="utf-8")
        write_store(Path(folder) / "store", num=4096)
        rows = compare(Path(folder), learned_tokenizer(texts[:1000]), batches=options.batches)
    table = Table("mix", "pairs", "1000 ids/s", "tokenizing", "padding", "x rows saved")
    for row in rows:
        saved = f"{row['rows_saved']:.2f}" if "rows_saved" in row else "-"
        speed = f"{row['ids_per_second'] / 1000:.0f}"
        shares = (f"{row[key]:.1%}" for key in ("tokenizing", "padding"))
        table.add_row(row["mix"], "packed" if row["packed"] else "a row each", speed, *shares, saved)
    console.print(table)
    record = {"machine": machine(), "versions": versions(), "rows": 8, "sequence_length": 4096, "mixes": rows}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "packing_cpu.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
