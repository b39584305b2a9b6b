"""Write scenes as img2dataset writes downloaded pictures: tar shards with image, txt and json, plus their parquet.

    00000.tar  00000.parquet  00000_stats.json        key = shard (5 digits) + index (4 digits)

Besides img2dataset's columns the json holds the scene's ground truth: `scene` (objects, background, texture),
`class_name`, `captions` (short, medium, dense), `questions` and `story`.
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
from qlip.data.scene_text import dense_caption, medium_caption, question_answers, short_caption, story
from qlip.data.scenes import COLOUR_NAMES, SHAPE_NAMES, SceneConfig, render, sample_scenes, scene_records

SHARD_SIZE = 1000
ENCODERS: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG", "compress_level": 1},
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    "webp": {"format": "WEBP", "quality": 95},
}


def write_scene_shards(
    out: Path, *, num: int, split: Literal["train", "test"], config: SceneConfig, image_format: str = "png"
) -> list[Path]:
    """Write `num` scenes in shards of 1,000 under `out` and return the tar paths; complete shards are kept.

    Raises `UserError` for a folder that cannot be written, a wrong count, or shards of other scenes already there.
    """
    if num < 1:
        raise UserError(f"--num {num}: ask for at least one scene")
    if image_format not in ENCODERS:
        raise UserError(f"format {image_format!r} is unknown; known: {', '.join(ENCODERS)}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        _same_scenes_or_refuse(out, split=split, config=config, image_format=image_format)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; choose another folder") from None
    paths = []
    with progress(f"scenes {split}", num, unit="scenes") as bar:
        for shard, first in enumerate(range(0, num, SHARD_SIZE)):
            count = min(SHARD_SIZE, num - first)
            paths.append(_write_shard(out, shard, count, split=split, config=config, image_format=image_format))
            bar.update(first + count)
    return paths


def _same_scenes_or_refuse(out: Path, *, split: str, config: SceneConfig, image_format: str) -> None:
    description = {
        "split": split,
        "image_size": config.image_size,
        "object_counts": list(config.object_counts),
        "seed": config.seed,
        "format": image_format,
    }
    record = out / "scenes.json"
    if record.exists() and json.loads(record.read_text()) != description:
        raise UserError(f"{out} holds other scenes ({record.read_text()}); choose another folder or delete this one")
    record.write_text(json.dumps(description))


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
    stats = {
        "count": count,
        "successes": count,
        "failed_to_download": 0,
        "failed_to_resize": 0,
        "status_dict": {"success": count},
    }
    stats_path.write_text(json.dumps(stats))
    temporary.replace(tar_path)
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
