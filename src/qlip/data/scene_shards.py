"""Write scenes as img2dataset writes downloaded pictures: tar shards with image, txt and json, plus their parquet.

    00000.tar  00000.parquet  00000_stats.json        key = shard (5 digits) + index (4 digits)

Besides img2dataset's columns the json holds the scene's ground truth: `scene` (objects, background, texture),
`class_name`, `captions` (shape, short, medium, dense), `questions` and `story`.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from qlip.core.errors import UserError
from qlip.core.log import progress
from qlip.data.scene_text import dense_caption, medium_caption, question_answers, shape_caption, short_caption, story
from qlip.data.scenes import COLOUR_NAMES, SHAPE_NAMES, SceneConfig, render, sample_scenes, scene_records

SHARD_SIZE = 1000
MIN_IMAGE_SIZE = 8
ENCODERS: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG", "compress_level": 1},
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    "webp": {"format": "WEBP", "quality": 95},
}


def write_scene_shards(
    out: Path, *, num: int, split: Literal["train", "test"], config: SceneConfig, image_format: str = "png"
) -> list[Path]:
    """Write `num` scenes in shards of 1,000 under `out` and return the tar paths; complete shards are kept.

    Raises `UserError` for a folder that cannot be written, impossible numbers, or shards already there that hold other
    scenes or more of them.
    """
    _refuse_impossible(num, config=config, image_format=image_format)
    paths = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        _same_scenes_or_refuse(out, num=num, split=split, config=config, image_format=image_format)
        with progress(f"scenes {split}", num, unit="scenes") as bar:
            for shard, first in enumerate(range(0, num, SHARD_SIZE)):
                count = min(SHARD_SIZE, num - first)
                paths.append(_write_shard(out, shard, count, split=split, config=config, image_format=image_format))
                bar.update(first + count)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; free space or choose another folder") from None
    return paths


def _refuse_impossible(num: int, *, config: SceneConfig, image_format: str) -> None:
    if num < 1:
        raise UserError(f"--num {num}: ask for at least one scene")
    if image_format not in ENCODERS:
        raise UserError(f"format {image_format!r} is unknown; known: {', '.join(ENCODERS)}")
    if config.image_size < MIN_IMAGE_SIZE:
        raise UserError(f"--image-size {config.image_size}: give at least {MIN_IMAGE_SIZE} pixels")
    if min(config.object_counts) < 0 or sum(config.object_counts) <= 0:
        raise UserError(f"--object-counts {config.object_counts}: give probabilities, none negative, not all zero")


def _same_scenes_or_refuse(out: Path, *, num: int, split: str, config: SceneConfig, image_format: str) -> None:
    description = {
        "split": split,
        "image_size": config.image_size,
        "object_counts": list(config.object_counts),
        "seed": config.seed,
        "format": image_format,
    }
    record = out / "scenes.json"
    text = json.dumps(description)
    shards = sorted(out.glob("*.tar"))
    if shards and (not record.exists() or record.read_text() != text):
        found = record.read_text() if record.exists() else f"{len(shards)} shards of unknown origin"
        raise UserError(f"{out} holds other scenes ({found}); choose another folder or delete this one")
    if len(shards) > -(-num // SHARD_SIZE):  # whoever reads the folder would get them all
        raise UserError(f"{out} already holds {len(shards)} shards, more than {num} scenes; choose another folder")
    record.write_text(text)


def _write_shard(out: Path, shard: int, count: int, *, split: str, config: SceneConfig, image_format: str) -> Path:
    stem = f"{shard:05d}"
    tar_path, stats_path = out / f"{stem}.tar", out / f"{stem}_stats.json"
    if tar_path.exists() and stats_path.exists() and json.loads(stats_path.read_text())["successes"] == count:
        return tar_path
    rows = []
    temporary = tar_path.with_suffix(".tar.tmp")
    with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for picture, row in _samples(shard, count, split=split, config=config, image_format=image_format):
            rows.append(row)
            text = json.dumps(row, ensure_ascii=False)
            for field, data in ((image_format, picture), ("json", text.encode()), ("txt", row["caption"].encode())):
                member = tarfile.TarInfo(f"{row['key']}.{field}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    table = pa.Table.from_pylist([{k: v for k, v in row.items() if not isinstance(v, list | dict)} for row in rows])
    pq.write_table(table, out / f"{stem}.parquet")
    stats_path.unlink(missing_ok=True)
    temporary.replace(tar_path)
    stats = {
        "count": count,
        "successes": count,
        "failed_to_download": 0,
        "failed_to_resize": 0,
        "status_dict": {"success": count},
    }
    temporary = stats_path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(stats))
    temporary.replace(stats_path)  # last: a shard with its stats is complete
    return tar_path


def _samples(
    shard: int, count: int, *, split: str, config: SceneConfig, image_format: str
) -> Iterator[tuple[bytes, dict]]:
    """Encoded picture and json row of every scene of a shard; scenes do not depend on `count`."""
    scenes = sample_scenes(SHARD_SIZE, split=split, shard=shard, config=config)
    pictures = render(scenes, image_size=config.image_size).permute(0, 2, 3, 1).numpy()
    for index, record in enumerate(scene_records(scenes)[:count]):
        key = f"{shard:05d}{index:04d}"
        random = Random(f"{config.seed}/{split}/{key}")
        buffer = io.BytesIO()
        Image.fromarray(pictures[index]).save(buffer, **ENCODERS[image_format])
        picture = buffer.getvalue()
        captions = {
            "shape": shape_caption(record, random),
            "short": short_caption(record, random),
            "medium": medium_caption(record, random),
            "dense": dense_caption(record),
        }
        size = config.image_size
        yield (
            picture,
            {
                "url": f"scene://{split}/{config.seed}/{key}",
                "caption": captions["short"],
                "key": key,
                "status": "success",
                "error_message": None,
                "width": size,
                "height": size,
                "original_width": size,
                "original_height": size,
                "exif": "{}",
                "sha256": hashlib.sha256(picture).hexdigest(),
                "class_name": record["class_name"],
                "captions": captions,
                "scene": record,
                "questions": question_answers(record, random, colours=COLOUR_NAMES, shapes=SHAPE_NAMES),
                "story": story(record, random),
            },
        )
