"""Pictures of a token store, pixel by pixel what the model decodes; stopped, foreign and hostile ones."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from qlip.apps import detokenize
from qlip.apps.detokenize import detokenize_store
from qlip.core.errors import UserError
from qlip.data.finished_files import only_writer
from qlip.data.sources import open_source
from qlip.data.token_files import TokenStoreInfo
from qlip.data.token_keys import file_name_of
from qlip.models.image_tokenizer import ImageTokenizer, QLIPTokenizer, open_image_tokenizer
from small_token_stores import HOSTILE_KEYS, INFO, make_store
from tiny_tokenizer import save_tiny_tokenizer


def refused(*words: str):
    return pytest.raises(UserError, match=".*".join(words))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> ImageTokenizer:
    return open_image_tokenizer(model)


@pytest.fixture(scope="module")
def info(tokenizer: ImageTokenizer) -> TokenStoreInfo:
    return replace(INFO, encoder_fingerprint=tokenizer.encoder_fingerprint, grid=(2, 2))


@pytest.fixture
def opened_once(tokenizer: ImageTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening takes most of the time of a test."""
    monkeypatch.setattr(detokenize, "open_image_tokenizer", lambda source, *, image_size: tokenizer)


def pixels_of(file: Path) -> Tensor:
    with Image.open(file) as image:
        assert image.mode == "RGB"
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("format,batch_size", [("png", 4), ("webp", 100)])
def test_pixels_are_those_of_the_model(
    tmp_path: Path,
    model: Path,
    tokenizer: ImageTokenizer,
    info: TokenStoreInfo,
    format: Literal["png", "webp"],
    batch_size: int,
) -> None:
    bits = make_store(tmp_path / "store", info=info)
    out = detokenize_store(model, tmp_path / "store", tmp_path / "out", format=format, batch_size=batch_size)
    expected = tokenizer.decode(bits)
    assert expected.float().std() > 10, "a flat picture would show nothing"
    for place in range(17):
        stem = "00000" if place < 11 else "00001"
        assert torch.equal(pixels_of(out / stem / f"n%2F{place}.png.{format}"), expected[place])
    assert len(list(out.glob(f"*/*.{format}"))) == 17 and not list(out.rglob("*.tmp"))


@pytest.mark.usefixtures("opened_once")
def test_views_are_pictures_of_their_own(
    tmp_path: Path, model: Path, tokenizer: ImageTokenizer, info: TokenStoreInfo
) -> None:
    two_views = replace(info, views=("centre", "mirrored"))
    bits = make_store(tmp_path / "store", info=two_views, rows=(6, 4))
    out = detokenize_store(model, tmp_path / "store", tmp_path / "out", max_samples=4)
    names = [str(file.relative_to(out)) for file in sorted(out.glob("*/*.png"))]
    assert names == sorted(
        f"{stem}/n%2F{picture}.png{view}.png"
        for picture, stem in enumerate(("00000", "00000", "00000", "00001"))
        for view in ("", "#1")
    )
    expected = tokenizer.decode(bits[3:4])[0]
    assert torch.equal(pixels_of(out / "00000/n%2F1.png#1.png"), expected)


@pytest.mark.usefixtures("opened_once")
def test_what_is_there_is_kept(
    tmp_path: Path,
    model: Path,
    info: TokenStoreInfo,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_store(tmp_path / "store", info=info)
    detokenize_store(model, tmp_path / "store", tmp_path / "whole", batch_size=4)
    detokenize_store(model, tmp_path / "store", tmp_path / "out", batch_size=4, max_samples=10)
    (tmp_path / "out/00000/n%2F2.png.png").unlink()
    there = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*/*.png")}
    decoded: list[int] = []
    decode = QLIPTokenizer.decode

    def counted(self: QLIPTokenizer, bits: Tensor) -> Tensor:
        decoded.append(len(bits))
        return decode(self, bits)

    monkeypatch.setattr(QLIPTokenizer, "decode", counted)
    capsys.readouterr()
    detokenize_store(model, tmp_path / "store", tmp_path / "out", batch_size=4)
    assert decoded == [4, 4] and "17 pictures of side 16 in" in (printed := capsys.readouterr().out)
    assert "9 of them from an earlier call" in printed
    assert all(file.stat().st_mtime_ns == time for file, time in there.items())
    whole, again = (
        {file.name: file.read_bytes() for file in (tmp_path / name).glob("*/*.png")} for name in ("whole", "out")
    )
    assert whole == again
    detokenize_store(model, tmp_path / "store", tmp_path / "out", batch_size=4)
    assert decoded == [4, 4]


