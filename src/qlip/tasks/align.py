"""Stage 1: everything trains on contrast, pixels, quantizer entropy and commitment (QLIP Eq 3).

L = a_r MSE + a_q L_BSQ + a_a InfoNCE + a_z |sg(Z^) - Z|^2

A weight of zero also saves the work: without a_a no text tower runs, without a_r no decoder (BSQ-ViT, CLIP baselines).
"""

from __future__ import annotations

import dataclasses
import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from torch import Tensor, nn

from qlip.core.errors import UserError
from qlip.engine.interfaces import Batch, OptimizerConfig, Parts, Phase
from qlip.losses.balance import RunningBalance
from qlip.losses.contrastive import clip_loss, siglip_loss
from qlip.losses.gradient_norm import LayerGradient
from qlip.losses.reconstruction import commitment, pixel_mse
from qlip.models.qlip.modeling import QLIPModel, QLIPOutput
from qlip.nn.blocks import Block, SwiGLU
from qlip.quantizers.base import JointQuantizer

MAX_LOGIT_SCALE = math.log(100)
SIGLIP_LOGIT_SCALE = math.log(10)
SIGLIP_LOGIT_BIAS = -10.0
CONTRASTIVE_PARTS = ("text_model", "text_projection", "visual_projection", "vision_model.post_layernorm", "logit_scale")
PIXEL_PARTS = (
    "vision_decoder",
    "vision_model.quantizer",
    "vision_model.quant_embed",
    "vision_model.quant_embed_post",
)
TABLE_8_RATES = {
    "model.vision_model": 2e-4,
    "model.visual_projection": 2e-4,  # projections follow their tower (EVA-CLIP; open in the paper)
    "model.text_model": 2e-5,
    "model.text_projection": 2e-5,
    "model.vision_decoder": 2e-3,
    "model.vision_model.quant_embed": 5e-4,  # covers quant_embed_post too; inferred by elimination
    "model.logit_scale": 5e-4,
}


@dataclass(kw_only=True, slots=True)
class AlignConfig:
    """Weights and rates of Table 8, stage 1."""

    kind: Literal["align"] = "align"
    """Which task this configures."""
    init: str = ""
    """Folder or hub id of a model to start from, for instance one that `qlip import` wrote; empty starts afresh."""
    pixel_weight: float = 1e3
    """a_r, on the squared error of [0, 1] pixels; 0 runs no decoder and freezes it with the bottleneck (CLIP)."""
    contrastive_weight: float = 1.0
    """a_a; 0 runs no text tower and freezes what only texts train (BSQ-ViT)."""
    quantizer_weight: float = 1.0
    """a_q; has no effect without quantizer or with pixel weight 0."""
    commitment_weight: float = 1.0
    """a_z; has no effect without quantizer or with pixel weight 0."""
    contrastive: Literal["clip", "siglip"] = "clip"
    """Softmax over all pairs (Eq 2), or SigLIP's sigmoid for every pair, with a bias that is not saved in the model."""
    contrastive_chunk: int = 0
    """Score so many pairs at a time, in memory that grows with the batch and not with its square; 0 scores all."""
    balance: Literal["fixed", "running"] = "fixed"
    """`running` sets a_r by the ratio of both losses so far (`RunningBalance`), pixel_weight only starts it."""
    balance_momentum: float = 0.99
    """Share of its averages that `running` keeps at every step."""
    probe_every: int = 0
    """Steps between logging the gradient norms of both losses at the encoder's last W_3 (Fig 5); 0 is off.

    Such a step takes a tenth to a fifth longer (`benchmarks/probe.py`): below 1 % from every 21 steps on.
    """
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(name="lamb", lr=5e-4, part_lrs=dict(TABLE_8_RATES))
    )
    """Table 8 has LAMB with a rate per part; rates of frozen parts are passed over."""


