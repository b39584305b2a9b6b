"""A store holds the bits of every usable picture, whoever decodes it and whatever kills it, and nothing else."""

from __future__ import annotations

import functools
import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qlip.apps import tokenize
from qlip.apps.encoding import TokenizeOptions
from qlip.apps.tokenize import tokenize_images
from qlip.core.errors import UserError
from qlip.core.images import ImageLimits, open_image
from qlip.data.caption_fields import captions_of_item
from qlip.data.finished_files import only_writer
from qlip.data.items import Item
from qlip.data.token_store import TokenStore
from qlip.data.token_writer import TokenWriter
from qlip.data.transforms import prepared_pixels
from qlip.models.image_tokenizer import open_image_tokenizer
from tiny_tokenizer import save_tiny_tokenizer

NUM = 23  # pictures; number 9 is broken and number 14 has no picture


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_tokenizer(tmp_path_factory.mktemp("models") / "one")


@pytest.fixture(autouse=True, scope="module")
def opened_once() -> Iterator[None]:
    """Opening a model reads a vocabulary, which is most of the time of a small call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize, "open_image_tokenizer", functools.cache(open_image_tokenizer))
        yield


def picture(number: int) -> bytes:
    noise = np.random.default_rng(number).integers(0, 256, (20, 24 + number, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    return b"no picture" if number == 9 else buffer.getvalue()


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four shards, six pictures each."""
    folder = tmp_path_factory.mktemp("data")
    for first in range(0, NUM, 6):
        with tarfile.open(folder / f"{first // 6:05d}.tar", "w") as tar:
            for number in range(first, min(first + 6, NUM)):
                add_sample(tar, number)
    return folder


def add_sample(tar: tarfile.TarFile, number: int) -> None:
    record = {"captions": {"short": f"short {number}", "long": f"long {number}"}, "also": ["x", f"y {number}"]}
    members = {"png": picture(number), "json": json.dumps(record).encode(), "txt": f"plain {number}".encode()}
    if number == 14:
        del members["png"]
    for ending, content in members.items():
        member = tarfile.TarInfo(f"{number:03d}.{ending}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def made(model: Path, shard: Path, out: Path, **options: Any) -> TokenStore:
    how: dict[str, Any] = {"batch_size": 4, "max_skip_share": 0.1, "device": "cpu"}
    names = TokenizeOptions.__dataclass_fields__
    how |= {name: value for name, value in options.items() if name in names}
    others = {name: value for name, value in options.items() if name not in names}
    return TokenStore(tokenize_images(str(shard), TokenizeOptions(model=str(model), out=out, **how), **others))


def contents(store: TokenStore) -> list[tuple]:
    return [(row.key, row.bits.tolist(), row.captions, row.size) for row in store]


def test_bits_are_those_of_the_tokenizer(
    model: Path, shard: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    store = made(model, shard, tmp_path / "out")
    assert store.verify() == len(store) == NUM - 2
    assert [len(TokenStore(file)) for file in store.files] == [6, 5, 5, 5]
    tokenizer = tokenize.open_image_tokenizer(model)
    store.require(tokenizer.encoder_fingerprint)
    good = [number for number in range(NUM) if number not in (9, 14)]
    for row, number in zip(store, good, strict=True):
        image = open_image(picture(number), limits=ImageLimits())
        bits = tokenizer.encode(prepared_pixels(image, size=16)[None])[0]
        assert (row.bits != bits).sum() <= 1, "a latent at zero may fall either way in a batch"
        assert (row.key, row.captions, row.size) == (f"{number:03d}", (f"plain {number}",), (24 + number, 20))
    skipped = [json.loads(line) for file in sorted((tmp_path / "out").glob("*.jsonl")) for line in file.open()]
    assert [(line["key"], line["reason"].partition(":")[0]) for line in skipped][1] == ("014", "missing image")
    assert [line["key"] for line in skipped] == ["009", "014"]
    info = store.info
    assert info.encoding["batch_invariant"] is False and info.encoding["device"] == "cpu"
    assert info.transform["size"] == 16 and info.source["name"] and info.versions["torch"] and info.created
    assert "21 pictures of 4 x 28 bits" in capsys.readouterr().out


def test_batch_invariant_bits_depend_on_no_batch(model: Path, shard: Path, tmp_path: Path) -> None:
    stores = [made(model, shard, tmp_path / str(size), batch_size=size, batch_invariant=True) for size in (1, 4)]
    assert contents(stores[0]) == contents(stores[1]) and stores[0].info.encoding["batch_invariant"] is True


@pytest.mark.parametrize("killed_at", ["00000.parquet", "00002.parquet"])
def test_goes_on_after_a_kill(
    model: Path, shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: str
) -> None:
    whole = contents(made(model, shard, tmp_path / "whole"))
    leave = TokenWriter.__exit__

    def killed(writer: TokenWriter, *error) -> None:  # leaves the temporary file, as kill -9 does
        if writer.path.name == killed_at:
            raise KeyboardInterrupt
        leave(writer, *error)

    monkeypatch.setattr(TokenWriter, "__exit__", killed)
    with pytest.raises(KeyboardInterrupt):
        made(model, shard, tmp_path / "out")
    monkeypatch.undo()
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*.parquet")}
    assert sorted(before) == [f"{number:05d}.parquet" for number in range(int(killed_at[:5]))]
    again = made(model, shard, tmp_path / "out")
    assert contents(again) == whole
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == time for name, time in before.items())
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_a_finished_folder_is_left_alone(model: Path, shard: Path, tmp_path: Path) -> None:
    made(model, shard, tmp_path)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    made(model, shard, tmp_path)
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}


