"""The work of `qlip tokenize`, part by part: pictures of a part -> decoded batches -> tokenizer -> one token file.

The same for every engine: batches never reach over parts, so a file is the same whoever makes it. A file appears whole
or not at all, with its skipped pictures in `<part>.skipped.jsonl` beside it.

Shapes: `b` pictures, `v` views of each, `S` their side, `n` tokens, `L` bits of a token, `e` width of embeddings.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from qlip.apps.decode_pool import DecodePool, Place
from qlip.apps.decoding import DecodedBatch, DecodeOptions, num_views
from qlip.apps.encoding import Encoded, TokenizeOptions, encoder_of
from qlip.core.errors import UserError
from qlip.data.finished_files import finished_file
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
        self.ledger = Ledger(None, max_skip_share=options.max_skip_share, listed=str(skipped_file(options.out, "*")))
        """Of everything made here; `make` stops when too large a share is skipped."""
        self._pool = DecodePool(decoding, workers=options.workers)

    def make(self, parts: list[Part], *, on_rows: Callable[[int], None]) -> Iterator[PartDone]:
        """Make the file of each part, as many at a time as there are decoders; `on_rows` hears of items and skips.

        The pictures of the next batches are decoded, and the rows of the one before written, while one is encoded.
        Raises `UserError` for a full disk and when too many pictures are skipped; files that are not whole are taken
        away.
        """
        writing: dict[str, _OpenPart] = {}
        try:
            for place, batch, encoded in _delayed(self._encoded(parts)):
                if place.part not in writing:
                    writing[place.part] = _OpenPart(place.part, self.options, self.info)
                part = writing[place.part]
                part.add(batch, encoded, num_views=self._num_views)
                self._count(batch)
                on_rows(len(batch.keys) + len(batch.skips))
                if place.is_last:
                    done = part.finish()
                    del writing[place.part]
                    yield done
        except BaseException as error:
            for part in writing.values():
                part.abandon(error)
            raise

    def close(self) -> None:
        """End the workers."""
        self._pool.close()

    def _encoded(self, parts: list[Part]) -> Iterator[tuple[Place, DecodedBatch, Encoded | None]]:
        for place, batch in self._pool.decode(parts, size=self._pictures_at_once):
            yield place, batch, self._encode(batch.pixels) if batch.keys else None

    def _count(self, batch: DecodedBatch) -> None:
        for _ in batch.keys:
            self.ledger.good()
        for skip in batch.skips:
            self.ledger.skip(skip, epoch=0)


def _delayed(
    batches: Iterator[tuple[Place, DecodedBatch, Encoded | None]],
) -> Iterator[tuple[Place, DecodedBatch, Encoded | None]]:
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
        """Take the file away; what was skipped so far stays listed."""
        self.writer.__exit__(type(error), error, None)
        with contextlib.suppress(UserError):  # the disk is full, which is being said already
            _write_skips(skipped_file(self.options.out, self.name), self.skips)


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
    skips = _read_skips(skipped_file(out, name))
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
    """Without skips no file. Raises `UserError` when it cannot be written."""
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}; choose another OUT") from None
    if skips:
        lines = [{"key": s.key, "reason": s.reason, "shard": s.shard, "count": s.count} for s in skips]
        with finished_file(file) as opened:
            opened.write("".join(json.dumps(line) + "\n" for line in lines).encode())


def _read_skips(file: Path) -> list[Skip]:
    """Raises `UserError` for a damaged file."""
    try:
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [
            Skip(key=line["key"], reason=line["reason"], shard=line["shard"], count=line["count"]) for line in lines
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is no list of skipped pictures ({type(error).__name__}): remove it with the part's .parquet, and "
            "run qlip tokenize again, which makes what is missing"
        ) from None
