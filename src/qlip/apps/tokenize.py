"""`qlip tokenize MODEL SRC OUT`: pictures to a token store, in this process, resumed where it was stopped.

    source -> parts of 10,000 items -> decode in threads -> batch -> tokenizer -> OUT/00000.parquet, 00001.parquet, ...

Parts are cut before anything is decoded and a file appears whole or not at all, so what exists is finished, and rows
are the same after any kill. Pictures that cannot be used are listed in `00000.skipped.jsonl` beside the part's file.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlip.core import pixels
from qlip.core.config import differences, to_json
from qlip.core.errors import UserError
from qlip.core.images import ImageLimits, ImageRejected, open_image
from qlip.core.log import ProgressLine, console, progress
from qlip.data.caption_fields import captions_of_item, check_fields
from qlip.data.items import Item, Source
from qlip.data.ledger import Ledger, kind_of
from qlip.data.sources import open_source
from qlip.data.tar_reader import Skip
from qlip.data.token_files import TokenRows, TokenStoreInfo, TokenWriter, pack_bits
from qlip.data.token_store import TokenStore
from qlip.data.transforms import prepared_pixels
from qlip.engine.parallel import pick_device
from qlip.engine.run_folder import make_writable
from qlip.models.baselines import MINUS_ONE_TO_ONE
from qlip.models.image_tokenizer import ImageTokenizer, QLIPTokenizer, VQTokenizer, open_image_tokenizer

PART = 10_000  # items of a file; a kill loses at most so many
VERSIONS = ("qlip", "torch", "transformers", "pillow", "pyarrow")
MAY_CHANGE = ("created", "versions", "picture_decoder", "encoding.device")  # between a run and its resumption
Picture = tuple[Item, Tensor, tuple[int, int]]
"""An item, its prepared pixels (3, S, S) uint8, and its own width and height."""


def tokenize_images(
    model: str | Path,
    src: str,
    out: str | Path,
    *,
    image_size: int = 0,
    images: str = "",
    split: str = "train",
    caption_fields: tuple[str, ...] = (),
    max_samples: int = 0,
    batch_size: int = 100,
    batch_invariant: bool = False,
    device: str = "auto",
    max_skip_share: float = 0.05,
    part_items: int = PART,
) -> Path:
    """Write the bits and captions of every picture; returns the folder, which `TokenStore` opens.

    `image_size`, `images` and `split` are those of `open_image_tokenizer` and `open_source`. `caption_fields` of the
    pictures' json replace their plain captions where a picture has any: dots reach inside (`captions.short`), and
    `prompts` are all prompts that are true of a procedural scene. `max_samples` takes the first so many, 0 all.
    `batch_invariant` encodes QLIP's pictures one by one in float32, so that no bit depends on the batch; slower.
    Finished files of an earlier call are kept.

    Raises `UserError` for a model or data that cannot be opened, a folder of other tokens, a caption field that no
    picture has, a larger share than `max_skip_share` of unusable pictures, and a full disk.
    """
    folder = Path(out).expanduser()
    if min(batch_size, part_items) < 1 or max_samples < 0:
        raise UserError(f"batch_size {batch_size}, max_samples {max_samples}: give at least 1, and 0 or more")
    tokenizer = open_image_tokenizer(model, image_size=image_size)
    source = open_source(src, images=images, split=split)
    check_fields(source, caption_fields)
    place = pick_device(device)
    taken = {"caption_fields": list(caption_fields), "max_samples": max_samples, "part_items": part_items}
    encoding = {"device": place.type, "batch_size": batch_size, "batch_invariant": batch_invariant}
    info = _info(tokenizer, encoding, {"name": source.name, "identity": source.identity(), **taken})
    encode = _encoder(tokenizer, place, batch_invariant=batch_invariant)
    _refuse_other_tokens(folder, info)
    make_writable(folder)
    tokenizer.to(place)
    ledger = Ledger(None, max_skip_share=max_skip_share)
    start, total = _count_finished(folder, ledger), min(filter(None, (max_samples, source.num_items)), default=0)
    with progress("tokenize", total, start=start) as bar, ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
        job = _Job(
            info=info,
            encode=encode,
            image_size=tokenizer.image_size,
            caption_fields=caption_fields,
            batch_size=batch_size,
            ledger=ledger,
            num_done=start,
            threads=threads,
            bar=bar,
        )
        for file, entries in _parts(source, folder, max_samples=max_samples, part_items=part_items):
            if not file.exists():
                job.write(file, entries)
    return _concluded(job, source, folder)


@dataclass(kw_only=True, slots=True)
class _Job:
    """What all parts share."""

    info: TokenStoreInfo
    encode: Callable[[Tensor], Tensor]
    """(b, 3, S, S) uint8 -> (b, n, L) bool, both on the CPU."""
    image_size: int
    caption_fields: tuple[str, ...]
    batch_size: int
    ledger: Ledger
    threads: ThreadPoolExecutor
    bar: ProgressLine
    num_done: int
    """Items and skips so far, those of finished files among them."""

    def write(self, file: Path, entries: Iterator[Item | Skip]) -> None:
        """Make one file."""
        skips: list[Skip] = []
        with TokenWriter(file, self.info) as writer:
            waiting: list[Picture] = []
            for entry in self._prepared(entries):
                self.num_done += 1
                if isinstance(entry, Skip):
                    self.ledger.skip(entry, epoch=0)
                    skips.append(entry)
                    continue
                self.ledger.good()
                waiting.append(entry)
                if len(waiting) == self.batch_size:
                    writer.write(self._rows(waiting))
                    waiting = []
            if waiting:
                writer.write(self._rows(waiting))
            _write_skips(_skipped_file(file), skips)  # before the rename: a finished file has them beside it

    def _prepared(self, entries: Iterator[Item | Skip]) -> Iterator[Picture | Skip]:
        """In their order; pictures of the next batch are decoded while this one is encoded."""
        pending: deque[Future[Picture | Skip] | Skip] = deque()
        for entry in chain(entries, [None]):
            while pending and (entry is None or len(pending) >= 2 * self.batch_size):
                first = pending.popleft()
                yield first if isinstance(first, Skip) else first.result()
            if isinstance(entry, Item):
                pending.append(self.threads.submit(_prepare, entry, self.image_size))
            elif entry is not None:
                pending.append(entry)

    def _rows(self, batch: list[Picture]) -> TokenRows:
        """One forward pass, padded with copies of the last picture so that all have one shape."""
        padding = [batch[-1][1]] * (self.batch_size - len(batch))
        bits = self.encode(torch.stack([pixel for _, pixel, _ in batch] + padding))[: len(batch)]
        self.bar.update(self.num_done)
        return TokenRows(
            keys=[item.key.encode("utf-8", "backslashreplace").decode() for item, _, _ in batch],
            packed=pack_bits(bits),
            captions=[captions_of_item(item, fields=self.caption_fields) for item, _, _ in batch],
            sizes=[size for _, _, size in batch],
        )


def _parts(
    source: Source, folder: Path, *, max_samples: int, part_items: int
) -> Iterator[tuple[Path, Iterator[Item | Skip]]]:
    """Runs of so many items or skips, each with its file; what the caller leaves of a run is passed over."""
    entries = _first(source.items(), max_samples) if max_samples else iter(source.items())
    for number in count():
        first = next(entries, None)
        if first is None:
            return
        part = chain([first], islice(entries, part_items - 1))
        yield folder / f"{number:05d}.parquet", part
        deque(part, maxlen=0)


def _first(entries: Iterable[Item | Skip], num: int) -> Iterator[Item | Skip]:
    """As far as item number `num`."""
    for entry in entries:
        yield entry
        num -= isinstance(entry, Item)
        if not num:
            return


def _prepare(item: Item, size: int) -> Picture | Skip:
    try:
        image = open_image(item.image, limits=ImageLimits())
        return item, prepared_pixels(image, size=size), image.size
    except ImageRejected as rejected:
        return Skip(key=item.key, reason=str(rejected), shard="")


def _skipped_file(file: Path) -> Path:
    return file.with_suffix(".skipped.jsonl")


def _count_finished(folder: Path, ledger: Ledger) -> int:
    """Add what the files of an earlier call hold to the ledger; how many items and skips that is."""
    num_skips = 0
    for file in sorted(folder.glob("*.parquet")):
        ledger.num_good += len(TokenStore(file))
        skipped_file = _skipped_file(file)
        for line in skipped_file.read_text().splitlines() if skipped_file.exists() else ():
            skip = json.loads(line)
            ledger.skipped[kind_of(skip["reason"])] += skip["count"]
            num_skips += 1
    return ledger.num_good + num_skips


def _write_skips(file: Path, skips: list[Skip]) -> None:
    try:
        file.unlink(missing_ok=True)
        if skips:
            lines = [{"key": s.key, "reason": s.reason, "shard": s.shard, "count": s.count} for s in skips]
            file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}; free disk space or choose another OUT") from None


def _encoder(tokenizer: ImageTokenizer, place: torch.device, *, batch_invariant: bool) -> Callable[[Tensor], Tensor]:
    if not batch_invariant:
        return lambda pictures: tokenizer.encode(pictures.to(place)).cpu()
    if not isinstance(tokenizer, QLIPTokenizer):
        raise UserError(f"a {tokenizer.name} has no batch-invariant encoding: leave --batch-invariant out")
    measured = tokenizer.measured
    if measured.identity()["dtype"] != "float32":
        raise UserError(
            f"batch-invariant encoding needs float32 weights, these are {measured.identity()['dtype']}: "
            "leave --batch-invariant out"
        )
    return lambda pictures: measured.model.encode(measured.pixel_values(pictures.to(place)), batch_invariant=True).cpu()


def _info(tokenizer: ImageTokenizer, encoding: dict[str, Any], source: dict[str, Any]) -> TokenStoreInfo:
    said = tokenizer.measured.identity() if isinstance(tokenizer, QLIPTokenizer | VQTokenizer) else {}
    is_qlip = isinstance(tokenizer, QLIPTokenizer)
    mean, std = (pixels.CLIP_MEAN, pixels.CLIP_STD) if is_qlip else (MINUS_ONE_TO_ONE.mean, MINUS_ONE_TO_ONE.std)
    size = tokenizer.image_size
    return TokenStoreInfo(
        encoder_fingerprint=tokenizer.encoder_fingerprint,
        num_bits=tokenizer.num_bits,
        grid=tokenizer.grid,
        decoder={"name": tokenizer.name, "fingerprint": said.get("model_fingerprint", "")},
        transform={
            "size": size,
            "filter": "bicubic",
            "antialias": True,
            "crop": "centre",
            "mean": list(mean),
            "std": list(std),
        },
        picture_decoder={"library": "pillow", "version": version("pillow")},
        encoding={"dtype": said.get("dtype", ""), **encoding},
        versions={name: version(name) for name in VERSIONS},
        source=source,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _refuse_other_tokens(folder: Path, info: TokenStoreInfo) -> None:
    """Raise `UserError` when the folder holds tokens that do not belong to this call."""
    if not folder.is_dir() or not any(folder.glob("*.parquet")):
        return
    changed = [
        line for line in differences(to_json(TokenStore(folder).info), to_json(info)) if not line.startswith(MAY_CHANGE)
    ]
    if changed:
        more = f"; and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(f"{folder} holds other tokens: {'; '.join(changed[:3])}{more}; choose another OUT or delete it")


def _concluded(job: _Job, source: Source, folder: Path) -> Path:
    ledger, info = job.ledger, job.info
    ledger.check()
    if not ledger.num_good:
        raise UserError(f"{source.name}: no usable picture; give data that have some")
    skipped = f", {ledger.skipped.total()} skipped ({folder}/*.skipped.jsonl)" if ledger.skipped else ""
    console.print(f"{ledger.num_good} pictures of {info.num_tokens} x {info.num_bits} bits in {folder}{skipped}")
    return folder
