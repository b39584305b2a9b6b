"""Stage 2: texture for the decoder, with the encoder frozen and the text tower dropped (QLIP Eq 4).

    decoder:        a_r MSE + a_q L_BSQ + a_p perceptual + a_g softplus(-D(x^))     trains bottleneck and decoder
    discriminator:  (softplus(-D(x)) + softplus(D(x^))) / 2 + lazy R1               trains D

Every tensor on the zero-shot path is frozen, so image and text embeddings do not move by a bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from qlip.core import pixels
from qlip.core.errors import UserError
from qlip.engine.interfaces import Batch, OptimizerConfig, Phase
from qlip.losses.adversarial import Discriminator, discriminator_loss, generator_loss, r1_penalty, same_crop
from qlip.losses.perceptual import EncoderDistance, LpipsDistance, PerceptualDistance
from qlip.losses.reconstruction import pixel_mse
from qlip.models.qlip.modeling import QLIPModel

TRAINED_PARTS = (
    "vision_model.quantizer",
    "vision_model.quant_embed",
    "vision_model.quant_embed_post",
    "vision_decoder",
)


@dataclass(kw_only=True, slots=True)
class ReconstructConfig:
    """Weights and rates of Table 8, stage 2; discriminator after BSQ-ViT."""

    kind: Literal["reconstruct"] = "reconstruct"
    """Which task this configures."""
    init: str = ""
    """Folder of the stage-1 model (`<run>/export`); required."""
    pixel_weight: float = 1.0
    """a_r, on the squared error of [0, 1] pixels."""
    quantizer_weight: float = 1.0
    """a_q."""
    perceptual_weight: float = 0.1
    """a_p."""
    gan_weight: float = 0.1
    """a_g; 0 leaves the discriminator out."""
    perceptual: Literal["encoder", "lpips"] = "encoder"
    """`lpips` needs VGG-16 weights; `encoder` is the distance between states of the frozen stage-1 encoder."""
    vgg_weights: str = ""
    """torchvision's VGG-16 file for `lpips`."""
    gan_start_step: int = 0
    """First step on which the decoder feels the discriminator; the discriminator itself trains from step 0."""
    r1_gamma: float = 10.0
    """Strength of R1: gamma / 2 x squared gradient norm at real pictures in [-1, 1]."""
    r1_every: int = 16
    """R1 is computed every so many steps and multiplied by as much."""
    discriminator_channel_base: int = 32768
    """Channels at resolution r are min(base / r, max)."""
    discriminator_max_channels: int = 512
    """Upper limit of the above."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            name="adamw", lr=5e-4, part_lrs={"model.vision_decoder": 1e-4}, clip_norm=1.0
        )
    )
    """Bottleneck and decoder."""
    discriminator_optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(name="adamw", lr=1e-4, clip_norm=1.0)
    )
    """Discriminator."""


class ReconstructTask:
    """One step of stage 2: the decoder phase, then the discriminator phase on the same pictures."""

    def __init__(self, model: QLIPModel, config: ReconstructConfig) -> None:
        self.model = model
        self.config = config
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(TRAINED_PARTS))
        self.perceptual = build_perceptual(model, config)
        self._phases = [Phase(name="decoder", modules=("model",), optimizer=config.optimizer)]
        self.discriminator: Discriminator | None = None
        self._last: tuple[Tensor, Tensor] | None = None  # real and reconstructed crops of the running step
        if config.gan_weight:
            self.discriminator = Discriminator(
                _largest_power_of_two(model.config.vision_config.image_size),
                channel_base=config.discriminator_channel_base,
                max_channels=config.discriminator_max_channels,
            )
            self._phases.append(
                Phase(name="discriminator", modules=("discriminator",), optimizer=config.discriminator_optimizer)
            )

    def modules(self) -> dict[str, nn.Module]:
        """The model, and the discriminator unless its weight is zero."""
        modules: dict[str, nn.Module] = {"model": self.model}
        if self.discriminator is not None:
            modules["discriminator"] = self.discriminator
        return modules

    def phases(self, step: int) -> list[Phase]:
        """`decoder`, then `discriminator`."""
        return self._phases

    def loss(self, phase: Phase, batch: Batch, step: int) -> dict[str, Tensor]:
        """Weighted terms of one phase, and unweighted ones for the log."""
        if phase.name == "discriminator":
            return self._discriminator_loss(step)
        real = batch["pixel_values"]
        output = self.model(real)
        quantized = output.vision_model_output.quantized
        mse = pixel_mse(output.reconstructions, real)
        distance = self.perceptual(output.reconstructions, real).mean()
        terms = {
            "pixel_loss": self.config.pixel_weight * mse,
            "perceptual_loss": self.config.perceptual_weight * distance,
            "mse": mse,
            self.perceptual.name: distance,
        }
        if quantized is not None:
            terms["quantizer_loss"] = self.config.quantizer_weight * quantized.losses["quantizer"]
            terms |= quantized.stats
        if self.discriminator is not None:
            real_crop, fake_crop = self._crops(real, output.reconstructions)
            self._last = (real_crop, fake_crop.detach())
            if step >= self.config.gan_start_step:
                generator = generator_loss(self.discriminator(fake_crop))
                terms["generator_loss"] = self.config.gan_weight * generator
        return terms

    def _crops(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """Both in [-1, 1] float32, cut alike to the discriminator's size when the picture is no power of two."""
        real, fake = 2 * pixels.to_unit(real) - 1, 2 * pixels.to_unit(fake) - 1
        size = _largest_power_of_two(real.shape[-1])
        return (real, fake) if size == real.shape[-1] else same_crop(real, fake, size=size)

    def _discriminator_loss(self, step: int) -> dict[str, Tensor]:
        assert self.discriminator is not None and self._last is not None, "the decoder phase comes first"
        real, fake = self._last
        self._last = None
        with torch.autocast(device_type=real.device.type, enabled=False):  # GAN losses and R1 need float32
            real_logits, fake_logits = self.discriminator(real), self.discriminator(fake)
            terms = {
                "discriminator_loss": discriminator_loss(real_logits, fake_logits),
                "real_logit": real_logits.mean(),
                "fake_logit": fake_logits.mean(),
            }
            if self.config.r1_gamma and step % self.config.r1_every == 0:
                penalty = r1_penalty(self.discriminator, real)
                terms["r1_loss"] = self.config.r1_gamma / 2 * self.config.r1_every * penalty
        return terms

    def after_step(self, phase: Phase) -> None:
        """Nothing has bounds."""


def build_perceptual(model: QLIPModel, config: ReconstructConfig) -> PerceptualDistance:
    """The distance a config names. Raises `UserError` when LPIPS is asked for without its weights."""
    if config.perceptual == "lpips":
        if not config.vgg_weights:
            raise UserError("perceptual lpips needs --task.vgg-weights FILE (torchvision's vgg16-397923af.pth)")
        return LpipsDistance(Path(config.vgg_weights))
    return EncoderDistance(model.vision_model.patch_states)


def _largest_power_of_two(size: int) -> int:
    return 1 << (size.bit_length() - 1)
