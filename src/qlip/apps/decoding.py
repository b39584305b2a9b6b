"""Encoded pictures -> batches of pixels, in worker processes, in order, and whatever a picture does to its worker.

Batches are decoded in pieces by all workers. A process that dies over a piece (for lack of memory, say) is replaced and
the piece done again; if it dies again, the piece's pictures are decoded one by one, and the one that kills its process
is skipped with that reason.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Generic, TypeVar

import torch
import torch.multiprocessing  # tensors travel between processes in shared memory
from torch import Tensor

from qlip.core.images import ImageLimits, ImageRejected, open_image
from qlip.data.caption_fields import captions_of_item
from qlip.data.items import Item
from qlip.data.tar_reader import Skip
from qlip.data.views import VIEWS, ViewChoice, view_pixels

AHEAD = 2  # pieces per worker that wait or are being decoded, beside those of a batch
PIECE = 32  # pictures that a worker decodes at a time: no batch waits long for one worker
DIED = "decoder died: the process that decoded this picture was ended, most likely for lack of memory"
Tag = TypeVar("Tag")


@dataclass(kw_only=True, slots=True, frozen=True)
class DecodeOptions:
    """How pictures become pixels."""

    image_size: int
    """S."""
    views: ViewChoice
    """What is cut from each; v rows a picture."""
    caption_fields: tuple[str, ...]
    """Of the picture's json; see `captions_of_item`."""


@dataclass(kw_only=True, slots=True)
class DecodedBatch:
    """The usable pictures of a batch, and the others."""

    pixels: Tensor
    """(b v, 3, S, S) uint8, the views of a picture behind each other."""
    keys: list[str] = field(default_factory=list)
    """b names."""
    captions: list[tuple[str, ...]] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """Width and height before the transform."""
    labels: list[int | None] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)


def decode_batch(entries: list[Item | Skip], options: DecodeOptions) -> DecodedBatch:
    """Open, cut and describe the pictures of a batch, in their order."""
    size = options.image_size
    batch = DecodedBatch(pixels=torch.empty(0, 3, size, size, dtype=torch.uint8))
    pixels = []
    for entry in entries:
        if isinstance(entry, Skip):
            batch.skips.append(entry)
            continue
        try:
            image = open_image(entry.image, limits=ImageLimits())
        except ImageRejected as rejected:
            batch.skips.append(Skip(key=entry.key, reason=str(rejected), shard=""))
            continue
        pixels.append(view_pixels(image, size=size, views=options.views))
        batch.keys.append(entry.key.encode("utf-8", "backslashreplace").decode())
        batch.captions.append(captions_of_item(entry, fields=options.caption_fields))
        batch.sizes.append(image.size)
        batch.labels.append(entry.label)
    if pixels:
        batch.pixels = torch.cat(pixels)
    return batch


def _joined(pieces: list[DecodedBatch]) -> DecodedBatch:
    if len(pieces) == 1:
        return pieces[0]
    return DecodedBatch(
        pixels=torch.cat([piece.pixels for piece in pieces]),
        keys=[key for piece in pieces for key in piece.keys],
        captions=[texts for piece in pieces for texts in piece.captions],
        sizes=[size for piece in pieces for size in piece.sizes],
        labels=[label for piece in pieces for label in piece.labels],
        skips=[skip for piece in pieces for skip in piece.skips],
    )


@dataclass(slots=True)
class _Piece(Generic[Tag]):
    """A piece of a batch at work."""

    tag: Tag
    """What the caller knows the batch by."""
    is_last: bool
    entries: list[Item | Skip]
    future: Future[DecodedBatch]


class DecodePool:
    """Decodes batches ahead of their use."""

    def __init__(self, options: DecodeOptions, *, workers: int) -> None:
        """`workers` processes; 0 decodes in threads of this process, where Pillow alone runs side by side."""
        self.options, self.workers = options, workers
        self._num_pieces = 1  # of the largest batch so far
        self._executor = self._start()

    def decode(self, batches: Iterable[tuple[Tag, list[Item | Skip]]]) -> Iterator[tuple[Tag, DecodedBatch]]:
        """Batches with what the caller knows them by, in their order."""
        pending: deque[_Piece[Tag]] = deque()
        done: list[DecodedBatch] = []
        for piece in self._pieces(batches):
            pending.append(piece)
            while len(pending) > AHEAD * max(1, self.workers) + self._num_pieces:
                yield from self._first(pending, done)
        while pending:
            yield from self._first(pending, done)

    def close(self) -> None:
        """End the workers; what they were doing is dropped."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _start(self) -> Executor:
        if self.workers == 0:
            return ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="decode")
        return _process_pool(self.workers)

    def _submit(self, entries: list[Item | Skip]) -> Future[DecodedBatch]:
        try:
            return self._executor.submit(decode_batch, entries, self.options)
        except BrokenProcessPool as broken:  # a worker died since the last result; the first that waits mends it
            future: Future[DecodedBatch] = Future()
            future.set_exception(broken)
            return future

    def _pieces(self, batches: Iterable[tuple[Tag, list[Item | Skip]]]) -> Iterator[_Piece[Tag]]:
        """Batches cut into pieces of equal size, at work."""
        for tag, entries in batches:
            num = max(1, -(-len(entries) // PIECE))
            self._num_pieces = max(self._num_pieces, num)
            for number in range(num):
                part = entries[len(entries) * number // num : len(entries) * (number + 1) // num]
                yield _Piece(tag, number == num - 1, part, self._submit(part))

    def _first(self, pending: deque[_Piece[Tag]], done: list[DecodedBatch]) -> Iterator[tuple[Tag, DecodedBatch]]:
        """Wait for the first piece; if it ends its batch, that is yielded."""
        piece = pending.popleft()
        try:
            done.append(piece.future.result())
        except BrokenProcessPool:
            done.append(self._again(piece, pending))
        if piece.is_last:
            yield piece.tag, _joined(done)
            done.clear()

    def _again(self, piece: _Piece[Tag], pending: deque[_Piece[Tag]]) -> DecodedBatch:
        """A piece whose worker has died, and with it the whole pool."""
        self._restart()
        try:
            decoded = self._submit(piece.entries).result()
        except BrokenProcessPool:
            decoded = self._one_by_one(piece.entries)
            self._restart()
        for other in pending:
            if not (other.future.done() and other.future.exception() is None):
                other.future = self._submit(other.entries)
        return decoded

    def _restart(self) -> None:
        self.close()
        self._executor = self._start()

    def _one_by_one(self, entries: list[Item | Skip]) -> DecodedBatch:
        """Each picture in a process that only it can take down."""
        kept: list[Item | Skip] = []
        pool = _process_pool(1)
        for entry in entries:
            try:
                pool.submit(decode_batch, [entry], self.options).result()
                kept.append(entry)
            except BrokenProcessPool:
                kept.append(Skip(key=entry.key, reason=DIED, shard=""))
                pool.shutdown()
                pool = _process_pool(1)
        try:
            return pool.submit(decode_batch, kept, self.options).result()
        finally:
            pool.shutdown()


def num_views(options: DecodeOptions) -> int:
    """v."""
    return len(VIEWS[options.views])


def _process_pool(workers: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("forkserver")  # forks of a process with threads or CUDA can hang
    context.set_forkserver_preload(["qlip.apps.decoding"])
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker)


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker would wait for ever for batches of a parent that was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
