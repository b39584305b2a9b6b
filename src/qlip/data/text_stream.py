"""Documents of many files as an endless stream of one rank, in an order that is a function of (seed, epoch, rank).

    files, permuted -> every rank its own files, or its own documents of all -> windows of documents, mixed -> text

Only one window lies in memory. A position is a handful of numbers: resuming reads one window again and goes on behind
the last document that was handed out. How files are read is in `text_files.py`.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from qlip.core.errors import UserError
from qlip.core.log import console
from qlip.data.ledger import Ledger
from qlip.data.shards import refuse_changes, seeded_random
from qlip.data.tar_reader import Skip
from qlip.data.text_files import Wanted, check_column, read_documents, text_files

WINDOW_CHARS = 256_000_000  # a window ends early here: giant documents must not fill the memory


@dataclass(kw_only=True, slots=True)
class TextPosition:
    """Where a stream is: everything before it has been handed out."""

    epoch: int = 0
    window: int = 0
    """Windows of the epoch before this one."""
    file: int = 0
    """Index among this rank's files of the epoch, where the window starts."""
    document: int = 0
    """Number in that file that the window starts from."""
    inside: int = 0
    """Documents of the window that are done."""
    num_given: int = 0
    """Documents of the epoch that are done."""


class TextStream:
    """Every document once per epoch over all ranks, without end.

    With hardly more files than ranks, epochs of ranks differ in length: each has its own files, and begins its next
    epoch without waiting for the others.
    """

    def __init__(
        self,
        spec: str,
        *,
        text_field: str,
        shuffle_window: int,
        ledger: Ledger,
        seed: int,
        rank: int,
        num_ranks: int,
    ) -> None:
        """`text_field`: json field (dotted inside objects), parquet column, or `txt` for that member of shards.

        Ranks share files out if there are as many, otherwise the documents of every file. Raises as `text_files`, and
        `UserError` for a parquet file without the column.
        """
        if shuffle_window < 1:
            raise UserError(f"shuffle_window {shuffle_window}: give at least 1")
        self.files, self.text_field, self.shuffle_window = text_files(spec), text_field, shuffle_window
        self.seed, self.rank, self.num_ranks, self.ledger = seed, rank, num_ranks, ledger
        self._by_file = len(self.files) >= num_ranks
        for file in self.files:
            if file.name.endswith(".parquet"):
                check_column(file, text_field)
        # by name alone, so that a folder may move, and a damaged file be mended
        names = "/".join(file.name for file in self.files)
        self._order = {
            "text": f"{len(self.files)} files, sha256 {hashlib.sha256(names.encode()).hexdigest()[:12]}",
            "text_field": text_field,
            "shuffle_window": shuffle_window,
            "seed": seed,
        }
        self.position = TextPosition()
        self._first_epoch = 0
        self._resumed = False

    def __iter__(self) -> Iterator[str]:
        """From the resumed position, else from the beginning.

        Raises `UserError` when too many documents are unusable, and for epochs without any: for the first where every
        rank has documents of every file, and for as many in a row as there are files, at least two, where ranks have
        files of their own.
        """
        if not self._resumed:
            self.position = TextPosition(epoch=self._first_epoch)
            self.ledger.load_state_dict({"num_good": 0, "skipped": {}})
        self._resumed = False
        return self._documents()

    def state_dict(self) -> dict[str, Any]:
        """The position behind the last document, the counts, and the order they belong to; JSON values."""
        return {"position": asdict(self.position), "counts": self.ledger.state_dict(), "order": self._order}

    def resume(self, states: list[dict[str, Any]]) -> None:
        """Go on from the states of all ranks: exactly with as many, else from the epoch after the last that any was in.

        Of a file that was mended since, documents of one window may come again or be left out in this epoch. Raises
        `UserError` when file names, field, seed or window have changed.
        """
        for state in states:
            refuse_changes(state["order"], self._order)
        if len(states) == self.num_ranks:
            self.position = TextPosition(**states[self.rank]["position"])
            self.ledger.load_state_dict(states[self.rank]["counts"])
            self._resumed = True
            return
        self._first_epoch = 1 + max(state["position"]["epoch"] for state in states)
        if self.rank == 0:
            console.print(
                f"data: the position in the texts was saved by {len(states)} ranks, here are {self.num_ranks}; every "
                f"rank begins epoch {self._first_epoch} and leaves out the rest of the one before"
            )

    def _documents(self) -> Iterator[str]:
        empty_epochs = 0
        while True:
            entries = self._entries()
            while window := self._window(entries):
                here = self.position
                if not here.inside:  # otherwise they were counted before the position was saved
                    self._count(window)
                texts = [found for _, _, found in window if isinstance(found, str)]
                seeded_random("texts", self.seed, here.epoch, self.rank, here.window).shuffle(texts)
                for text in itertools.islice(texts, here.inside, None):
                    here.inside += 1
                    here.num_given += 1
                    yield text
                file, number, _ = window[-1]
                self.position = TextPosition(
                    epoch=here.epoch,
                    window=here.window + 1,
                    file=file,
                    document=number + 1,
                    num_given=here.num_given,
                )
            empty_epochs = 0 if self.position.num_given else empty_epochs + 1
            # a rank's files may all be empty; the next epoch gives it others
            if not empty_epochs or not self._by_file or empty_epochs >= max(2, len(self.files)):
                self.ledger.check()  # an epoch may be shorter than what it waits for
                self._refuse_nothing(empty_epochs)
            self.position = TextPosition(epoch=self.position.epoch + 1)

    def _refuse_nothing(self, empty_epochs: int) -> None:
        if empty_epochs:
            share = f" for rank {self.rank} of {self.num_ranks}" if self.num_ranks > 1 else ""
            raise UserError(
                f"no usable document in {len(self.files)} files from {self.files[0]} on{share}; give files whose "
                f"{self.text_field!r} holds text"
            )

    def _window(self, entries: Iterator[tuple[int, int, str | Skip]]) -> list[tuple[int, int, str | Skip]]:
        window, num_chars = [], 0
        for entry in itertools.islice(entries, self.shuffle_window):
            window.append(entry)
            num_chars += len(entry[2]) if isinstance(entry[2], str) else 0
            if num_chars > WINDOW_CHARS:
                break
        return window

    def _entries(self) -> Iterator[tuple[int, int, str | Skip]]:
        """File, number in it and text of what this rank reads from the window's start to the end of the epoch."""
        epoch, first = self.position.epoch, self.position.document
        files = list(self.files)
        seeded_random("texts", self.seed, epoch).shuffle(files)
        files = files[self.rank :: self.num_ranks] if self._by_file else files
        for place in range(self.position.file, len(files)):
            split = {"rank": 0, "num_ranks": 1} if self._by_file else {"rank": self.rank, "num_ranks": self.num_ranks}
            wanted = _numbers(first, **split)
            for number, found in read_documents(files[place], text_field=self.text_field, first=first, wanted=wanted):
                yield place, number, found
            first = 0

    def _count(self, window: list[tuple[int, int, str | Skip]]) -> None:
        for _, _, found in window:
            if isinstance(found, Skip):
                self.ledger.skip(found, epoch=self.position.epoch)
            else:
                self.ledger.good()


def _numbers(first: int, *, rank: int, num_ranks: int) -> Wanted:
    return lambda number: number >= first and number % num_ranks == rank
