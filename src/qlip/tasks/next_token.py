"""Next-token training of a model over image tokens: LlamaGen-style text-to-image (QLIP section 8, Eq 9).

The loss of a picture is the mean over its tokens of -ln p; teacher forcing, one phase.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from qlip.core import pixels
from qlip.core.distributed import rank
from qlip.core.precision import float32_region
from qlip.engine.interfaces import Batch, OptimizerConfig, Phase
from qlip.models.caption_encoder import CaptionEncoder
from qlip.models.image_tokenizer import ImageTokenizer
from qlip.models.text_to_image import TextToImageModel


@dataclass(kw_only=True, slots=True)
class NextTokenConfig:
    """What trains, how fast. Defaults are LlamaGen's for text-to-image."""

    kind: Literal["next_token"] = "next_token"
    """Tells this from the tokenizer's stages in config.json."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            name="adamw", lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05, warmup_steps=0, clip_norm=1.0
        )
    )
    """One for all parameters."""


class NextTokenTask:
    """Captions and image bits -> negative log-likelihood. Batches hold `bits`, or `pixel_values` to be encoded."""

    def __init__(
        self,
        model: TextToImageModel,
        config: NextTokenConfig,
        *,
        captions: CaptionEncoder,
        tokenizer: ImageTokenizer | None = None,
        seed: int = 0,
    ) -> None:
        """`captions` and `tokenizer` are frozen; the latter is needed for batches of pictures.

        `seed` decides which captions, activations and bits of the history are dropped in which step, on which rank.
        """
        self.model, self.captions, self.tokenizer = model, captions, tokenizer
        self.seed, self._place = seed, (-1, 0)  # step, micro-batch
        self._phase = Phase(name="train", modules=("model",), optimizer=config.optimizer)

    def modules(self) -> dict[str, nn.Module]:
        """The generator."""
        return {"model": self.model}

    def phases(self, step: int) -> list[Phase]:
        """One."""
        return [self._phase]

    def loss(self, phase: Phase, batch: Batch, step: int) -> dict[str, Tensor]:
        """`token_loss` in nats a token; `bits_per_bit`, 1 for a model that knows nothing."""
        self._reseed(step)
        self.captions.to(batch["input_ids"].device)
        caption, mask = self.captions.encode(batch["input_ids"], batch["attention_mask"])
        output = self.model(caption, mask, self._bits(batch))
        with torch.no_grad():
            bits_per_bit = output.loss / (math.log(2) * self.model.config.num_bits)
        return {"token_loss": output.loss, "bits_per_bit": bits_per_bit}

    def after_step(self, phase: Phase, terms: dict[str, Tensor]) -> None:
        """Nothing is bounded."""

    def _reseed(self, step: int) -> None:
        """Ranks begin with one random state, and a GPU's is in no checkpoint: every micro-batch has its own."""
        self._place = (step, self._place[1] + 1 if self._place[0] == step else 0)
        text = f"{self.seed}/{step}/{self._place[1]}/{rank()}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]))

    def _bits(self, batch: Batch) -> Tensor:
        if "bits" in batch:
            return batch["bits"]
        assert self.tokenizer is not None, "pictures need a tokenizer"
        pictures = pixels.to_uint8(batch["pixel_values"])
        self.tokenizer.to(pictures.device)
        with float32_region(pictures.device.type):  # as `qlip tokenize` does: autocast would flip bits
            return self.tokenizer.encode(pictures).clone()  # an inference tensor could not be saved for backward