class LogitBias(nn.Module):
    """SigLIP's learned bias of all logits, (1,); it belongs to the training, and saved models are without it."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.full((1,), SIGLIP_LOGIT_BIAS))

    def forward(self) -> Tensor:
        """The bias, (1,)."""
        return self.bias.clone()  # not the parameter itself, whose memory sharding may free


class AlignTask:
    """One step of stage 1, as a `JointTask`: contrast and code use are of all micro-batches together.

    From a quantizer without `average_code` (fsq, lfq, vq) the entropy terms stay means over micro-batches.
    """

    def __init__(self, model: QLIPModel, config: AlignConfig) -> None:
        """Freezes what has no weight, and starts a fresh model's temperature at ln 10 for SigLIP.

        Raises `UserError` for options that do not fit together.
        """
        refuse_impossible(config)
        self.model = model
        self.config = config
        self._probed_step = -1
        if config.probe_every:  # its hook is not called inside a compiled block
            cast(Block, model.vision_model.encoder.layers[-1]).keep_eager = True
        self._modules: dict[str, nn.Module] = {"model": model}
        trained: tuple[str, ...] = ("model",)
        if config.contrastive == "siglip" and config.contrastive_weight:
            self._modules["logit_bias"] = LogitBias()
            trained = ("model", "logit_bias")
            if not config.init:
                nn.init.constant_(model.logit_scale, SIGLIP_LOGIT_SCALE)
        if config.balance == "running":
            self._modules["balance"] = RunningBalance(
                config.pixel_weight, contrastive_weight=config.contrastive_weight, momentum=config.balance_momentum
            )
        for weight, parts in ((config.contrastive_weight, CONTRASTIVE_PARTS), (config.pixel_weight, PIXEL_PARTS)):
            if not weight:
                freeze(model, parts)
        self._phases = [Phase(name="align", modules=trained, optimizer=without_frozen_rates(config.optimizer, model))]

    def modules(self) -> dict[str, nn.Module]:
        """The whole model, SigLIP's bias and the running balance where the config has them."""
        return self._modules

    def phases(self, step: int) -> list[Phase]:
        """One phase."""
        return self._phases

    def loss(self, phase: Phase, batch: Batch, step: int) -> dict[str, Tensor]:
        """Weighted terms, and the unweighted ones beside them for the log; terms without weight are absent."""
        parts = self.parts(phase, batch, step)
        return parts.terms | self.joint_loss(phase, parts.features, step)

    def parts(self, phase: Phase, batch: Batch, step: int) -> Parts:
        """Pixel, quantizer and commitment terms, and what contrast and code use need.

        Features: image_embeds and text_embeds (b, e), logit_scale (1,), logit_bias (1,), average_code (1, ...).
        """
        probe = LayerGradient(self._probed_layer()) if self._probe_is_due(step) else None
        with probe or nullcontext():
            output = self._forward(batch)
        parts = Parts(terms={}, features={})
        if self.config.contrastive_weight:
            assert output.image_embeds is not None and output.text_embeds is not None
            parts.features |= {"image_embeds": output.image_embeds, "text_embeds": output.text_embeds}
            # A copy, since sharding may free the parameter's memory while features wait for the joint loss.
            parts.features["logit_scale"] = self.model.logit_scale.reshape(1).clone()
            if "logit_bias" in self._modules:
                parts.features["logit_bias"] = self._modules["logit_bias"]()
        if self.config.pixel_weight:
            self._add_pixel_parts(parts, output, batch["pixel_values"])
        if probe is not None:
            parts.terms |= self._probed(parts, probe)
            self._probed_step = step
        return parts

    def _forward(self, batch: Batch) -> QLIPOutput:
        texts = (batch["input_ids"], batch["attention_mask"]) if self.config.contrastive_weight else ()
        return self.model(batch["pixel_values"], *texts, reconstruct=bool(self.config.pixel_weight))

    def _add_pixel_parts(self, parts: Parts, output: QLIPOutput, pixel_values: Tensor) -> None:
        config, vision = self.config, output.vision_model_output
        assert output.reconstructions is not None and vision is not None
        mse = pixel_mse(output.reconstructions, pixel_values)
        weight: Tensor | float = config.pixel_weight
        if "balance" in self._modules:
            parts.terms["pixel_weight"] = weight = self._modules["balance"]()
        parts.terms |= {"pixel_loss": weight * mse, "mse": mse}
        if vision.quantized is None:
            return
        parts.terms |= vision.quantized.stats
        assert vision.pre_quant is not None
        if config.commitment_weight and vision.pre_quant.shape == vision.last_hidden_state.shape:
            committed = commitment(vision.pre_quant, vision.last_hidden_state)
            parts.terms["commitment_loss"] = config.commitment_weight * committed
        if config.quantizer_weight:
            parts.terms["quantizer_loss"] = config.quantizer_weight * vision.quantized.losses["quantizer"]
            if vision.quantized.average_code is not None:
                parts.features["average_code"] = vision.quantized.average_code[None]

    def joint_loss(self, phase: Phase, features: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """The contrastive loss of all pairs and, of several micro-batches, what their entropy terms lack."""
        terms: dict[str, Tensor] = {}
        if self.config.contrastive_weight:
            contrastive = self._contrastive(features)
            terms["contrastive_loss"] = self.config.contrastive_weight * contrastive
            terms["contrastive"] = contrastive
            terms["logit_scale"] = features["logit_scale"].mean(0).exp()
        if len(features.get("average_code", ())) > 1:
            quantizer = cast(JointQuantizer, self.model.vision_model.quantizer)
            correction = quantizer.joint_correction(features["average_code"])
            terms["codebook_correction_loss"] = self.config.quantizer_weight * correction
        return terms

    def _contrastive(self, features: dict[str, Tensor]) -> Tensor:
        """Unweighted, of the pairs in `features`, whose scale and bias are equal numbers, one per micro-batch."""
        images, texts = features["image_embeds"], features["text_embeds"]
        scale, chunk = features["logit_scale"].mean(0), self.config.contrastive_chunk
        if self.config.contrastive == "siglip":
            return siglip_loss(images, texts, scale, features["logit_bias"].mean(0), chunk_size=chunk)
        return clip_loss(images, texts, scale, chunk_size=chunk)

    def _probe_is_due(self, step: int) -> bool:
        """Once in a step, in a forward pass with gradient: of several micro-batches the first is measured alone."""
        every = self.config.probe_every
        return bool(every) and step % every == 0 and step != self._probed_step and torch.is_grad_enabled()

    def _probed_layer(self) -> nn.Linear:
        mlp = cast(Block, self.model.vision_model.encoder.layers[-1]).mlp
        return mlp.w3 if isinstance(mlp, SwiGLU) else mlp.fc2

    def _probed(self, parts: Parts, probe: LayerGradient) -> dict[str, Tensor]:
        """Gradient norms at W_3 of the unweighted losses of this micro-batch on all ranks, and contrast over pixels.

        The paper's Fig 5 has 1-2 and 2e-3..7e-3, ratio 170-500.
        """
        norms: dict[str, Tensor] = {}
        if self.config.contrastive_weight:
            norms["probe/contrastive"] = probe.norm(self._contrastive(parts.features))
        if self.config.pixel_weight:
            norms["probe/pixel"] = probe.norm(parts.terms["mse"])
        if len(norms) == 2:
            norms["probe/ratio"] = norms["probe/contrastive"] / norms["probe/pixel"]
        return norms

    @torch.no_grad()
    def after_step(self, phase: Phase, terms: dict[str, Tensor]) -> None:
        """Keep the temperature in [0, ln 100], and move the running balance."""
        if self.config.contrastive_weight:
            self.model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        balance = self._modules.get("balance")
        if isinstance(balance, RunningBalance):
            balance.update(terms["contrastive"], pixel=terms["mse"])


def refuse_impossible(config: AlignConfig) -> None:
    """Raise `UserError` for numbers out of range and for weights that leave nothing to train or to balance."""
    for name in ("contrastive_chunk", "probe_every"):
        if getattr(config, name) < 0:
            raise UserError(f"task.{name} is {getattr(config, name)}: give 0 (off) or more")
    if not config.contrastive_weight and not config.pixel_weight:
        raise UserError("task.contrastive_weight and task.pixel_weight are both 0: give at least one of them")
    if config.balance == "running" and not (config.contrastive_weight and config.pixel_weight):
        raise UserError("task.balance running needs both losses: give contrastive_weight and pixel_weight, or fixed")


def freeze(model: nn.Module, parts: tuple[str, ...]) -> None:
    """Turn off the gradients of these parameters and of those in these modules."""
    for name, parameter in model.named_parameters():
        if any(name == part or name.startswith(f"{part}.") for part in parts):
            parameter.requires_grad_(False)


def without_frozen_rates(optimizer: OptimizerConfig, model: nn.Module) -> OptimizerConfig:
    """The config without rates for frozen parts; a rate for what does not exist stays, to be refused as a typo."""
    named = [(f"model.{name}", parameter.requires_grad) for name, parameter in model.named_parameters()]

    def concerns_frozen_only(prefix: str) -> bool:
        trained = [requires_grad for name, requires_grad in named if name.startswith(prefix)]
        return bool(trained) and not any(trained)

    kept = {prefix: rate for prefix, rate in optimizer.part_lrs.items() if not concerns_frozen_only(prefix)}
    return dataclasses.replace(optimizer, part_lrs=kept)
