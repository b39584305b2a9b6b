"""Tar shards as a source of evaluation: every sample once in shard order, labels and captions where there are any."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlip.core.errors import UserError
from qlip.data.folders import card_name, checked_label, sha256_of, stamp_of
from qlip.data.items import Item
from qlip.data.remote import RemoteShard, Shard
from qlip.data.sample_parts import ShardConfig, captions_of
from qlip.data.shard_cache import promised_samples
from qlip.data.shard_list import expand_shards, split_sources
from qlip.data.tar_reader import RawSample, SampleRejected, Skip, iterate_tar, json_record

CLASS_NAMES_FILE = "classnames.txt"  # CLIP_benchmark's


@dataclass(kw_only=True, slots=True)
class ShardSource:
    """Samples of tar shards."""

    config: ShardConfig
    """Which members are the picture and the caption."""
    shards: list[Shard]
    name: str
    class_names: tuple[str, ...]
    num_items: int | None
    """As `sizes.json` or `_stats.json` promise, when they do for every shard."""
    has_labels: bool = field(init=False, default=True)
    """Only reading tells."""

    def identity(self) -> str:
        """sha256 over names, sizes and times of the shards; of remote ones over addresses and promised counts."""
        return sha256_of(
            f"{shard.name}\0{stamp_of(shard)}" if isinstance(shard, Path) else f"{shard}\0{promised_samples(shard)}"
            for shard in self.shards
        )

    def items(self) -> Iterator[Item | Skip]:
        """Shard by shard, in file order. Raises `UserError` for a key that two shards have, and for too high labels."""
        shard_of_key: dict[str, int] = {}
        for number, shard in enumerate(self.shards):
            for sample in iterate_tar(shard, max_sample_bytes=self.config.limits.max_bytes):
                first = shard_of_key.setdefault(sample.key, number) if sample.key else number
                if first != number:
                    raise UserError(
                        f"key {sample.key} is in {self.shards[first]} and in {shard}: results are told apart by key; "
                        "score the shards one set at a time or write them with keys of their own"
                    )
                yield sample if isinstance(sample, Skip) else self._item(sample)

    def _item(self, sample: RawSample) -> Item | Skip:
        try:
            record = json_record(sample) if "json" in sample.fields else {}
            picture = next((sample.fields[name] for name in self.config.image_fields if name in sample.fields), None)
            if picture is None:
                raise SampleRejected("missing image")
            captions, label = _captions(sample, self.config), _label(sample, record)
        except SampleRejected as rejected:
            return Skip(key=sample.key, reason=str(rejected), shard=sample.shard)
        label = checked_label(label, class_names=self.class_names, key=sample.key, source=sample.shard)
        return Item(key=sample.key, image=picture, captions=captions, label=label, record=record)


def open_shards(spec: str) -> ShardSource:
    """Shards as `expand_shards` reads them, with the names of `classnames.txt` beside them or in the folder above.

    A label is the number in the member `cls`, else `label` or `cls` of the json. A sample may lack caption and label.
    Raises `UserError` as `expand_shards` does, and for different `classnames.txt` beside different shards.
    """
    shards = expand_shards(spec)
    num_items: int | None = 0
    for shard in shards:
        promised = promised_samples(shard)
        num_items = None if num_items is None or promised is None else num_items + promised
        if num_items is None:
            break  # of remote shards every count is a request
    return ShardSource(
        config=ShardConfig(shards=spec),
        shards=shards,
        name=" + ".join(_part_name(part) for part in split_sources(spec)),
        class_names=_class_names(shards),
        num_items=num_items,
    )


def read_names(path: Path) -> tuple[str, ...]:
    """The lines of a file of class names; blank lines at the end are left out.

    Raises `UserError` for what cannot be read, is not UTF-8 or has an empty line between names.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().split("\n")]
    except OSError as error:
        raise UserError(
            f"class names {path} cannot be read: {error.strerror}; give a text file, one name a line"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"class names {path} are not UTF-8 text; give a text file, one name a line") from None
    if "" in lines:
        raise UserError(f"class names {path} line {lines.index('') + 1} is empty; give one name a line")
    return tuple(lines)


def _captions(sample: RawSample, config: ShardConfig) -> tuple[str, ...]:
    try:
        return tuple(captions_of(sample, config=config).values())
    except SampleRejected as rejected:
        if str(rejected) in ("missing caption", "empty caption"):
            return ()
        raise


def _label(sample: RawSample, record: dict[str, Any]) -> int | None:
    value: object = record.get("label", record.get("cls"))
    if "cls" in sample.fields:
        try:
            value = int(sample.fields["cls"])
        except ValueError:
            raise SampleRejected("bad label: cls is not a whole number") from None
    if not isinstance(value, int) or isinstance(value, bool):
        return None  # a json may call anything a label
    if value < 0:
        raise SampleRejected(f"bad label: {value}")
    return value


def _class_names(shards: list[Shard]) -> tuple[str, ...]:
    folders = {shard.parent for shard in shards if isinstance(shard, Path)}
    files = [file for folder in sorted(folders) if (file := _names_file(folder)) is not None]
    names = {read_names(file): file for file in files}
    if len(names) > 1:
        first, second, *_ = names.values()
        raise UserError(f"{first} and {second} name different classes; score the shards one set at a time")
    return next(iter(names), ())


def _names_file(folder: Path) -> Path | None:
    folder = folder.absolute()
    files = (folder / CLASS_NAMES_FILE, folder.parent / CLASS_NAMES_FILE)
    return next((file for file in files if file.is_file()), None)


def _part_name(part: str) -> str:
    if "://" in part and not part.startswith("file://"):
        return RemoteShard(part).name
    return card_name(Path(re.sub("^file://", "", part)).expanduser())
