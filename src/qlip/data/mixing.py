"""The mixture that one model of text and pictures learns from (UM3, QLIP section 9, Eq 7): texts, pictures to be
captioned, and captions to be drawn, in shares that change with the step, packed into rows (`packing.py`).

    text files -----------------------> documents --.
    token stores, or shards of pictures -> pairs ----+-> credits -> rows -> batch

Mixing several sources of shards of pictures by weight is another file's matter: `mixture.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from qlip.core.errors import UserError
from qlip.core.log import console
from qlip.data.document_sources import PairOptions, PairSource, PictureLoader, TextPieces
from qlip.data.ledger import Ledger
from qlip.data.packing import IMAGE_TO_TEXT, TASKS, TEXT_TO_IMAGE, Packer, Pairs, SequenceLayout
from qlip.data.shards import refuse_changes
from qlip.data.text_stream import TextStream
from qlip.data.token_loader import TokenDataConfig, token_loader

NO_ORDER = ("text", "tokens", "captioned_tokens", "batch_size", "global_batch_size", "max_skip_share")
"""Options that are not compared with a saved position: rows may come in other batches, and sources compare their files
themselves (texts by number and names, token stores by encoder, file names and row groups), so that folders may move."""
STORE_BATCH = 32  # pictures read from a token store at a time


@dataclass(kw_only=True, slots=True)
class MixDataConfig:
    """Which texts and pictures to train on, how often each, and how they become rows."""

    text: str = ""
    """Documents: .jsonl (also .zst, .gz), .parquet or .tar; a folder, a glob, `PATH/{00..09}`, or several joined by
    `::`."""
    text_field: str = "text"
    """Json field (dotted inside objects) or column that holds a document; `txt` is that member of shards."""
    tokens: str = ""
    """Folder of token files that `qlip tokenize` has made of pictures to be drawn."""
    captioned_tokens: str = ""
    """The same of pictures to be captioned; those of `tokens` if empty."""
    sequence_length: int = 4096
    """Ids of a row."""
    batch_size: int = 8
    """Rows per process that are in memory at once."""
    global_batch_size: int = 0
    """Rows per optimizer step over all processes, in as many parts as it takes; 0 is batch_size x processes."""
    text_start: float = 60.0
    """Eq 7's r_0: the ratio of text at the first step. A sample of text is a row's length of it."""
    text_end: float = 12.0
    """Eq 7's r_T: the ratio of text from calm_down_steps on."""
    image_to_text: float = 1.0
    """The ratio of pictures to be captioned; 0 leaves them out."""
    text_to_image: float = 3.0
    """The ratio of pictures to be drawn; 0 leaves them out."""
    calm_down_steps: int = 10_000
    """Eq 7's T, in optimizer steps; 0 begins with text_end."""
    pack_pairs: bool = True
    """Put several pairs into a row; false gives each a row of its own, padded, which is the paper's arithmetic."""
    caption_dropout: float = 0.0
    """Share of pictures to be drawn whose caption is left out, which guidance needs."""
    max_caption_tokens: int = 256
    """Longer captions are cut."""
    captions: Literal["uniform", "first"] = "uniform"
    """Which of a picture's captions in a token store: anew in every epoch any of them, or always the first."""
    shuffle_window: int = 1000
    """Documents that are mixed with each other in memory."""
    max_skip_share: float = 0.05
    """Stop when a larger share of the documents cannot be used."""


def mixing_ratio(step: int, config: MixDataConfig) -> tuple[float, float, float]:
    """Shares of text, image_to_text and text_to_image at an optimizer step; they sum to one.

    Eq 7: ``r(t) = (r_T - r_0) / T (t - T) + r_T`` for t <= T and r_T after it, against the fixed ratios of pairs.
    """
    text, steps = config.text_end, config.calm_down_steps
    if step < steps:
        text += (config.text_end - config.text_start) / steps * (step - steps)
    ratios = (max(text, 0.0), config.image_to_text, config.text_to_image)  # rounding may end below 0
    return ratios[0] / sum(ratios), ratios[1] / sum(ratios), ratios[2] / sum(ratios)


