"""The work of `qlip tokenize`, part by part: pictures of a part -> decoded batches -> tokenizer -> one token file.

The same for every engine: batches never reach over parts, so a file is the same whoever makes it. A file appears whole
or not at all, with its skipped pictures in `<part>.skipped.jsonl` beside it.

Shapes: `b` pictures, `v` views of each, `S` their side, `n` tokens, `L` bits of a token, `e` width of embeddings.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qlip.apps.decoding import DecodedBatch, DecodeOptions, DecodePool, num_views
from qlip.apps.encoding import Encoded, TokenizeOptions, encoder_of
from qlip.core.errors import UserError
from qlip.data.items import Item
from qlip.data.ledger import Ledger, kind_of
from qlip.data.source_parts import Part
from qlip.data.tar_reader import Skip
from qlip.data.token_files import TokenRows, TokenStoreInfo, open_tokens, pack_bits
from qlip.data.token_writer import TokenWriter
from qlip.engine.parallel import pick_device
from qlip.models.image_tokenizer import ImageTokenizer, open_image_tokenizer


@dataclass(kw_only=True, slots=True)
class PartDone:
    """What a finished part holds."""

    name: str
    num_good: int
    """Pictures in its file, each with all its views."""
    skipped: dict[str, int]
    """Pictures left out, by kind of reason."""
    num_entries: int
    """Items and skips that were read for it."""


class PartMaker:
    """A tokenizer at work."""

    def __init__(
        self, options: TokenizeOptions, info: TokenStoreInfo, *, tokenizer: ImageTokenizer | None = None
    ) -> None:
        """Opens the model unless it is given. Raises `UserError` as `open_image_tokenizer` and `encoder_of` do."""
        self.options, self.info = options, info
        place = pick_device(options.device)
        tokenizer = tokenizer or open_image_tokenizer(options.model, image_size=options.image_size)
        tokenizer.to(place)
        self.device = place
        self._encode = encoder_of(tokenizer, options)
        decoding = DecodeOptions(
            image_size=tokenizer.image_size, views=options.views, caption_fields=options.caption_fields
        )
        self._num_views = num_views(decoding)
        self._pictures_at_once = max(1, options.batch_size // self._num_views)
        self.ledger = Ledger(None, max_skip_share=options.max_skip_share)
        """Of everything made here; `make` stops when too large a share is skipped."""
        self._pool = DecodePool(decoding, workers=options.workers)

    def make(self, parts: Iterable[Part], *, on_rows: Callable[[int], None]) -> Iterator[PartDone]:
        """Make the file of each part, in their order; `on_rows` hears of every so many items and skips.

        The pictures of the next batches are decoded, and the rows of the one before written, while one is encoded.
        Raises `UserError` for a full disk and when too many pictures are skipped; the part's file is then not there.
        """
        writing: _OpenPart | None = None
        try:
            for place, batch, encoded in _delayed(self._encoded(parts)):
                if writing is None:
                    writing = _OpenPart(place.name, self.options, self.info)
                writing.add(batch, encoded, num_views=self._num_views)
                self._count(batch)
                on_rows(len(batch.keys) + len(batch.skips))
                if place.is_last:
                    done, writing = writing.finish(), None
                    yield done
        except BaseException as error:
            if writing is not None:
                writing.abandon(error)
            raise

    def close(self) -> None:
        """End the workers."""
        self._pool.close()

    def _encoded(self, parts: Iterable[Part]) -> Iterator[tuple[_Place, DecodedBatch, Encoded | None]]:
        for place, batch in self._pool.decode(_chunks(parts, self._pictures_at_once)):
            yield place, batch, self._encode(batch.pixels) if batch.keys else None

    def _count(self, batch: DecodedBatch) -> None:
        for _ in batch.keys:
            self.ledger.good()
        for skip in batch.skips:
            self.ledger.skip(skip, epoch=0)


class _Place(NamedTuple):
    """Which part a batch is of, and whether it ends it."""

    name: str
    is_last: bool


def _chunks(parts: Iterable[Part], size: int) -> Iterator[tuple[_Place, list[Item | Skip]]]:
    """Runs of so many entries of each part, at least one run a part."""
    for name, source in parts:
        entries = iter(source.items())
        chunk = list(islice(entries, size))
        while True:
            following = list(islice(entries, size))
            yield _Place(name, not following), chunk
            if not following:
                break
            chunk = following


def _delayed(
    batches: Iterator[tuple[_Place, DecodedBatch, Encoded | None]],
) -> Iterator[tuple[_Place, DecodedBatch, Encoded | None]]:
    """One batch late, so that the device works on the next one while this one is written."""
    before = next(batches, None)
    if before is None:
        return
    for batch in batches:
        yield before
        before = batch
    yield before


@dataclass(slots=True)
class _OpenPart:
    """A part's file while it is being written."""

    name: str
    options: TokenizeOptions
    info: TokenStoreInfo
    skips: list[Skip] = field(default_factory=list)
    num_good: int = 0
    num_entries: int = 0
    writer: TokenWriter = field(init=False)

    def __post_init__(self) -> None:
        self.writer = TokenWriter(part_file(self.options.out, self.name), self.info, compress=self.options.compress)

    def add(self, batch: DecodedBatch, encoded: Encoded | None, *, num_views: int) -> None:
        self.skips += batch.skips
        self.num_good += len(batch.keys)
        self.num_entries += len(batch.keys) + len(batch.skips)
        if encoded is None:
            return
        bits, embeddings, _ = encoded.wait()
        self.writer.write(
            TokenRows(
                keys=[key if not view else f"{key}#{view}" for key in batch.keys for view in range(num_views)],
                packed=pack_bits(bits),
                captions=_repeated(batch.captions, num_views),
                sizes=_repeated(batch.sizes, num_views),
                labels=_repeated(batch.labels, num_views),
                embeddings=None if embeddings is None else embeddings.numpy().astype(np.float16),
            )
        )

    def finish(self) -> PartDone:
        _write_skips(skipped_file(self.options.out, self.name), self.skips)  # first: a finished file has them beside it
        self.writer.__exit__(None, None, None)
        return PartDone(
            name=self.name, num_good=self.num_good, skipped=_by_kind(self.skips), num_entries=self.num_entries
        )

    def abandon(self, error: BaseException) -> None:
        self.writer.__exit__(type(error), error, None)


