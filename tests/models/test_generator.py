"""A generator's folder is whole: it draws the same pictures again, and nothing else is taken for one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_caption_encoder import write_t5
from test_image_tokenizer import vqgan
from test_llamagen import written
from tiny_generators import generator_for, read_vocabularies_once

from qlip.core.errors import UserError
from qlip.models import generator as module
from qlip.models.caption_encoder import open_caption_encoder
from qlip.models.generator import Generator, is_generator, open_generator, save_generator, text_side
from qlip.models.image_tokenizer import open_image_tokenizer
from qlip.models.measured import MeasuredGenerator
from qlip.models.sampling import SamplingConfig
from tiny_tokenizer import save_tiny_tokenizer

PROMPTS, SEEDS = ["a red star", "two rings, 红"], [3, 4]


@pytest.fixture(autouse=True, scope="module")
def vocabularies() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        read_vocabularies_once(patch)
        yield


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_tokenizer(tmp_path_factory.mktemp("models") / "qlip")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    out = tmp_path_factory.mktemp("generators") / "export"
    model = generator_for(open_image_tokenizer(tokenizer_folder), guidance=2.5)
    save_generator(model, folder=out, tokenizer=str(tokenizer_folder), step=7)
    return out


def test_a_folder_draws_the_pictures_that_its_parts_drew(tokenizer_folder, folder):
    tokenizer = open_image_tokenizer(tokenizer_folder)
    model = generator_for(tokenizer, guidance=2.5)
    captions = open_caption_encoder(model.config, tokenizer_model=None)
    first = Generator(model, captions=captions, tokenizer=tokenizer, sampling=SamplingConfig(guidance=2.5))
    second = open_generator(folder)
    pictures = second.generate(PROMPTS, seeds=SEEDS)
    assert pictures.shape == (2, 3, 16, 16) and pictures.dtype == torch.uint8
    assert torch.equal(first.generate(PROMPTS, seeds=SEEDS), pictures)
    assert torch.equal(tokenizer.decode(second.bits(PROMPTS, seeds=SEEDS)), pictures)
    assert first.identity() == second.identity() and first.sampling == second.sampling
    assert torch.equal(second.generate([f" {PROMPTS[1]}\0\n"], seeds=SEEDS[1:])[0], pictures[1])
    with pytest.raises(UserError, match="the prompt is empty"):
        second.generate(["a star", " "], seeds=SEEDS)


def test_what_cards_say(folder):
    generator: MeasuredGenerator = open_generator(folder)
    identity = generator.identity()
    assert identity["encoder_fingerprint"] == generator.model.config.image_tokenizer
    weights = sum(parameter.numel() for parameter in generator.model.parameters())
    assert identity["parameters"] == {"generator": weights} and identity["dtype"] == "float32"
    wanted = {"guidance": 2.5, "temperature": 1.0, "top_k": 1000, "top_p": 1.0, "head": "depth"}
    assert generator.sampling == wanted and generator.abilities == {"generate"}
    assert open_generator(folder, sampling=SamplingConfig(guidance=1.0, top_k=5)).sampling["top_k"] == 5
    card = (folder / "README.md").read_text()
    assert "trained for 7 steps" in card and "2 x 2\ntokens of 28 bits with the depth head" in card
    assert (folder / "trained_steps.txt").read_text() == "7"


def test_the_text_tower_of_the_tokenizer_reads_captions(tokenizer_folder, tmp_path):
    tokenizer = open_image_tokenizer(tokenizer_folder)
    model = generator_for(tokenizer, caption_encoder="qlip", caption_width=16)
    save_generator(model, folder=tmp_path / "out", tokenizer=str(tokenizer_folder), step=None)
    generator = open_generator(tmp_path / "out")
    assert generator.captions.network is text_side(generator.tokenizer).text_model
    found = generator.bits(["a star", "a ring"], seeds=[0, 0])
    assert not torch.equal(found[0], found[1])


def test_a_t5_stays_where_it_is_and_may_move(tokenizer_folder, tmp_path):
    t5 = write_t5(tmp_path / "t5")
    model = generator_for(open_image_tokenizer(tokenizer_folder), caption_encoder="t5", caption_source=str(t5))
    save_generator(model, folder=tmp_path / "out", tokenizer=str(tokenizer_folder), step=None)
    pictures = open_generator(tmp_path / "out").generate(PROMPTS, seeds=SEEDS)
    moved = t5.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"t5 is no folder: download google/flan-t5-xl .*--caption-encoder"):
        open_generator(tmp_path / "out")
    again = open_generator(tmp_path / "out", caption_encoder=str(moved))
    assert torch.equal(again.generate(PROMPTS, seeds=SEEDS), pictures)


def test_llamagens_file_is_copied(tmp_path):
    path = written(tmp_path / "vq_t2i.pt", {"model": vqgan()})
    tokenizer = open_image_tokenizer(path, image_size=12)
    save_generator(generator_for(tokenizer), folder=tmp_path / "out", tokenizer=str(path), step=None)
    path.unlink()
    generator = open_generator(tmp_path / "out")
    assert (generator.tokenizer.name, generator.image_size, generator.tokenizer.grid) == ("LlamaGenVQ", 12, (3, 3))
    pictures = generator.generate(PROMPTS, seeds=SEEDS)
    assert pictures.shape == (2, 3, 12, 12)
    assert torch.equal(pictures, tokenizer.decode(generator.bits(PROMPTS, seeds=SEEDS)))


def test_another_tokenizer_is_refused_with_both_fingerprints(folder, tmp_path):
    other = save_tiny_tokenizer(tmp_path / "other", seed=1)
    mixed = shutil.copytree(folder, tmp_path / "mixed", ignore=shutil.ignore_patterns("image_tokenizer"))
    shutil.copytree(other, mixed / "image_tokenizer")
    own, foreign = (open_image_tokenizer(path).encoder_fingerprint for path in (folder / "image_tokenizer", other))
    with pytest.raises(UserError) as error:
        open_generator(mixed)
    assert str(error.value) == (
        f"the generator draws tokens of QLIPModel {own[:12]}, but this is QLIPModel {foreign[:12]}: "
        "give the tokenizer that it was trained with"
    )


def change_config(**changes: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | changes))

    return change


def without(name: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return change


def not_finite(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["caption_projector.0.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])


DAMAGES = {
    "cut weights": (cut, "model.safetensors"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no file named model.safetensors"),
    "a tensor less": (without("empty_caption"), "1 missing keys, first empty_caption"),
    "not finite": (not_finite, "caption_projector.0.weight"),
    "another size": (change_config(hidden_size=32), "cannot load"),
    "more layers": (change_config(num_hidden_layers=3), "missing keys, first trunk.layers.2."),
    "fewer layers": (change_config(num_hidden_layers=1), "unexpected keys, first trunk.layers.1."),
    "impossible config": (change_config(head="deep"), "head 'deep' is unknown"),
    "config of words": (change_config(hidden_size="wide"), "cannot load"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "cannot read"),
    "no tokenizer": (lambda folder: shutil.rmtree(folder / "image_tokenizer"), "image_tokenizer"),
    "broken tokenizer": (lambda folder: cut(folder / "image_tokenizer"), "image_tokenizer"),
    "another grid": (change_config(grid=[3, 3]), "draws [3, 3] tokens of 28 bits, but its tokenizer has [2, 2] of 28"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_line(folder, tmp_path, damage):
    harm, said = DAMAGES[damage]
    copied = shutil.copytree(folder, tmp_path / "copied")
    harm(copied)
    with pytest.raises(UserError) as error:
        open_generator(copied)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_other_folders_are_no_generators(folder, tokenizer_folder, tmp_path):
    assert is_generator(folder) and not is_generator(tokenizer_folder) and not is_generator(tmp_path / "none")
    for other in (tokenizer_folder, tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="holds no text-to-image model: give the export of `qlip train"):
            open_generator(other)


def test_an_export_appears_whole_or_not_at_all(tokenizer_folder, tmp_path, monkeypatch):
    model = generator_for(open_image_tokenizer(tokenizer_folder))

    def killed(*_: object) -> str:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    monkeypatch.setattr(module, "_card", killed)
    with pytest.raises(KeyboardInterrupt):
        save_generator(model, folder=out, tokenizer=str(tokenizer_folder), step=1)
    assert not out.exists()
    monkeypatch.undo()
    for step in (1, 2):
        save_generator(model, folder=out, tokenizer=str(tokenizer_folder), step=step)
    assert (out / "trained_steps.txt").read_text() == "2"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not lose")
    with pytest.raises(UserError, match="mine"):
        save_generator(model, folder=tmp_path / "mine", tokenizer=str(tokenizer_folder), step=1)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "do not lose"