class MixingLoader:
    """Endless micro-batches of one rank (the engine's `Loader`)."""

    def __init__(
        self,
        config: MixDataConfig,
        *,
        packer: Packer,
        sources: dict[str, TextPieces | PairSource],
        order: dict[str, Any],
        micro_batches: int,
        seed: int,
        rank: int,
        num_ranks: int,
    ) -> None:
        """`sources` are those that `packer` takes from; `micro_batches` of this loader are an optimizer step."""
        self.config, self.packer, self.sources, self.micro_batches = config, packer, sources, micro_batches
        self.rank, self.num_ranks = rank, num_ranks
        self.num_batches = 0
        """Batches that were handed out, those before the resumed position among them."""
        self._order = order | {"seed": seed}
        self._beginning = packer.state_dict()
        self._resumed, self._started, self._waiting = False, False, False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """From the resumed position, else from the beginning."""
        if not self._waiting:
            self._start()
        self._waiting = False
        return self._batches()

    def state_dict(self) -> dict[str, Any]:
        """The position behind the last batch, and the order it belongs to; JSON values."""
        if not self._started:
            self._start()
            self._waiting = True
        return {
            "rank": self.rank,
            "num_ranks": self.num_ranks,
            "batches": self.num_batches,
            "micro_batches": self.micro_batches,
            "packer": self.packer.state_dict(),
            "sources": {name: source.state_dict() for name, source in self.sources.items()},
            "order": self._order,
        }

    def resume(self, states: list[dict[str, Any]]) -> None:
        """Go on from the saved states of all ranks, in their order.

        With as many ranks the batches are bit for bit those of an uninterrupted run; rows of a batch may be more or
        fewer. Otherwise the schedule goes on, while every source begins its next epoch, of which rank 0 tells. Raises
        `UserError` when files, seed or options have changed.
        """
        assert [state["rank"] for state in states] == list(range(states[0]["num_ranks"])), (
            "states of all ranks, in order"
        )
        for state in states:
            refuse_changes(state["order"], self._order)
        for name, source in self.sources.items():
            source.resume([state["sources"][name] for state in states])
        saved = states[0]
        self.num_batches = saved["batches"] // saved["micro_batches"] * self.micro_batches
        if saved["micro_batches"] == self.micro_batches:
            self.num_batches = saved["batches"]
        exact = len(states) == self.num_ranks
        self.packer.load_state_dict(states[self.rank]["packer"] if exact else self._beginning)
        self._resumed, self._started, self._waiting = True, False, False

    def _start(self) -> None:
        if not self._resumed:
            self.num_batches = 0
            self.packer.load_state_dict(self._beginning)
        self._resumed, self._started = False, True
        for source in self.sources.values():
            source.start()

    def _batches(self) -> Iterator[dict[str, Any]]:
        while True:
            shares = mixing_ratio(self.num_batches // self.micro_batches, self.config)
            batch = self.packer.batch(self.config.batch_size, shares)
            pictures = batch.pop("pixel_values")
            if pictures:
                batch["pixel_values"] = torch.stack(pictures)
            self.num_batches += 1
            yield batch


def mixing_loader(
    config: MixDataConfig,
    *,
    layout: SequenceLayout,
    encoder_fingerprint: str,
    seed: int,
    micro_batches: int = 1,
    images: PictureLoader | None = None,
    ledger: Path | None = None,
    rank: int = 0,
    num_ranks: int = 1,
) -> MixingLoader:
    """Endless batches of one rank: `input_ids`, `labels`, `position_ids`, `task_ids` (b, S) int64, `sample_counts`
    (3,) float32; with `images`, in batches that have any, `pixel_values` (pictures, 3, h, w) in the order of their ids.

    `images`, a loader of captioned pictures, takes the place of token stores; their ids and labels are -1. All ranks
    must be given the same. Raises `UserError` before the first batch, the same on every rank: impossible ratios and
    lengths, a ratio without its source, tokens of another encoder, what is not there.
    """
    _check(config, layout)
    split = {"seed": seed, "rank": rank, "num_ranks": num_ranks}
    texts = TextPieces(_text_stream(config, ledger=ledger, split=split), layout) if _has_text(config) else None
    sources: dict[str, TextPieces | PairSource] = {} if texts is None else {"text": texts}
    if config.text and texts is None and rank == 0:
        console.print("data: text_start and text_end are 0, so data.text is not read and rests of rows are padding")
    pairs: dict[int, Pairs] = {}
    loaders = _picture_loaders(config, images, encoder_fingerprint=encoder_fingerprint, split=split)
    for name, (tasks, loader, path) in loaders.items():
        options = PairOptions(
            layout=layout,
            max_caption_tokens=min(config.max_caption_tokens, config.sequence_length - layout.image_length - 4),
            caption_dropout=config.caption_dropout,
            seed=seed,
            name=path,
        )
        counts = Ledger(ledger, max_skip_share=1.0)  # a store may hold pictures without captions, which are left out
        source = PairSource(loader, options, ledger=counts, rank=rank, num_ranks=num_ranks)
        sources[name] = source
        pairs |= dict.fromkeys(tasks, source)
    packer = Packer(
        sequence_length=config.sequence_length,
        texts=texts,
        pairs=pairs,
        pack_pairs=config.pack_pairs,
        padding=layout.end,
        rank=rank,
        num_ranks=num_ranks,
    )
    order = {name: value for name, value in asdict(config).items() if name not in NO_ORDER}
    order |= {"image_length": layout.image_length, "sources": sorted(sources)}
    return MixingLoader(config, packer=packer, sources=sources, order=order, micro_batches=micro_batches, **split)


def _has_text(config: MixDataConfig) -> bool:
    return config.text_start > 0 or config.text_end > 0


def _text_stream(config: MixDataConfig, *, ledger: Path | None, split: dict[str, int]) -> TextStream:
    if not config.text:
        raise UserError("no texts to train on: set data.text to files of documents, or text_start and text_end to 0")
    return TextStream(
        config.text,
        text_field=config.text_field,
        shuffle_window=config.shuffle_window,
        ledger=Ledger(ledger, max_skip_share=config.max_skip_share),
        **split,
    )


def _picture_loaders(
    config: MixDataConfig, images: PictureLoader | None, *, encoder_fingerprint: str, split: dict[str, int]
) -> dict[str, tuple[list[int], PictureLoader, str]]:
    """By name of the source: the kinds it serves, its loader, and what messages call it."""
    ratios = {IMAGE_TO_TEXT: config.image_to_text, TEXT_TO_IMAGE: config.text_to_image}
    kinds = [kind for kind, ratio in ratios.items() if ratio]
    if images is not None:
        if config.tokens or config.captioned_tokens:
            raise UserError("pictures and their tokens are both given: leave out data.tokens and data.captioned_tokens")
        return {"images": (kinds, images, "pictures")} if kinds else {}
    loaders: dict[str, tuple[list[int], PictureLoader, str]] = {}
    for kind in kinds:
        name, captioned = TASKS[kind], kind == IMAGE_TO_TEXT
        tokens = config.captioned_tokens or config.tokens if captioned else config.tokens
        if not tokens:
            raise UserError(
                f"no pictures for {name}: set data.tokens to a folder that qlip tokenize has made, or data.{name} to 0"
            )
        reading = TokenDataConfig(tokens=tokens, batch_size=1, captions=config.captions)
        loader = token_loader(
            reading,
            tokenize=lambda texts: {},
            encoder_fingerprint=encoder_fingerprint,
            # of one store both kinds must not have the same picture at a time
            **(split | {"seed": split["seed"] + captioned}),
        )
        reading.batch_size = min(STORE_BATCH, len(loader.store) // split["num_ranks"])  # the store had to be opened
        loaders[name] = ([kind], loader, tokens)
    return loaders


def _check(config: MixDataConfig, layout: SequenceLayout) -> None:
    """Raise `UserError` for numbers that make no rows."""
    ratios = (config.text_start, config.text_end, config.image_to_text, config.text_to_image)
    pairs = config.image_to_text + config.text_to_image
    least_text = min(config.text_start, config.text_end) if config.calm_down_steps > 0 else config.text_end
    if not all(math.isfinite(ratio) and ratio >= 0 for ratio in ratios) or least_text + pairs <= 0:
        raise UserError(
            f"text_start, text_end, image_to_text, text_to_image {ratios}: give ratios, none negative, and one above 0 "
            "at every step"
        )
    if config.calm_down_steps < 0 or min(config.batch_size, config.shuffle_window, config.max_caption_tokens) < 1:
        raise UserError(
            f"calm_down_steps {config.calm_down_steps}, batch_size {config.batch_size}, shuffle_window "
            f"{config.shuffle_window}, max_caption_tokens {config.max_caption_tokens}: give at least 0, 1, 1 and 1"
        )
    if not 0 <= config.caption_dropout <= 1:
        raise UserError(f"caption_dropout {config.caption_dropout}: give a share between 0 and 1")
    least = layout.min_sequence_length if pairs else 2
    if config.sequence_length < least:
        raise UserError(
            f"sequence_length {config.sequence_length} holds no picture of {layout.image_length} ids with a caption: "
            f"give at least {least}"
        )
