"""Token stores of a few rows: keys, captions, labels and sizes follow from a row's place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from qlip.data.token_files import TokenRows, TokenStoreInfo, pack_bits
from qlip.data.token_keys import key_of_view
from qlip.data.token_writer import TokenWriter

INFO = TokenStoreInfo(
    encoder_fingerprint="a" * 64, num_bits=28, grid=(2, 3), transform={"size": 48}, source={"name": "pictures"}
)
CLASSES = ("cat", "dog", "owl")
HOSTILE_KEYS = (
    "../up",
    "/etc/passwd",
    "a/./b",
    ".hidden",
    "n01/x.JPEG",
    "a b\n\0",
    "__meta__/x",
    "__x__/y",
    "a//b",
    "a/",
    "back\\slash/../x",
    "C:\\x",
    "50%",
    "50%25",
    "x~" + "0" * 32,
    "ein Stern \N{WHITE STAR}" * 40,
    "",
)


def make_store(
    folder: Path,
    *,
    info: TokenStoreInfo = INFO,
    rows: tuple[int, ...] = (11, 6),
    keys: list[str] | None = None,
    captions: bool = True,
    labels: bool = False,
    compress: bool = False,
    prefix: str = "n",
) -> torch.Tensor:
    """Files of so many rows, in row groups of 4 rows; returns their bits (r, n, L)."""
    bits = torch.rand(sum(rows), info.num_tokens, info.num_bits, generator=torch.Generator().manual_seed(0)) < 0.5
    bits[:, 0] = True  # ids of 2^L - 1: far beyond what a float32 holds
    num_views, first = len(info.views), 0
    folder.mkdir(parents=True, exist_ok=True)
    for number, num in enumerate(rows):
        with TokenWriter(folder / f"{number:05d}.parquet", info, row_group_rows=4, compress=compress) as writer:
            places = range(first, first + num)
            pictures = [place // num_views for place in places]
            names = keys or [key_of_view(f"{prefix}/{p // num_views}.png", p % num_views) for p in range(sum(rows))]
            writer.write(
                TokenRows(
                    keys=[names[place] for place in places],
                    packed=pack_bits(bits[first : first + num]),
                    captions=[(f"no. {p}", "another")[: 1 + p % 2] if captions and p != 1 else () for p in pictures],
                    sizes=[(p + 1, 2 * p + 1) for p in pictures],
                    labels=[p % 3 for p in pictures] if labels else None,
                    embeddings=np.eye(info.embedding_width, dtype=np.float16)[[p % 3 for p in pictures]]
                    if info.embedding_width
                    else None,
                )
            )
        first += num
    return bits
