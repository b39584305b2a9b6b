"""Parts of a source -> decoded batches, read and decoded in worker processes, whatever a picture does to its worker.

Every worker reads parts of its own; where there are fewer parts than workers, several read the same one and decode
every so many-th batch of it. So the process that encodes reads no file and unpacks no picture. A worker that dies over
a batch (for lack of memory, say) is replaced and the batch done again; if it dies again, the batch's pictures are
decoded one by one, and the one that kills its process is skipped with that reason.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing import connection
from typing import NamedTuple

import torch
import torch.multiprocessing  # tensors travel between processes in shared memory

from qlip.apps.decoding import DecodedBatch, DecodeOptions, Entries, decode_batch
from qlip.core.errors import UserError
from qlip.data.source_parts import Part
from qlip.data.tar_reader import Skip

AHEAD = 2  # batches that a worker is asked for at a time
DIED = "decoder died: the process that decoded this picture was ended, most likely for lack of memory"


class Place(NamedTuple):
    """Where a batch belongs."""

    part: str
    """Name of the part."""
    is_last: bool
    """Whether it is the part's last one."""


def batches_of(parts: list[Part], *, size: int) -> Iterator[tuple[Place, Entries]]:
    """Runs of `size` items or skips; they never reach over parts, and an empty part has one, which is empty."""
    for name, source in parts:
        entries = iter(source.items())
        batch = list(islice(entries, size))
        while True:
            following = list(islice(entries, size))
            yield Place(name, not following), batch
            if not following:
                break
            batch = following


@dataclass(kw_only=True, slots=True, frozen=True)
class _Task:
    """What a worker reads: batches `first`, `first + step`, ... of some parts."""

    parts: list[Part]
    first: int
    step: int
    size: int
    options: DecodeOptions

    def batches(self) -> Iterator[tuple[Place, Entries]]:
        return islice(batches_of(self.parts, size=self.size), self.first, None, self.step)


class _Reader:
    """What a worker is reading."""

    def begin(self, task: _Task) -> None:
        """Read this, whatever it was reading."""
        self.stream, self.options = task.batches(), task.options

    def next(self, *, raw: bool = False) -> tuple[Place, DecodedBatch | Entries] | None:
        """The next batch, decoded unless it is asked for as it is; None behind the last."""
        found = next(self.stream, None)
        if found is None or raw:
            return found
        return found[0], decode_batch(found[1], self.options)


_reader = _Reader()  # of a worker process


def _begin(task: _Task) -> None:
    _reader.begin(task)


def _next(*, raw: bool = False) -> tuple[Place, DecodedBatch | Entries] | None:
    return _reader.next(raw=raw)


class _Worker:
    """A process that reads one task after the other, and what it has been asked for."""

    def __init__(self, *, in_process: bool) -> None:
        self.in_process = in_process
        reader = _Reader()
        self._begin, self._next = (_begin, _next) if in_process else (reader.begin, reader.next)
        self.executor = self._start()
        self.asked: deque[Future] = deque()

    def begin(self, task: _Task) -> None:
        """Read this, whatever it was reading."""
        self.asked.clear()
        try:
            self.executor.submit(self._begin, task)
            for _ in range(AHEAD):
                self.ask()
        except BrokenProcessPool:  # it died after its last answer
            self.replace()
            self.begin(task)

    def ask(self) -> None:
        """For one batch more."""
        try:
            self.asked.append(self.executor.submit(self._next))
        except BrokenProcessPool as broken:
            future: Future = Future()
            future.set_exception(broken)
            self.asked.append(future)

    def replace(self) -> None:
        """A new process, which reads nothing yet."""
        self.close()
        self.executor = self._start()

    def close(self) -> None:
        """End it; what it was doing is dropped."""
        _end(self.executor)

    def _start(self) -> Executor:
        return _process_pool() if self.in_process else ThreadPoolExecutor(1, thread_name_prefix="decode")


