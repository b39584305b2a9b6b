"""Where packed documents come from: texts taken in pieces, and pairs looked at before they are taken.

Both know their position, and go on from it with the piece or pair that would have come next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from qlip.core.errors import UserError
from qlip.data.ledger import Ledger
from qlip.data.packing import (
    IMAGE_TO_TEXT,
    TEXT_TO_IMAGE,
    UNFILLED,
    Pair,
    SequenceLayout,
    image_to_text,
    text_document,
    text_to_image,
)
from qlip.data.shards import seeded_random
from qlip.data.tar_reader import Skip
from qlip.data.text_stream import TextStream
from qlip.data.token_loader import TokenLoader

MAX_WITHOUT_CAPTION = 10_000  # pictures one after the other, of loaders that do not say how many they have


class PictureLoader(Protocol):
    """What a `PairSource` asks of a loader: the engine's contract."""

    def __iter__(self) -> Iterator[dict[str, Any]]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def resume(self, states: list[dict[str, Any]]) -> None: ...


class TextPieces:
    """Documents as ids, taken in pieces of any length."""

    def __init__(self, stream: TextStream, layout: SequenceLayout) -> None:
        self.stream, self.layout = stream, layout
        self._ids = np.empty(0, np.int64)
        self._offset, self._resumed_offset = 0, 0

    def start(self) -> None:
        """From the resumed position, else from the beginning; once before the first piece."""
        self._documents = iter(self.stream)
        self._before, self._ids, self._offset = self.stream.state_dict(), np.empty(0, np.int64), 0
        if self._resumed_offset:
            self._open_next()
            # a file that was mended since may have a shorter document here
            self._offset, self._resumed_offset = min(self._resumed_offset, len(self._ids)), 0

    def take(self, limit: int) -> np.ndarray:
        """The next 1 to `limit` ids, all of one document. Raises as `TextStream`."""
        if self._offset == len(self._ids):
            self._open_next()
        piece = self._ids[self._offset : self._offset + limit]
        self._offset += len(piece)
        return piece

    def state_dict(self) -> dict[str, Any]:
        """The position before the current document, and how many of its ids are taken; JSON values."""
        return {"stream": self._before, "offset": self._offset}

    def resume(self, states: list[dict[str, Any]]) -> None:
        """Go on from the states of all ranks. Raises as `TextStream.resume`."""
        self.stream.resume([state["stream"] for state in states])
        self._resumed_offset = states[self.stream.rank]["offset"] if len(states) == self.stream.num_ranks else 0

    def _open_next(self) -> None:
        self._before = self.stream.state_dict()
        self._ids, self._offset = text_document(self.layout, next(self._documents)), 0


@dataclass(kw_only=True, slots=True, frozen=True)
class PairOptions:
    """How pairs are made."""

    layout: SequenceLayout
    max_caption_tokens: int
    """Longer captions are cut."""
    caption_dropout: float
    """Chance that a picture to be drawn has no caption."""
    seed: int
    name: str
    """What messages and the ledger call the pictures."""


class PairSource:
    """Pairs out of a loader of captioned pictures, or of their bits; those without caption are left out, which the
    ledger is told in the first epoch."""

    def __init__(
        self, loader: PictureLoader, options: PairOptions, *, ledger: Ledger, rank: int, num_ranks: int
    ) -> None:
        """`loader` gives `caption` and `key` lists with `bits` (b, n, L) or `pixel_values` (b, 3, h, w)."""
        self.loader, self.options, self.ledger = loader, options, ledger
        self.rank, self.num_ranks = rank, num_ranks
        self._number, self._used = 0, 0
        # twice the store: a rank has another part of it in every epoch
        self._limit = 2 * len(loader.store) if isinstance(loader, TokenLoader) else MAX_WITHOUT_CAPTION
        self._caption: list[int] | None = None
        self._resumed = False

    def start(self) -> None:
        """From the resumed position, else from the beginning; once before the first pair."""
        self._batches = iter(self.loader)
        if not self._resumed:
            self._number, self._used = 0, 0
            self.ledger.load_state_dict({"num_good": 0, "skipped": {}})
        used, self._resumed = self._used, False
        self._next_batch()
        while used > len(self._captions):  # the loader may give smaller batches than before
            used -= len(self._captions)
            self._next_batch()
        self._used = used

    def peek(self, task: int) -> Pair:
        """The next pair as a document of this kind; the same until `take`.

        Raises `UserError` when no picture has a caption: none of as many, one after the other, as two epochs have.
        """
        caption = self._next_caption()
        if task == TEXT_TO_IMAGE and self.options.caption_dropout:
            draw = seeded_random("caption dropout", self.options.seed, self.rank, self._number).random()
            caption = [] if draw < self.options.caption_dropout else caption
        build = image_to_text if task == IMAGE_TO_TEXT else text_to_image
        picture = None if self._pictures is None else self._pictures[self._used]
        return Pair(ids=build(self.options.layout, caption, self._visual[self._used]), pixel_values=picture)

    def take(self) -> None:
        """The pair that was looked at is used."""
        self._used += 1
        self._number += 1
        self._caption = None
        self.ledger.good()

    def state_dict(self) -> dict[str, Any]:
        """The loader's position before the current batch, the pictures of it that are done, and counts; JSON values."""
        return {
            "loader": self._before,
            "used": self._used,
            "number": self._number,
            "counts": self.ledger.state_dict(),
        }

    def resume(self, states: list[dict[str, Any]]) -> None:
        """Go on from the states of all ranks. Raises as the loader's `resume`."""
        before = [state["loader"] for state in states]
        self.loader.resume(before)
        workers = getattr(self.loader, "num_workers", None)  # of others the loader begins its next epoch
        if len(states) == self.num_ranks and before[self.rank].get("num_workers") == workers:
            state = states[self.rank]
            self._used, self._number = state["used"], state["number"]
            self.ledger.load_state_dict(state["counts"])
            self._resumed = True

    def _next_batch(self) -> None:
        self._before = self.loader.state_dict()
        batch = next(self._batches)
        self._captions: list[str] = batch["caption"]
        self._keys: list[str] = batch["key"]
        self._pictures: Tensor | None = batch.get("pixel_values")
        if self._pictures is None:
            self._visual = self.options.layout.visual_ids(batch["bits"]).numpy()
        else:
            self._visual = np.full((len(self._captions), self.options.layout.image_length), UNFILLED)
        self._used, self._caption = 0, None

    def _next_caption(self) -> list[int]:
        for _ in range(self._limit):
            if self._caption:
                return self._caption
            if self._used == len(self._captions):
                self._next_batch()
            text = self._captions[self._used].strip()
            self._caption = self.options.layout.tokenize(text)[: self.options.max_caption_tokens] if text else None
            if not self._caption:
                if self._epoch() == 0:  # later ones have nothing new to tell
                    skip = Skip(key=self._keys[self._used], reason="empty caption", shard=self.options.name)
                    self.ledger.skip(skip, epoch=0)
                self._used += 1
        raise UserError(
            f"{self.options.name}: {self._limit} pictures one after the other have no caption; give captioned ones, or "
            "set data.image_to_text and data.text_to_image to 0"
        )

    def _epoch(self) -> int:
        """Of the next picture. Loaders of shards, which leave pictures without caption out themselves, do not say."""
        if not isinstance(self.loader, TokenLoader):
            return 0
        num_left = len(self._captions) - self._used
        return self.loader.epoch - (num_left > self.loader.done)  # a batch may reach into another epoch
