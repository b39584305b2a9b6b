"""What evaluations of written texts share: truths before any work, texts as rows that `collect` keeps, cards, files.

OUT/<protocol>_captions.json   [{"image_id": int, "caption": str}], one for each picture: COCO's results form
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from qlip.core import distributed
from qlip.core.errors import UserError
from qlip.data.items import Item
from qlip.evals.benchmark_files import picture_seed
from qlip.evals.card import data_card_fields, machine_card_fields
from qlip.evals.collect import Batch, Collected, Measure
from qlip.evals.inputs import EvalInput, require_ability
from qlip.evals.protocols import Protocol
from qlip.models.measured import Ability, MeasuredGenerator, MeasuredModel
from qlip.models.unified_model import Unified, WritingSettings

MOST_BYTES = 4096
"""UTF-8 of a written text; what is beyond is cut off."""
TEXT = "text"
"""The row that `captions_of` makes: (b, MOST_BYTES) uint8, padded with zeros."""
PLACES = "place among the pictures to be captioned, from 0"
Truth = TypeVar("Truth")
AnyModel = MeasuredModel | MeasuredGenerator | Unified


def require_unified(model: AnyModel, ability: Ability, protocol: Protocol) -> Unified:
    """The model as one that writes. Raises `UserError` when it cannot do what the protocol measures."""
    require_ability(cast(MeasuredModel, model), ability, protocol)  # whose abilities alone are looked at
    return cast(Unified, model)


def truths_of(data: EvalInput, truth: Callable[[Item], Truth | None], *, least: int, what: str) -> dict[str, Truth]:
    """Key -> what is right, for all items, or the first `max_samples`, of which `truth` says something.

    All ranks call it together, before any work. Raises `UserError` when they are fewer than `least`, and as `truth`
    does; `what` says what is missing and where it comes from.
    """

    def read() -> dict[str, Truth]:
        found: dict[str, Truth] = {}
        for item in data.source.items():
            right = truth(item) if isinstance(item, Item) else None
            if right is not None:
                found[cast(Item, item).key] = right
            if len(found) == data.max_samples > 0:
                break
        if len(found) < least:
            raise UserError(f"{data.source.name}: {len(found)} {what}")
        return found

    return distributed.on_all_ranks(read)


def captions_of(model: Unified, settings: WritingSettings, *, seed: int = 0) -> Measure:
    """A caption of every picture, as the row `TEXT`; each has a seed by its place in the data."""

    def measure(batch: Batch) -> dict[str, Tensor]:
        places = [place for place in batch["sample_index"].tolist() if place != -1]  # nothing is written for padding
        pictures = rearrange(batch["pictures"][: len(places)], "b c h w -> b h w c").cpu().numpy()
        seeds = [picture_seed(seed, prompt_index=place, sample_index=0) for place in places]
        captions = model.caption([Image.fromarray(picture) for picture in pictures], settings, seeds=seeds)
        return {TEXT: text_rows(captions)}

    return measure


def text_rows(texts: Sequence[str]) -> Tensor:
    """b texts -> (b, MOST_BYTES) uint8; zeros in them become spaces."""
    rows = torch.zeros(len(texts), MOST_BYTES, dtype=torch.uint8)
    for row, text in zip(rows, texts, strict=True):
        content = text.replace("\0", " ").encode(errors="replace")[:MOST_BYTES]
        row[: len(content)] = torch.tensor(list(content), dtype=torch.uint8)
    return rows


def texts_of(rows: Tensor) -> list[str]:
    """What `text_rows` was given, each text as one line without spaces at its ends."""
    texts = (bytes(row.tolist()).rstrip(b"\0").decode(errors="ignore") for row in rows)
    return [" ".join(text.split()) for text in texts]


def written_card(
    protocol: Protocol,
    model: Unified,
    *,
    data: EvalInput,
    collected: Collected,
    baseline: str,
    device: torch.device,
    started: float,
) -> dict[str, Any]:
    """The card of evaluations of written texts; `started` is `time.monotonic()` of then.

    Data that a protocol wants one split of are `complete` only where their name says that this split was read.
    """
    card = data_card_fields(protocol, data=data, collected=collected, baseline=baseline)
    return {
        **card,
        "complete": card["complete"] and of_its_split(protocol, data),
        "image_size": model.image_size,
        "model_name": model.name,
        **model.identity(),
        **machine_card_fields(data=data, collected=collected, device=device, started=started),
    }


def of_its_split(protocol: Protocol, data: EvalInput) -> bool:
    """Whether the data are the split that the protocol is of: sources that chose a split end their names in it."""
    return not protocol.split or data.source.name.endswith(f" {protocol.split}")


def image_numbers(collected: Collected, numbers: dict[str, Any]) -> tuple[list[int], str]:
    """A number for each picture that was captioned, and where it is from.

    `numbers`: key -> COCO's number, of all pictures that were to be captioned, in the order of the data. Where some
    have none or share one, it is the picture's place among these, which skipped pictures leave free.
    """
    found = [numbers[key] for key in collected.keys]
    if len(set(found)) == len(found) and all(type(number) is int for number in found):
        return cast(list[int], found), "the data"
    places = {key: place for place, key in enumerate(numbers)}
    return [places[key] for key in collected.keys], PLACES


def write_captions(path: Path, numbers: Sequence[int], captions: Sequence[str]) -> None:
    """The file appears whole or not at all. Raises `UserError` when it cannot be written."""
    rows = [{"image_id": number, "caption": text} for number, text in zip(numbers, captions, strict=True)]
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8", errors="replace")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another --out") from None
