"""What `qlip data inspect` says about shards: read as training reads them, counted and never changed."""

from __future__ import annotations

import io
import itertools
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from qlip.core.images import ImageRejected
from qlip.core.log import progress
from qlip.data.ledger import kind_of
from qlip.data.remote import Shard
from qlip.data.sample_parts import ShardConfig, caption_of, image_of
from qlip.data.shard_list import expand_shards
from qlip.data.shards import seeded_random
from qlip.data.tar_reader import RawSample, SampleRejected, Skip, iterate_tar

NUM_EXAMPLES = 5


@dataclass(kw_only=True, slots=True)
class Spread:
    """Smallest, middle and largest of some numbers."""

    min: int
    median: float
    max: int

    @classmethod
    def of(cls, counts: Counter[int]) -> Spread:
        """Of numbers given as value -> how often; all zero without any."""
        if not counts:
            return cls(min=0, median=0, max=0)
        return cls(min=min(counts), median=statistics.median(counts.elements()), max=max(counts))


@dataclass(kw_only=True, slots=True)
class InspectionReport:
    """Everything found in the shards."""

    num_shards: int
    """Files the words given stand for."""
    num_shards_read: int
    """Files opened before the limit was reached."""
    num_good: int
    """Samples that training would use."""
    skipped: dict[str, int]
    """Samples that training would skip, by kind of reason, most frequent first."""
    width: Spread
    """Pixels, of good samples, upright."""
    height: Spread
    """Pixels, of good samples, upright."""
    caption_words: Spread
    """Words of good samples' captions."""
    formats: dict[str, int]
    """File formats by content, not by name: JPEG, PNG, WEBP, ..."""
    duplicate_caption_share: float
    """Share of good samples whose caption an earlier one had."""
    num_duplicate_keys: int
    """Samples whose key another shard had: legal, but keys do not name samples uniquely."""
    largest: str
    """Key and size of the picture with the most pixels; empty without any."""
    examples: list[tuple[str, str]]
    """Keys and captions of the first samples."""
    faults: list[Skip]
    """The first skips of every kind."""


@dataclass(slots=True)
class _Counts:
    num_good: int = 0
    width: Counter[int] = field(default_factory=Counter)
    height: Counter[int] = field(default_factory=Counter)
    words: Counter[int] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    keys: set[int] = field(default_factory=set)  # hashes: a pool has more keys than fit as text
    captions: set[int] = field(default_factory=set)
    num_duplicate_keys: int = 0
    num_duplicate_captions: int = 0
    largest: tuple[int, str] = (0, "")
    examples: list[tuple[str, str]] = field(default_factory=list)
    faults: dict[str, Skip] = field(default_factory=dict)

    def add_skip(self, skip: Skip) -> None:
        self.skipped[kind_of(skip.reason)] += skip.count
        self.faults.setdefault(kind_of(skip.reason), skip)

    def add_sample(self, sample: RawSample, *, config: ShardConfig) -> None:
        self.num_duplicate_keys += hash(sample.key) in self.keys
        self.keys.add(hash(sample.key))
        try:
            random = seeded_random("sample", config.seed, 0, sample.key)
            caption = caption_of(sample, config=config, random=random)
            image = image_of(sample, config=config)
        except (ImageRejected, SampleRejected) as rejected:
            self.add_skip(Skip(key=sample.key, reason=str(rejected), shard=sample.shard))
            return
        self.num_good += 1
        self.width[image.width] += 1
        self.height[image.height] += 1
        self.largest = max(self.largest, (image.width * image.height, f"{sample.key} ({image.width} x {image.height})"))
        self.words[len(caption.split())] += 1
        self.formats[_format_of(sample, config=config)] += 1
        self.num_duplicate_captions += hash(caption) in self.captions
        self.captions.add(hash(caption))
        if len(self.examples) < NUM_EXAMPLES:
            self.examples.append((sample.key, caption))


def inspect_shards(spec: str, *, limit: int | None, config: ShardConfig) -> InspectionReport:
    """Read the shards of `spec` (not of `config.shards`) in order, decode every picture, and count. They may be
    remote; `config.shard_cache` then keeps copies.

    `limit` is how many samples and skips to look at, None for all. Raises `UserError` for shards that are not there
    or out of reach.
    """
    paths = expand_shards(spec, shard_cache=config.shard_cache)
    counts = _Counts()
    num_shards_read = 0
    with progress("inspect", len(paths), unit="shards") as bar:
        for shard, found in itertools.islice(_events(paths, config), limit):
            if shard >= num_shards_read:
                bar.update(shard)
                num_shards_read = shard + 1
            if isinstance(found, Skip):
                counts.add_skip(found)
            else:
                counts.add_sample(found, config=config)
        bar.update(num_shards_read)
    return InspectionReport(
        num_shards=len(paths),
        num_shards_read=num_shards_read,
        num_good=counts.num_good,
        skipped=dict(counts.skipped.most_common()),
        width=Spread.of(counts.width),
        height=Spread.of(counts.height),
        caption_words=Spread.of(counts.words),
        formats=dict(counts.formats.most_common()),
        duplicate_caption_share=counts.num_duplicate_captions / max(1, counts.num_good),
        num_duplicate_keys=counts.num_duplicate_keys,
        largest=counts.largest[1],
        examples=counts.examples,
        faults=list(counts.faults.values()),
    )


def format_report(report: InspectionReport) -> str:
    """The report as lines for a terminal. Captions and keys are foreign text: shown quoted, shortened, printable."""
    num_skipped = sum(report.skipped.values())
    share = num_skipped / max(1, num_skipped + report.num_good)
    lines = [
        f"shards            {report.num_shards_read} of {report.num_shards} read",
        f"samples good      {report.num_good}",
        f"samples skipped   {num_skipped} ({share:.1%})",
        *(f"  {count:>8}  {kind}" for kind, count in report.skipped.items()),
        f"width             {_line(report.width)} pixels",
        f"height            {_line(report.height)} pixels",
        f"largest picture   {report.largest or 'none'}",
        f"formats           {', '.join(f'{name} {count}' for name, count in report.formats.items()) or 'none'}",
        f"caption length    {_line(report.caption_words)} words",
        f"same captions     {report.duplicate_caption_share:.1%} of the good samples repeat an earlier caption",
        f"same keys         {report.num_duplicate_keys} samples have the key of one in another shard",
    ]
    if report.examples:
        lines.append("first samples")
        lines += [f"  {key}  {_quoted(caption)}" for key, caption in report.examples]
    if report.faults:
        lines.append("first of each fault")
        lines += [
            f"  {Path(s.shard).name}  {repr(s.key)[1:-1] or '(shard)'}  {_quoted(s.reason)}" for s in report.faults
        ]
    return "\n".join(lines)


def _events(paths: list[Shard], config: ShardConfig) -> Iterator[tuple[int, RawSample | Skip]]:
    cache = Path(config.shard_cache).expanduser() if config.shard_cache else None
    for shard, path in enumerate(paths):
        for found in iterate_tar(path, max_sample_bytes=config.limits.max_bytes, cache=cache):
            yield shard, found


def _format_of(sample: RawSample, *, config: ShardConfig) -> str:
    data = next(sample.fields[name] for name in config.image_fields if name in sample.fields)
    with Image.open(io.BytesIO(data)) as image:
        return image.format or "unknown"


def _line(spread: Spread) -> str:
    return f"{spread.min} / {spread.median:g} / {spread.max} (min / median / max)"


def _quoted(text: str, *, num_chars: int = 100) -> str:
    return repr(text if len(text) <= num_chars else text[: num_chars - 3] + "...")
