"""A token store as an iterable dataset of PyTorch: every row once over all ranks and workers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from qlip.data.token_store import TokenStore


class TokenDataset(IterableDataset):
    """Rows of a store in its order, for `torch.utils.data.DataLoader`.

    Each row is `key`, `bits` (n, L) bool, `caption` (the first, or empty) and `label` (-1 without), which the default
    collate function can batch. Row groups are dealt out in turn to the workers of all ranks, so every row comes once an
    epoch, and ranks may get unequal numbers. There is no shuffling and no position to resume from: for training there
    is `data/token_loader.py`.
    """

    def __init__(self, path: str | Path, *, rank: int = 0, num_ranks: int = 1) -> None:
        """Raises `UserError` as `TokenStore`, also later for damaged rows."""
        self.store, self.rank, self.num_ranks = TokenStore(path), rank, num_ranks

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, num_workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        first, step = self.rank * num_workers + number, self.num_ranks * num_workers
        for file, group, _ in self.store.row_groups[first::step]:
            rows = self.store.read_rows(file, group)
            labels = rows.labels or [None] * len(rows.keys)
            for place, bits in enumerate(self.store.unpack(rows.packed)):
                captions, label = rows.captions[place], labels[place]
                yield {
                    "key": rows.keys[place],
                    "bits": bits,
                    "caption": captions[0] if captions else "",
                    "label": -1 if label is None else label,
                }
