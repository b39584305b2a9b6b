"""`qlip detokenize MODEL SRC OUT`: the pictures of a token store, one file each, resumed where it was stopped.

    rows -> those whose file is missing -> batches -> tokenizer.decode -> OUT/<file of the store>/<key>.png

Shapes: `b` pictures, `S` their side, `n` tokens, `L` bits of a token.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from qlip.core.errors import UserError
from qlip.core.log import console, progress
from qlip.data.finished_files import claim_folder, finished_file, only_writer
from qlip.data.token_keys import file_name_of
from qlip.data.token_store import TokenStore
from qlip.engine.parallel import pick_device
from qlip.engine.run_folder import make_writable
from qlip.models.image_tokenizer import ImageTokenizer, QLIPTokenizer, VQTokenizer, open_image_tokenizer

MARKER = "detokenize.json"


def detokenize_store(
    model: str | Path,
    src: str | Path,
    out: str | Path,
    *,
    format: Literal["png", "webp"] = "png",
    image_size: int = 0,
    max_samples: int = 0,
    batch_size: int = 100,
    device: str = "auto",
) -> Path:
    """Write the picture of every row, lossless; returns the folder.

    `image_size` is that of `open_image_tokenizer`. `max_samples` takes the first so many pictures with all their views,
    0 all. Pictures that are there are kept. Raises `UserError` for a tokenizer whose encoder has not made the store, a
    folder of other pictures or that another process writes to, damage, and a full disk.
    """
    folder = Path(out).expanduser()
    if batch_size < 1 or max_samples < 0:
        raise UserError(f"batch_size {batch_size}, max_samples {max_samples}: give at least 1, and 0 or more")
    store = TokenStore(src)
    tokenizer = open_image_tokenizer(model, image_size=image_size)
    store.require(tokenizer.encoder_fingerprint)
    if (tokenizer.grid, tokenizer.num_bits) != (store.info.grid, store.info.num_bits):
        raise UserError(
            f"{store.path} has a grid of {store.info.grid} tokens, pictures of side {tokenizer.image_size} have "
            f"{tokenizer.grid}: give its --image-size, {store.info.transform.get('size', 'which is not recorded')}"
        )
    place = pick_device(device)
    make_writable(folder)
    said = {
        "store": store.identity(),
        "source": store.info.source,
        "model_fingerprint": _model_fingerprint(tokenizer),
        "image_size": tokenizer.image_size,
    }
    num_rows = min(len(store), max_samples * len(store.info.views) or len(store))
    missing = _Missing(store, folder, ending=format, num_rows=num_rows)
    with only_writer(folder):
        claim_folder(folder, MARKER, said, writes=[file.stem for file in store.files])
        tokenizer.to(place)
        _write_pictures(tokenizer, missing, store, size=min(batch_size, num_rows))
    kept = f", {missing.num_kept} of them from an earlier call" if missing.num_kept else ""
    console.print(f"{num_rows} pictures of side {tokenizer.image_size} in {folder}{kept}", markup=False)
    return folder


class _Row(NamedTuple):
    path: Path
    """Where its picture goes."""
    packed: np.ndarray
    """(ceil(n L / 8)) uint8."""


class _Missing:
    """The first `num_rows` rows of a store that have no picture yet, in order."""

    def __init__(self, store: TokenStore, folder: Path, *, ending: str, num_rows: int) -> None:
        self._store, self._folder, self._ending, self.num_rows = store, folder, ending, num_rows
        self.num_seen, self.num_kept = 0, 0
        self._rows = self._read()

    def __iter__(self) -> Iterator[_Row]:
        return self._rows

    def _read(self) -> Iterator[_Row]:
        for file, group, _ in self._store.row_groups:
            if self.num_seen == self.num_rows:
                return
            folder = self._folder / self._store.files[file].stem
            rows = self._store.read_rows(file, group)
            for key, packed in islice(zip(rows.keys, rows.packed, strict=True), self.num_rows - self.num_seen):
                path = folder / f"{file_name_of(key)}.{self._ending}"
                self.num_seen += 1
                if path.exists():
                    self.num_kept += 1
                else:
                    yield _Row(path, packed)


def _write_pictures(tokenizer: ImageTokenizer, missing: _Missing, store: TokenStore, *, size: int) -> None:
    with progress("detokenize", missing.num_rows) as bar, ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
        while batch := list(islice(missing, size)):
            pictures = _decoded(tokenizer, batch, store, size=size)
            list(threads.map(_save, (row.path for row in batch), pictures))
            bar.update(missing.num_seen)


def _decoded(tokenizer: ImageTokenizer, batch: list[_Row], store: TokenStore, *, size: int) -> Tensor:
    """(b, 3, S, S) uint8; padded with copies of the last row, so that all batches have one shape."""
    packed = [row.packed for row in batch] + [batch[-1].packed] * (size - len(batch))
    bits = store.unpack(np.stack(packed)).to(tokenizer.device)
    return tokenizer.decode(bits)[: len(batch)].cpu()


def _save(path: Path, pixels: Tensor) -> None:
    """A picture of (3, S, S) uint8 as a file that is whole when it is there."""
    with finished_file(path) as file:
        image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        if path.suffix == ".webp":
            image.save(file, format="webp", lossless=True)
        else:
            image.save(file, format="png")


def _model_fingerprint(tokenizer: ImageTokenizer) -> str:
    """Of the decoder too; pictures of two decoders do not mix."""
    assert isinstance(tokenizer, QLIPTokenizer | VQTokenizer)
    return str(tokenizer.measured.identity()["model_fingerprint"])
