"""`qlip train` as a user runs it: own photographs, Ctrl-C, bad data in worker processes, impossible sizes."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import skimage.data
from PIL import Image
from tiny_runs import stopped_by_ctrl_c, tiny, write_tar

from qlip.core.log import read_metrics
from qlip.data.scene_shards import write_scene_shards
from qlip.data.scenes import SceneConfig

PHOTOS = Path(skimage.data.__file__).parent
CAPTIONS = {
    "astronaut.png": "a portrait of an astronaut",
    "coffee.png": "a cup of coffee",
    "chelsea.png": "a cat called Chelsea",
    "rocket.jpg": "a rocket, at night",
    "camera.png": "a man with a camera",
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "train"
    write_scene_shards(folder, num=24, split="train", config=SceneConfig(image_size=16))
    return folder


def write_photo_shards(folder: Path) -> None:
    """Two shards of twenty patches of photographs as JPEG with a caption, as someone with a folder of pictures has."""
    folder.mkdir(parents=True)
    patches = []
    for name, caption in CAPTIONS.items():
        with Image.open(PHOTOS / name) as photo:
            for i in range(8):
                left, top = 40 * (i % 4), 60 * (i // 4)
                buffer = io.BytesIO()
                photo.convert("L" if i == 7 else "RGB").crop((left, top, left + 90 + i, top + 80)).save(buffer, "JPEG")
                patches.append((buffer.getvalue(), f"{caption}, part {i}"))
    for shard in range(2):
        files = {}
        for i, (picture, caption) in enumerate(patches[20 * shard : 20 * shard + 20]):
            files |= {f"{shard:05d}{i:04d}.jpg": picture, f"{shard:05d}{i:04d}.txt": caption.encode()}
        write_tar(folder / f"{shard:05d}.tar", files)


def test_own_photographs_train_and_come_back(qlip, tmp_path):
    home = tmp_path / "my photos ü 写真"
    write_photo_shards(home / "shards")
    shards, run = home / "shards" / "{00000..00001}.tar", home / "run 1"
    assert "samples good      40" in qlip.works("data", "inspect", shards)
    qlip.works("train", "scenes_tiny", "--data.train", shards, "--out", run, *tiny())
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == [1, 2, 3]
    assert not (run / "skipped.jsonl").exists()
    photo = PHOTOS / "astronaut.png"
    qlip.works("reconstruct", run / "export", photo, "--out", home / "looks")
    assert Image.open(home / "looks" / "astronaut.png").size == (16, 16)
    assert "is finished (3 steps)" in qlip.works("train", "scenes_tiny", "--data.train", shards, "--out", run, *tiny())
    qlip.works("export", run, home / "again")
    weights = [(folder / "model.safetensors").read_bytes() for folder in (run / "export", home / "again")]
    assert weights[0] == weights[1]
    said = qlip.refused("export", run, home / "other", "--step", "2")
    assert "has no checkpoint 2; it has [3]" in said
    assert "is no export of ours" in qlip.refused("export", run, home / "shards")
    assert "is no export of ours" in qlip.refused("export", run, home / "looks" / "sheet.png")
    qlip.works("classify", home / "again", photo, "--labels", ",".join(CAPTIONS.values()))


def test_bad_data_in_worker_processes_are_one_line(qlip, tmp_path):
    for shard in range(2):
        files = {f"{shard:05d}{i:04d}.{field}": b"no picture" for i in range(3) for field in ("jpg", "txt")}
        write_tar(tmp_path / f"{shard:05d}.tar", files)
    options = tiny(data__num_workers="2")
    said = qlip.refused("train", "scenes_tiny", "--data.train", tmp_path, "--out", tmp_path / "run", *options)
    assert said.startswith("3 of 3 samples skipped, more than max_skip_share 0.05: not an image (3)")
    assert len((tmp_path / "run" / "skipped.jsonl").read_text().splitlines()) >= 3


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"model__encoder__num_heads": "3"}, "hidden_size 16 is not a multiple of num_attention_heads 3"),
        ({"model__image_size": "17"}, "image_size 17 is not a multiple of patch_size 8"),
        ({"model__num_bits": "0"}, "num_bits must be at least 1"),
        ({"trainer__steps": "0"}, "trainer.steps is 0"),
        ({"evals__max_samples": "-1", "evals__data": "nowhere"}, "max_samples is -1"),
        ({"trainer__device": "tpu:9"}, "tpu:9"),
    ],
)
def test_impossible_numbers_are_one_line(qlip, scenes, tmp_path, option, said):
    out = tmp_path / "run"
    assert said in qlip.refused("train", "scenes_tiny", "--data.train", scenes, "--out", out, *tiny(**option))
    assert not (out / "checkpoints").exists()


def test_a_changed_option_is_named_before_a_run_goes_on(qlip, scenes, tmp_path):
    command = ["train", "scenes_tiny", "--data.train", scenes, "--out", tmp_path / "run"]
    qlip.works(*command, *tiny())
    said = qlip.refused(*command, *tiny(trainer__steps="4"))
    assert "trainer.steps: 3 -> 4" in said and "--accept-changes" in said
    assert "resuming" in qlip.works(*command, *tiny(trainer__steps="4"), "--accept-changes")
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]


def test_ctrl_c_is_one_line_and_the_run_goes_on(qlip, scenes, tmp_path):
    run = tmp_path / "run"
    command = ["train", "scenes_tiny", "--data.train", str(scenes), "--out", str(run)]
    endless = [*command, *tiny(trainer__steps="1000000", trainer__save_every="100")]
    newest = stopped_by_ctrl_c(endless, run, lines=103)  # between two checkpoints
    steps = str(newest + 1)
    said = qlip.works(*command, *tiny(trainer__steps=steps, trainer__save_every="100"), "--accept-changes")
    assert f"at step {newest}" in said
    assert read_metrics(run / "metrics.jsonl")[-1]["step"] == newest + 1
