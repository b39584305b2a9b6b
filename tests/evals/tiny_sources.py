"""Small sources in memory and a model that is no network, for tests of what is done around models."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qlip.data.items import Item
from qlip.data.tar_reader import Skip
from qlip.models.measured import Reconstructed


def png(pixels: np.ndarray) -> bytes:
    """(h, w, 3) uint8 -> an encoded picture."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


class ListSource:
    """Items and skips in a list, counting how often they are gone through."""

    class_names: tuple[str, ...] = ()

    def __init__(self, items: list[Item | Skip], *, name: str = "list") -> None:
        self.name, self.found = name, items
        self.num_items: int | None = len(items)
        self.times_read = 0

    def identity(self) -> str:
        keys = "/".join(item.key for item in self.found)
        return hashlib.sha256(keys.encode()).hexdigest()

    def items(self) -> Iterator[Item | Skip]:
        self.times_read += 1
        yield from self.found


def random_pictures(num: int, *, side: int = 16, seed: int = 0) -> list[Item]:
    """Noise with a different mean each, so that no two score alike."""
    noise = np.random.default_rng(seed)
    return [
        Item(key=f"{i:05d}", image=png(noise.integers(0, 40 + i % 200, (side, side, 3), dtype=np.uint8)), label=i % 3)
        for i in range(num)
    ]


class Halver:
    """Gives pictures back at half their brightness; its code is the parity of four pixels. Counts its batches."""

    name = "Halver"
    image_size, patch_size, num_bits = 16, 8, 6
    bits_per_token: float | None = 6.0
    abilities = frozenset(("reconstruct", "match_text", "features"))

    def __init__(self) -> None:
        self.batches: list[int] = []

    def identity(self) -> dict[str, Any]:
        return {"model_fingerprint": "halver", "dtype": "float32"}

    def to(self, device: torch.device) -> None:
        pass

    def reconstruct(self, pictures: Tensor) -> Reconstructed:
        self.batches.append(len(pictures))
        tokens = pictures[:, 0, ::8, ::8].flatten(1)  # (b, 4)
        bits = ((tokens[..., None].int() >> torch.arange(6)) & 1).bool()
        return Reconstructed(unit_pixels=pictures.float() / 255 / 2, bits=bits)

    def image_embeds(self, pictures: Tensor) -> Tensor:
        self.batches.append(len(pictures))
        means = pictures.float().mean((2, 3)) + 1  # (b, 3)
        return means / means.norm(dim=-1, keepdim=True)

    def text_embeds(self, texts: list[str]) -> Tensor:
        codes = torch.tensor([[len(text), text.count("a") + 1, text.count("e") + 1] for text in texts]).float()
        return codes / codes.norm(dim=-1, keepdim=True)

    def features(self, pictures: Tensor) -> dict[str, Tensor]:
        self.batches.append(len(pictures))
        values = pictures.float().flatten(2)
        return {"cls": values.mean(2), "mean": values.std(2)}
