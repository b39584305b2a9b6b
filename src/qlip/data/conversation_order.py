"""The order of conversations in an epoch: a pure function of (seed, epoch), in batches of one modality and length.

A global micro-batch holds what all ranks read at the same time. All of it has pictures or none has, so that ranks with
sharded weights do the same work; ranks take its samples in turn by length, so that none waits for another.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

MEGABATCH = 50  # global micro-batches that are sorted by length together: long enough to help, short enough to mix


@dataclass(kw_only=True, slots=True, frozen=True)
class ConversationOrder:
    """Which samples are in which micro-batch."""

    num_words: np.ndarray
    """(n,) length of every sample."""
    has_image: np.ndarray
    """(n,) bool."""
    batch_size: int
    """Samples of a rank."""
    num_ranks: int
    group_by_length: bool
    need_images: bool
    """Leave samples without picture out."""
    seed: int

    @property
    def num_batches(self) -> int:
        """Micro-batches of an epoch, the same on every rank."""
        return sum(-(-len(pool) // self._global_size) for pool in self.pools())

    @property
    def _global_size(self) -> int:
        return self.batch_size * self.num_ranks

    def pools(self) -> list[np.ndarray]:
        """Numbers of the samples of each modality, those with pictures first; an empty one is left out."""
        masks = [self.has_image] if self.need_images else [self.has_image, ~self.has_image]
        return [pool for mask in masks if len(pool := np.flatnonzero(mask))]

    def epoch(self, epoch: int) -> np.ndarray:
        """(m, num_ranks, batch_size) int64: the samples of every micro-batch of every rank.

        Every sample comes once, and some of a modality twice when its last global micro-batch has to be filled.
        """
        random = self.random("epoch", epoch)
        batches = np.concatenate([self._batches(random.permutation(pool), random) for pool in self.pools()])
        batches = batches[random.permutation(len(batches))]  # (m, b * ranks)
        return batches.reshape(len(batches), self.batch_size, self.num_ranks).transpose(0, 2, 1)

    def random(self, *parts: object) -> np.random.Generator:
        """Of (seed, parts): equal in every process and on every machine."""
        text = "/".join(map(str, ("conversations", self.seed, *parts)))
        return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()))

    def _batches(self, mixed: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """One modality, mixed -> (m, b * ranks), each row sorted by length where that is wanted."""
        lacking = -len(mixed) % self._global_size
        again = np.concatenate([random.permutation(mixed) for _ in range(-(-lacking // len(mixed)))] or [mixed[:0]])
        mixed = np.concatenate([mixed, again[:lacking]])
        if not self.group_by_length:
            return mixed.reshape(-1, self._global_size)
        step = MEGABATCH * self._global_size
        megabatches = [mixed[place : place + step] for place in range(0, len(mixed), step)]
        by_length = [part[np.argsort(-self.num_words[part], kind="stable")] for part in megabatches]
        return np.concatenate(by_length).reshape(-1, self._global_size)
