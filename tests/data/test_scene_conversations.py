"""Scenes as conversations: every question with its answer, every picture found in the shards by its name."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from shard_files import write_tar

from qlip.core.errors import UserError
from qlip.data.conversations import open_conversations
from qlip.data.image_files import open_image_files
from qlip.data.scene_conversations import write_scene_conversations
from qlip.data.scene_shards import write_scene_shards
from qlip.data.scenes import SceneConfig
from qlip.data.tar_reader import RawSample, iterate_tar


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scene_shards(folder, num=12, split="train", config=SceneConfig(image_size=16))
    return folder


def scenes(shards: Path) -> dict[str, dict]:
    samples = [sample for path in sorted(shards.glob("*.tar")) for sample in iterate_tar(path)]
    return {sample.key: json.loads(sample.fields["json"]) for sample in samples if isinstance(sample, RawSample)}


@pytest.mark.parametrize("captions", [False, True])
def test_every_scene_becomes_a_conversation(shards: Path, tmp_path: Path, captions: bool) -> None:
    written = write_scene_conversations(str(shards), tmp_path / "new/c.json", captions=captions)
    conversations, images = open_conversations(tmp_path / "new/c.json"), open_image_files(str(shards))
    records = scenes(shards)
    assert not conversations.rejected and [c.key for c in conversations] == list(records)
    for conversation in conversations:
        record = records[conversation.key]
        texts = [part["text"] for m in conversation.messages for part in m["content"] if part["type"] == "text"]
        pairs = [(question["question"], question["answer"]) for question in record["questions"]]
        expected = [("Describe the picture.", record["captions"]["dense"])] if captions else pairs
        assert sorted(zip(texts[::2], texts[1::2], strict=True)) == sorted(expected)
        assert conversation.messages[0]["content"][0] == {"type": "image"}
        with Image.open(io.BytesIO(images.read(conversation.images[0]))) as image:
            assert image.size == (16, 16)
    assert written.num_records == 12 and written.num_skipped == 0
    assert written.num_turns == (12 if captions else sum(len(record["questions"]) for record in records.values()))
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new/c.json"]


def test_keys_are_unique_across_shards(shards: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.tar"
    copy.write_bytes((shards / "00000.tar").read_bytes())
    with pytest.raises(
        UserError, match=r"key 000000000 is in .*00000.tar and in .*copy.tar: pictures are found by key"
    ):
        write_scene_conversations(f"{shards}::{copy}", tmp_path / "c.json")
    assert not list(tmp_path.glob("c.json*"))


def test_what_is_no_scene_is_skipped_or_refused(shards: Path, tmp_path: Path) -> None:
    other = [("x.png", b"x"), ("x.json", b'{"questions": 3}'), ("y.png", b"y"), ("y.json", b"{"), ("z.txt", b"z")]
    write_tar(tmp_path / "other.tar", [*other, ("w.json", b'{"questions": [{"question": "A", "answer": "b"}]}')])
    written = write_scene_conversations(f"{shards}::{tmp_path / 'other.tar'}", tmp_path / "c.json")
    assert (written.num_records, written.num_skipped) == (12, 4)
    with pytest.raises(UserError, match="no scenes with questions"):
        write_scene_conversations(str(tmp_path / "other.tar"), tmp_path / "d.json")
    assert not list(tmp_path.glob("d.json*"))


def test_a_file_that_cannot_be_written_is_one_line(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_scene_conversations(str(shards), tmp_path / "file/c.json")
