"""Which parts of a raw sample are used: its picture and its caption, and the options that choose them."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

from PIL import Image

from qlip.core.images import ImageLimits, open_image
from qlip.data.tar_reader import RawSample, SampleRejected, json_record


@dataclass(kw_only=True, slots=True)
class ShardConfig:
    """Which shards to read and which parts of a sample to use."""

    shards: str
    """A folder, `PATH/{00000..00009}.tar`, a glob, or several joined by `::`; PATH may be remote: `s3://...`."""
    shard_cache: str = ""
    """Folder in which whole copies of remote shards are kept and read; empty reads them as streams."""
    train_num_samples: int = 0
    """Samples of an epoch over all readers, each of which goes on to the next after its share (rounded up) and reads
    its shards again in a new order if they hold fewer; 0 makes every shard once an epoch. For training only."""
    shuffle_buffer: int = 2000
    """Samples shuffled together, held as encoded bytes by every worker; 0 reads everything in order."""
    seed: int = 0
    """Another seed gives another order, other captions and other augmentations."""
    image_fields: tuple[str, ...] = ("jpg", "jpeg", "png", "webp")
    """The first of these a sample has is its picture."""
    caption_field: str = "txt"
    """The field that holds the caption as UTF-8 text."""
    caption_weights: dict[str, float] = field(default_factory=dict)
    """Draw the caption from these fields of the json instead, by weight; dots reach inside: `captions.dense`.
    A sample without any of them falls back to `caption_field`."""
    max_caption_chars: int = 5000
    """Longer captions are cut."""
    max_skip_share: float = 0.05
    """The run stops when a larger share of the samples seen cannot be used."""
    limits: ImageLimits = field(default_factory=ImageLimits)
    """Pictures beyond these are skipped; `max_bytes` bounds whole samples too."""


def image_of(sample: RawSample, *, config: ShardConfig) -> Image.Image:
    """The sample's picture, RGB. Raises `SampleRejected` without one, `ImageRejected` for a bad one."""
    for name in config.image_fields:
        if name in sample.fields:
            return open_image(sample.fields[name], limits=config.limits)
    raise SampleRejected("missing image")


def caption_of(sample: RawSample, *, config: ShardConfig, random: Random) -> str:
    """The sample's caption: one line of text is not promised, but it is not empty, has no NUL and is cut to length.

    With `caption_weights` it is drawn among those json fields the sample has. Raises `SampleRejected`.
    """
    captions = captions_of(sample, config=config)
    return random.choices(list(captions.values()), [config.caption_weights.get(name, 1.0) for name in captions])[0]


def captions_of(sample: RawSample, *, config: ShardConfig) -> dict[str, str]:
    """Every usable caption by its name in `caption_weights`; a sample without any of them has its `caption_field`.

    So a recipe that names json fields also trains on shards that carry plain captions. Raises `SampleRejected`.
    """
    if config.caption_weights and "json" in sample.fields:
        record = json_record(sample)
        texts = {name: _clean(_inside(record, name), config) for name in config.caption_weights}
        usable = {name: text for name, text in texts.items() if text and config.caption_weights[name] > 0}
        if usable:
            return usable
    if config.caption_field not in sample.fields:
        raise SampleRejected("missing caption")
    try:
        caption = _clean(sample.fields[config.caption_field].decode("utf-8-sig"), config)
    except UnicodeDecodeError:
        raise SampleRejected("undecodable caption: not UTF-8") from None
    if not caption:
        raise SampleRejected("empty caption")
    return {config.caption_field: caption}


def _clean(text: str, config: ShardConfig) -> str:
    text = text.replace("\0", " ").strip()[: config.max_caption_chars].strip()
    return text.encode("utf-8", "ignore").decode()  # json can spell half a surrogate pair, which no tokenizer takes


def _inside(record: dict[str, Any], path: str) -> str:
    value: object = record
    for name in [path] if path in record else path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, str) else ""
