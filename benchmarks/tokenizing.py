"""Images per second of `qlip tokenize` against its two halves alone, and what a million pictures cost.

.venv/bin/python benchmarks/tokenizing.py                 # four minutes on two cores; writes results/tokenize_cpu.json
.venv/bin/python benchmarks/tokenizing.py --device cuda   # B-16 at 256 px; writes results/tokenize_cuda.json

On a CPU the network of `scenes_tiny` and its scenes of 48 px; on a GPU that of `qlip_b_16_256`, with random weights,
and photographs' likes: 500 x 375 JPEG of noise at all scales, quality 90. In every round the three take turns over
the same shards: `decode` reads and decodes them with the same workers and throws the pixels away, `encode` sends
decoded batches through the encoder and fetches the bits, `whole` is the command's own path from shards to files. A
rate is the median over rounds; `share` is the median of whole / min(decode, encode) of each round. Opening the model
and starting the workers is not in the rates (`start_seconds`).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import tarfile
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.table import Table

from qlip.apps.decode_pool import DecodePool
from qlip.apps.decoding import DecodeOptions
from qlip.apps.demo import machine
from qlip.apps.encoding import TokenizeOptions, encoder_of
from qlip.apps.token_parts import PartMaker
from qlip.apps.tokenize import default_workers, store_info
from qlip.core.log import console
from qlip.data.scene_shards import write_scene_shards
from qlip.data.scenes import SceneConfig
from qlip.data.source_parts import Part, parts_of
from qlip.data.sources import open_source
from qlip.engine.run_folder import versions
from qlip.models.image_tokenizer import ImageTokenizer, open_image_tokenizer
from qlip.models.qlip.loading import save_model
from qlip.models.qlip.modeling import QLIPModel
from qlip.models.qlip.processing import QLIPProcessor
from qlip.recipes import find_recipe

RESULTS = Path(os.environ.get("OUT", Path(__file__).parent / "results"))
RECIPES = {"cpu": "scenes_tiny", "cuda": "qlip_b_16_256"}
NUM_PICTURES = {"cpu": 8_000, "cuda": 20_000}
BATCH_SIZE = {"cpu": 100, "cuda": 256}
SHARD = 1_000
SCENE_SIZE = 48
PHOTO_SIZE = (500, 375)  # ImageNet's usual
NUM_PHOTOS = 500  # different ones; shards repeat them under new keys
ENCODE_BATCHES = {"cpu": 20, "cuda": 30}
MILLION = 1_000_000


def photograph(seed: int) -> bytes:
    """A JPEG of coloured noise whose amplitude falls with frequency, as photographs' does."""
    random = np.random.default_rng(seed)
    width, height = PHOTO_SIZE
    total = np.zeros((height, width, 3), np.float32)
    for level in range(1, 9):
        shape = (max(2, height >> (8 - level)), max(2, width >> (8 - level)))
        noise = random.normal(0, 45 * 2.0 ** (-0.2 * level), (*shape, 3)).astype(np.float32)
        for channel in range(3):
            plane = Image.fromarray(noise[..., channel]).resize(PHOTO_SIZE, Image.Resampling.BILINEAR)
            total[..., channel] += np.asarray(plane)
    buffer = io.BytesIO()
    Image.fromarray((total + 128).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_photographs(folder: Path, *, num: int) -> float:
    """Shards of `num` pictures; returns the mean size of a JPEG in bytes."""
    folder.mkdir()
    with ProcessPoolExecutor() as pool:
        photos = list(pool.map(photograph, range(NUM_PHOTOS), chunksize=20))
    for first in range(0, num, SHARD):
        with tarfile.open(folder / f"{first // SHARD:05d}.tar", "w") as tar:
            for number in range(first, min(first + SHARD, num)):
                for ending, content in (("jpg", photos[number % NUM_PHOTOS]), ("txt", f"picture {number}".encode())):
                    member = tarfile.TarInfo(f"{number:09d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return float(np.mean([len(photo) for photo in photos]))


def save_tokenizer(folder: Path, recipe: str) -> Path:
    """A tokenizer of a recipe's size with random weights."""
    config = find_recipe(recipe).model  # type: ignore[union-attr]
    torch.manual_seed(0)
    processor = QLIPProcessor.for_size(config.image_size, context_length=config.context_length)
    save_model(QLIPModel(config.build_config()).eval(), folder=folder, processor=processor, step=0)
    return folder


class Stages:
    """The three ways of one setting, each with the same decoders and encoder."""

    def __init__(self, tokenizer: ImageTokenizer, parts: list[Part], options: TokenizeOptions) -> None:
        self.tokenizer, self.options = tokenizer, options
        start = time.perf_counter()
        self.maker = PartMaker(options, store_info(tokenizer, options, {}), tokenizer=tokenizer)
        self.whole(parts[:1])  # workers start, kernels are chosen
        self.start_seconds = time.perf_counter() - start
        decoding = DecodeOptions(image_size=tokenizer.image_size, views="centre", caption_fields=())
        self.decoders = DecodePool(decoding, workers=options.workers)
        self.decode(parts[:1])

    def close(self) -> None:
        """End all workers."""
        self.maker.close()
        self.decoders.close()

    def whole(self, parts: list[Part]) -> float:
        """Pictures per second from shards to files."""
        shutil.rmtree(self.options.out, ignore_errors=True)
        self.options.out.mkdir()
        start = time.perf_counter()
        num = sum(done.num_good for done in self.maker.make(parts, on_rows=lambda _: None))
        return num / (time.perf_counter() - start)

    def decode(self, parts: list[Part]) -> float:
        """Pictures per second from shards to pixels."""
        start = time.perf_counter()
        num = sum(len(batch.keys) for _, batch in self.decoders.decode(parts, size=self.options.batch_size))
        return num / (time.perf_counter() - start)

    def encode(self, num_batches: int) -> float:
        """Pictures per second from pixels to bits."""
        size = self.tokenizer.image_size
        shape = (self.options.batch_size, 3, size, size)
        pixels = [torch.randint(0, 256, shape, dtype=torch.uint8) for _ in range(2)]
        encode = encoder_of(self.tokenizer, self.options)
        encode(pixels[0]).wait()
        start = time.perf_counter()
        before = encode(pixels[1])
        for number in range(num_batches - 1):
            following = encode(pixels[number % 2])
            before.wait()
            before = following
        before.wait()
        return num_batches * len(pixels[0]) / (time.perf_counter() - start)


def compare(tokenizer: ImageTokenizer, parts: list[Part], options: TokenizeOptions, *, rounds: int) -> dict[str, Any]:
    """Rates of one setting."""
    threads = torch.get_num_threads()
    on_cpu = tokenizer.device.type == "cpu"
    torch.set_num_threads(max(1, threads - options.workers) if on_cpu else threads)  # as `qlip tokenize` does
    stages = Stages(tokenizer, parts, options)
    found: list[dict[str, float]] = []
    for _ in range(rounds):
        rates = {
            "decode": stages.decode(parts),
            "encode": stages.encode(ENCODE_BATCHES[tokenizer.device.type]),
            "whole": stages.whole(parts),
        }
        found.append(rates | {"share": rates["whole"] / min(rates["decode"], rates["encode"])})
    stages.close()
    torch.set_num_threads(threads)
    row: dict[str, Any] = {name: median(rates[name] for rates in found) for name in found[0]}
    row["hours_per_million"] = MILLION / row["whole"] / 3600
    setting = {"precision": options.precision, "batch_size": options.batch_size, "workers": options.workers}
    return setting | {"embeddings": options.embeddings} | row | {"start_seconds": stages.start_seconds}


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--recipe", default="", help="whose network; by default the device's")
    parser.add_argument("--pictures", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=-1)
    parser.add_argument("--batch-size", type=int, default=0, help="100, on a GPU 256")
    parser.add_argument("--precisions", nargs="+", default=None)
    arguments = parser.parse_args()
    place = torch.device(arguments.device)
    recipe, num = arguments.recipe or RECIPES[place.type], arguments.pictures or NUM_PICTURES[place.type]
    workers = default_workers(place.type) if arguments.workers < 0 else arguments.workers
    with tempfile.TemporaryDirectory() as folder:
        data, bytes_each = Path(folder) / "shards", 0.0
        if place.type == "cpu":
            write_scene_shards(data, num=num, split="train", config=SceneConfig(image_size=SCENE_SIZE))
        else:
            bytes_each = write_photographs(data, num=num)
        tokenizer = open_image_tokenizer(save_tokenizer(Path(folder) / "model", recipe))
        tokenizer.to(place)
        parts = parts_of(open_source(str(data)), max_items=SHARD)
        rows = []
        for precision in arguments.precisions or (("fp32", "bf16") if place.type == "cuda" else ("fp32",)):
            options = TokenizeOptions(
                model="",
                out=Path(folder) / "store",
                batch_size=arguments.batch_size or BATCH_SIZE[place.type],
                precision=precision,
                device=place.type,
                workers=workers,
            )
            rows.append(compare(tokenizer, parts, options, rounds=arguments.rounds))
        size = sum(file.stat().st_size for file in (Path(folder) / "store").glob("*.parquet")) / num
    table = Table(title=f"{recipe}, {num} pictures on {machine()}", title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)
    found = {
        "machine": machine(),
        "gpu": torch.cuda.get_device_name() if place.type == "cuda" else None,
        "versions": versions(),
        "recipe": recipe,
        "image_size": tokenizer.image_size,
        "pictures": num,
        "rounds": arguments.rounds,
        "jpeg_bytes": bytes_each or None,
        "store_bytes_each": size,
        "settings": rows,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"tokenize_{place.type}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
