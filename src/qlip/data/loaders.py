"""Samples to batches in worker processes, with a position that can be saved and resumed. The only file that knows
torchdata.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar, cast

import torch
from torch.utils.data import IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader as StatefulDataLoader

from qlip.core.errors import UserError, last_line
from qlip.core.log import console

Batch = TypeVar("Batch")
Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]
"""Samples -> a batch."""


class ResumableSamples(Protocol):
    """What a `TrainingLoader` asks of its iterable dataset, of which every worker has a copy."""

    def __iter__(self) -> Iterator[dict[str, Any]]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def check_states(self, states: list[dict[str, Any]]) -> None: ...
    def start_after(self, states: list[dict[str, Any]]) -> int: ...


class TrainingLoader:
    """Endless micro-batches of one rank.

    Every (rank, worker) is a reader with its own position and never waits for another, so uneven shards cannot hang a
    run. Batches are taken from the workers in turn, each of one worker's samples.
    """

    def __init__(
        self,
        dataset: ResumableSamples,
        *,
        collate: Collate,
        batch_size: int,
        num_workers: int,
        rank: int,
        num_ranks: int,
        pin_memory: bool,
    ) -> None:
        """`dataset` is an IterableDataset too. `pin_memory` puts batches in page-locked memory where CUDA is."""
        self.dataset = dataset
        self.num_workers = num_workers
        self.rank, self.num_ranks = rank, num_ranks
        self._loader = stateful_loader(
            cast(IterableDataset, dataset),
            collate=collate,
            batch_size=batch_size,
            num_workers=num_workers,
            drop_last=True,
            pin_memory=pin_memory and torch.cuda.is_available(),
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """From the resumed position, else from the beginning.

        What a worker raises comes out as it does without workers: `UserError` is one line again, and a worker that the
        system killed becomes one. All random numbers that the start draws from PyTorch's state are drawn now.
        """
        return errors_as_without_workers(iter(self._loader))

    def state_dict(self) -> dict[str, Any]:
        """This rank's position behind the last batch that was handed out, and the split it belongs to; JSON values."""
        return {
            "rank": self.rank,
            "num_ranks": self.num_ranks,
            "num_workers": self.num_workers,
            "loader": self._loader.state_dict(),
        }

    def resume(self, states: list[dict[str, Any]]) -> None:
        """Go on from the saved states of all ranks, in their order.

        With as many ranks and workers as saved them the batches are bit for bit those of an uninterrupted run.
        Otherwise every reader begins the epoch after the largest that any reader was in (in a mixture: source by
        source), counts of skipped samples start at zero, and rank 0 says so; that epoch is whole, and the rest of the
        old one is left out. Raises `UserError` when shards, seed or options have changed.
        """
        assert [state["rank"] for state in states] == list(range(states[0]["num_ranks"])), (
            "states of all ranks, in order"
        )
        readers = [reader for state in states for reader in _reader_states(state)]
        self.dataset.check_states(readers)
        saved = (states[0]["num_ranks"], states[0]["num_workers"])
        if saved == (self.num_ranks, self.num_workers):
            self._loader.load_state_dict(states[self.rank]["loader"])
            return
        epoch = self.dataset.start_after(readers)
        if self.rank == 0:
            console.print(
                f"data: the position was saved by {saved[0]} ranks x {saved[1]} workers, here are {self.num_ranks} x "
                f"{self.num_workers}; every reader begins epoch {epoch} and leaves out the rest of the one before"
            )


def errors_as_without_workers(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches; `UserError` of a worker is one line again, and a worker that the system killed becomes one."""
    try:
        yield from batches
    except UserError as error:
        raise UserError(last_line(error)) from None
    except RuntimeError as error:
        killed = killed_worker(error)
        if killed is None:
            raise
        raise killed from None


def stateful_loader(
    dataset: IterableDataset,
    *,
    collate: Collate,
    batch_size: int,
    num_workers: int,
    drop_last: bool,
    pin_memory: bool = False,
) -> StatefulDataLoader:
    """torchdata's loader without its deprecation warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*set_vital")  # torchdata calls what torch 2.15 deprecates
        return StatefulDataLoader(
            dataset,
            batch_size=batch_size,
            num_workers=num_workers,
            collate_fn=collate,
            drop_last=drop_last,
            pin_memory=pin_memory,
        )


def killed_worker(error: RuntimeError) -> UserError | None:
    """The one line for torch's error about a worker that did not end by itself; None for any other error.

    torch raises it wherever the main thread happens to be, so outside of the loader too.
    """
    found = re.search(
        r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (is killed by|exited unexpectedly)(.*)", str(error)
    )
    if found is None:
        return None
    if "bus error" in found[3].lower():
        return UserError(f"data worker {found[1]} ran out of shared memory; enlarge /dev/shm or lower data.num_workers")
    return UserError(
        f"data worker {found[1]} was killed from outside, most often because memory ran out; lower data.num_workers or "
        "data.shuffle_buffer, or give the job more memory"
    )


def _reader_states(state: dict[str, Any]) -> list[dict[str, Any]]:
    """The dataset's own states inside torchdata's: one per worker, or the one of the training process."""
    try:
        loader, num_workers = state["loader"], state["num_workers"]
        if num_workers == 0:
            return [loader["dataset_state"]]
        workers = loader["_snapshot"]["_worker_snapshots"]
        return [workers[f"worker_{number}"]["dataset_state"] for number in range(num_workers)]
    except KeyError as error:
        raise UserError(f"the saved data position has no {error}: another version wrote it; start a new run") from None