@dataclass(slots=True)
class _Group:
    """Workers that read the same parts in turn."""

    workers: list[_Worker]
    parts: list[Part]
    """From the one that is being read on."""
    options: DecodeOptions
    size: int
    num_taken: int = 0
    """Batches of the first part that have been taken."""
    turn: int = 0
    """Whose batch is next."""

    def begin(self) -> None:
        for number, worker in enumerate(self.workers):
            worker.begin(self._task(number))

    @property
    def head(self) -> Future:
        """The next batch."""
        return self.workers[self.turn].asked[0]

    def take(self) -> tuple[Place, DecodedBatch] | None:
        """The next batch, waited for; None behind the last."""
        try:
            found = self._found(self.workers[self.turn])
        except RuntimeError as error:
            if "shared memory" not in str(error):
                raise
            raise UserError(
                "no room in /dev/shm, through which decoders hand over pictures: give it more (docker run --shm-size "
                "2g), take a smaller --batch-size, or --workers 0"
            ) from None
        self.turn = (self.turn + 1) % len(self.workers)
        if found is not None:
            self.num_taken += 1
            if found[0].is_last:
                self.parts, self.num_taken = self.parts[1:], 0
        return found

    def _task(self, behind: int) -> _Task:
        """For the worker whose batch comes `behind` others."""
        first = self.num_taken + behind
        return _Task(parts=self.parts, first=first, step=len(self.workers), size=self.size, options=self.options)

    def _found(self, worker: _Worker) -> tuple[Place, DecodedBatch] | None:
        try:
            found = worker.asked.popleft().result()
        except BrokenProcessPool:
            return self._again(worker)
        worker.ask()
        return found

    def _again(self, worker: _Worker) -> tuple[Place, DecodedBatch] | None:
        """The batch over which a worker has died."""
        worker.replace()
        worker.begin(self._task(0))
        try:
            found = worker.asked.popleft().result()
            worker.ask()
            return found
        except BrokenProcessPool:
            worker.replace()
        worker.executor.submit(_begin, self._task(0))
        found = worker.executor.submit(_next, raw=True).result()
        assert found is not None and isinstance(found[1], list), "there was a batch to die over"
        place, entries = found[0], found[1]
        decoded = _one_by_one(entries, self.options)
        for _ in range(AHEAD):
            worker.ask()
        return place, decoded


class DecodePool:
    """Reads and decodes parts ahead of their use."""

    def __init__(self, options: DecodeOptions, *, workers: int) -> None:
        """`workers` processes; 0 decodes in a thread of this process."""
        self.options = options
        self._workers = [_Worker(in_process=workers > 0) for _ in range(max(1, workers))]

    def decode(self, parts: list[Part], *, size: int) -> Iterator[tuple[Place, DecodedBatch]]:
        """The batches of each part in their order; those of different parts come in between each other."""
        num_groups = min(len(self._workers), len(parts))
        groups = [
            _Group(self._workers[number::num_groups], parts[number::num_groups], self.options, size)
            for number in range(num_groups)
        ]
        for group in groups:
            group.begin()
        while groups:
            done, _ = wait([group.head for group in groups], return_when=FIRST_COMPLETED)
            for group in [group for group in groups if group.head in done]:
                found = group.take()
                if found is None:
                    groups.remove(group)
                else:
                    yield found

    def close(self) -> None:
        """End the workers; what they were doing is dropped."""
        for worker in self._workers:
            worker.close()


def _one_by_one(entries: Entries, options: DecodeOptions) -> DecodedBatch:
    """Each picture in a process that only it can take down."""
    batch = decode_batch([], options)
    pool = _process_pool()
    try:
        for entry in entries:
            try:
                batch = batch.with_(pool.submit(decode_batch, [entry], options).result())
            except BrokenProcessPool:
                batch.skips.append(Skip(key=entry.key, reason=DIED, shard=""))
                _end(pool)
                pool = _process_pool()
    finally:
        _end(pool)
    return batch


def _process_pool() -> ProcessPoolExecutor:
    context = multiprocessing.get_context("forkserver")  # forks of a process with threads or CUDA can hang
    context.set_forkserver_preload(["qlip.apps.decode_pool"])
    pool = ProcessPoolExecutor(1, mp_context=context, initializer=_begin_worker)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C is the parent's to answer
    try:
        pool.submit(os.getpid)  # starts the process, which never sees the signal
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pool


def _end(executor: Executor) -> None:
    """At once, even when a second Ctrl-C comes: whoever waits for a worker's last batch would hang on that."""
    for process in list((getattr(executor, "_processes", None) or {}).values()):
        process.kill()
    executor.shutdown(wait=True, cancel_futures=True)


def _begin_worker() -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker would wait for ever to be asked by a parent that was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
