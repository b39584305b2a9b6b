"""Rows of several documents each, for one autoregressive model of text and pictures (UM3, QLIP section 9).

A document is a piece of text, a caption with its picture, or a picture with its caption:

    text            BOS document EOS
    image_to_text   BOS BEGIN v_1 .. v_m END caption EOS
    text_to_image   BOS caption BEGIN v_1 .. v_m END EOS

Position ids begin anew in each, so attention can be kept inside it; every id is learned but the first of a document,
which nothing predicts. Pairs are never cut: one that does not fit in the rest of a row comes first in the next, and the
rest is filled with text. Texts are cut at the end of a row and go on in a later one as a document without another BOS:
nothing of them is lost but the context before the cut, and the first id behind it is not learned.

Shapes: `b` rows, `S` ids of a row, `m` visual ids of a picture, `n` tokens of a picture, `L` bits of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from qlip.data.chat_labels import IGNORED

TASKS = ("text", "image_to_text", "text_to_image")
"""Kinds of documents; a task id is the place in here."""
TEXT, IMAGE_TO_TEXT, TEXT_TO_IMAGE = range(3)
UNFILLED = -1
"""Stands in ids and labels for a visual id of a picture that is encoded later."""
PADDING_TASK = -1
MAX_LEAD = 1.0
"""Samples of text beyond its share that later ones make up for."""


@dataclass(kw_only=True, slots=True, frozen=True)
class SequenceLayout:
    """How texts and pictures become ids."""

    tokenize: Callable[[str], list[int]]
    """Ids of a text, without special tokens; markers in it are plain characters."""
    begin: int
    """BOS."""
    end: int
    """EOS."""
    image_begin: int
    """BEGIN."""
    image_end: int
    """END."""
    image_length: int
    """m."""
    visual_ids: Callable[[Tensor], Tensor]
    """(b, n, L) bool -> (b, m) int64."""

    @property
    def min_sequence_length(self) -> int:
        """S that holds a picture and a few words."""
        return self.image_length + 4 + 8


def text_document(layout: SequenceLayout, text: str) -> np.ndarray:
    """BOS text EOS, int64."""
    return np.array([layout.begin, *layout.tokenize(text), layout.end], dtype=np.int64)


def image_to_text(layout: SequenceLayout, caption: list[int], visual: np.ndarray) -> np.ndarray:
    """BOS BEGIN picture END caption EOS, int64; `visual` (m,)."""
    head, tail = [layout.begin, layout.image_begin], [layout.image_end, *caption, layout.end]
    return np.concatenate([head, visual, tail]).astype(np.int64)


def text_to_image(layout: SequenceLayout, caption: list[int], visual: np.ndarray) -> np.ndarray:
    """BOS caption BEGIN picture END EOS, int64; `visual` (m,)."""
    head, tail = [layout.begin, *caption, layout.image_begin], [layout.image_end, layout.end]
    return np.concatenate([head, visual, tail]).astype(np.int64)


@dataclass(kw_only=True, slots=True)
class Pair:
    """One picture with its caption."""

    ids: np.ndarray
    """Of the whole document, int64."""
    pixel_values: Tensor | None
    """(3, h, w) where the visual ids are UNFILLED."""


class Texts(Protocol):
    """Where the packer has text from."""

    def take(self, limit: int) -> np.ndarray:
        """The next 1 to `limit` ids, all of one document."""


class Pairs(Protocol):
    """Where the packer has pairs from."""

    def peek(self, task: int) -> Pair:
        """The next pair as a document of this kind; the same until `take`."""

    def take(self) -> None:
        """The pair that was looked at is used."""


class Packer:
    """Fills rows with documents, each kind as often as its share says.

    Samples are counted: a pair is one, S ids of text are one. What is placed costs its kind's credit the samples it is,
    while all credits grow by their shares of them. So a credit is how many samples a kind lags behind its share; it
    stays within 3/4 of a sample of zero, but for texts that fill the rest of a row. Where those alone are more than
    text's share, text exceeds it for as long: what it leads by beyond MAX_LEAD is forgotten, lest it stay away as long
    when its share grows. Pairs keep their shares of all pairs.
    """

    def __init__(
        self,
        *,
        sequence_length: int,
        texts: Texts | None,
        pairs: dict[int, Pairs],
        pack_pairs: bool,
        padding: int,
        rank: int,
        num_ranks: int,
    ) -> None:
        """`pairs` by task id; `padding` is the id behind the last document; without `pack_pairs` a pair has a row."""
        self.sequence_length, self.texts, self.pairs, self.pack_pairs = sequence_length, texts, pairs, pack_pairs
        self.padding = padding
        self.credits = _first_credits(rank, num_ranks)
        self.pending: int | None = None
        """The kind of a pair that did not fit."""

    def batch(self, num_rows: int, shares: tuple[float, ...]) -> dict[str, Any]:
        """`input_ids`, `labels`, `position_ids`, `task_ids` (b, S) int64, `sample_counts` (3,) float32; pictures of
        pairs in their order as list `pixel_values`.

        `shares` of the kinds sum to one; a kind without share is not placed, but for text that fills rests.
        """
        rows = _Rows(num_rows, self.sequence_length, padding=self.padding)
        for row in range(num_rows):
            rows.open(row)
            if self.pack_pairs:
                self._fill(rows, shares)
            else:
                self._fill_with_one_kind(rows, shares)
        return {
            "input_ids": torch.from_numpy(rows.input_ids),
            "labels": torch.from_numpy(rows.labels),
            "position_ids": torch.from_numpy(rows.position_ids),
            "task_ids": torch.from_numpy(rows.task_ids),
            "sample_counts": torch.tensor(rows.counts, dtype=torch.float32),
            "pixel_values": rows.pictures,
        }

    def state_dict(self) -> dict[str, Any]:
        """Credits and the waiting kind, as JSON values; a batch never ends within a row."""
        return {"credits": list(self.credits), "pending": self.pending}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from saved credits."""
        self.credits, self.pending = list(state["credits"]), state["pending"]

    def _fill(self, rows: _Rows, shares: tuple[float, ...]) -> None:
        while rows.free:
            if self.pending is not None and rows.free == self.sequence_length:
                kind, self.pending = self.pending, None
            elif self.pending is None:
                kind = self._next_kind(shares)
                if kind != TEXT and len(self.pairs[kind].peek(kind).ids) > rows.free:
                    self.pending = kind
            if self.pending is None:
                self._place(rows, kind, shares)
            elif self.texts is not None:
                self._place(rows, TEXT, shares)
            else:
                return

    def _fill_with_one_kind(self, rows: _Rows, shares: tuple[float, ...]) -> None:
        kind = self._next_kind(shares)
        self._place(rows, kind, shares)
        while kind == TEXT and rows.free:
            self._place(rows, kind, shares)

    def _next_kind(self, shares: tuple[float, ...]) -> int:
        """Of the kinds that are due, the one whose deadline is next: Tijdeman's rule (The chairman assignment problem,
        Discrete Mathematics 32, 1980), under which n kinds lag or lead by at most 1 - 1 / (2 n - 2)."""
        kinds = [kind for kind, share in enumerate(shares) if share > 0]
        slack = 1 / max(2 * len(kinds) - 2, 1)
        due = [kind for kind in kinds if self.credits[kind] + shares[kind] >= slack] or kinds
        return min(due, key=lambda kind: (1 - slack - self.credits[kind]) / shares[kind])

    def _place(self, rows: _Rows, kind: int, shares: tuple[float, ...]) -> None:
        if kind == TEXT:
            assert self.texts is not None, "text has a share"
            piece = self.texts.take(rows.free)
            rows.place(piece, kind)
            placed = len(piece) / self.sequence_length
        else:
            pair = self.pairs[kind].peek(kind)
            self.pairs[kind].take()
            rows.place(pair.ids, kind)
            if pair.pixel_values is not None:
                rows.pictures.append(pair.pixel_values)
            placed = 1.0
        rows.counts[kind] += placed
        self.credits = [credit + share * placed for credit, share in zip(self.credits, shares, strict=True)]
        self.credits[kind] -= placed
        excess = -MAX_LEAD - self.credits[TEXT]
        if excess > 0 and shares[TEXT] < 1:  # as if this much of the text had not been placed
            rest = 1 - shares[TEXT]
            self.credits = [credit - excess * share / rest for credit, share in zip(self.credits, shares, strict=True)]
            self.credits[TEXT] = -MAX_LEAD


