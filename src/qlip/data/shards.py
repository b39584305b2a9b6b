"""Tar shards to samples: split over ranks and workers, shuffled by (seed, epoch), resumed exactly, skips recorded.

    expand_shards -> permute by (seed, epoch) -> every (rank, worker) its own -> blocks of raw samples, permuted
                  -> decode -> dict

Only bytes are shuffled; pictures are decoded afterwards. So a position is a handful of numbers: resuming reads one
block again and goes on behind the last sample that was handed out.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from qlip.core.errors import UserError
from qlip.core.images import ImageRejected
from qlip.data.ledger import Ledger
from qlip.data.sample_parts import ShardConfig, caption_of, image_of
from qlip.data.shard_list import expand_shards
from qlip.data.tar_reader import RawSample, SampleRejected, Skip, iterate_tar

BLOCK_BYTES = 1_000_000_000  # a block ends early here: giant files must not fill the memory
Decode = Callable[[Image.Image, str, RawSample, Random], dict[str, Any]]
"""RGB picture, caption, the whole sample, and the Random of (seed, epoch, key) -> what the dataset yields."""


@dataclass(kw_only=True, slots=True)
class Position:
    """Where a reader is: everything before it has been handed out."""

    epoch: int = 0
    shard: int = 0
    """Index among this reader's shards of the epoch, where the current block starts."""
    event: int = 0
    """Samples and skips of that shard before the block."""
    block: int = 0
    """Blocks of the epoch before this one."""
    inside: int = 0
    """Samples of the block that are done."""
    num_yielded: int = 0
    """Samples handed out in this epoch."""


def seeded_random(*parts: object) -> Random:
    """A Random seeded by the sha256 of the parts: equal in every process and on every machine."""
    return Random(hashlib.sha256("/".join(map(str, parts)).encode()).digest())


def check_shard_split(num_shards: int, *, num_ranks: int, num_workers: int) -> None:
    """Raise `UserError` when some (rank, worker) would get no shard: it would wait for ever, or train on nothing."""
    num_readers = num_ranks * max(1, num_workers)
    if num_shards < num_readers:
        raise UserError(
            f"{num_shards} shards for {num_ranks} ranks x {max(1, num_workers)} workers: give at least {num_readers} "
            f"shards, or at most {num_shards // num_ranks} workers"
        )