def test_other_tokens_are_not_mixed_in(model: Path, shard: Path, tmp_path: Path) -> None:
    other = save_tiny_tokenizer(tmp_path / "other", seed=1)
    first = made(model, shard, tmp_path / "out").info.encoder_fingerprint
    second = tokenize.open_image_tokenizer(other).encoder_fingerprint
    with pytest.raises(UserError, match=f"other tokens: .*{first}' -> '{second}'.*choose another OUT"):
        made(other, shard, tmp_path / "out")
    with pytest.raises(UserError, match=r"other tokens: source.max_samples: 0 -> 5"):
        made(model, shard, tmp_path / "out", max_samples=5)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "data.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"data\.parquet is no whole parquet file"):
        made(model, shard, tmp_path / "foreign")


def test_captions_come_from_the_fields(model: Path, shard: Path, tmp_path: Path) -> None:
    store = made(model, shard, tmp_path / "out", caption_fields=("captions.short", "also", "captions.long"))
    assert store[3].captions == ("short 3", "x", "y 3", "long 3")
    with pytest.raises(UserError, match=r"caption field 'captions.shrot'; did you mean 'captions.short'"):
        made(model, shard, tmp_path / "typo", caption_fields=("captions.long", "captions.shrot"))
    assert not (tmp_path / "typo").exists()


def test_hostile_captions() -> None:
    def captions(record: dict, *fields: str) -> tuple[str, ...]:
        item = Item(key="a", image=b"", captions=("plain", "plain"), record=record)
        return captions_of_item(item, fields=fields)

    assert captions({}) == captions({}, "a.b") == captions({"a": 3}, "a", "a.b") == ("plain",)
    assert captions({"a": ["x", None, 3, " x ", {"b": "y"}]}, "a") == ("x",)
    assert captions({"a": " \0 "}, "a") == () and captions({"a": "b\ud800\0c"}, "a") == ("b c",)
    assert captions({"a.b": "flat", "a": {"b": "deep"}}, "a.b") == ("flat",)
    assert len(captions({"a": "x" * 9999}, "a")[0]) == 5000
    assert captions({"scene": 3, "prompts": "mine"}, "prompts") == ("mine",)


def test_prompts_of_a_scene() -> None:
    star = {"shape": "star", "colour": "red", "size": "large", "x": 0.5, "y": 0.5, "radius": 0.2}
    scene = {"objects": [star], "background": "beige", "texture": "plain", "class_name": "red star"}
    item = Item(key="a", image=b"", captions=("plain",), record={"scene": scene, "captions": {"short": "star"}})
    texts = captions_of_item(item, fields=("prompts", "captions.short"))
    assert {"a star", "a red star", "star"} == set(texts)


