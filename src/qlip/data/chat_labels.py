"""A conversation as token ids and labels: the text that the model is asked with, supervised on its answers alone.

The chat template is rendered with a placeholder for every answer, so where the answers lie in the final text is known
by construction and not searched for; that text is tokenized once, as a whole. Ids up to the first answer are those
that the processor makes of the question when the model is asked.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from qlip.core.chats import chat_text, template_name, without_markers
from qlip.core.errors import UserError
from qlip.data.conversations import Conversation, Message
from qlip.data.tar_reader import SampleRejected

IGNORED = -100
"""Label of a token that is not learned (PyTorch's and LLaVA's number)."""
NEWLINE = re.compile(r"[^\S\n]*\n")


@dataclass(kw_only=True, slots=True, frozen=True)
class EncodedChat:
    """One conversation, `t` tokens."""

    input_ids: Tensor
    """(t,) int64, with as many image tokens per picture as the model has features of one."""
    labels: Tensor
    """(t,) int64: the ids of the answers and of the end behind each, elsewhere -100."""
    num_images: int
    """How many of the conversation's pictures, from the first on, the kept turns hold."""
    num_cut_turns: int
    """Question-answer pairs left out at the end because they did not fit."""


@dataclass(kw_only=True, slots=True, frozen=True)
class LabelledText:
    """The text of a conversation and where the model's words are in it."""

    text: str
    spans: list[tuple[int, int]]
    """Characters of each answer, with what the template puts between its question for an answer and the answer."""


