"""A token store as endless training batches of one rank, in an order that is a function of (seed, epoch, rank).

    row groups, permuted -> an equal run of rows for every rank -> windows of some row groups, their rows mixed -> batch

Only one window lies in memory. Every row comes once per epoch over all ranks, and batches go on into the next epoch, so
no row is left out.

Shapes: `b` rows of a batch, `n` tokens, `L` bits of a token, `t` text tokens.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from qlip.core.errors import UserError
from qlip.core.log import console
from qlip.data.shards import refuse_changes
from qlip.data.token_store import TokenStore


@dataclass(kw_only=True, slots=True)
class TokenDataConfig:
    """Which token store to train on, and how it becomes batches."""

    tokens: str = ""
    """Folder of token files that `qlip tokenize` has made."""
    batch_size: int = 64
    """Pictures per process that are in memory at once."""
    global_batch_size: int = 0
    """Pictures per optimizer step over all processes, in as many parts as it takes; 0 is batch_size x processes."""
    captions: Literal["uniform", "first"] = "uniform"
    """Which of a picture's captions: anew in every epoch any of them, or always the first. Without one it is empty."""
    shuffle_window: int = 32
    """Row groups (`qlip tokenize` makes them of 2048 pictures) whose rows are mixed with each other in memory."""


@dataclass(slots=True)
class _Row:
    """One row on its way into a batch, and the position behind it."""

    key: str
    packed: np.ndarray
    caption: str
    index: int
    epoch: int
    done: int


