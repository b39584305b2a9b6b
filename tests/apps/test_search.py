"""`qlip search` finds the picture that was tokenized and the text's nearest, says no in one line, obeys no caption."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from qlip.apps import search, search_report
from qlip.apps.search import search_store
from qlip.core.errors import UserError
from qlip.core.images import ImageLimits, open_image
from qlip.data.token_files import TokenRows, TokenStoreInfo, pack_bits
from qlip.data.token_writer import TokenWriter
from qlip.data.views import VIEWS, ViewChoice, view_pixels
from qlip.models.image_tokenizer import QLIPTokenizer, VQTokenizer, open_image_tokenizer
from qlip.models.qlip.loading import load_processor
from tiny_tokenizer import save_tiny_tokenizer

NUM = 24
CAPTIONS = {
    0: ("plain", "second text"),
    1: ("[red]not red[/red] [link=http://x]x[/link] :smile:",),
    2: ("up\x1b[2Jdown\r\nright\N{RIGHT-TO-LEFT OVERRIDE}left\x00",),
    3: ("long " * 400,),
    4: ("[/unopened] \\",),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_tokenizer(tmp_path_factory.mktemp("models") / "tokenizer")


@pytest.fixture(autouse=True, scope="module")
def opened_once() -> Iterator[None]:
    """Opening a model reads a vocabulary, which is most of the time of a small call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "open_image_tokenizer", functools.cache(open_image_tokenizer))
        patch.setattr(search, "load_processor", functools.cache(load_processor))
        yield


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    text = io.StringIO()
    monkeypatch.setattr(search_report, "console", Console(file=text, width=300))
    return text


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Blocks of colour; number 7 is number 6 with other noise, too weak to matter much."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(NUM):
        random = np.random.default_rng(6 if number == 7 else number)
        blocks = random.integers(0, 256, (4, 6, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(blocks ^ np.uint8(number == 7)).save(folder / f"{number:02d}.png")
    return sorted(folder.iterdir())


def tokenizer_of(model: Path) -> QLIPTokenizer:
    tokenizer = search.open_image_tokenizer(str(model), image_size=0)
    assert isinstance(tokenizer, QLIPTokenizer)
    return tokenizer


def write_store(
    folder: Path,
    model: Path,
    pictures: list[Path],
    *,
    cut: ViewChoice = "centre",
    embeddings: bool = True,
    **about: Any,
) -> Path:
    tokenizer = tokenizer_of(model)
    opened = [open_image(path, limits=ImageLimits()) for path in pictures]
    pixels = torch.cat([view_pixels(image, size=16, views=cut) for image in opened])
    bits, vectors = tokenizer.encode_with_embeddings(pixels)
    num_views = len(VIEWS[cut])
    info = TokenStoreInfo(
        encoder_fingerprint=tokenizer.encoder_fingerprint,
        num_bits=28,
        grid=(2, 2),
        decoder={
            "name": tokenizer.name,
            "path": str(model),
            "fingerprint": tokenizer.measured.identity()["model_fingerprint"],
        },
        transform={"size": 16},
        views=VIEWS[cut],
        embedding_width=16 if embeddings else 0,
    )
    keys = [f"{path.stem}#{view}" if view else path.stem for path in pictures for view in range(num_views)]
    rows = TokenRows(
        keys=keys,
        packed=pack_bits(bits),
        captions=[CAPTIONS.get(row, ()) for row in range(len(pictures)) for _ in range(num_views)],
        sizes=[None] * len(keys),
        embeddings=vectors.numpy().astype(np.float16) if embeddings else None,
    )
    folder.mkdir(exist_ok=True)
    with TokenWriter(folder / "0.parquet", replace(info, **about), row_group_rows=10) as writer:
        writer.write(rows)
    return folder


@pytest.fixture(scope="module")
def store(model: Path, pictures: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("stores") / "whole", model, pictures)


def results(out: Path) -> dict[str, Any]:
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.mode == "RGB" and sheet.width > 190
    return json.loads((out / "results.json").read_text())


@pytest.mark.parametrize("views", ["centre", "flip", "ten-crop"])
def test_the_tokenized_picture_is_found_first(
    model: Path, pictures: list[Path], tmp_path: Path, said: io.StringIO, views: ViewChoice
) -> None:
    store = write_store(tmp_path / "store", model, pictures, cut=views)
    search_store(store, image=pictures[11], by="bits", num=4, out=tmp_path / "bits", device="cpu")
    found = results(tmp_path / "bits")
    first = found["hits"][0]
    assert (first["key"], first["rank"], first["bits"]) == ("11", 1, 112) and first["bits_differing"] <= 1
    assert all("#" not in hit["key"] for hit in found["hits"]) and len(found["hits"]) == 4
    search_store(store, image=pictures[11], num=NUM * 20, out=tmp_path / "auto", device="cpu")
    found = results(tmp_path / "auto")
    assert found["by"] == "embedding" and len(found["hits"]) == NUM
    assert found["hits"][0]["key"] == "11" and found["hits"][0]["cosine"] == pytest.approx(1, abs=1e-3)
    assert "nearest to" in said.getvalue() and "of 24 pictures" in said.getvalue()


def test_a_text_finds_what_its_embedding_is_nearest_to(
    model: Path, store: Path, tmp_path: Path, said: io.StringIO
) -> None:
    search_store(store, text="a red star", num=5, out=tmp_path, device="cpu")
    tokenizer = tokenizer_of(model)
    text = tokenizer.text_embeds(["a red star"])[0].numpy()
    stored = search.TokenStore(store)
    embeddings = np.concatenate(
        [stored.read_rows(file, group, with_embeddings=True).embeddings for file, group, _ in stored.row_groups]
    ).astype(np.float32)
    wanted = np.argsort(-(embeddings @ text) / np.linalg.norm(embeddings, axis=1), kind="stable")[:5].tolist()
    found = results(tmp_path)
    assert [hit["index"] for hit in found["hits"]] == wanted
    assert found["query"] == {"text": "a red star"} and found["model"]["path"] == str(model)
    assert found["model"]["fingerprint"] == tokenizer.measured.identity()["model_fingerprint"]
    assert found["store"]["identity"] == stored.identity() and found["store"]["pictures"] == NUM
    assert "cosine" in said.getvalue()


def test_duplicates_are_listed_once(
    model: Path, pictures: list[Path], store: Path, tmp_path: Path, said: io.StringIO
) -> None:
    search_store(store, duplicates=0.05, num=3, device="cpu")  # without --out no model is needed
    assert "1 pair differs in at most 5 of 112 (4.5 %): 2 of 24 pictures, in 1 group; the closest 1:" in said.getvalue()
    search_store(store, duplicates=0.05, num=3, out=tmp_path, device="cpu")
    found = results(tmp_path)
    assert (found["num_pairs"], found["num_groups"], found["num_in_groups"]) == (1, 1, 2)
    assert [picture["key"] for picture in found["pairs"][0]["pictures"]] == ["06", "07"]
    assert found["groups"] == [["06", "07"]]
    others = write_store(tmp_path / "others", model, pictures[:6])
    search_store(others, duplicates=0.05, num=3, out=tmp_path, device="cpu")
    assert "0 pairs differ in at most 5 of 112 (4.5 %): 0 of 6 pictures, in 0 groups\n" in said.getvalue()
    found = json.loads((tmp_path / "results.json").read_text())
    assert (found["pairs"], found["groups"], found["num_groups"]) == ([], [], 0)
    assert not (tmp_path / "sheet.png").exists(), "it was of the search before"


def test_groups_are_all_listed_by_first_views(
    model: Path, pictures: list[Path], tmp_path: Path, said: io.StringIO
) -> None:
    twice = [tmp_path / f"{path.stem}{copy}.png" for copy in "ab" for path in pictures[:3]]
    for path in twice:
        path.write_bytes((pictures[0].parent / f"{path.stem[:-1]}.png").read_bytes())
    store = write_store(tmp_path / "store", model, twice, cut="flip")
    search_store(store, duplicates=0.0, num=1, out=tmp_path, device="cpu")
    found = results(tmp_path)
    assert found["groups"] == [["00a", "00b"], ["01a", "01b"], ["02a", "02b"]] and len(found["pairs"]) == 1
    assert "3 pairs differ" in said.getvalue() and "in 3 groups; the closest 1:" in said.getvalue()


@pytest.mark.parametrize(
    "words,num_cut", [("star", 0), ("a " * 14, 0), ("a " * 15, 1), ("star " * 400, 386)], ids=["1", "14", "15", "400"]
)
def test_what_the_text_tower_does_not_read_is_said(store: Path, said: io.StringIO, words: str, num_cut: int) -> None:
    search_store(store, text=words, num=1, device="cpu")  # 16 slots, begin and end among them
    shown = said.getvalue()
    assert ("not read" in shown) == (num_cut > 0)
    assert f"the last {num_cut} of its tokens are not read, the model takes 16" in shown or not num_cut
    assert max(map(len, shown.splitlines())) < 150 and words.strip()[:50] in shown


def test_captions_are_shown_as_they_stand_but_obeyed_by_nobody(
    pictures: list[Path], store: Path, tmp_path: Path, said: io.StringIO
) -> None:
    search_store(store, image=pictures[0], num=NUM, out=tmp_path, device="cpu")
    search_store(store, text="[bold]x[/bold]\n[/red]", num=1, device="cpu")
    search_store(store, duplicates=1.0, num=300, device="cpu")
    shown = said.getvalue()
    assert "[red]not red[/red] [link=http://x]x[/link] :smile:" in shown and "[/unopened] \\" in shown
    assert "plain / second text" in shown and "up [2Jdown right left" in shown
    assert not any(sign in shown for sign in ("\x1b", "\x00", "\r", "\N{RIGHT-TO-LEFT OVERRIDE}"))
    assert "long long" in shown and "long " * 30 not in shown
    captions = {tuple(hit["captions"]) for hit in results(tmp_path)["hits"]}
    assert captions == {*CAPTIONS.values(), ()}, "the file has them whole"


@pytest.mark.parametrize(
    "options,words",
    [
        ({}, "search for one thing: give --image PICTURE, --text WORDS or --duplicates SHARE"),
        ({"text": "x", "duplicates": 0.1}, "search for one thing"),
        ({"text": "x", "num": 0}, "--num 0: give at least 1"),
        ({"text": "x", "by": "bits"}, "a text has no bits: give words with --text and leave --by out"),
        ({"text": " \n"}, "the text is empty: give words"),
        ({"text": "\u200b\x00"}, "the text is empty: give words"),
        ({"text": "star\udce9"}, "the text 'star?' is no UTF-8: give --text in UTF-8"),
        ({"text": "\ud83d star"}, "is no UTF-8"),
        ({"duplicates": 1.5}, "--duplicates 1.5: give a share of the bits from 0 to 1"),
        ({"duplicates": float("nan")}, "--duplicates nan: give a share"),
        ({"duplicates": 0.1, "by": "embedding"}, "duplicates are found by bits: leave --by embedding out"),
        ({"image": Path("nothing.png")}, "no picture at nothing.png; give an image file"),
        ({"text": "x", "device": "nonsense"}, "'nonsense' is not usable here"),
        ({"duplicates": 0.1, "device": "nonsense"}, "'nonsense' is not usable here"),
        ({"text": "x", "model": "no/where/at/all"}, "no/where/at/all"),
    ],
    ids=lambda value: "-".join(value) or "nothing" if isinstance(value, dict) else "",
)
def test_what_cannot_be_searched_is_one_line(store: Path, options: dict, words: str) -> None:
    with pytest.raises(UserError) as caught:
        search_store(store, **options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_store_without_embeddings_is_searched_by_bits(
    model: Path, pictures: list[Path], tmp_path: Path, said: io.StringIO
) -> None:
    store = write_store(tmp_path / "store", model, pictures[:5], embeddings=False, decoder={})
    for options in ({"text": "x"}, {"image": pictures[0], "by": "embedding"}):
        with pytest.raises(UserError, match=r"has no embeddings: make it with qlip tokenize --embeddings"):
            search_store(store, **options)
    with pytest.raises(UserError, match=r"does not say where its tokenizer lies: say it with --model"):
        search_store(store, image=pictures[0])
    search_store(store, image=pictures[0], model=str(model), num=1, device="cpu")
    assert "bits that differ" in said.getvalue()


def test_a_tokenizer_of_another_kind_is_called_so(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vq: Any = SimpleNamespace(name="VQModel", num_bits=4, bits_per_token=4.0, patch_size=16)
    monkeypatch.setattr(search, "open_image_tokenizer", lambda _, image_size: VQTokenizer(vq, image_size=image_size))
    monkeypatch.setattr(search, "open_measured", lambda _: vq)
    with pytest.raises(UserError) as caught:
        search_store(store, text="x", model="some/vq")
    assert str(caught.value) == (
        f"{store} was made by a QLIPModel, some/vq is a VQModel: say where the one that made it is with --model"
    )


def test_what_is_no_store_or_an_empty_one(store: Path, tmp_path: Path) -> None:
    (tmp_path / "junk.parquet").write_bytes(b"words")
    with pytest.raises(UserError, match=r"junk\.parquet is no whole parquet file \(.*\); give a token store$"):
        search_store(tmp_path / "junk.parquet", duplicates=0.1)
    with pytest.raises(UserError, match=r"junk\.parquet is no whole parquet file \(.*\); remove it"):
        search_store(tmp_path, duplicates=0.1)
    with TokenWriter(tmp_path / "empty.parquet", search.TokenStore(store).info, row_group_rows=10):
        pass
    for options in ({"text": "x"}, {"duplicates": 0.1}):
        with pytest.raises(UserError, match=r"empty\.parquet has no pictures: give a token store that has some"):
            search_store(tmp_path / "empty.parquet", **options)


def test_models_of_others_are_refused(model: Path, pictures: list[Path], store: Path, tmp_path: Path) -> None:
    other = save_tiny_tokenizer(tmp_path / "other", seed=1)
    mine, its = (tokenizer_of(folder).encoder_fingerprint for folder in (model, other))
    for options in ({"text": "x"}, {"image": pictures[0]}, {"duplicates": 0.1, "out": tmp_path / "out"}):
        with pytest.raises(UserError, match=f"made by encoder {mine}, this model's is {its}: give the model"):
            search_store(store, model=str(other), **options)
    about = {"name": "QLIPModel", "fingerprint": "b" * 64, "path": str(model)}
    store = write_store(tmp_path / "store", model, pictures[:5], decoder=about)
    whole = tokenizer_of(model).measured.identity()["model_fingerprint"]
    with pytest.raises(UserError, match=f"are of model {'b' * 64}, this one is {whole}: give the model"):
        search_store(store, text="x")
    search_store(store, image=pictures[0], by="bits", device="cpu")  # bits depend on the encoder alone
    write_store(tmp_path / "store", model, pictures[:5], decoder=about | {"path": "gone\nfrom/here/now"})
    with pytest.raises(UserError, match=r"does not open \(gone from/here/now is not there\): say where"):
        search_store(tmp_path / "store", text="x")
    write_store(tmp_path / "store", model, pictures[:5], decoder={"name": "VQModel"}, transform={"size": 32})
    with pytest.raises(
        UserError, match=r"made by a VQModel, .* is a QLIPModel: say where the one that made it is with --model"
    ):
        search_store(tmp_path / "store", image=pictures[0], model=str(model))
    write_store(tmp_path / "store", model, pictures[:5], grid=(4, 1))
    with pytest.raises(UserError, match=r"tokens of another grid"):
        search_store(tmp_path / "store", text="x")
    write_store(tmp_path / "store", model, pictures[:5], views=("sideways",))
    with pytest.raises(UserError, match=r"views that this qlip does not know: update"):
        search_store(tmp_path / "store", image=pictures[0])


@pytest.mark.parametrize(
    "encoding,batch_invariant,precision",
    [
        ({"batch_invariant": True, "dtype": "float32"}, True, "fp32"),
        ({"batch_invariant": False, "dtype": "bfloat16 autocast"}, False, "bf16"),
    ],
    ids=["one by one", "autocast"],
)
def test_the_query_is_encoded_as_the_store_was(
    model: Path,
    pictures: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    encoding: dict,
    batch_invariant: bool,
    precision: str,
) -> None:
    store = write_store(tmp_path / "store", model, pictures[:5], encoding=encoding)
    seen: list[search.TokenizeOptions] = []
    encoder_of = search.encoder_of

    def noted(tokenizer: QLIPTokenizer, options: search.TokenizeOptions) -> Any:
        seen.append(options)
        return encoder_of(tokenizer, options)

    monkeypatch.setattr(search, "encoder_of", noted)
    for by in ("bits", "embedding"):
        search_store(store, image=pictures[3], by=by, num=1, out=tmp_path, device="cpu")
        assert results(tmp_path)["hits"][0]["key"] == "03"
    assert [(one.batch_invariant, one.precision) for one in seen] == [(batch_invariant, precision)] * 2


def test_a_full_disk_is_one_line(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(search_report.Path, "write_text", full)
    with pytest.raises(UserError, match=r"cannot write to .*: No space left on device; free disk space or choose"):
        search_store(store, text="x", out=tmp_path, device="cpu")
