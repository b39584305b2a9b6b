"""The size of a model, and where a run's model comes from: fresh, from a folder, or with a quantizer put in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from huggingface_hub.errors import StrictDataclassError

from qlip.core.errors import UserError
from qlip.models.qlip.configuration import QLIPConfig, QLIPDecoderConfig, QLIPTextConfig, QLIPVisionConfig
from qlip.models.qlip.loading import load_model, load_processor
from qlip.models.qlip.modeling import QLIPModel
from qlip.models.qlip.processing import QLIPProcessor
from qlip.quantizers.base import check_num_codes


@dataclass(kw_only=True, slots=True)
class TowerSize:
    """Size of one transformer."""

    hidden_size: int = 768
    """Width d."""
    num_layers: int = 12
    """Blocks L."""
    num_heads: int = 12
    """Attention heads; the released models have width / heads = 64."""
    intermediate_size: int = 2048
    """Feed-forward width I."""


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Size of a fresh QLIP; defaults are B-16-256. A run that starts from a model (`task.init`) ignores this part."""

    image_size: int = 256
    """Side of the square pictures in pixels."""
    patch_size: int = 16
    """Side of a patch, one token each."""
    quantizer: Literal["bsq", "none", "fsq", "lfq", "vq"] = "bsq"
    """Binary spherical; none (the decoder sees the encoder's states); or one of vector-quantize-pytorch's."""
    num_bits: int = 28
    """Bits per token; for fsq those that its levels make."""
    group_size: int = 1
    """Bits whose joint entropy the codebook term sees (bsq, lfq), or bits of one codebook (vq); at most 16."""
    fsq_levels: tuple[int, ...] = ()
    """Levels of each latent dimension, for fsq alone: seven times 16 make 28 bits."""
    encoder: TowerSize = field(default_factory=TowerSize)
    """Vision encoder."""
    decoder: TowerSize = field(default_factory=TowerSize)
    """Visual decoder."""
    text: TowerSize = field(
        default_factory=lambda: TowerSize(hidden_size=512, num_layers=12, num_heads=8, intermediate_size=2048)
    )
    """Text tower."""
    context_length: int = 77
    """Longest text in tokens; longer ones are cut."""
    projection_dim: int = 512
    """Width of the shared embedding."""
    initializer_range: float = 0.02
    """Standard deviation of fresh weights; narrow towers learn faster from about 1/sqrt(width)."""

    def build_config(self) -> QLIPConfig:
        """The transformers config of this size."""
        check_num_codes(self.group_size)
        grid = {"image_size": self.image_size, "patch_size": self.patch_size}
        text = QLIPTextConfig(max_position_embeddings=self.context_length, **_tower(self.text))
        vision = QLIPVisionConfig(
            quantizer=self.quantizer,
            num_bits=self.num_bits,
            quantizer_group_size=self.group_size,
            fsq_levels=list(self.fsq_levels) or None,
            hidden_size_post_q=self.decoder.hidden_size,
            initializer_range=self.initializer_range,
            **grid,
            **_tower(self.encoder),
        )
        decoder = QLIPDecoderConfig(initializer_range=self.initializer_range, **grid, **_tower(self.decoder))
        text.initializer_range = self.initializer_range
        return QLIPConfig(
            text_config=text,
            vision_config=vision,
            decoder_config=decoder,
            projection_dim=self.projection_dim,
            initializer_range=self.initializer_range,
        )


def _tower(size: TowerSize) -> dict[str, int]:
    return {
        "hidden_size": size.hidden_size,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.num_heads,
        "intermediate_size": size.intermediate_size,
    }


def fresh_model(config: ModelConfig) -> tuple[QLIPModel, QLIPProcessor]:
    """A model with random weights, and its processor. Raises `UserError` for sizes that do not fit together."""
    try:
        model = QLIPModel(config.build_config())
    except (StrictDataclassError, ValueError) as error:  # transformers' configs wrap theirs in the former
        reason = str(error).splitlines()[-1].strip().removeprefix("ValueError: ")
        raise UserError(f"model: {reason}; change the --model options") from None
    return model, QLIPProcessor.for_size(config.image_size, context_length=config.context_length)


def model_from(init: str) -> tuple[QLIPModel, QLIPProcessor]:
    """A model folder or hub id as a model with float32 master weights, whatever the file has, and its processor."""
    return load_model(init).float(), load_processor(init)


def with_quantizer(model: QLIPModel, config: ModelConfig, kind: str) -> QLIPModel:
    """The model with a fresh bottleneck of `config`'s bits between its encoder and decoder; all else as it was.

    Raises `UserError` for a model that has a quantizer already.
    """
    vision = model.config.vision_config
    if vision.quantizer != "none":
        raise UserError(
            f"task.add_quantizer is {kind}, but the model has the quantizer {vision.quantizer} already: leave it empty"
        )
    changed = QLIPConfig.from_dict(model.config.to_dict())
    changed.vision_config = QLIPVisionConfig.from_dict(
        vision.to_dict()
        | {
            "quantizer": kind,
            "quantizer_embed_type": "mlp",
            "num_bits": config.num_bits,
            "quantizer_group_size": config.group_size,
            "fsq_levels": list(config.fsq_levels) or None,
            "hidden_size_post_q": model.config.decoder_config.hidden_size,
        }
    )
    extended = QLIPModel(changed)
    missing = extended.load_state_dict(model.state_dict(), strict=False)
    assert not missing.unexpected_keys and all(key.startswith("vision_model.quant") for key in missing.missing_keys)
    return extended
