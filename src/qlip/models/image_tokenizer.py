"""Pictures <-> bits, whoever's tokenizer it is: what generators, token stores and their evaluations use.

Shapes: `b` pictures, `S` their side, `n` tokens in row-major order, `L` bits of a token.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from qlip.core import pixels
from qlip.core.errors import UserError
from qlip.models.autoencoders import MeasuredAutoencoder
from qlip.models.measured import MeasuredQLIP
from qlip.models.opening import open_measured
from qlip.models.qlip.modeling import unit_norm

TOKENIZER_FOLDER = "image_tokenizer"  # in the folder of a model that writes its tokens


class ImageTokenizer(Protocol):
    """A frozen tokenizer. All calls take place in inference mode, on the tokenizer's device."""

    name: str
    """What it is: `QLIPModel`, `LlamaGenVQ`, `VQModel`."""
    image_size: int
    """S."""
    grid: tuple[int, int]
    """Rows and columns of tokens; their product is n."""
    num_bits: int
    """L."""
    device: torch.device
    """Where pictures and bits have to be."""
    encoder_fingerprint: str
    """sha256 over everything that can change a bit; generators and token stores are tied to it."""

    def to(self, device: torch.device) -> None:
        """Move it there."""

    def encode(self, pictures: Tensor) -> Tensor:
        """(b, 3, S, S) uint8 -> (b, n, L) bool."""

    def decode(self, bits: Tensor) -> Tensor:
        """(b, n, L) bool -> (b, 3, S, S) uint8, rounded."""


class QLIPTokenizer:
    """QLIP and BSQ-ViT: 28 bits a token."""

    def __init__(self, measured: MeasuredQLIP) -> None:
        """Raises `UserError` for a model without quantizer."""
        if not measured.num_bits:
            raise UserError("this model has no quantizer, hence no tokens: take one that was trained with one")
        self.measured, self.name, self.device = measured, measured.name, torch.device("cpu")
        self.image_size, self.num_bits = measured.image_size, measured.num_bits
        side = measured.image_size // measured.patch_size
        self.grid = (side, side)
        self.embedding_width: int = measured.model.config.projection_dim
        self.encoder_fingerprint: str = measured.identity()["encoder_fingerprint"]

    def to(self, device: torch.device) -> None:
        """Move it there."""
        self.measured.to(device)
        self.device = device

    @torch.inference_mode()
    def encode(self, pictures: Tensor, *, batch_invariant: bool = False) -> Tensor:
        """(b, 3, S, S) uint8 -> (b, n, L) bool; `batch_invariant` as `QLIPModel.encode` has it."""
        return self.measured.model.encode(self.measured.pixel_values(pictures), batch_invariant=batch_invariant)

    @torch.inference_mode()
    def encode_with_embeddings(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """(b, 3, S, S) uint8 -> bits (b, n, L) and text-aligned embeddings (b, e) of norm 1, in one pass."""
        output = self.measured.model.get_image_features(self.measured.pixel_values(pictures))
        assert output.quantized is not None
        return output.quantized.bits, unit_norm(output.pooler_output)

    @torch.inference_mode()
    def image_embeds(self, pictures: Tensor) -> Tensor:
        """(b, 3, S, S) uint8 -> text-aligned embeddings (b, e) of norm 1."""
        return self.measured.image_embeds(pictures)

    @torch.inference_mode()
    def text_embeds(self, texts: list[str]) -> Tensor:
        """t texts -> (t, e) of norm 1."""
        return self.measured.text_embeds(texts)

    @torch.inference_mode()
    def decode(self, bits: Tensor) -> Tensor:
        """(b, n, L) bool -> (b, 3, S, S) uint8."""
        return pixels.to_uint8(self.measured.model.decode(bits))


class VQTokenizer:
    """diffusers' VQModel and LlamaGen's VQGAN: the index of a code as log2 K bits, most significant first."""

    def __init__(self, measured: MeasuredAutoencoder, *, image_size: int) -> None:
        """Raises `UserError` for a continuous code, a codebook that is no power of two, or an impossible size."""
        if measured.bits_per_token != measured.num_bits or not measured.num_bits:
            raise UserError(f"{measured.name} has no codebook of 2^L codes: take a VQ model of as many")
        if image_size < 1 or image_size % measured.patch_size:
            raise UserError(
                f"a {measured.name} takes any side that is a multiple of {measured.patch_size}, not {image_size}: "
                "say which with --image-size"
            )
        self.measured, self.name, self.device = measured, measured.name, torch.device("cpu")
        self.image_size, self.num_bits = image_size, measured.num_bits
        side = image_size // measured.patch_size
        self.grid = (side, side)
        self.encoder_fingerprint: str = measured.identity()["model_fingerprint"]

    def to(self, device: torch.device) -> None:
        """Move it there."""
        self.measured.to(device)
        self.device = device

    @torch.inference_mode()
    def encode(self, pictures: Tensor) -> Tensor:
        """(b, 3, S, S) uint8 -> (b, n, L) bool."""
        return self.measured.encode_bits(pictures)

    @torch.inference_mode()
    def decode(self, bits: Tensor) -> Tensor:
        """(b, n, L) bool -> (b, 3, S, S) uint8."""
        return pixels.unit_to_uint8(self.measured.decode_bits(bits, grid=self.grid))


def open_image_tokenizer(source: str | Path, *, image_size: int = 0) -> ImageTokenizer:
    """The tokenizer in a folder, in LlamaGen's file or on the hub, on the CPU.

    `image_size` is needed for VQ models, which take many. Raises `UserError` for anything that makes no tokens.
    """
    measured = open_measured(source)
    if isinstance(measured, MeasuredQLIP):
        if image_size not in (0, measured.image_size):
            raise UserError(f"{source} takes pictures of side {measured.image_size}: leave --image-size out")
        return QLIPTokenizer(measured)
    if isinstance(measured, MeasuredAutoencoder):
        return VQTokenizer(measured, image_size=image_size)
    raise UserError(f"{source} is a {measured.name}, which makes no tokens: give a QLIP, VQ or LlamaGen tokenizer")


def copy_tokenizer(source: str, folder: Path) -> None:
    """A copy of a tokenizer's folder or file as `TOKENIZER_FOLDER` inside `folder`."""
    target = folder / TOKENIZER_FOLDER
    if Path(source).is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("checkpoints", ".git"))
    else:
        target.mkdir()
        shutil.copy2(source, target)
