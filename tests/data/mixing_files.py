"""Small texts, token stores and loaders for the tests of mixing."""

import itertools
import json
from pathlib import Path
from typing import Any

import torch

from qlip.data.mixing import MixDataConfig, MixingLoader, mixing_loader
from qlip.data.packing import SequenceLayout
from qlip.data.token_files import TokenRows, TokenStoreInfo, pack_bits
from qlip.data.token_writer import TokenWriter

BOS, EOS, BEGIN, END, FIRST_VISUAL = 256, 257, 258, 259, 300
FINGERPRINT = "a" * 64


def visual_ids(bits: torch.Tensor) -> torch.Tensor:
    return FIRST_VISUAL + (bits.long() << torch.arange(bits.shape[-1])).sum(-1)


LAYOUT = SequenceLayout(
    tokenize=lambda text: list(text.encode()),
    begin=BOS,
    end=EOS,
    image_begin=BEGIN,
    image_end=END,
    image_length=4,
    visual_ids=visual_ids,
)


def write_texts(folder: Path, *, num_files: int = 1, per_file: int = 30) -> str:
    folder.mkdir(exist_ok=True)
    for file in range(num_files):
        texts = (f"{file} {number} ".ljust(3 + 7 * number % 97, "x") for number in range(per_file))
        (folder / f"{file}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(folder)


def write_store(folder: Path, *, rows: int = 12, name: str = "t", captions: bool = True, empty: int = 0) -> str:
    """Pictures whose tokens are 4 times their number; `empty` of them have a white caption."""
    folder.mkdir()
    info = TokenStoreInfo(encoder_fingerprint=FINGERPRINT, num_bits=9, grid=(2, 2))
    bits = torch.stack([(torch.full((4, 1), number) >> torch.arange(9)) & 1 for number in range(rows)]).bool()
    texts: list[tuple[str, ...]] = [
        (" ",) if number < empty else (f"{name}{number}", f"{name}-{number}") for number in range(rows)
    ]
    with TokenWriter(folder / "00000.parquet", info, row_group_rows=24) as writer:
        keys = [f"{name}{number}" for number in range(rows)]
        found: list[tuple[str, ...]] = texts if captions else [()] * rows
        writer.write(TokenRows(keys=keys, packed=pack_bits(bits), captions=found, sizes=[None] * rows))
    return str(folder)


def loader_of(config: MixDataConfig, **options) -> MixingLoader:
    settings: dict[str, Any] = {"layout": LAYOUT, "encoder_fingerprint": FINGERPRINT, "seed": 0} | options
    return mixing_loader(config, **settings)


def write_both(folder: Path) -> MixDataConfig:
    """A config of small rows, with texts and a token store."""
    return MixDataConfig(
        text=write_texts(folder / "texts"),
        tokens=write_store(folder / "store", rows=24),
        sequence_length=64,
        batch_size=3,
        text_start=6.0,
        text_end=2.0,
        calm_down_steps=20,
        shuffle_window=5,
        caption_dropout=0.3,
    )


def documents_of(batches: list[dict]) -> list[tuple[int, list[int]]]:
    """Task and ids of every document."""
    found = []
    for batch in batches:
        for ids, positions, tasks in zip(
            *(batch[name].tolist() for name in ("input_ids", "position_ids", "task_ids")), strict=True
        ):
            starts = [place for place, position in enumerate(positions) if position == 0]
            pieces = itertools.pairwise([*starts, len(ids)])
            found += [(tasks[start], ids[start:end]) for start, end in pieces if tasks[start] >= 0]
    return found