class TokenLoader:
    """Endless micro-batches of one rank (the engine's `Loader`)."""

    def __init__(
        self,
        store: TokenStore,
        config: TokenDataConfig,
        *,
        tokenize: Callable[[list[str]], dict[str, Tensor]],
        seed: int,
        rank: int,
        num_ranks: int,
    ) -> None:
        """`tokenize` makes `input_ids` and `attention_mask` (b, t) of texts. Raises `UserError` as `token_loader`."""
        if config.batch_size < 1 or config.shuffle_window < 1:
            raise UserError(
                f"batch_size {config.batch_size}, shuffle_window {config.shuffle_window}: give at least 1 of both"
            )
        if len(store) < config.batch_size * num_ranks:
            raise UserError(
                f"{store.path} has {len(store)} pictures, too few for {num_ranks} x {config.batch_size} at a time: "
                "lower batch_size or tokenize more"
            )
        self.store, self.config, self.tokenize = store, config, tokenize
        self.seed, self.rank, self.num_ranks = seed, rank, num_ranks
        self.epoch, self.done = 0, 0
        self._order = {
            "store": f"{len(store)} pictures in {len(store.files)} files, sha256 {store.identity()[:12]}",
            "seed": seed,
            "captions": config.captions,
            "shuffle_window": config.shuffle_window,
        }
        self._sizes = np.array([rows for _, _, rows in store.row_groups])
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._first_epoch = 0
        self._resumed = False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """From the resumed position, else from the beginning."""
        if not self._resumed:
            self.epoch, self.done = self._first_epoch, 0
        self._resumed = False
        return self._batches()

    def state_dict(self) -> dict[str, Any]:
        """The position behind the last batch, and the order it belongs to; JSON values."""
        return {
            "rank": self.rank,
            "num_ranks": self.num_ranks,
            "epoch": self.epoch,
            "done": self.done,
            "order": self._order,
        }

    def resume(self, states: list[dict[str, Any]]) -> None:
        """Go on from the saved states of all ranks, in their order.

        With as many ranks the batches are bit for bit those of an uninterrupted run. Otherwise every rank begins the
        epoch after the largest that any was in, and rank 0 says so; that epoch is whole, and the rest of the old one
        is left out. Raises `UserError` when the store, the seed or the options have changed.
        """
        assert [state["rank"] for state in states] == list(range(states[0]["num_ranks"])), (
            "states of all ranks, in order"
        )
        for state in states:
            refuse_changes(state["order"], self._order)
        if len(states) == self.num_ranks:
            self.epoch, self.done = states[self.rank]["epoch"], states[self.rank]["done"]
            self._resumed = True
            return
        self._first_epoch = 1 + max(state["epoch"] for state in states)
        if self.rank == 0:
            console.print(
                f"data: the position was saved by {len(states)} ranks, here are {self.num_ranks}; every rank begins "
                f"epoch {self._first_epoch} and leaves out the rest of the one before"
            )

    def _batches(self) -> Iterator[dict[str, Any]]:
        rows = self._rows()
        while True:
            batch = list(itertools.islice(rows, self.config.batch_size))
            self.epoch, self.done = batch[-1].epoch, batch[-1].done
            captions = [row.caption for row in batch]
            yield {
                "bits": self.store.unpack(np.stack([row.packed for row in batch])),
                **self.tokenize(captions),
                "key": [row.key for row in batch],
                "sample_index": torch.tensor([row.index for row in batch]),
                "caption": captions,
            }

    def _rows(self) -> Iterator[_Row]:
        """This rank's rows without end, from the position on."""
        first_epoch, passed = self.epoch, self.done
        for epoch in itertools.count(first_epoch):
            before = 0
            for number, window in enumerate(self._windows(epoch)):
                num_rows = sum(len(rows) for _, rows in window)
                if before + num_rows > passed:
                    rows = self._mixed(epoch, number, window, before)
                    yield from itertools.islice(rows, max(0, passed - before), None)
                before += num_rows
            passed = 0

    def _windows(self, epoch: int) -> list[list[tuple[int, range]]]:
        """This rank's row groups of an epoch, with its rows in each, as many as are mixed at a time."""
        first, last = (len(self.store) * rank // self.num_ranks for rank in (self.rank, self.rank + 1))
        order = self._random("groups", epoch).permutation(len(self._sizes)).tolist()
        own: list[tuple[int, range]] = []
        start = 0
        for group in order:
            size = int(self._sizes[group])
            rows = range(max(first - start, 0), min(last - start, size))
            if rows:
                own.append((group, rows))
            start += size
        step = self.config.shuffle_window
        return [own[place : place + step] for place in range(0, len(own), step)]

    def _mixed(self, epoch: int, number: int, window: list[tuple[int, range]], before: int) -> Iterator[_Row]:
        """The rows of window `number` of an epoch, behind `before` others of this rank."""
        groups = {group: self.store.read_rows(*self.store.row_groups[group][:2]) for group, _ in window}
        places = [(group, row) for group, rows in window for row in rows]
        random = self._random("rows", epoch, self.rank, number)
        order, draws = random.permutation(len(places)).tolist(), random.random(len(places)).tolist()
        for done, (place, draw) in enumerate(zip(order, draws, strict=True), start=before + 1):
            group, row = places[place]
            rows = groups[group]
            texts = rows.captions[row] or ("",)
            yield _Row(
                key=rows.keys[row],
                packed=rows.packed[row],
                caption=texts[int(draw * len(texts)) if self.config.captions == "uniform" else 0],
                index=int(self._starts[group]) + row,
                epoch=epoch,
                done=done,
            )

    def _random(self, *parts: object) -> np.random.Generator:
        text = "/".join(map(str, ("tokens", self.seed, *parts)))
        return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()))


def token_loader(
    config: TokenDataConfig,
    *,
    tokenize: Callable[[list[str]], dict[str, Tensor]],
    encoder_fingerprint: str,
    seed: int,
    rank: int = 0,
    num_ranks: int = 1,
) -> TokenLoader:
    """Endless batches of one rank: `bits` (b, n, L) bool, `input_ids`, `attention_mask` (b, t), `key`, `caption` lists,
    `sample_index` (b,) int64, the row in the store.

    All ranks must be given the same config and seed. Raises `UserError` before the first batch, the same on every
    rank: no store, tokens of another encoder, no captions at all, fewer pictures than a batch of every rank.
    """
    if not config.tokens:
        raise UserError("no tokens to train on: set data.tokens to a folder that qlip tokenize has made")
    store = TokenStore(config.tokens)
    store.require(encoder_fingerprint)
    if store.num_without_captions() == len(store) > 0:
        raise UserError(f"{store.path} has no captions: run qlip tokenize on captioned pictures, into another folder")
    if rank == 0:
        store.warn_of_missing_parts()
    return TokenLoader(store, config, tokenize=tokenize, seed=seed, rank=rank, num_ranks=num_ranks)
