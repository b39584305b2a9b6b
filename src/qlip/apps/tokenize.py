"""`qlip tokenize MODEL SRC OUT`: pictures to a token store, on this machine or a Ray cluster, resumed where it stopped.

    source -> parts (a shard each, or 10,000 items) -> token_parts.py makes OUT/<part>.parquet of each -> OUT is a store

Parts are cut before anything is decoded and a file appears whole or not at all, so what exists is finished, and rows
are the same after any kill and with any engine.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from qlip.apps.encoding import TokenizeOptions
from qlip.apps.token_parts import PartDone, PartMaker, finished, skipped_file
from qlip.core import pixels
from qlip.core.config import differences, to_json
from qlip.core.errors import UserError
from qlip.core.log import ProgressLine, console, progress
from qlip.data.caption_fields import check_fields
from qlip.data.finished_files import only_writer
from qlip.data.items import Source
from qlip.data.ledger import Ledger
from qlip.data.source_parts import Part, limited_parts, parts_of
from qlip.data.sources import open_source
from qlip.data.token_files import TokenStoreInfo
from qlip.data.token_store import TokenStore
from qlip.data.views import VIEWS, resized_side
from qlip.engine.parallel import pick_device
from qlip.engine.run_folder import make_writable
from qlip.models.baselines import MINUS_ONE_TO_ONE
from qlip.models.image_tokenizer import ImageTokenizer, QLIPTokenizer, VQTokenizer, open_image_tokenizer

PART = 10_000  # items of a file that is made of no shard; a kill loses at most so many
VERSIONS = ("qlip", "torch", "transformers", "pillow", "pyarrow")
MAY_CHANGE = ("created", "versions", "picture_decoder", "encoding.device", "decoder.path", "codec")  # when resumed


@dataclass(kw_only=True, slots=True, frozen=True)
class RayOptions:
    """Where and how wide a job runs on Ray."""

    address: str = ""
    """Of a cluster; empty starts one on this machine, `auto` finds the one that this machine belongs to."""
    actors: int = 0
    """Tokenizers at work; 0 is as many as the cluster has room for."""
    gpus: float = 1.0
    """GPUs of each; 0 computes on CPUs."""
    cpus: float = 0.0
    """CPUs of each; 0 is one and its decoders."""


def tokenize_images(
    src: str,
    options: TokenizeOptions,
    *,
    images: str = "",
    split: str = "train",
    max_samples: int = 0,
    part_items: int = PART,
    engine: Literal["local", "ray"] = "local",
    ray: RayOptions | None = None,
) -> Path:
    """Write the bits and captions of every picture of `src` to `options.out`, which `TokenStore` opens; returns it.

    `images` and `split` are those of `open_source`. `max_samples` takes the first so many, 0 all. `part_items` is the
    size of files that are not made of shards. Finished files of an earlier call are kept.

    Raises `UserError` for a model or data that cannot be opened, a folder of other tokens, a caption field that no
    picture has, a larger share than `options.max_skip_share` of unusable pictures, keys that come twice, a full disk.
    """
    options = replace(options, out=options.out.expanduser())
    _refuse_impossible(src, options, max_samples=max_samples, part_items=part_items)
    tokenizer = open_image_tokenizer(options.model, image_size=options.image_size)
    source = open_source(src, images=images, split=split)
    check_fields(source, options.caption_fields)
    parts = parts_of(source, max_items=part_items)
    parts = limited_parts(parts, max_samples) if max_samples else parts
    taken = {
        "caption_fields": list(options.caption_fields),
        "max_samples": max_samples,
        "parts": len(parts),
        "part_items": part_items,
    }
    said = {"name": source.name, "identity": source.identity(), **taken}
    info = store_info(tokenizer, options, said, class_names=source.class_names)
    _refuse_other_tokens(options.out, info)
    make_writable(options.out)
    with only_writer(options.out):
        job = _Job(options=options, info=info, total=min(filter(None, (max_samples, source.num_items)), default=0))
        todo = job.count_finished(parts)
        if engine == "ray":
            job.make_on_ray(todo, ray or RayOptions())
        else:
            job.make_here(todo, tokenizer)
        return job.concluded(source)


def _refuse_impossible(src: str, options: TokenizeOptions, *, max_samples: int, part_items: int) -> None:
    if min(options.batch_size, part_items) < 1 or min(max_samples, options.workers) < 0:
        raise UserError(
            f"batch_size {options.batch_size}, max_samples {max_samples}, workers {options.workers}: give a batch at "
            "least 1, the others 0 or more"
        )
    if not 0 <= options.max_skip_share <= 1:
        raise UserError(f"max_skip_share {options.max_skip_share:g} is no share: give 0 to 1")
    place = Path(src).expanduser()
    if place.is_dir() and options.out.resolve() == place.resolve():
        raise UserError(f"OUT {options.out} is where the pictures are: choose a folder of its own for the tokens")


@dataclass(kw_only=True, slots=True)
class _Job:
    """All parts, and what is known of them."""

    options: TokenizeOptions
    info: TokenStoreInfo
    total: int
    """Items of the source; 0 where only reading tells."""
    num_done: int = 0
    """Items and skips of finished parts and of what is being made."""
    ledger: Ledger = None  # type: ignore[assignment]  # made below

    def __post_init__(self) -> None:
        listed = str(skipped_file(self.options.out, "*"))
        self.ledger = Ledger(None, max_skip_share=self.options.max_skip_share, listed=listed)

    def count_finished(self, parts: list[Part]) -> list[Part]:
        """The parts that are still to be made; those of an earlier call are counted."""
        todo = []
        for part in parts:
            done = finished(self.options.out, part[0], num_views=len(self.info.views))
            if done is None:
                todo.append(part)
            else:
                self.ledger.add(num_good=done.num_good, skipped=done.skipped)
                self.num_done += done.num_entries
        return todo

    def make_here(self, parts: list[Part], tokenizer: ImageTokenizer) -> None:
        """In this process and its decoders."""
        maker = PartMaker(self.options, self.info, tokenizer=tokenizer)
        maker.ledger.load_state_dict(self.ledger.state_dict())
        threads = torch.get_num_threads()
        if maker.device.type == "cpu":  # decoders and encoder share the cores
            torch.set_num_threads(max(1, threads - self.options.workers))
        try:
            with progress("tokenize", self.total, start=self.num_done) as bar:
                self._collect(maker.make(parts, on_rows=self._moved(bar)))
        finally:
            torch.set_num_threads(threads)
            maker.close()

    def make_on_ray(self, parts: list[Part], ray: RayOptions) -> None:
        """On the actors of a cluster."""
        from qlip.apps.tokenize_ray import make_on_ray

        with progress("tokenize", self.total, start=self.num_done) as bar:
            self._collect(
                make_on_ray(
                    self.options,
                    self.info,
                    parts,
                    address=ray.address,
                    num_actors=ray.actors,
                    gpus_per_actor=ray.gpus,
                    cpus_per_actor=ray.cpus or 1 + self.options.workers,
                    on_rows=self._moved(bar),
                )
            )

    def concluded(self, source: Source) -> Path:
        """Check the whole store and say what it is."""
        folder = self.options.out
        self.ledger.check()
        if not self.ledger.num_good:
            raise UserError(f"{source.name}: no usable picture; give data that have some")
        TokenStore(folder).refuse_repeated_keys()
        rows, skipped = self.ledger.num_good * len(self.info.views), self.ledger.skipped
        bits = f"{self.info.num_tokens} x {self.info.num_bits} bits in {folder}"
        views = f" in {len(self.info.views)} views: {rows} rows" if len(self.info.views) > 1 else ""
        left_out = f", {skipped.total()} skipped ({folder}/*.skipped.jsonl)" if skipped else ""
        console.print(f"{self.ledger.num_good} pictures{views} of {bits}{left_out}", markup=False)
        return folder

    def _collect(self, parts: Iterator[PartDone]) -> None:
        for done in parts:
            self.ledger.add(num_good=done.num_good, skipped=done.skipped)

    def _moved(self, bar: ProgressLine) -> Callable[[int], None]:
        def moved(num: int) -> None:
            self.num_done += num
            bar.update(self.num_done)

        return moved


def store_info(
    tokenizer: ImageTokenizer, options: TokenizeOptions, source: dict[str, Any], *, class_names: tuple[str, ...] = ()
) -> TokenStoreInfo:
    """What the files of a store say of themselves."""
    said = tokenizer.measured.identity() if isinstance(tokenizer, QLIPTokenizer | VQTokenizer) else {}
    is_qlip = isinstance(tokenizer, QLIPTokenizer)
    mean, std = (pixels.CLIP_MEAN, pixels.CLIP_STD) if is_qlip else (MINUS_ONE_TO_ONE.mean, MINUS_ONE_TO_ONE.std)
    size = tokenizer.image_size
    return TokenStoreInfo(
        encoder_fingerprint=tokenizer.encoder_fingerprint,
        num_bits=tokenizer.num_bits,
        grid=tokenizer.grid,
        decoder={
            "name": tokenizer.name,
            "fingerprint": said.get("model_fingerprint", ""),
            "path": str(Path(options.model).expanduser().absolute()) if Path(options.model).exists() else options.model,
        },
        transform={
            "size": size,
            "resize": resized_side(size, options.views),
            "filter": "bicubic",
            "antialias": True,
            "crop": "centre",
            "mean": list(mean),
            "std": list(std),
        },
        picture_decoder={"library": "pillow", "version": version("pillow")},
        encoding={
            "dtype": said.get("dtype", "") if options.precision == "fp32" else "bfloat16 autocast",
            "device": pick_device(options.device).type,
            "batch_size": options.batch_size,
            "batch_invariant": options.batch_invariant,
            "compressed": options.compress,
        },
        versions={name: version(name) for name in VERSIONS},
        source=source,
        views=VIEWS[options.views],
        class_names=class_names,
        embedding_width=tokenizer.embedding_width if options.embeddings and isinstance(tokenizer, QLIPTokenizer) else 0,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def default_workers(device: str) -> int:
    """Decoders beside an encoder: half the cores if it needs the other half, else all but one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores // 2 if pick_device(device).type == "cpu" else min(32, cores - 1)


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
