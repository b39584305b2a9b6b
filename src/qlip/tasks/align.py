"""Stage 1: everything trains on contrast, pixels, quantizer entropy and commitment (QLIP Eq 3).

L = a_r MSE + a_q L_BSQ + a_a InfoNCE + a_z |sg(Z^) - Z|^2
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from qlip.engine.interfaces import Batch, OptimizerConfig, Phase
from qlip.losses.contrastive import clip_loss
from qlip.losses.reconstruction import commitment, pixel_mse
from qlip.models.qlip.modeling import QLIPModel

MAX_LOGIT_SCALE = math.log(100)
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
    """a_r, on the squared error of [0, 1] pixels."""
    contrastive_weight: float = 1.0
    """a_a."""
    quantizer_weight: float = 1.0
    """a_q."""
    commitment_weight: float = 1.0
    """a_z; has no effect without quantizer or when Z and Z^ differ in width."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(name="lamb", lr=5e-4, part_lrs=dict(TABLE_8_RATES))
    )
    """Table 8 has LAMB with a rate per part."""


class AlignTask:
    """One step of stage 1."""

    def __init__(self, model: QLIPModel, config: AlignConfig) -> None:
        self.model = model
        self.config = config
        self._phases = [Phase(name="align", modules=("model",), optimizer=config.optimizer)]

    def modules(self) -> dict[str, nn.Module]:
        """The whole model trains."""
        return {"model": self.model}

    def phases(self, step: int) -> list[Phase]:
        """One phase."""
        return self._phases

    def loss(self, phase: Phase, batch: Batch, step: int) -> dict[str, Tensor]:
        """Weighted terms, and the unweighted ones beside them for the log."""
        output = self.model(batch["pixel_values"], batch["input_ids"], batch["attention_mask"])
        vision = output.vision_model_output
        contrastive = clip_loss(output.image_embeds, output.text_embeds, self.model.logit_scale)
        mse = pixel_mse(output.reconstructions, batch["pixel_values"])
        terms = {
            "contrastive_loss": self.config.contrastive_weight * contrastive,
            "pixel_loss": self.config.pixel_weight * mse,
            "contrastive": contrastive,
            "mse": mse,
            "logit_scale": self.model.logit_scale.exp(),
        }
        if vision.quantized is not None:
            committed = commitment(vision.pre_quant, vision.last_hidden_state)
            terms["quantizer_loss"] = self.config.quantizer_weight * vision.quantized.losses["quantizer"]
            terms["commitment_loss"] = self.config.commitment_weight * committed
            terms |= vision.quantized.stats
        return terms

    @torch.no_grad()
    def after_step(self, phase: Phase) -> None:
        """Keep the temperature in [0, ln 100]."""
        self.model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