class _Rows:
    """A batch that is being filled, row by row; padding, a document of its own, is what nothing was placed on."""

    def __init__(self, num_rows: int, length: int, *, padding: int) -> None:
        self.input_ids = np.full((num_rows, length), padding, dtype=np.int64)
        self.labels = np.full((num_rows, length), IGNORED, dtype=np.int64)
        self.position_ids = np.zeros((num_rows, length), dtype=np.int64)
        self.task_ids = np.full((num_rows, length), PADDING_TASK, dtype=np.int64)
        self.counts = [0.0] * len(TASKS)
        self.pictures: list[Tensor] = []
        self._positions = np.arange(length)
        self.row, self.free = 0, 0

    def open(self, row: int) -> None:
        """What is placed from now on comes into this row."""
        self.row, self.free = row, self.input_ids.shape[1]
        self.position_ids[row] = self._positions

    def place(self, ids: np.ndarray, task: int) -> None:
        """One document behind the others of the row, whose rest counts its positions anew."""
        start = self.input_ids.shape[1] - self.free
        end = start + len(ids)
        self.input_ids[self.row, start:end] = ids
        self.labels[self.row, start + 1 : end] = ids[1:]
        self.task_ids[self.row, start:end] = task
        self.position_ids[self.row, end:] = self._positions[: self.free - len(ids)]
        self.free -= len(ids)


def _first_credits(rank: int, num_ranks: int) -> list[float]:
    """Credits that sum to zero over kinds and over ranks, so that ranks draw their pairs at different steps."""
    places = (rank, (rank + num_ranks // 2) % num_ranks)
    pairs = [(place + 0.5) / num_ranks - 0.5 for place in places]
    return [-sum(pairs), *pairs]
