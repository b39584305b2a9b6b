"""From conversations by number to a training batch: what the worker processes of the conversation loader do.

Shapes: `b` samples, `t` tokens, padded to the longest of the batch on the right, `S` side of the square pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qlip.core.images import ImageLimits, ImageRejected, open_image
from qlip.data.chat_labels import IGNORED, ChatEncoder, EncodedChat
from qlip.data.conversation_order import ConversationOrder
from qlip.data.conversations import Conversation, Conversations
from qlip.data.image_files import ImageFiles
from qlip.data.tar_reader import SampleRejected, Skip

MAX_TRIES = 200  # samples tried for one place in a batch: the ledger then stops the run, or the batch does


@dataclass(kw_only=True, slots=True, frozen=True)
class Request:
    """One micro-batch of one rank."""

    epoch: int
    samples: tuple[int, ...]
    """Numbers of conversations; for one that cannot be used another of its modality comes."""


@dataclass(kw_only=True, slots=True)
class Answer:
    """What a request became."""

    epoch: int
    batch: dict[str, Any] | None
    """None when for one place no usable sample was found in `MAX_TRIES`."""
    skips: list[Skip] = field(default_factory=list)
    num_good: int = 0
    num_cut_turns: int = 0
    """Question-answer pairs left out of samples that were too long."""


@dataclass(kw_only=True, slots=True)
class _Sample:
    number: int
    key: str
    chat: EncodedChat
    pixel_values: list[Tensor]


@dataclass(kw_only=True, slots=True)
class ConversationDataset:
    """`dataset[request]` -> `Answer`: a function of the request alone, whichever worker does it."""

    conversations: Conversations
    images: ImageFiles | None
    """None when no sample has a picture."""
    encoder: ChatEncoder
    order: ConversationOrder
    limits: ImageLimits
    source: str
    """Names the file in the ledger."""

    def __getitem__(self, request: Request) -> Answer:
        """Read, open and encode; every skip is reported with its reason."""
        answer = Answer(epoch=request.epoch, batch=None)
        samples = []
        for place, number in enumerate(request.samples):
            sample = self._first_usable(number, place=place, request=request, answer=answer)
            if sample is None:
                return answer
            samples.append(sample)
        answer.num_good = len(samples)
        answer.num_cut_turns = sum(sample.chat.num_cut_turns for sample in samples)
        answer.batch = self._collate(samples)
        return answer

    def _first_usable(self, number: int, *, place: int, request: Request, answer: Answer) -> _Sample | None:
        for candidate in self._candidates(number, place=place, epoch=request.epoch):
            conversation = self.conversations[candidate]
            try:
                return self._sample(candidate, conversation)
            except (ImageRejected, SampleRejected) as rejected:
                answer.skips.append(Skip(key=conversation.key, reason=str(rejected), shard=self.source))
        return None

    def _candidates(self, number: int, *, place: int, epoch: int) -> Iterator[int]:
        """The sample, then others of its modality in an order of their own, which only a bad one brings up."""
        yield number
        pool = next(
            pool for pool in self.order.pools() if self.conversations.has_image[number] == self._has_image(pool)
        )
        random = self.order.random("instead", epoch, number, place)
        for _ in range(MAX_TRIES - 1):
            yield int(pool[random.integers(len(pool))])

    def _has_image(self, pool: Any) -> bool:
        return bool(self.conversations.has_image[pool[0]])

    def _sample(self, number: int, conversation: Conversation) -> _Sample:
        chat = self.encoder.encode(conversation)  # first: it is cheaper than a picture
        pixel_values = [self._pixels(name) for name in conversation.images[: chat.num_images]]
        return _Sample(number=number, key=conversation.key, chat=chat, pixel_values=pixel_values)

    def _pixels(self, name: str) -> Tensor:
        assert self.images is not None, "conversations with pictures come with their files"
        picture = open_image(self.images.read(name, max_bytes=self.limits.max_bytes), limits=self.limits)
        pixels: Tensor = self.encoder.processor.image_processor(picture, return_tensors="pt")["pixel_values"]
        return pixels.float()  # (1, 3, S, S)

    def _collate(self, samples: list[_Sample]) -> dict[str, Any]:
        ids = [sample.chat.input_ids for sample in samples]
        labels = [sample.chat.labels for sample in samples]
        padding = self.encoder.tokenizer.pad_token_id
        batch: dict[str, Any] = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=padding),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
            "key": [sample.key for sample in samples],
            "sample_index": torch.tensor([sample.number for sample in samples]),
        }
        pictures = [pixels for sample in samples for pixels in sample.pixel_values]
        return batch | ({"pixel_values": torch.cat(pictures)} if pictures else {})
