"""Every tokenizer is pictures to bits and back, with the bits of its own network, and other models are refused."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_llamagen import DS4, PlainVQGAN, Weights, random_weights, written
from tiny_generators import read_vocabularies_once
from torch import Tensor

from qlip.core.errors import UserError
from qlip.core.pixels import from_uint8, to_uint8
from qlip.models.image_tokenizer import ImageTokenizer, QLIPTokenizer, VQTokenizer, open_image_tokenizer
from qlip.models.qlip.loading import load_model, quiet_transformers
from qlip.quantizers.ids import bits_to_ids
from tiny_tokenizer import save_tiny_tokenizer


@pytest.fixture(autouse=True, scope="module")
def vocabularies() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        read_vocabularies_once(patch)
        yield


@pytest.fixture(scope="module")
def qlip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_tokenizer(tmp_path_factory.mktemp("models") / "qlip")


def vqgan(*, seed: int = 0, codes: int = 32) -> Weights:
    """LlamaGen's with a power of two codes."""
    weights = random_weights(DS4, num_res=1, seed=seed)
    weights["quantize.embedding.weight"] = torch.randn(codes, 8, generator=torch.Generator().manual_seed(seed))
    return weights


def some_pictures(num: int = 3, *, side: int = 16) -> Tensor:
    return torch.randint(0, 256, (num, 3, side, side), dtype=torch.uint8)


def test_a_qlips_bits_and_pictures(qlip):
    tokenizer: ImageTokenizer = open_image_tokenizer(qlip)
    assert isinstance(tokenizer, QLIPTokenizer)
    assert (tokenizer.name, tokenizer.image_size, tokenizer.grid, tokenizer.num_bits) == ("QLIPModel", 16, (2, 2), 28)
    model, pictures = load_model(qlip), some_pictures()
    bits = tokenizer.encode(pictures)
    with torch.inference_mode():
        assert torch.equal(bits, model.encode(from_uint8(pictures))) and bits.shape == (3, 4, 28)
        assert torch.equal(tokenizer.decode(bits), to_uint8(model.decode(bits)))
    assert bits.dtype == torch.bool and tokenizer.decode(bits).dtype == torch.uint8
    assert tokenizer.encoder_fingerprint == tokenizer.measured.identity()["encoder_fingerprint"]
    assert open_image_tokenizer(qlip, image_size=16).encoder_fingerprint == tokenizer.encoder_fingerprint


def test_a_vqgans_bits_are_its_indices(tmp_path):
    weights = vqgan()
    path = written(tmp_path / "vq.pt", {"model": weights})
    tokenizer = open_image_tokenizer(path, image_size=16)
    assert isinstance(tokenizer, VQTokenizer)
    assert (tokenizer.name, tokenizer.image_size, tokenizer.grid, tokenizer.num_bits) == ("LlamaGenVQ", 16, (4, 4), 5)
    pictures, plain = some_pictures(2), PlainVQGAN(weights, DS4, num_res=1)
    bits = tokenizer.encode(pictures)
    with torch.inference_mode():
        ids = plain.ids(pictures.float() / 127.5 - 1)
        assert torch.equal(bits_to_ids(bits), ids) and bits.shape == (2, 16, 5)
        wanted = ((plain.picture(ids) + 1) / 2).clamp(0, 1) * 255
    found = tokenizer.decode(bits)
    assert found.dtype == torch.uint8 and (found.float() - wanted).abs().max() < 0.51
    other = open_image_tokenizer(written(tmp_path / "other.pt", {"model": vqgan(seed=1)}), image_size=16)
    assert other.encoder_fingerprint != tokenizer.encoder_fingerprint
    (tmp_path / "folder").mkdir()
    shutil.copy(path, tmp_path / "folder")
    again = open_image_tokenizer(tmp_path / "folder", image_size=16)
    assert again.encoder_fingerprint == tokenizer.encoder_fingerprint


def test_fingerprints_follow_the_encoder_alone(qlip, tmp_path):
    def changed(part: str) -> str:
        model = load_model(qlip)
        with torch.no_grad():
            next(parameter for name, parameter in model.named_parameters() if name.startswith(part)).add_(1)
        with quiet_transformers():
            model.save_pretrained(shutil.copytree(qlip, tmp_path / part))
        return open_image_tokenizer(tmp_path / part).encoder_fingerprint

    own = open_image_tokenizer(qlip).encoder_fingerprint
    assert changed("vision_model.encoder") != own
    assert changed("text_model") == changed("vision_decoder") == own


def test_sizes_that_cannot_be_are_one_line(qlip, tmp_path):
    with pytest.raises(UserError, match="takes pictures of side 16: leave --image-size out"):
        open_image_tokenizer(qlip, image_size=32)
    path = written(tmp_path / "vq.pt", {"model": vqgan()})
    for size in (0, 30, -4):
        with pytest.raises(UserError, match=f"any side that is a multiple of 4, not {size}: say which with"):
            open_image_tokenizer(path, image_size=size)


def test_models_without_tokens_are_one_line(tmp_path):
    continuous = save_tiny_tokenizer(tmp_path / "none", quantizer="none")
    with pytest.raises(UserError, match="this model has no quantizer, hence no tokens"):
        open_image_tokenizer(continuous)
    path = written(tmp_path / "vq.pt", {"model": vqgan(codes=21)})
    with pytest.raises(UserError, match=r"LlamaGenVQ has no codebook of 2\^L codes: take a VQ model of as many"):
        open_image_tokenizer(path, image_size=16)
    with pytest.raises(UserError, match="is not there"):
        open_image_tokenizer(tmp_path / "nowhere")
