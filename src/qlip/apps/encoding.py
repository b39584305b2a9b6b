"""How `qlip tokenize` encodes: decoded batches -> bits and embeddings, on their way while the next batch is prepared.

Shapes: `b` pictures, `v` views of each, `S` their side, `n` tokens, `L` bits of a token, `e` width of embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from qlip.core.errors import UserError
from qlip.data.views import ViewChoice
from qlip.models.image_tokenizer import ImageTokenizer, QLIPTokenizer


@dataclass(kw_only=True, slots=True, frozen=True)
class TokenizeOptions:
    """How parts are made; travels to other machines."""

    model: str
    """Folder, file or hub id of the tokenizer."""
    out: Path
    """Folder of the store."""
    image_size: int = 0
    """S, for tokenizers that take many."""
    caption_fields: tuple[str, ...] = ()
    """Of the pictures' json; see `captions_of_item`."""
    views: ViewChoice = "centre"
    """What is cut from every picture."""
    batch_size: int = 100
    """Rows that are encoded together."""
    batch_invariant: bool = False
    """Encode one by one in float32, so that no bit depends on the batch."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """What the encoder computes in; bf16 under autocast."""
    embeddings: bool = False
    """Also store text-aligned embeddings."""
    compress: bool = False
    """Entropy-code the bits."""
    device: str = "auto"
    """Where it computes."""
    workers: int = 0
    """Processes that read and decode pictures; 0 does it in a thread."""
    max_skip_share: float = 0.05
    """A larger share of unusable pictures stops the work."""


class Encoded(NamedTuple):
    """Rows on their way to the CPU."""

    bits: Tensor
    """(b v, n, L) bool."""
    embeddings: Tensor | None
    """(b v, e) of norm 1."""
    arrived: torch.cuda.Event | None = None
    """On a GPU: the numbers are there when it has come."""

    def wait(self) -> Encoded:
        """The same with numbers that may be read."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self


def encoder_of(tokenizer: ImageTokenizer, options: TokenizeOptions) -> Callable[[Tensor], Encoded]:
    """A function of (b, 3, S, S) uint8 on the CPU, which pads to `batch_size` so that all batches have one shape.

    Raises `UserError` for a tokenizer that has no batch-invariant encoding or no embeddings.
    """
    name, is_qlip = tokenizer.name, isinstance(tokenizer, QLIPTokenizer)
    if options.embeddings and not is_qlip:
        raise UserError(f"a {name} has no text-aligned embeddings: leave --embeddings out")
    if options.batch_invariant:
        if not isinstance(tokenizer, QLIPTokenizer):
            raise UserError(f"a {name} has no batch-invariant encoding: leave --batch-invariant out")
        if options.precision != "fp32" or tokenizer.measured.identity()["dtype"] != "float32":
            raise UserError(
                "batch-invariant encoding needs float32 weights and --precision fp32: leave --batch-invariant out"
            )

    def compute(pixels: Tensor) -> Encoded:
        if options.batch_invariant:
            assert isinstance(tokenizer, QLIPTokenizer)
            bits = tokenizer.encode(pixels, batch_invariant=True)
            return Encoded(bits, tokenizer.image_embeds(pixels) if options.embeddings else None)
        if options.embeddings:
            assert isinstance(tokenizer, QLIPTokenizer)
            return Encoded(*tokenizer.encode_with_embeddings(pixels))
        return Encoded(tokenizer.encode(pixels), None)

    def encode(pixels: Tensor) -> Encoded:
        num = len(pixels)
        if num < options.batch_size:
            pixels = torch.cat([pixels, pixels[-1:].expand(options.batch_size - num, -1, -1, -1)])
        with torch.autocast(tokenizer.device.type, torch.bfloat16, enabled=options.precision == "bf16"):
            encoded = compute(_sent(pixels, tokenizer.device))
        return _fetched(encoded, num)

    return encode


def _sent(pixels: Tensor, device: torch.device) -> Tensor:
    """On the device; a copy out of ordinary memory would first wait for what the GPU is computing."""
    return pixels.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else pixels.to(device)


def _fetched(encoded: Encoded, num: int) -> Encoded:
    """The first `num` rows on their way to the CPU, without waiting for them."""
    on_gpu = encoded.bits.is_cuda
    bits = encoded.bits[:num].to("cpu", non_blocking=on_gpu)
    embeddings = encoded.embeddings
    if embeddings is not None:
        embeddings = embeddings[:num].to("cpu", non_blocking=on_gpu)
    arrived = torch.cuda.Event() if on_gpu else None
    if arrived is not None:
        arrived.record()
    return Encoded(bits, embeddings, arrived)
