"""Conversations as endless training batches of one rank, resumed bit for bit with any number of workers.

The order of an epoch is a pure function of (seed, epoch), so a position is two numbers: the epoch, and how many of its
micro-batches are done. Samples that cannot be used are replaced, written to the ledger, and stop the run when they are
too many.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset

from qlip.core.errors import UserError
from qlip.core.images import ImageLimits
from qlip.core.log import console
from qlip.data.chat_labels import ChatEncoder
from qlip.data.conversation_batches import Answer, ConversationDataset, Request
from qlip.data.conversation_order import ConversationOrder
from qlip.data.conversations import Conversations, open_conversations
from qlip.data.image_files import open_image_files
from qlip.data.ledger import Ledger
from qlip.data.loaders import errors_as_without_workers
from qlip.data.shards import refuse_changes


@dataclass(kw_only=True, slots=True)
class ConversationDataConfig:
    """Which conversations to train on, and how they become batches."""

    conversations: str = ""
    """LLaVA's .json list or a .jsonl file; several are joined by `::`."""
    images: str = ""
    """Folder that the names of the pictures start from, or tar shards that hold them; empty for texts alone."""
    batch_size: int = 16
    """Conversations per process that are in memory at once."""
    global_batch_size: int = 0
    """Conversations per optimizer step over all processes, in several parts if need be; 0: batch_size x processes."""
    num_workers: int = 2
    """Processes per rank that open pictures and tokenize; 0 does it in the training process."""
    max_length: int = 2048
    """Tokens of a conversation, those of pictures included; its last questions are left out until it fits."""
    plain: bool = False
    """Leave out template and questions: pictures and captions alone, for the projector (LLaVA's first stage)."""
    group_by_length: bool = True
    """Whether conversations of similar length share a batch, which saves padding."""
    max_skip_share: float = 0.05
    """Stop when a larger share of the conversations cannot be used."""
    limits: ImageLimits = field(default_factory=ImageLimits)
    """Pictures beyond these are skipped from their header."""


class ConversationLoader:
    """Endless micro-batches of one rank (the engine's `Loader`)."""

    def __init__(
        self, dataset: ConversationDataset, config: ConversationDataConfig, *, ledger: Path, rank: int
    ) -> None:
        """`dataset.order` says how many ranks there are."""
        self.dataset, self.config, self.rank = dataset, config, rank
        self.epoch, self.done = 0, 0
        self.ledger = Ledger(ledger, max_skip_share=config.max_skip_share)
        self.num_cut_turns = 0
        """Question-answer pairs that were left out of too long conversations since the start of this process."""
        order, conversations = dataset.order, dataset.conversations
        self.num_ranks = order.num_ranks
        self._order = {
            "conversations": f"{len(conversations)} conversations, sha256 {conversations.identity[:12]}",
            "seed": order.seed,
            "group_by_length": order.group_by_length,
            "need_images": order.need_images,
        }
        self._num_batches = order.num_batches
        self._first_epoch = 0
        self._resumed = False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """From the resumed position, else from the beginning."""
        if not self._resumed:
            self.epoch, self.done = self._first_epoch, 0
            self.ledger.load_state_dict({"num_good": 0, "skipped": {}})
            self._write_rejected()
        self._resumed = False
        requests = _Requests(self.dataset.order, epoch=self.epoch, done=self.done, rank=self.rank)
        loader = DataLoader(
            cast(Dataset, self.dataset),
            batch_size=None,  # a request is a whole batch
            sampler=requests,
            num_workers=self.config.num_workers,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # the training's own random state is left alone
        )
        return self._batches(iter(loader))

    def state_dict(self) -> dict[str, Any]:
        """The position behind the last batch, the counts, and the order they belong to; JSON values."""
        return {
            "rank": self.rank,
            "num_ranks": self.num_ranks,
            "batch_size": self.config.batch_size,
            "epoch": self.epoch,
            "done": self.done,
            "counts": self.ledger.state_dict(),
            "order": self._order,
        }

    def resume(self, states: list[dict[str, Any]]) -> None:
        """Go on from the saved states of all ranks, in their order.

        With as many ranks and as large batches these are bit for bit those of an uninterrupted run, whatever the number
        of workers. Otherwise every rank begins the epoch after the largest that any was in, and rank 0 says so; that
        epoch is whole, and the rest of the old one is left out. Raises `UserError` when the file, the seed or the
        options have changed.
        """
        assert [state["rank"] for state in states] == list(range(states[0]["num_ranks"])), (
            "states of all ranks, in order"
        )
        for state in states:
            refuse_changes(state["order"], self._order)
        saved, here = (len(states), states[0]["batch_size"]), (self.num_ranks, self.config.batch_size)
        if saved == here:
            state = states[self.rank]
            self.epoch, self.done = state["epoch"], state["done"]
            self.ledger.load_state_dict(state["counts"])
            self._resumed = True
            return
        self._first_epoch = 1 + max(state["epoch"] for state in states)
        if self.rank == 0:
            console.print(
                f"data: the position was saved by {saved[0]} ranks x {saved[1]} conversations, here are {here[0]} x "
                f"{here[1]}; every rank begins epoch {self._first_epoch} and leaves out the rest of the one before"
            )

    def _batches(self, answers: Iterator[Answer]) -> Iterator[dict[str, Any]]:
        for answer in errors_as_without_workers(answers):
            yield self._taken(answer)

    def _taken(self, answer: Answer) -> dict[str, Any]:
        """Count what a worker reports, and move on behind its batch."""
        for skip in answer.skips:
            self.ledger.skip(skip, epoch=answer.epoch)
        for _ in range(answer.num_good):
            self.ledger.good()
        if answer.batch is None:
            self.ledger.check()
            raise UserError(
                f"{len(answer.skips)} conversations one after the other cannot be used, the last: "
                f"{answer.skips[-1].reason}; see `qlip data inspect`"
            )
        if answer.num_cut_turns and not self.num_cut_turns and self.rank == 0:
            console.print(
                f"data: a conversation has more than max_length {self.config.max_length} tokens and loses its last "
                "questions, as all such do; raise data.max_length to keep them"
            )
        self.num_cut_turns += answer.num_cut_turns
        self.done += 1
        if self.done == self._num_batches:
            self.epoch, self.done = self.epoch + 1, 0
            self.ledger.check()  # an epoch may be shorter than what it waits for
        return answer.batch

    def _write_rejected(self) -> None:
        """Records of the file that are no conversations: known before the first batch, written by one rank."""
        if self.rank == 0:
            ledger = Ledger(self.ledger.path, max_skip_share=1.0)
            for skip in self.dataset.conversations.rejected:
                ledger.skip(skip, epoch=self.epoch)


