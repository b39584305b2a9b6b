"""Several sources of shards drawn from by weight, each read in its own order from its own position.

The weights are open_clip's `train_data_upsampling_factors`: a factor multiplies the chance of every shard of its
source. So the next sample comes from source k with probability

    factor_k * shards_k / sum_j factor_j * shards_j

and equal factors draw shards of equal size as often as if they were one source.

Mixing texts with pairs of picture and caption for one autoregressive model is another file's matter: `mixing.py`.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset

from qlip.core.errors import UserError
from qlip.data.sample_parts import ShardConfig
from qlip.data.shard_list import check_shard_split, expand_sources
from qlip.data.shards import Decode, ShardDataset, refuse_changes, worker_and_number


@dataclass(kw_only=True, slots=True)
class MixedSource:
    """One source of a mixture."""

    name: str
    """As the user wrote it."""
    num_shards: int
    """Files it stands for."""
    share: float
    """Probability that the next sample comes from it."""


def mixed_sources(spec: str, factors: tuple[float, ...], *, shard_cache: str = "") -> list[MixedSource]:
    """The sources that `::` joins, with their shares.

    Raises `UserError` unless there is one finite positive factor for each, and as `expand_shards` does.
    """
    sources = expand_sources(spec, shard_cache=shard_cache)
    if len(factors) != len(sources) or not all(math.isfinite(factor) and factor > 0 for factor in factors):
        raise UserError(
            f"train_data_upsampling_factors {factors} for {len(sources)} sources: give one positive number for each "
            "part between ::, and leave a source out to draw nothing from it"
        )
    weights = [factor * len(shards) for factor, (_, shards) in zip(factors, sources, strict=True)]
    return [
        MixedSource(name=name, num_shards=len(shards), share=weight / sum(weights))
        for weight, (name, shards) in zip(weights, sources, strict=True)
    ]


class MixedShards(IterableDataset):
    """Endless samples of several sources, for torchdata's StatefulDataLoader with any number of workers.

    Which source comes next is a pure function of (seed, rank, worker, number of samples drawn). Every reader has its
    own position and epoch in every source. `shuffle_buffer` and `train_num_samples` are divided among the sources by
    their shares, rounded up: the memory stays the same, and the sources end their epochs at about the same time.
    `max_skip_share` holds for each source by itself.
    """

    def __init__(
        self,
        config: ShardConfig,
        *,
        factors: tuple[float, ...],
        decode: Decode,
        rank: int,
        num_ranks: int,
        ledger: Path | None,
    ) -> None:
        """`config.shards` joins the sources with `::`; `factors` as in `mixed_sources`. Raises as it does."""
        super().__init__()
        self.factors = factors
        self.seed, self.rank, self.num_ranks = config.seed, rank, num_ranks
        self.mixed = mixed_sources(config.shards, factors, shard_cache=config.shard_cache)
        self.check_split(num_workers=1)
        self.sources = [
            ShardDataset(
                replace(
                    config,
                    shards=mixed.name,
                    shuffle_buffer=math.ceil(config.shuffle_buffer * mixed.share),
                    train_num_samples=math.ceil(config.train_num_samples * mixed.share),
                ),
                decode=decode,
                repeat=True,
                rank=rank,
                num_ranks=num_ranks,
                ledger=ledger,
            )
            for mixed in self.mixed
        ]
        self.num_drawn = 0
        self._bounds = list(itertools.accumulate(mixed.share for mixed in self.mixed))
        self._loaded = False

    def check_split(self, *, num_workers: int) -> None:
        """Raise `UserError` when some (rank, worker) would get no shard of some source."""
        for mixed in self.mixed:
            check_shard_split(
                mixed.num_shards, num_ranks=self.num_ranks, num_workers=num_workers, source=f"source {mixed.name}"
            )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """From the loaded state, else from the beginning."""
        if not self._loaded:
            self.num_drawn = 0
        self._loaded = False
        return self._samples([iter(source) for source in self.sources])

    def state_dict(self) -> dict[str, Any]:
        """The number of samples drawn, the position in every source, and the order they belong to; JSON values only."""
        sources = [source.state_dict() for source in self.sources]
        return {"num_drawn": self.num_drawn, "sources": sources, "order": self._order()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next iteration goes on from there. Raises `UserError` when the order has changed since."""
        self.check_states([state])
        for source, source_state in zip(self.sources, state["sources"], strict=True):
            source.load_state_dict(source_state)
        self.num_drawn = state["num_drawn"]
        self._loaded = True

    def check_states(self, states: list[dict[str, Any]]) -> None:
        """Raise `UserError` when states of any readers belong to other sources, factors, shards, seed or options."""
        for state in states:
            refuse_changes(state["order"], self._order())
            for source, source_state in zip(self.sources, state["sources"], strict=True):
                source.check_states([source_state])

    def start_after(self, states: list[dict[str, Any]]) -> int:
        """Iterations without a loaded state start every source at the epoch behind every epoch that `states` were in.

        Returns the largest of these epochs.
        """
        return max(
            source.start_after([state["sources"][number] for state in states])
            for number, source in enumerate(self.sources)
        )

    def _order(self) -> dict[str, Any]:
        return {"train_data_upsampling_factors": list(self.factors)}

    def _samples(self, iterators: list[Iterator[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
        self.check_split(num_workers=worker_and_number()[1])
        while True:
            source = self._next_source()
            sample = next(iterators[source])
            self.num_drawn += 1
            yield sample

    def _next_source(self) -> int:
        """The source of sample number `num_drawn`: where a uniform number from a hash falls among the shares."""
        parts = f"source/{self.seed}/{self.rank}/{worker_and_number()[0]}/{self.num_drawn}"
        number = int.from_bytes(hashlib.sha256(parts.encode()).digest()[:8]) / 2**64
        return min(bisect.bisect_right(self._bounds, number), len(self._bounds) - 1)
