"""Scene shards: img2dataset's layout, the same bytes for the same seed, and nothing foreign overwritten."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from qlip.core.errors import UserError
from qlip.data import scene_shards
from qlip.data.scene_shards import write_scene_shards
from qlip.data.scenes import HELD_OUT_PAIRS, SceneConfig, render, sample_scenes
from qlip.data.tar_reader import Skip, iterate_tar

CONFIG = SceneConfig(image_size=16)


@pytest.fixture(autouse=True)
def shards_of_forty(monkeypatch) -> None:
    """The real size is 1,000; nothing but the time depends on it."""
    assert scene_shards.SHARD_SIZE == 1000
    monkeypatch.setattr(scene_shards, "SHARD_SIZE", 40)


def write(folder: Path, *, num: int = 50, split: str = "train", config: SceneConfig = CONFIG, **options) -> list[Path]:
    return write_scene_shards(folder, num=num, split=split, config=config, **options)


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("image_format", ["png", "jpg", "webp"])
def test_layout_is_img2datasets(tmp_path, image_format):
    assert write(tmp_path, image_format=image_format) == [tmp_path / "00000.tar", tmp_path / "00001.tar"]
    for shard, count in (("00000", 40), ("00001", 10)):
        content = members(tmp_path / f"{shard}.tar")
        keys = [f"{shard}{i:04d}" for i in range(count)]
        assert list(content) == [f"{key}.{field}" for key in keys for field in (image_format, "json", "txt")]
        records = [json.loads(content[f"{key}.json"]) for key in keys]
        for key, record in zip(keys, records, strict=True):
            assert record["key"] == key and record["status"] == "success"
            assert content[f"{key}.txt"].decode() == record["caption"] == record["captions"]["short"]
            assert list(record["captions"]) == ["shape", "short", "medium", "dense"]
            assert all(record["captions"].values())
            with Image.open(io.BytesIO(content[f"{key}.{image_format}"])) as image:
                assert image.size == (record["width"], record["height"]) == (16, 16)
        table = pq.read_table(tmp_path / f"{shard}.parquet").to_pylist()
        assert [row["key"] for row in table] == keys
        assert table[0].keys() >= {"url", "caption", "key", "status", "width", "height", "sha256"}
        assert [row["sha256"] for row in table] == [record["sha256"] for record in records]
        stats = json.loads((tmp_path / f"{shard}_stats.json").read_text())
        assert stats["count"] == stats["successes"] == count
        assert not any(isinstance(found, Skip) for found in iterate_tar(tmp_path / f"{shard}.tar"))
    assert not list(tmp_path.glob("*.tmp"))


def test_bytes_depend_on_the_seed_alone(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write(tmp_path / name, config=SceneConfig(image_size=16, seed=seed))
    contents = [{name: data for name, (_, data) in state(tmp_path / name).items()} for name in "abc"]
    assert contents[0] == contents[1]
    assert contents[0]["00000.tar"] != contents[2]["00000.tar"] != contents[0]["00001.tar"]


def test_pixels_are_the_renderers(tmp_path):
    write(tmp_path, num=10)
    expected = render(sample_scenes(40, split="train", shard=0, config=CONFIG), image_size=16)[:10].permute(0, 2, 3, 1)
    content = members(tmp_path / "00000.tar")
    pictures = [np.asarray(Image.open(io.BytesIO(data))) for name, data in content.items() if name.endswith(".png")]
    np.testing.assert_array_equal(np.stack(pictures), expected.numpy())


def test_a_second_run_rewrites_nothing(tmp_path):
    write(tmp_path)
    before = {name: stamp for name, stamp in state(tmp_path).items() if name != "scenes.json"}
    write(tmp_path)
    assert {name: stamp for name, stamp in state(tmp_path).items() if name != "scenes.json"} == before


def test_more_scenes_keep_the_first_ones(tmp_path):
    write(tmp_path / "few", num=10)
    write(tmp_path / "all", num=50)
    few, all_of_them = members(tmp_path / "few" / "00000.tar"), members(tmp_path / "all" / "00000.tar")
    assert all_of_them.items() > few.items() and len(few) == 30
    write(tmp_path / "few", num=50)
    assert members(tmp_path / "few" / "00000.tar") == all_of_them
    assert members(tmp_path / "few" / "00001.tar") == members(tmp_path / "all" / "00001.tar")
    with pytest.raises(UserError, match=r"already holds 2 shards, more than 10 scenes"):
        write(tmp_path / "few", num=10)


def test_what_a_kill_leaves_behind_is_written_again(tmp_path):
    write(tmp_path / "whole")
    whole = {name: data for name, (_, data) in state(tmp_path / "whole").items()}
    folder = tmp_path / "killed"
    write(folder)
    (folder / "00001.tar").rename(folder / "00001.tar.tmp")  # in the middle of the second shard
    (folder / "00001.tar.tmp").write_bytes(whole["00001.tar"][:700])
    (folder / "00000_stats.json").unlink()  # between the first shard and its stats
    write(folder)
    assert {name: data for name, (_, data) in state(folder).items()} == whole


def test_stats_appear_after_their_shard(tmp_path, monkeypatch):
    write(tmp_path, num=10)
    real = Path.replace

    def killed(path: Path, target: Path) -> Path:
        if target.name == "00000_stats.json":
            raise KeyboardInterrupt
        return real(path, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, num=20)
    assert not (tmp_path / "00000_stats.json").exists()
    monkeypatch.setattr(Path, "replace", real)
    write(tmp_path, num=20)
    assert len(members(tmp_path / "00000.tar")) == 60
    assert json.loads((tmp_path / "00000_stats.json").read_text())["successes"] == 20


@pytest.mark.parametrize(
    "other",
    [
        {"split": "test"},
        {"config": SceneConfig(image_size=16, seed=1)},
        {"config": SceneConfig(image_size=24)},
        {"config": SceneConfig(image_size=16, object_counts=(1, 0, 0, 0))},
        {"image_format": "jpg"},
    ],
)
def test_other_scenes_in_the_same_folder_are_refused(tmp_path, other):
    write(tmp_path, num=5)
    before = state(tmp_path)
    with pytest.raises(UserError, match="holds other scenes") as error:
        write(tmp_path, num=5, **other)
    assert "\n" not in str(error.value)
    assert state(tmp_path) == before


def test_foreign_shards_are_not_overwritten(tmp_path):
    (tmp_path / "00000.tar").write_bytes(b"mine")
    with pytest.raises(UserError, match="1 shards of unknown origin"):
        write(tmp_path, num=5)
    assert (tmp_path / "00000.tar").read_bytes() == b"mine"


def test_train_never_shows_held_out_pairs_and_test_does(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / split, num=120, split=split)
        pairs = {
            (thing["colour"], thing["shape"])
            for path in sorted((tmp_path / split).glob("*.tar"))
            for name, data in members(path).items()
            if name.endswith(".json")
            for thing in json.loads(data)["scene"]["objects"]
        }
        assert bool(pairs & HELD_OUT_PAIRS) == (split == "test")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num": 0}, "--num 0: ask for at least one scene"),
        ({"image_format": "bmp"}, "format 'bmp' is unknown"),
        ({"config": SceneConfig(image_size=1)}, "--image-size 1: give at least 8"),
        ({"config": SceneConfig(object_counts=(0, 0, 0, 0))}, "not all zero"),
        ({"config": SceneConfig(object_counts=(1, -1, 1, 1))}, "none negative"),
    ],
)
def test_impossible_numbers_are_one_line(tmp_path, options, said):
    with pytest.raises(UserError, match=said) as error:
        write(tmp_path / "out", **options)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*choose another folder"):
        write(tmp_path / "file" / "scenes", num=5)
