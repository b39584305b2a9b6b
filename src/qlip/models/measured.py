"""What evaluations ask of a model, ours or another's: 8-bit pictures in, and nothing about how it scales them.

Shapes: `b` pictures, `S` their side, `t` texts, `e` width of embeddings, `d` of features, `n` tokens, `L` bits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from qlip.core import pixels
from qlip.models.qlip.fingerprint import encoder_fingerprint, model_fingerprint
from qlip.models.qlip.modeling import QLIPModel, unit_norm
from qlip.models.qlip.processing import QLIPProcessor
from qlip.models.qlip.tokenizer import text_tokenizer

NOT_THE_MODEL = ("transformers_version", "dtype", "_name_or_path", "architectures")
PROBE_TEXTS = ("a photo of a cat", "Zwölf Boxkämpfer, 12.5 %!", "it's <|endoftext|> \N{SNOWMAN}")
Ability = Literal["reconstruct", "match_text", "features", "generate", "answer", "caption", "continue"]


@dataclass(kw_only=True, slots=True)
class Reconstructed:
    """Pictures that went through a model's code."""

    unit_pixels: Tensor
    """(b, 3, S, S) float, 1 is white; neither clamped nor rounded: how, is the protocol's."""
    bits: Tensor | None
    """(b, n, L) bool, the code; None for a continuous one."""


@runtime_checkable
class MeasuredModel(Protocol):
    """A model that evaluations can score. All calls take place in inference mode, on the model's device."""

    name: str
    """What it is, for cards: `QLIPModel`, `CLIPModel`, `AutoencoderKL`, ..."""
    image_size: int
    """S that it takes; 0 takes any multiple of `patch_size`."""
    patch_size: int
    """Pixels of a token's side."""
    abilities: frozenset[Ability]
    """Which of the three calls below it has; evaluations refuse before they start."""
    bits_per_token: float | None
    """Size of a discrete token's code in bits, or of a continuous latent's numbers (as `latent_bits` of the card says);
    None for a model without a code."""

    num_bits: int
    """L of `Reconstructed.bits`; 0 without a discrete code."""

    def identity(self) -> dict[str, Any]:
        """For cards: `model_fingerprint` (sha256 over all weights), `dtype`, and what else tells models apart."""

    def to(self, device: torch.device) -> None:
        """Move it there."""

    def reconstruct(self, pictures: Tensor) -> Reconstructed:
        """(b, 3, S, S) uint8 on the model's device -> the same through its code."""

    def image_embeds(self, pictures: Tensor) -> Tensor:
        """(b, 3, S, S) uint8 -> (b, e) float32 of norm 1."""

    def text_embeds(self, texts: list[str]) -> Tensor:
        """t texts -> (t, e) float32 of norm 1."""

    def features(self, pictures: Tensor) -> dict[str, Tensor]:
        """(b, 3, S, S) uint8 -> `cls` and `mean`, (b, d) float32 each: for probes."""


class MeasuredGenerator(Protocol):
    """A text-to-image model that evaluations can score."""

    name: str
    """What it is, for cards."""
    image_size: int
    """Side S of its pictures."""
    abilities: frozenset[Ability]
    """`generate`."""
    sampling: dict[str, Any]
    """Temperature, top-k, top-p, guidance, head: for cards."""

    def identity(self) -> dict[str, Any]:
        """For cards: `model_fingerprint`, `dtype`, and what else tells models apart."""

    def to(self, device: torch.device) -> None:
        """Move it there."""

    def generate(self, prompts: list[str], *, seeds: list[int]) -> Tensor:
        """b prompts and as many seeds -> (b, 3, S, S) uint8; a picture depends on its own prompt and seed alone."""


def sha256_of_json(value: Any) -> str:
    """sha256 over canonical JSON: of configs, scales and token ids."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def sha256_of_config(config: PreTrainedConfig) -> str:
    """sha256 over what a transformers config says of the model, without versions and dtype."""
    said = config.to_dict()
    return sha256_of_json({name: value for name, value in said.items() if name not in NOT_THE_MODEL})


def sha256_of_tokens(tokenize: Callable[[list[str]], dict[str, Tensor]]) -> str:
    """sha256 over the ids of a few texts with capitals, accents, numbers and marks: tells tokenizers apart."""
    return sha256_of_json([tokenize([text])["input_ids"].tolist() for text in PROBE_TEXTS])


class MeasuredQLIP:
    """QLIP, BSQ-ViT and CLIP trained by us, and the released checkpoints.

    `features` are Table 10's: the CLS state after its LayerNorm, and the mean of the patch states before the quantizer.
    """

    name = "QLIPModel"

    def __init__(self, model: QLIPModel, processor: QLIPProcessor) -> None:
        """`processor` gives the text side. The weights must stay as they are from the first `identity` on."""
        self.model = model
        self._identity: dict[str, Any] = {}
        self.tokenize = text_tokenizer(processor.tokenizer)
        vision = model.config.vision_config
        self.image_size, self.patch_size = vision.image_size, vision.patch_size
        self.abilities: frozenset[Ability] = frozenset(("reconstruct", "match_text", "features"))
        self.num_bits = 0 if vision.quantizer == "none" else vision.num_bits
        self.bits_per_token = float(self.num_bits) if self.num_bits else None

    def identity(self) -> dict[str, Any]:
        """Fingerprints of the whole model and of what makes bits, computed once: they read all weights."""
        self._identity = self._identity or {
            "model_fingerprint": model_fingerprint(self.model),
            "encoder_fingerprint": encoder_fingerprint(self.model),
            "config_sha256": sha256_of_config(self.model.config),
            "tokens_sha256": sha256_of_tokens(self.tokenize),
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "parameters": self._num_parameters(),
        }
        return dict(self._identity)

    def _num_parameters(self) -> dict[str, int]:
        """The paper's E + G + Q, and the text tower."""
        counts = {"encoder": 0, "decoder": 0, "quantizer": 0, "text": 0}
        for name, parameter in self.model.named_parameters():
            part = "text" if name.startswith("text") else "decoder" if name.startswith("vision_decoder") else "encoder"
            part = "quantizer" if name.startswith("vision_model.quant") else part
            counts[part] += parameter.numel() if name.startswith(("vision_", "text_model")) else 0
        return counts

    def to(self, device: torch.device) -> None:
        """Move it there."""
        self.model.to(device)

    def reconstruct(self, pictures: Tensor) -> Reconstructed:
        """Encode, quantize, decode."""
        output = self.model(self.pixel_values(pictures))
        return Reconstructed(unit_pixels=pixels.to_unit(output.reconstructions), bits=output.bits)

    def image_embeds(self, pictures: Tensor) -> Tensor:
        """The projected CLS state."""
        return unit_norm(self.model.get_image_features(self.pixel_values(pictures)).pooler_output)

    def text_embeds(self, texts: list[str]) -> Tensor:
        """The projected end-of-text state."""
        ids = {name: tensor.to(self.model.device) for name, tensor in self.tokenize(texts).items()}
        return unit_norm(self.model.get_text_features(ids["input_ids"], ids["attention_mask"]).pooler_output)

    def features(self, pictures: Tensor) -> dict[str, Tensor]:
        """`cls` and `mean`."""
        output = self.model.vision_model(self.pixel_values(pictures))
        return {"cls": output.pooler_output.float(), "mean": output.pre_quant.float().mean(1)}

    def pixel_values(self, pictures: Tensor) -> Tensor:
        """uint8 pictures -> what the network takes."""
        return pixels.from_uint8(pictures).to(self.model.visual_projection.weight.dtype)
