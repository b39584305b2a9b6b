"""Small real files for the data tests: pictures as bytes, and tars with any members, honest or hostile."""

import io
import json
import tarfile
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image

from qlip.data.batches import DataConfig, training_loader
from qlip.data.loaders import TrainingLoader
from qlip.data.sample_parts import ShardConfig
from qlip.data.shards import ShardDataset
from qlip.data.tar_reader import RawSample


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def picture(width: int = 12, height: int = 10, *, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_tar(path: Path, members: list[tuple[str | tarfile.TarInfo, bytes]]) -> Path:
    """Members in the given order; a TarInfo instead of a name is written as it is."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name) if isinstance(name, str) else name
            if member.isreg():
                member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def pair(key: str, *, seed: int = 0, caption: str | bytes | None = None) -> list[tuple[str | tarfile.TarInfo, bytes]]:
    """The members of one good sample."""
    text = caption if isinstance(caption, bytes) else (caption or f"caption of {key}").encode()
    record = json.dumps({"key": key, "captions": {"short": f"short {key}", "dense": f"dense {key}"}}).encode()
    return [(f"{key}.jpg", encoded(picture(seed=seed), "JPEG")), (f"{key}.json", record), (f"{key}.txt", text)]


def write_shards(folder: Path, *, num_shards: int, per_shard: int) -> list[str]:
    """`num_shards` good tars named as img2dataset names them. Returns all keys in order."""
    keys = []
    for shard in range(num_shards):
        names = [f"{shard:05d}{i:04d}" for i in range(per_shard)]
        write_tar(folder / f"{shard:05d}.tar", [member for name in names for member in pair(name)])
        keys += names
    return keys


def decode(image: Image.Image, caption: str, sample: RawSample, random: Random) -> dict:
    return {"size": image.size, "caption": caption, "draw": random.random()}


def dataset(shards: Path | str, *, repeat: bool = False, rank: int = 0, num_ranks: int = 1, **options) -> ShardDataset:
    ledger = options.pop("ledger", None)
    config = ShardConfig(shards=str(shards), **options)
    return ShardDataset(config, decode=decode, repeat=repeat, rank=rank, num_ranks=num_ranks, ledger=ledger)


def write_uneven(folder: Path, *, num_shards: int = 8) -> list[str]:
    """Shards of 1, 2, 3, ... samples."""
    keys = []
    for shard in range(num_shards):
        names = [f"{shard:05d}{i:04d}" for i in range(shard + 1)]
        write_tar(folder / f"{shard:05d}.tar", [member for name in names for member in pair(name)])
        keys += names
    return keys


def lengths(texts: list[str]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([[len(text)] for text in texts]), "attention_mask": torch.ones(len(texts), 1)}


def loader_of(folder: Path | str, *, rank: int = 0, num_ranks: int = 1, seed: int = 0, **options) -> TrainingLoader:
    config = DataConfig(train=str(folder), **({"batch_size": 2, "num_workers": 0, "shuffle_buffer": 5} | options))
    ledger = Path(folder.split("::")[0] if isinstance(folder, str) else folder) / "skipped.jsonl"
    return training_loader(
        config, image_size=4, tokenize=lengths, seed=seed, ledger=ledger, rank=rank, num_ranks=num_ranks
    )