class ShardDataset(IterableDataset):
    """Samples of captioned image shards, for torchdata's StatefulDataLoader with any number of workers.

    The order is a pure function of (seed, epoch, rank, worker). Training (`repeat`) never ends; every reader counts its
    own epochs, so uneven shards hold nobody up. Evaluation is one pass in shard order, whatever `shuffle_buffer` says.
    """

    def __init__(
        self,
        config: ShardConfig,
        *,
        decode: Decode,
        repeat: bool,
        rank: int,
        num_ranks: int,
        ledger: Path | None,
    ) -> None:
        """`decode` may raise `SampleRejected` to skip a sample; `ledger` None counts the skips without a file.

        Raises `UserError` for shards that are not there or fewer than ranks, and for impossible caption weights.
        """
        super().__init__()
        weights = config.caption_weights.values()
        if config.caption_weights and (min(weights) < 0 or sum(weights) <= 0):
            raise UserError(
                f"caption_weights {config.caption_weights}: give probabilities, none negative, not all zero"
            )
        self.config = config
        self.paths = expand_shards(config.shards)
        if repeat:
            check_shard_split(len(self.paths), num_ranks=num_ranks, num_workers=1)
        self.decode = decode
        self.repeat = repeat
        self.rank, self.num_ranks = rank, num_ranks
        self.ledger = Ledger(ledger, max_skip_share=config.max_skip_share)
        self.position = Position()
        self._loaded = False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """From the loaded state, else from the beginning."""
        if not self._loaded:
            self.position = Position()
            self.ledger.load_state_dict({"num_good": 0, "skipped": {}})
        self._loaded = False
        return self._samples()

    def state_dict(self) -> dict[str, Any]:
        """The position behind the last sample, the counts, and the order they belong to; JSON values only."""
        return {"position": asdict(self.position), "counts": self.ledger.state_dict(), "order": self._order()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next iteration goes on from there. Raises `UserError` when the order has changed since."""
        order = self._order()
        changed = [
            f"{name} {state['order'].get(name)} -> {value}"
            for name, value in order.items()
            if state["order"].get(name) != value
        ]
        if changed:
            raise UserError(
                f"the data position cannot be resumed: {', '.join(changed)}; put it back or start a new run"
            )
        self.position = Position(**state["position"])
        self.ledger.load_state_dict(state["counts"])
        self._loaded = True

    def _order(self) -> dict[str, Any]:
        """Everything the order depends on; files by name, so that a folder may move."""
        worker, num_workers = _worker()
        names = "/".join(path.name for path in self.paths)
        return {
            "num_workers": num_workers,
            "worker": worker,
            "num_ranks": self.num_ranks,
            "rank": self.rank,
            "seed": self.config.seed,
            "shuffle_buffer": self.config.shuffle_buffer,
            "shards": f"{len(self.paths)} files, sha256 {hashlib.sha256(names.encode()).hexdigest()[:12]}",
        }

    @property
    def _block_size(self) -> int:
        return self.config.shuffle_buffer if self.repeat else 0

    def _samples(self) -> Iterator[dict[str, Any]]:
        if self.repeat:
            check_shard_split(len(self.paths), num_ranks=self.num_ranks, num_workers=_worker()[1])
        while True:
            shards = self._shards_of_epoch()
            yield from self._epoch(shards)
            self.ledger.check()
            if shards and not self.position.num_yielded:
                raise UserError(
                    f"no usable sample in {len(shards)} shards from {shards[0]} on; see `qlip data inspect`"
                )
            if not self.repeat:
                return
            self.position = Position(epoch=self.position.epoch + 1)

    def _shards_of_epoch(self) -> list[Path]:
        """This reader's shards in this epoch's order."""
        worker, num_workers = _worker()
        shards = list(self.paths)
        if self._block_size:
            seeded_random("shards", self.config.seed, self.position.epoch).shuffle(shards)
        # Neighbouring shards go to different ranks first, so that ranks differ by one shard at most.
        return shards[worker * self.num_ranks + self.rank :: self.num_ranks * num_workers]

    def _epoch(self, shards: list[Path]) -> Iterator[dict[str, Any]]:
        """The rest of the epoch, from `self.position` on, which is kept up to date before every yield."""
        here = self.position
        events = self._events(shards, first_shard=here.shard, first_event=here.event)
        while True:
            block, shard, event = self._fill_block(events, resuming=here.inside > 0)
            if not block:
                here.shard, here.event = shard, event
                return
            for _ in range(here.inside):
                block.popleft()
            while block:
                raw = block.popleft()
                sample = self._finish(raw)
                here.inside += 1
                if sample is not None:
                    here.num_yielded += 1
                    yield sample
            here.shard, here.event, here.block, here.inside = shard, event, here.block + 1, 0

    def _fill_block(
        self, events: Iterator[tuple[int, int, RawSample | Skip]], *, resuming: bool
    ) -> tuple[deque[RawSample], int, int]:
        """The next block in its order, and the shard and event where the one after it starts.

        Skips met while resuming were counted and written before the state was saved.
        """
        here, block, num_bytes = self.position, list[RawSample](), 0
        shard, event = here.shard, here.event
        for shard_of_found, event_of_found, found in events:
            shard, event = shard_of_found, event_of_found + 1
            if isinstance(found, RawSample):
                block.append(found)
                num_bytes += sum(map(len, found.fields.values()))
            elif not resuming:
                self.ledger.skip(found, epoch=here.epoch)
            if len(block) >= max(1, self._block_size) or num_bytes >= BLOCK_BYTES:
                break
        if self._block_size:
            seeded_random("block", self.config.seed, here.epoch, self.rank, _worker()[0], here.block).shuffle(block)
        return deque(block), shard, event

    def _events(
        self, shards: list[Path], *, first_shard: int, first_event: int
    ) -> Iterator[tuple[int, int, RawSample | Skip]]:
        for shard in range(first_shard, len(shards)):
            found = iterate_tar(shards[shard], max_sample_bytes=self.config.limits.max_bytes)
            for event, sample in enumerate(found):
                if shard > first_shard or event >= first_event:
                    yield shard, event, sample

    def _finish(self, raw: RawSample) -> dict[str, Any] | None:
        """Decode one sample and count it; None when it is skipped."""
        random = seeded_random("sample", self.config.seed, self.position.epoch, raw.key)
        try:
            caption = caption_of(raw, config=self.config, random=random)
            sample = self.decode(image_of(raw, config=self.config), caption, raw, random)
        except (ImageRejected, SampleRejected) as rejected:
            skip = Skip(key=raw.key, reason=str(rejected), shard=raw.shard)
            self.ledger.skip(skip, epoch=self.position.epoch)
            return None
        self.ledger.good()
        return {**sample, "key": raw.key}


def _worker() -> tuple[int, int]:
    """This worker's number and how many there are; (0, 1) in the training process."""
    info = get_worker_info()
    return (info.id, info.num_workers) if info is not None else (0, 1)