class _Requests:
    """The micro-batches of one rank, without end."""

    def __init__(self, order: ConversationOrder, *, epoch: int, done: int, rank: int) -> None:
        self.order, self.epoch, self.done, self.rank = order, epoch, done, rank

    def __iter__(self) -> Iterator[Request]:
        done = self.done
        for epoch in itertools.count(self.epoch):
            for samples in self.order.epoch(epoch)[done:, self.rank]:
                yield Request(epoch=epoch, samples=tuple(samples.tolist()))
            done = 0


def _as_it_is(answer: Any) -> Any:
    return answer


def conversation_loader(
    config: ConversationDataConfig,
    *,
    processor: Any,
    seed: int,
    ledger: Path,
    need_images: bool,
    rank: int = 0,
    num_ranks: int = 1,
) -> ConversationLoader:
    """Endless batches of one rank: `input_ids`, `attention_mask`, `labels` (b, t) int64, padded on the right;
    `pixel_values` (pictures of the batch, 3, S, S) float32 unless it has none; `key` list; `sample_index` (b,) int64.

    `processor` is a LlavaProcessor with its chat template. `need_images` leaves conversations without picture out, for
    training a projector. All ranks must be given the same. Raises `UserError` before the first batch, the same on every
    rank: files that are not there or broken, too many unusable records, fewer conversations than a batch of all ranks.
    """
    if config.batch_size < 1 or config.num_workers < 0:
        raise UserError(f"batch_size {config.batch_size}, num_workers {config.num_workers}: give at least 1 and 0")
    if processor.tokenizer.pad_token_id is None:
        raise UserError("the tokenizer has no padding token: set pad_token in its tokenizer_config.json")
    conversations = open_conversations(config.conversations)
    _refuse_too_many_rejected(conversations, config)
    order = ConversationOrder(
        num_words=conversations.num_words,
        has_image=conversations.has_image,
        batch_size=config.batch_size,
        num_ranks=num_ranks,
        group_by_length=config.group_by_length,
        need_images=need_images,
        seed=seed,
    )
    _check_size(order, config)
    if bool(conversations.has_image.any()) and not config.images:
        raise UserError(f"{config.conversations} has pictures: set data.images to their folder or shards")
    dataset = ConversationDataset(
        conversations=conversations,
        images=open_image_files(config.images) if conversations.has_image.any() else None,
        encoder=ChatEncoder(processor, max_length=config.max_length, plain=config.plain),
        order=order,
        limits=config.limits,
        source=config.conversations,
    )
    return ConversationLoader(dataset, config, ledger=ledger, rank=rank)


def _refuse_too_many_rejected(conversations: Conversations, config: ConversationDataConfig) -> None:
    counts = Ledger(None, max_skip_share=config.max_skip_share)
    counts.num_good = len(conversations)
    for skip in conversations.rejected:
        counts.skipped[skip.reason.partition(":")[0]] += 1
    counts.check()


def _check_size(order: ConversationOrder, config: ConversationDataConfig) -> None:
    num_usable, num_all = sum(map(len, order.pools())), len(order.has_image)
    if not num_usable:
        raise UserError(f"{config.conversations} has no pictures, and only the projector is trained: give other data")
    if num_usable < order.batch_size * order.num_ranks:
        raise UserError(
            f"{config.conversations} has {num_usable} usable conversations, too few for {order.num_ranks} x "
            f"{order.batch_size} at a time: lower data.batch_size or give more"
        )
    if num_usable < num_all:
        console.print(
            f"data: {num_all - num_usable} of {num_all} conversations have no picture and are left out: "
            "only the projector is trained"
        )