@pytest.mark.parametrize(
    "options,words",
    [
        ({"max_skip_share": 0.05}, "2 of 23 samples skipped"),
        ({"max_samples": -1}, "max_samples -1"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"image_size": 32}, "leave --image-size out"),
        ({"device": "nonsense"}, "not usable"),
    ],
)
def test_bad_options_are_one_line(model: Path, shard: Path, tmp_path: Path, options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        made(model, shard, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)


def test_the_first_pictures_alone(model: Path, shard: Path, tmp_path: Path) -> None:
    assert [row.key for row in made(model, shard, tmp_path, max_samples=8)] == [f"{number:03d}" for number in range(8)]


def test_no_usable_picture_is_said(model: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match="no usable picture"):
        made(model, tmp_path / "pictures", tmp_path / "out", max_skip_share=1.0)


def test_a_full_disk_is_one_line(model: Path, shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    made(model, shard, tmp_path, max_samples=6)  # a first part that is whole
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*00000\.parquet: .*No space left"):
        made(model, shard, tmp_path / "out")
    assert not [file for file in (tmp_path / "out").iterdir() if file.name != ".lock"], "no half file"


def test_views_embeddings_and_compression(model: Path, shard: Path, tmp_path: Path) -> None:
    plain = made(model, shard, tmp_path / "plain", batch_invariant=True)
    rich = made(
        model,
        shard,
        tmp_path / "rich",
        batch_invariant=True,
        views="flip",
        embeddings=True,
        compress=True,
        batch_size=8,
    )
    assert rich.verify() == len(rich) == 2 * len(plain) and rich.info.views == ("centre", "centre, mirrored")
    tokenizer = tokenize.open_image_tokenizer(model)
    for file, group, _ in rich.row_groups:
        rows = rich.read_rows(file, group, with_embeddings=True)
        for place in range(0, len(rows.keys), 2):
            key = rows.keys[place]
            assert rows.keys[place + 1] == f"{key}#1"
            square = prepared_pixels(open_image(picture(int(key)), limits=ImageLimits()), size=16)
            both = torch.stack([square, square.flip(-1)])
            expected, embeddings = tokenizer.encode_with_embeddings(both)
            assert (rich.unpack(rows.packed[place : place + 2]) != expected).sum() <= 1
            assert np.abs(rows.embeddings[place : place + 2] - embeddings.numpy()).max() < 1e-3
    assert contents(rich)[::2] == contents(plain), "compressed bits are the same bits"


def test_classes_of_folders_and_names_that_repeat(model: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("b cat", "a dog", "a dog")):
        (tmp_path / "pictures" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "pictures" / name / f"{number}.png").write_bytes(picture(number))
    store = made(model, tmp_path / "pictures", tmp_path / "out", part_items=2)
    assert store.info.class_names == ("a dog", "b cat") and len(store.files) == 2
    assert {row.key: row.label for row in store} == {"b cat/0.png": 1, "a dog/1.png": 0, "a dog/2.png": 0}
    for name in ("a", "b"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            add_sample(tar, 3)
    with pytest.raises(UserError, match=r"key 003 is in a\.parquet and in b\.parquet"):
        made(model, Path(f"{tmp_path}/?.tar"), tmp_path / "twice")


def test_too_many_broken_pictures_stop_the_work_early(model: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for number in range(400):
        (tmp_path / "pictures" / f"{number}.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"200 of 200 samples skipped, .*not an image"):
        made(model, tmp_path / "pictures", tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir() if file.name != ".lock"] == ["00000.skipped.jsonl"]
    lines = (tmp_path / "out" / "00000.skipped.jsonl").read_text().splitlines()
    assert len(lines) >= 200, "which ones is said, though there is no file of tokens"


def test_a_damaged_list_of_skips_is_one_line(model: Path, shard: Path, tmp_path: Path) -> None:
    made(model, shard, tmp_path)
    (tmp_path / "00001.skipped.jsonl").write_text('{"key": "00')
    with pytest.raises(UserError, match=r"00001\.skipped\.jsonl is no list of skipped pictures"):
        made(model, shard, tmp_path)


def test_two_calls_do_not_write_to_one_folder(model: Path, shard: Path, tmp_path: Path) -> None:
    with only_writer(tmp_path), pytest.raises(UserError, match="another qlip command is writing"):
        made(model, shard, tmp_path)
    with pytest.raises(UserError, match="where the pictures are"):
        made(model, shard, shard)
