"""What `qlip data inspect` says about conversations: counts, faults, missing pictures, one with coloured labels."""

from __future__ import annotations

import unicodedata
from collections import Counter
from dataclasses import dataclass
from typing import Any

from rich.text import Text

from qlip.core.errors import UserError
from qlip.data.chat_labels import IGNORED, EncodedChat
from qlip.data.conversations import Conversations
from qlip.data.image_files import ImageFiles
from qlip.data.inspect import Spread
from qlip.data.ledger import kind_of
from qlip.data.tar_reader import SampleRejected, Skip

SUPERVISED, UNSUPERVISED = "green", "dim"


@dataclass(kw_only=True, slots=True)
class ConversationReport:
    """Everything found in conversation files."""

    num_usable: int
    num_with_images: int
    turns: Spread
    """Answers of a conversation."""
    words: Spread
    """Words of a conversation, questions and answers."""
    num_leading_answers: int
    """Conversations whose first turn, an answer, is dropped."""
    num_same_keys: int
    """Conversations whose id an earlier one has: LLaVA's own files have thousands."""
    rejected: dict[str, int]
    """Unusable records by kind of reason, most frequent first."""
    faults: list[Skip]
    """The first record of each kind."""
    num_pictures_sought: int
    """How many of the first pictures were looked for; 0 when no images were given."""
    missing: list[Skip]
    """Those that were not found or could not be read."""


def inspect_conversation_files(
    conversations: Conversations, *, images: ImageFiles | None, num_pictures: int
) -> ConversationReport:
    """Count, and read the first `num_pictures` pictures without decoding them."""
    turns, keys = Counter[int](), set[int]()
    missing, num_sought, num_same = list[Skip](), 0, 0
    for conversation in conversations:
        turns[sum(message["role"] == "assistant" for message in conversation.messages)] += 1
        num_same += hash(conversation.key) in keys
        keys.add(hash(conversation.key))
        for name in conversation.images:
            if images is None or num_sought == num_pictures:
                break
            num_sought += 1
            fault = _fault_of(images, name)
            if fault:
                missing.append(Skip(key=conversation.key, reason=fault, shard=""))
    faults: dict[str, Skip] = {}
    for skip in conversations.rejected:
        faults.setdefault(kind_of(skip.reason), skip)
    return ConversationReport(
        num_usable=len(conversations),
        num_with_images=int(conversations.has_image.sum()),
        turns=Spread.of(turns),
        words=Spread.of(Counter(conversations.num_words.tolist())),
        num_leading_answers=conversations.num_leading_answers,
        num_same_keys=num_same,
        rejected=dict(Counter(kind_of(skip.reason) for skip in conversations.rejected).most_common()),
        faults=list(faults.values()),
        num_pictures_sought=num_sought,
        missing=missing,
    )


def format_conversation_report(report: ConversationReport) -> str:
    """The report as lines for a terminal; keys and reasons hold foreign text and are shown printable."""
    num_rejected = sum(report.rejected.values())
    share = num_rejected / max(1, num_rejected + report.num_usable)
    lines = [
        f"conversations     {report.num_usable} usable",
        f"with pictures     {report.num_with_images}",
        f"text only         {report.num_usable - report.num_with_images}",
        f"answers           {_line(report.turns)}",
        f"length            {_line(report.words)} words",
        f"begin with gpt    {report.num_leading_answers}, that turn is dropped",
        f"same ids          {report.num_same_keys}",
        f"rejected          {num_rejected} ({share:.1%})",
        *(f"  {count:>8}  {kind}" for kind, count in report.rejected.items()),
    ]
    if report.faults:
        lines.append("first of each fault")
        lines += [f"  {skip.shard}  id {visible(skip.key)}  {visible(skip.reason)}" for skip in report.faults]
    if report.num_pictures_sought:
        looked = f"{len(report.missing)} of the first {report.num_pictures_sought}"
        lines.append(f"missing pictures  {looked}; whether the others can be opened is seen in training")
        lines += [f"  id {visible(skip.key)}  {visible(skip.reason)}" for skip in report.missing[:5]]
    else:
        lines.append("missing pictures  not looked for: give --images")
    return "\n".join(lines)


def labelled_text(chat: EncodedChat, *, tokenizer: Any, image_token_id: int) -> Text:
    """The tokens as text: what is supervised green, the rest dim, runs of image tokens as `<image> x 36`."""
    text = Text()
    runs = _runs(chat, image_token_id=image_token_id)
    for kind, ids in runs:
        if kind == "image":
            text.append(f"<image> x {len(ids)}", style=UNSUPERVISED)
        else:
            decoded = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            text.append(visible(decoded), style=kind)
    return text


def sample_of(conversations: Conversations, number: int) -> int:
    """`number`, if there is such a conversation. Raises `UserError`."""
    if not 0 <= number < len(conversations):
        raise UserError(f"--sample {number}: there are {len(conversations)}, counted from 0")
    return number


def visible(text: str) -> str:
    """The text with control and format characters as escapes; line breaks stay, each behind its sign."""
    return "".join(
        "⏎\n" if character == "\n" else _escaped(character) if unicodedata.category(character)[0] == "C" else character
        for character in text
    )


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _runs(chat: EncodedChat, *, image_token_id: int) -> list[tuple[str, list[int]]]:
    """Neighbouring tokens of one kind: image, or a style."""
    runs: list[tuple[str, list[int]]] = []
    for token, label in zip(chat.input_ids.tolist(), chat.labels.tolist(), strict=True):
        kind = "image" if token == image_token_id else UNSUPERVISED if label == IGNORED else SUPERVISED
        if not runs or runs[-1][0] != kind:
            runs.append((kind, []))
        runs[-1][1].append(token)
    return runs


def _fault_of(images: ImageFiles, name: str) -> str:
    try:
        images.read(name)
    except SampleRejected as rejected:
        return str(rejected)
    return ""


def _line(spread: Spread) -> str:
    return f"{spread.min} / {spread.median:g} / {spread.max} (min / median / max)"
