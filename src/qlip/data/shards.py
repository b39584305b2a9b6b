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
from qlip.data.remote import Shard
from qlip.data.sample_parts import ShardConfig, caption_of, image_of
from qlip.data.shard_list import check_shard_split, expand_shards
from qlip.data.tar_reader import RawSample, SampleRejected, Skip, iterate_tar

READER = ("num_workers", "worker", "num_ranks", "rank")
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
    round: int = 0
    """How often this reader has been through all its shards in this epoch; above 0 only with `train_num_samples`."""
    before_round: int = 0
    """Samples of this epoch handed out before this round."""


def seeded_random(*parts: object) -> Random:
    """A Random seeded by the sha256 of the parts: equal in every process and on every machine."""
    return Random(hashlib.sha256("/".join(map(str, parts)).encode()).digest())


def refuse_changes(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise `UserError` with what has changed in that which decides the order of samples."""
    names = sorted(before.keys() | now.keys(), key=[*now, *before].index)
    changed = [f"{name} {before.get(name)} -> {now.get(name)}" for name in names if before.get(name) != now.get(name)]
    if changed:
        raise UserError(f"the data position cannot be resumed: {', '.join(changed)}; put it back or start a new run")


class ShardDataset(IterableDataset):
    """Samples of captioned image shards, for torchdata's StatefulDataLoader with any number of workers.

    The order is a pure function of (seed, epoch, rank, worker). Training (`repeat`) never ends; every reader counts its
    own epochs, so uneven shards hold nobody up; `train_num_samples` makes all epochs equally long. Evaluation is one
    pass in shard order, whatever `shuffle_buffer` says.
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

        Raises `UserError` for shards that are not there or fewer than ranks, for impossible caption weights, and for
        a negative `train_num_samples`.
        """
        super().__init__()
        weights = config.caption_weights.values()
        if config.caption_weights and (min(weights) < 0 or sum(weights) <= 0):
            raise UserError(
                f"caption_weights {config.caption_weights}: give probabilities, none negative, not all zero"
            )
        self.config = config
        if config.train_num_samples < 0:
            raise UserError(f"train_num_samples {config.train_num_samples}: give the samples of an epoch, or 0 for all")
        self.paths = expand_shards(config.shards, shard_cache=config.shard_cache)
        names = "/".join(path.name for path in self.paths)  # once: a pool has a million, every batch saves its position
        self._shards_digest = f"{len(self.paths)} files, sha256 {hashlib.sha256(names.encode()).hexdigest()[:12]}"
        self.decode = decode
        self.repeat = repeat
        self.rank, self.num_ranks = rank, num_ranks
        if repeat:
            self.check_split(num_workers=1)
        self._cache = Path(config.shard_cache).expanduser() if config.shard_cache else None
        self.ledger = Ledger(ledger, max_skip_share=config.max_skip_share)
        self.first_epoch = 0
        self.position = Position()
        self._loaded = False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """From the loaded state, else from the beginning."""
        if not self._loaded:
            self.position = Position(epoch=self.first_epoch)
            self.ledger.load_state_dict({"num_good": 0, "skipped": {}})
        self._loaded = False
        return self._samples()

    def state_dict(self) -> dict[str, Any]:
        """The position behind the last sample, the counts, and the order they belong to; JSON values only."""
        return {"position": asdict(self.position), "counts": self.ledger.state_dict(), "order": self._order()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next iteration goes on from there. Raises `UserError` when the order has changed since."""
        refuse_changes(state["order"], self._order())
        self.position = Position(**state["position"])
        self.ledger.load_state_dict(state["counts"])
        self._loaded = True

    def check_split(self, *, num_workers: int) -> None:
        """Raise `UserError` when some (rank, worker) would get no shard."""
        check_shard_split(len(self.paths), num_ranks=self.num_ranks, num_workers=num_workers)

    def check_states(self, states: list[dict[str, Any]]) -> None:
        """Raise `UserError` when states of any readers belong to other shards, seed or options than these."""
        for state in states:
            refuse_changes({k: v for k, v in state["order"].items() if k not in READER}, self._shared_order())

    def start_after(self, states: list[dict[str, Any]]) -> int:
        """Iterations without a loaded state start at the epoch behind every epoch that `states` were in; returns it."""
        self.first_epoch = 1 + max(state["position"]["epoch"] for state in states)
        return self.first_epoch

    def _order(self) -> dict[str, Any]:
        """Everything the order of this reader depends on."""
        worker, num_workers = worker_and_number()
        reader = {"num_workers": num_workers, "worker": worker, "num_ranks": self.num_ranks, "rank": self.rank}
        return reader | self._shared_order()

    def _shared_order(self) -> dict[str, Any]:
        """The part of it that all readers share; files by name, so that a folder may move."""
        epoch = {"train_num_samples": self.config.train_num_samples} if self.config.train_num_samples else {}
        return epoch | {
            "seed": self.config.seed,
            "shuffle_buffer": self.config.shuffle_buffer,
            "shards": self._shards_digest,
        }

    @property
    def _block_size(self) -> int:
        return self.config.shuffle_buffer if self.repeat else 0

    def _samples(self) -> Iterator[dict[str, Any]]:
        if self.repeat:
            self.check_split(num_workers=worker_and_number()[1])
        while True:
            shards = self._shards_of_epoch()
            yield from self._once_through(shards)
            self.ledger.check()
            here = self.position
            if shards and here.num_yielded == here.before_round:
                raise UserError(
                    f"no usable sample in {len(shards)} shards from {shards[0]} on; see `qlip data inspect`"
                )
            if not self.repeat:
                return
            if self._epoch_is_over():
                self.position = Position(epoch=here.epoch + 1)
            else:
                done = here.num_yielded
                self.position = Position(epoch=here.epoch, round=here.round + 1, num_yielded=done, before_round=done)

    def _epoch_is_over(self) -> bool:
        """Whether this reader has had its share of a fixed-length epoch; otherwise whenever its shards are through."""
        share = -(-self.config.train_num_samples // (self.num_ranks * worker_and_number()[1]))
        return self.position.num_yielded >= share

    def _is_cut_short(self) -> bool:
        return self.repeat and self.config.train_num_samples > 0 and self._epoch_is_over()

    @property
    def _round_name(self) -> str:
        """Names this round in seeds: `epoch`, and `epoch.round` when it is not the first."""
        here = self.position
        return f"{here.epoch}.{here.round}" if here.round else f"{here.epoch}"

    def _shards_of_epoch(self) -> list[Shard]:
        """This reader's shards in the order of this round."""
        worker, num_workers = worker_and_number()
        shards = list(self.paths)
        if self._block_size:
            seeded_random("shards", self.config.seed, self.position.epoch).shuffle(shards)
        # Neighbouring shards go to different ranks first, so that ranks differ by one shard at most.
        mine = shards[worker * self.num_ranks + self.rank :: self.num_ranks * num_workers]
        if self._block_size and self.position.round:
            seeded_random("shards", self.config.seed, self._round_name, self.rank, worker).shuffle(mine)
        return mine

    def _once_through(self, shards: list[Shard]) -> Iterator[dict[str, Any]]:
        """The rest of the shards, from `self.position` on, which is kept up to date before every yield.

        Ends early where a fixed-length epoch does.
        """
        here = self.position
        events = self._events(shards, first_shard=here.shard, first_event=here.event)
        while not self._is_cut_short():
            block, shard, event = self._fill_block(events, resuming=here.inside > 0)
            if not block:
                here.shard, here.event = shard, event
                return
            if here.inside > len(block):
                raise UserError(
                    f"{shards[here.shard]} has changed since the checkpoint or cannot be read whole: the position to "
                    "resume from is not in it; put it back, or choose another --out"
                )
            for _ in range(here.inside):
                block.popleft()
            while block and not self._is_cut_short():
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
            seeded_random(
                "block", self.config.seed, self._round_name, self.rank, worker_and_number()[0], here.block
            ).shuffle(block)
        return deque(block), shard, event

    def _events(
        self, shards: list[Shard], *, first_shard: int, first_event: int
    ) -> Iterator[tuple[int, int, RawSample | Skip]]:
        for shard in range(first_shard, len(shards)):
            found = iterate_tar(shards[shard], max_sample_bytes=self.config.limits.max_bytes, cache=self._cache)
            for event, sample in enumerate(found):
                if shard > first_shard or event >= first_event:
                    yield shard, event, sample

    def _finish(self, raw: RawSample) -> dict[str, Any] | None:
        """Decode one sample and count it; None when it is skipped."""
        random = seeded_random("sample", self.config.seed, self._round_name, raw.key)
        try:
            caption = caption_of(raw, config=self.config, random=random)
            sample = self.decode(image_of(raw, config=self.config), caption, raw, random)
        except (ImageRejected, SampleRejected) as rejected:
            skip = Skip(key=raw.key, reason=str(rejected), shard=raw.shard)
            self.ledger.skip(skip, epoch=self.position.epoch)
            return None
        self.ledger.good()
        return {**sample, "key": raw.key}


def worker_and_number() -> tuple[int, int]:
    """This worker's number and how many there are; (0, 1) in the training process."""
    info = get_worker_info()
    return (info.id, info.num_workers) if info is not None else (0, 1)
