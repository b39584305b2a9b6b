"""The questions of scenes as conversations in LLaVA's format: an assistant can be trained without other data."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlip.core.errors import UserError
from qlip.core.log import progress
from qlip.data.sample_parts import ShardConfig
from qlip.data.shard_list import expand_shards
from qlip.data.shards import seeded_random
from qlip.data.tar_reader import RawSample, SampleRejected, Skip, iterate_tar, json_record

CAPTION_REQUEST = "Describe the picture."  # `plain` drops it


@dataclass(kw_only=True, slots=True, frozen=True)
class WrittenConversations:
    """What was written."""

    num_records: int
    num_turns: int
    """Answers in all records."""
    num_skipped: int
    """Samples of the shards that are broken or no scenes."""


def write_scene_conversations(shards: str, out: Path, *, captions: bool = False) -> WrittenConversations:
    """One record a scene: `id` its key, `image` its picture's member name, its questions as turns in a random order.

    `captions` writes one turn instead, answered by the dense caption. The pictures are found with the same shards as
    images. Raises `UserError` for a key that two shards have (a picture must be found by its name), for shards without
    scenes, and for a file that cannot be written.
    """
    paths = expand_shards(shards)
    shard_of_key: dict[str, int] = {}
    num_turns = num_skipped = 0
    temporary = out.with_name(out.name + ".tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file, progress("scenes", len(paths), unit="shards") as bar:
            for number, shard in enumerate(paths, start=1):
                for found in iterate_tar(shard):
                    record = None if isinstance(found, Skip) else _record(found, captions=captions)
                    if record is None:
                        num_skipped += 1
                        continue
                    first = shard_of_key.setdefault(record["id"], number)
                    if first != number:
                        raise UserError(
                            f"key {record['id']} is in {paths[first - 1]} and in {shard}: pictures are found by key; "
                            "take shards of one `qlip data scenes` at a time"
                        )
                    file.write("[\n" if not num_turns else ",\n")
                    json.dump(record, file, ensure_ascii=False)
                    num_turns += len(record["conversations"]) // 2
                bar.update(number)
            file.write("\n]\n")
        if not num_turns:
            raise UserError(f"no scenes with questions in {shards}: give shards of `qlip data scenes`")
        temporary.replace(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; free space or choose another folder") from None
    finally:
        with suppress(OSError):  # the folder may be what could not be made
            temporary.unlink()
    return WrittenConversations(num_records=len(shard_of_key), num_turns=num_turns, num_skipped=num_skipped)


def _record(sample: RawSample, *, captions: bool) -> dict[str, Any] | None:
    """The scene as LLaVA writes it; None for what is no scene."""
    ending = next((name for name in ShardConfig(shards="").image_fields if name in sample.fields), None)
    try:
        scene = json_record(sample)
        if captions:
            pairs = [(CAPTION_REQUEST, scene["captions"]["dense"])]
        else:
            pairs = [(question["question"], question["answer"]) for question in scene["questions"]]
    except (SampleRejected, KeyError, TypeError):
        return None
    if ending is None or not pairs or not all(isinstance(text, str) and text for pair in pairs for text in pair):
        return None
    seeded_random("turns", sample.key).shuffle(pairs)  # an assistant is asked any kind of question first
    turns = []
    for number, (question, answer) in enumerate(pairs):
        turns.append({"from": "human", "value": question if number else f"<image>\n{question}"})
        turns.append({"from": "gpt", "value": answer})
    return {"id": sample.key, "image": f"{sample.key}.{ending}", "conversations": turns}
