"""Stage 2: texture for the decoder, with the encoder frozen and the text tower dropped (QLIP Eq 4).

    decoder:        a_r MSE + a_q L_BSQ + a_p perceptual + a_g softplus(-D(x^))     trains bottleneck and decoder
    discriminator:  (softplus(-D(x)) + softplus(D(x^))) / 2 + lazy R1               trains D

Every tensor on the zero-shot path is frozen, so image and text embeddings do not move by a bit. Off by default, for
runs whose adversary misbehaves: the hinge loss, a late and slow start of a_g, LeCAM, and VQGAN's adaptive a_g.
"""

from __future__ import annotations

import warnings
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from qlip.core import pixels
from qlip.core.distributed import mean_over_ranks
from qlip.core.errors import UserError
from qlip.engine.interfaces import Batch, OptimizerConfig, Phase
from qlip.losses.adversarial import (
    GanLoss,
    LecamPenalty,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    r1_penalty,
    same_crop,
    warmup_factor,
)
from qlip.losses.discriminator import Discriminator
from qlip.losses.gradient_norm import LayerGradient
from qlip.losses.perceptual import EncoderDistance, LpipsDistance, PerceptualDistance
from qlip.losses.reconstruction import pixel_mse
from qlip.models.qlip.modeling import QLIPModel
from qlip.tasks.align import PIXEL_PARTS