@pytest.mark.usefixtures("opened_once")
def test_hostile_keys_stay_in_the_folder(tmp_path: Path, model: Path, info: TokenStoreInfo) -> None:
    make_store(tmp_path / "store", info=info, rows=(len(HOSTILE_KEYS),), keys=list(HOSTILE_KEYS))
    out = detokenize_store(model, tmp_path / "store", tmp_path / "out")
    names = {file.name for file in (out / "00000").iterdir()}
    assert names == {f"{file_name_of(key)}.png" for key in HOSTILE_KEYS} and len(names) == len(HOSTILE_KEYS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "store"]


@pytest.mark.usefixtures("opened_once")
def test_another_tokenizer_and_other_pictures_are_refused(tmp_path: Path, model: Path, info: TokenStoreInfo) -> None:
    make_store(tmp_path / "foreign")
    with refused("foreign was made by encoder " + "a" * 64, info.encoder_fingerprint):
        detokenize_store(model, tmp_path / "foreign", tmp_path / "out")
    make_store(tmp_path / "large", info=replace(info, grid=(2, 3)))
    with refused("has a grid of \\(2, 3\\)", "\\(2, 2\\)", "--image-size, 48"):
        detokenize_store(model, tmp_path / "large", tmp_path / "out")
    for batch_size, max_samples in ((0, 0), (1, -1)):
        with refused("give at least 1"):
            detokenize_store(model, "", tmp_path / "out", batch_size=batch_size, max_samples=max_samples)
    assert not (tmp_path / "out").exists()
    make_store(tmp_path / "store", info=info)
    make_store(tmp_path / "fewer", info=info, rows=(3,))
    detokenize_store(model, tmp_path / "store", tmp_path / "out", max_samples=1)
    with refused("out holds something else: store", "another OUT"):
        detokenize_store(model, tmp_path / "fewer", tmp_path / "out")
    (tmp_path / "mine/00000").mkdir(parents=True)
    with refused("mine has 00000, but no detokenize.json"):
        detokenize_store(model, tmp_path / "store", tmp_path / "mine")
    with only_writer(tmp_path / "out"), refused("another qlip command is writing to .*out"):
        detokenize_store(model, tmp_path / "store", tmp_path / "out")
    assert len(list(tmp_path.glob("out/*/*.png"))) == 1
    (tmp_path / "file").touch()
    with refused("cannot write to .*file", "choose another folder"):
        detokenize_store(model, tmp_path / "store", tmp_path / "file")


@pytest.mark.usefixtures("opened_once")
def test_a_folder_of_pictures_is_one_of_pictures_only(tmp_path: Path, model: Path, info: TokenStoreInfo) -> None:
    make_store(tmp_path / "store", info=info)
    out = detokenize_store(model, tmp_path / "store", tmp_path / "out")
    assert (out / ".lock").exists() and open_source(str(out)).num_items == 17


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/dev/full")
@pytest.mark.usefixtures("opened_once")
def test_a_full_disk_is_one_line(tmp_path: Path, model: Path, info: TokenStoreInfo) -> None:
    make_store(tmp_path / "store", info=info)
    out = detokenize_store(model, tmp_path / "store", tmp_path / "out", max_samples=1)
    (out / f"00000/n%2F5.png.png.qlip-{os.getpid()}.tmp").symlink_to("/dev/full")
    with refused("cannot write .*n%2F5.png.png: .*No space left", "free disk space") as caught:
        detokenize_store(model, tmp_path / "store", tmp_path / "out")
    assert "\n" not in str(caught.value) and not (out / "00000/n%2F5.png.png").exists()