class ChatEncoder:
    """Makes `EncodedChat`s with the chat template of a LlavaProcessor. Picklable."""

    def __init__(self, processor: Any, *, max_length: int, plain: bool = False) -> None:
        """`plain` leaves template and questions out, as LLaVA's first stage does: a picture, its caption, a newline.

        Raises `UserError` for a tokenizer without offsets and for a template that answers cannot be told apart in.
        """
        self.processor, self.max_length, self.plain = processor, max_length, plain
        self.tokenizer = processor.tokenizer
        if not self.tokenizer.is_fast:
            raise UserError("the tokenizer is a slow one, without offsets: save its folder with a tokenizer.json")
        grey = processor.image_processor(Image.new("RGB", (8, 8), "grey"), return_tensors="pt")
        self.image_text: str = processor.replace_image_token({"pixel_values": grey["pixel_values"]}, 0)
        self._special_ids = set(self.tokenizer.all_special_ids) | {
            number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special
        }
        self._special_ids -= {self.tokenizer.unk_token_id}  # it stands for words too
        self._markers = [marker for marker in self.tokenizer.get_added_vocab() if marker]
        self._lead = "" if plain else self._between_prompt_and_answer()

    def encode(self, conversation: Conversation) -> EncodedChat:
        """Ids and labels of at most `max_length` tokens; the last question-answer pairs are left out until it fits.

        Raises `SampleRejected` when not even the first pair fits, and when nothing is left to learn from.
        """
        pairs = _ends_of_pairs(conversation.messages)
        if not pairs:
            raise SampleRejected("no supervised token: no answer")
        num_pairs = len(pairs)
        while True:
            messages = conversation.messages[: pairs[num_pairs - 1]]
            num_images = sum(part["type"] == "image" for message in messages for part in message["content"])
            labelled = self.render(messages, num_images=num_images)
            input_ids, labels, ends = self._tokenized(labelled, num_images=num_images)
            if len(input_ids) <= self.max_length:
                break
            if num_pairs == 1:
                raise SampleRejected(
                    f"longer than the context: {len(input_ids)} tokens up to the first answer, limit {self.max_length}"
                )
            num_pairs = max(1, min(num_pairs - 1, sum(end <= self.max_length for end in ends)))
        if conversation.images and not num_images:
            raise SampleRejected("longer than the context: its pictures are in the turns that do not fit")
        if not bool((labels != IGNORED).any()):
            raise SampleRejected("no supervised token")
        return EncodedChat(
            input_ids=input_ids, labels=labels, num_images=num_images, num_cut_turns=len(pairs) - num_pairs
        )

    def render(self, messages: list[Message], *, num_images: int) -> LabelledText:
        """The final text, image tokens repeated. Raises `UserError` for a template that drops or changes turns."""
        harmless = [self._harmless(message) for message in messages]
        if self.plain:
            return self._plain(harmless)
        mark = "@answer"
        while any(mark in part.get("text", "") for message in harmless for part in message["content"]):
            mark += "@"
        answers, hollow = list[str](), list[Message]()
        for message in harmless:
            if message["role"] == "assistant":
                text = "\n".join(part["text"] for part in message["content"])
                message = {**message, "content": [{"type": "text", "text": f"{mark}:{len(answers)};"}]}
                answers.append(text)
            hollow.append(message)
        pieces = re.split(f"{mark}:(\\d+);", chat_text(self.processor, hollow))
        if [int(number) for number in pieces[1::2]] != list(range(len(answers))):
            raise UserError(
                f"the chat template {template_name(self.processor)} drops, repeats or moves answers of earlier turns; "
                "choose another with --chat-template"
            )
        if sum(piece.count(self.processor.image_token) for piece in pieces[::2]) != num_images:
            raise UserError(
                f"the chat template {template_name(self.processor)} does not write one {self.processor.image_token} "
                "per picture; choose another with --chat-template"
            )
        text, spans = "", list[tuple[int, int]]()
        for piece, answer in zip(pieces[::2], [*answers, ""], strict=True):
            text += piece.replace(self.processor.image_token, self.image_text)
            start = len(text) - (len(self._lead) if piece.endswith(self._lead) else 0)
            text += answer
            spans.append((start, len(text)))
        return LabelledText(text=text, spans=spans[:-1])

    def _plain(self, messages: list[Message]) -> LabelledText:
        text, spans = "", list[tuple[int, int]]()
        for message in messages:
            if message["role"] == "user":
                text += self.image_text * sum(part["type"] == "image" for part in message["content"])
            elif message["role"] == "assistant":
                start = len(text)
                text += "\n".join(part["text"] for part in message["content"]) + "\n"
                spans.append((start, len(text)))
        return LabelledText(text=text, spans=spans)

    def _tokenized(self, labelled: LabelledText, *, num_images: int) -> tuple[Tensor, Tensor, list[int]]:
        """Ids and labels (t,), and the number of tokens up to the end of every answer."""
        text, spans = labelled.text, labelled.spans
        written = self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)
        encoding = self.tokenizer(
            text,
            add_special_tokens=not written,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            verbose=False,
        )
        ids: list[int] = encoding["input_ids"]
        added: list[int] = encoding["special_tokens_mask"]  # by the tokenizer: not in the text
        offsets: list[tuple[int, int]] = encoding["offset_mapping"]
        num_image_ids = ids.count(self.processor.image_token_id)
        expected = num_images * self.image_text.count(self.processor.image_token)
        if num_image_ids != expected:
            raise SampleRejected(f"special token in the text: {num_image_ids} image tokens, expected {expected}")
        labels, ends = [IGNORED] * len(ids), list[int]()
        token = 0
        for number, (start, end) in enumerate(spans):
            limit = spans[number + 1][0] if number + 1 < len(spans) else len(text)
            while token < len(ids) and (added[token] or _is_before(offsets[token], start, end)):
                token += 1
            while token < len(ids) and not added[token] and _is_inside(offsets[token], start, end):
                if ids[token] in self._special_ids:
                    raise SampleRejected("special token in the text: an answer holds one in disguise")
                labels[token] = ids[token]
                token += 1
            for place in range(token, self._end_of_turn(ids, offsets, text, first=token, span=(end, limit))):
                labels[place] = ids[place]
                token = place + 1
            ends.append(token)
        return torch.tensor(ids), torch.tensor(labels), ends

    def _end_of_turn(
        self, ids: list[int], offsets: list[tuple[int, int]], text: str, *, first: int, span: tuple[int, int]
    ) -> int:
        """The token behind the end mark of an answer whose text ends before token `first`.

        The mark is the first special token, if only space is before it; without one a line's end is what tells a model
        to stop, as in `plain`. What lies in `span` belongs to this turn or the next question.
        """
        end, limit = span
        place = first
        while place < len(ids) and offsets[place][1] <= limit:
            if ids[place] in self._special_ids:
                return place + 1 if offsets[place][1] > end else first
            if text[end : offsets[place][1]].strip():
                break
            place += 1
        newline = NEWLINE.match(text, end, limit)
        place = first
        while newline and place < len(ids) and offsets[place][0] < newline.end() and offsets[place][1] <= limit:
            if text[end : offsets[place][1]].strip():
                break  # a token that reaches into the next question
            place += 1
        return place

    def _between_prompt_and_answer(self) -> str:
        """What the template writes between a prompt for an answer and the answer: the model has to write it itself."""
        question = [{"role": "user", "content": [{"type": "text", "text": "question"}]}]
        answer = {"role": "assistant", "content": [{"type": "text", "text": "@answer"}]}
        prompt = chat_text(self.processor, question, asking=True)
        before, mark, _ = chat_text(self.processor, [*question, answer]).partition("@answer")
        if not mark or not before.startswith(prompt):
            raise UserError(
                f"the chat template {template_name(self.processor)} asks for an answer in other words than it puts "
                "before one; choose another with --chat-template"
            )
        return before[len(prompt) :]

    def _harmless(self, message: Message) -> Message:
        """The message with markers such as `</s>` in its texts broken up."""
        parts = [
            part if part["type"] != "text" else {**part, "text": without_markers(part["text"], self._markers)}
            for part in message["content"]
        ]
        return {**message, "content": parts}


def _ends_of_pairs(messages: list[Message]) -> list[int]:
    """For every answer the number of messages up to it; a question without answer at the end is in none."""
    return [number for number, message in enumerate(messages, start=1) if message["role"] == "assistant"]


def _is_before(offsets: tuple[int, int], start: int, end: int) -> bool:
    return offsets[0] < end and not _is_inside(offsets, start, end)


def _is_inside(offsets: tuple[int, int], start: int, end: int) -> bool:
    """Whether a token overlaps a span; one without width (a space that the tokenizer trims) has to lie within."""
    first, last = offsets
    return first < end and last > start if first < last else start < first < end