def part_file(out: Path, name: str) -> Path:
    """Where a part's tokens are."""
    return out / f"{name}.parquet"


def skipped_file(out: Path, name: str) -> Path:
    """Where the pictures that a part leaves out are listed, one JSON object {key, reason, shard, count} a line."""
    return out / f"{name}.skipped.jsonl"


def finished(out: Path, name: str, *, num_views: int) -> PartDone | None:
    """What an earlier call has made of this part; None if it is still to be made. Raises `UserError` for damage."""
    file = part_file(out, name)
    if not file.exists():
        return None
    _, footer = open_tokens(file)
    ledger = skipped_file(out, name)
    lines = [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []
    skips = [Skip(key=line["key"], reason=line["reason"], shard=line["shard"], count=line["count"]) for line in lines]
    num_good = footer.num_rows // num_views
    return PartDone(name=name, num_good=num_good, skipped=_by_kind(skips), num_entries=num_good + len(skips))


def _repeated(values: list, times: int) -> list:
    return values if times == 1 else [value for value in values for _ in range(times)]


def _by_kind(skips: list[Skip]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for skip in skips:
        counts[kind_of(skip.reason)] += skip.count
    return dict(counts)


def _write_skips(file: Path, skips: list[Skip]) -> None:
    try:
        file.unlink(missing_ok=True)
        if skips:
            lines = [{"key": s.key, "reason": s.reason, "shard": s.shard, "count": s.count} for s in skips]
            file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}; free disk space or choose another OUT") from None