@dataclass(kw_only=True, slots=True)
class ReconstructConfig:
    """Weights and rates of Table 8, stage 2; discriminator after BSQ-ViT."""

    kind: Literal["reconstruct"] = "reconstruct"
    """Which task this configures."""
    init: str = ""
    """Folder of the stage-1 model (`<run>/export`); required."""
    add_quantizer: Literal["", "bsq"] = ""
    """Give a model that stage 1 trained without quantizer a fresh bottleneck of this kind (Table 3c, recipe 2)."""
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
    gan_loss: GanLoss = "nonsaturating"
    """`nonsaturating` is StyleGAN2's logistic loss; `hinge` stops teaching D pictures that are beyond its margin."""
    gan_start_step: int = 0
    """First step on which the decoder feels the discriminator; the discriminator itself trains from step 0."""
    gan_warmup_steps: int = 0
    """Steps from then on over which a_g rises linearly to its full value."""
    adaptive_gan_weight: bool = False
    """Multiply a_g by |gradient of pixel + perceptual terms| / |gradient of the generator term| at the decoder's last
    layer, as VQGAN does, for each micro-batch; costs two partial backward passes."""
    adaptive_gan_max: float = 1e4
    """Upper limit of that ratio."""
    lecam_weight: float = 0.0
    """Strength of LeCAM, which holds D's logits near their moving averages; helps small data sets. 0 is off."""
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
    """One step of stage 2: the decoder phase on all micro-batches, then the discriminator phase on the same ones."""

    def __init__(self, model: QLIPModel, config: ReconstructConfig) -> None:
        assert config.add_quantizer in ("", model.config.vision_config.quantizer), "the model has another quantizer"
        self.model = model
        self.config = config
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(PIXEL_PARTS))
        self.perceptual = build_perceptual(model, config)
        self._phases = [Phase(name="decoder", modules=("model",), optimizer=config.optimizer)]
        self.discriminator: Discriminator | None = None
        self.lecam: LecamPenalty | None = None
        self._crops: deque[tuple[Tensor, Tensor]] = deque()  # real and reconstructed, one pair per micro-batch
        self._crops_step = -1  # the step they belong to
        if not config.gan_weight:
            _warn_of_idle_options(config)
            return
        self.discriminator = Discriminator(
            _largest_power_of_two(model.config.vision_config.image_size),
            channel_base=config.discriminator_channel_base,
            max_channels=config.discriminator_max_channels,
        )
        self._phases.append(
            Phase(name="discriminator", modules=("discriminator",), optimizer=config.discriminator_optimizer)
        )
        if config.lecam_weight:
            self.lecam = LecamPenalty()

    def modules(self) -> dict[str, nn.Module]:
        """The model; the discriminator unless its weight is zero; LeCAM's averages, which have no parameters."""
        modules: dict[str, nn.Module] = {"model": self.model}
        if self.discriminator is not None:
            modules["discriminator"] = self.discriminator
        if self.lecam is not None:
            modules["lecam"] = self.lecam
        return modules

    def phases(self, step: int) -> list[Phase]:
        """`decoder`, then `discriminator`, in every step."""
        return self._phases

    def loss(self, phase: Phase, batch: Batch, step: int) -> dict[str, Tensor]:
        """Weighted terms of one phase, and unweighted ones for the log."""
        return self._discriminator_loss(step) if phase.name == "discriminator" else self._decoder_loss(batch, step)

    def _decoder_loss(self, batch: Batch, step: int) -> dict[str, Tensor]:
        real = batch["pixel_values"]
        feels_adversary = self.discriminator is not None and step >= self.config.gan_start_step
        measured = feels_adversary and self.config.adaptive_gan_weight
        last_layer = LayerGradient(self.model.vision_decoder.conv_out) if measured else None
        with last_layer or nullcontext():
            output = self.model(real)
        terms = self._reference_terms(output.reconstructions, real)
        quantized = output.vision_model_output.quantized
        if quantized is not None:
            terms["quantizer_loss"] = self.config.quantizer_weight * quantized.losses["quantizer"]
            terms |= quantized.stats
        if self.discriminator is not None:
            real_crop, fake_crop = self._cut(real, output.reconstructions)
            self._keep(real_crop, fake_crop.detach(), step)
            if feels_adversary:
                terms |= self._generator_terms(self.discriminator(fake_crop), terms, step, last_layer)
        return terms

    def _reference_terms(self, reconstructions: Tensor, real: Tensor) -> dict[str, Tensor]:
        """What a reconstruction is compared with its picture by."""
        if isinstance(self.perceptual, nn.Module):
            self.perceptual.to(real.device)  # not among `modules()`: nothing of it trains or is saved
        mse = pixel_mse(reconstructions, real)
        distance = self.perceptual(reconstructions, real).mean()
        return {
            "pixel_loss": self.config.pixel_weight * mse,
            "perceptual_loss": self.config.perceptual_weight * distance,
            "mse": mse,
            self.perceptual.name: distance,
        }

    def _generator_terms(
        self, fake_logits: Tensor, terms: dict[str, Tensor], step: int, last_layer: LayerGradient | None
    ) -> dict[str, Tensor]:
        config = self.config
        generator = generator_loss(fake_logits, kind=config.gan_loss)
        factor = warmup_factor(step, start_step=config.gan_start_step, warmup_steps=config.gan_warmup_steps)
        weighted = factor * config.gan_weight * generator
        if last_layer is None:
            return {"generator_loss": weighted, "generator": generator}
        reference_norm = last_layer.norm(terms["pixel_loss"] + terms["perceptual_loss"])
        adaptive = adaptive_weight(reference_norm, last_layer.norm(generator), maximum=config.adaptive_gan_max)
        return {"generator_loss": adaptive * weighted, "generator": generator, "adaptive_weight": adaptive}

    def _cut(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """Both in [-1, 1] float32, cut alike to the discriminator's size when the picture is no power of two."""
        real, fake = 2 * pixels.to_unit(real) - 1, 2 * pixels.to_unit(fake) - 1
        size = _largest_power_of_two(real.shape[-1])
        return (real, fake) if size == real.shape[-1] else same_crop(real, fake, size=size)

    def _keep(self, real: Tensor, fake: Tensor, step: int) -> None:
        """Queue a micro-batch for the discriminator; what a skipped step has left there goes."""
        if step != self._crops_step:
            self._crops.clear()
            self._crops_step = step
        self._crops.append((real, fake))

    def _discriminator_loss(self, step: int) -> dict[str, Tensor]:
        assert self.discriminator is not None and self._crops, "the decoder phase comes first"
        config = self.config
        real, fake = self._crops.popleft()
        with torch.autocast(device_type=real.device.type, enabled=False):  # GAN losses and R1 need float32
            real_logits, fake_logits = self.discriminator(real), self.discriminator(fake)
            terms = {
                "discriminator_loss": discriminator_loss(real_logits, fake_logits, kind=config.gan_loss),
                "real_logit": real_logits.mean(),
                "fake_logit": fake_logits.mean(),
            }
            if self.lecam is not None:
                terms["lecam"] = self.lecam(real_logits, fake_logits)
                terms["lecam_loss"] = config.lecam_weight * terms["lecam"]
            if config.r1_gamma and step % config.r1_every == 0:
                terms["r1"] = r1_penalty(self.discriminator, real)
                terms["r1_loss"] = config.r1_gamma / 2 * config.r1_every * terms["r1"]
        return terms

    @torch.no_grad()
    def after_step(self, phase: Phase, terms: dict[str, Tensor]) -> None:
        """Move LeCAM's averages with the mean logits of all micro-batches and ranks."""
        if self.lecam is not None and phase.name == "discriminator":
            real_logit, fake_logit = mean_over_ranks(torch.stack([terms["real_logit"], terms["fake_logit"]]))
            self.lecam.update(real_logit=real_logit, fake_logit=fake_logit)


def _warn_of_idle_options(config: ReconstructConfig) -> None:
    """Say which options do nothing without a discriminator."""
    idle = [name for name in ("lecam_weight", "adaptive_gan_weight", "gan_warmup_steps") if getattr(config, name)]
    if idle:
        warnings.warn(f"{', '.join(idle)} has no effect with gan_weight 0", stacklevel=3)


def build_perceptual(model: QLIPModel, config: ReconstructConfig) -> PerceptualDistance:
    """The distance a config names. Raises `UserError` when LPIPS is asked for without its weights."""
    if config.perceptual == "lpips":
        if not config.vgg_weights:
            raise UserError("perceptual lpips needs --task.vgg-weights FILE (torchvision's vgg16-397923af.pth)")
        return LpipsDistance(Path(config.vgg_weights))
    return EncoderDistance(model.vision_model.patch_states)


def _largest_power_of_two(size: int) -> int:
    return 1 << (size.bit_length() - 1)
