"""Visual instruction tuning (LLaVA-1.5; QLIP section 7, Eq 8): pictures and chats -> likelihood of the answers.

The loss is -ln p of a token, averaged over the supervised tokens that all ranks have in a micro-batch; the gradient of
a step is the mean over its micro-batches, which LLaVA-1.5's trainer takes for each rank alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlavaForConditionalGeneration

from qlip.core.distributed import sum_over_ranks, world_size
from qlip.data.chat_labels import IGNORED
from qlip.engine.interfaces import Batch, OptimizerConfig, Phase


@dataclass(kw_only=True, slots=True)
class InstructConfig:
    """What trains, how fast. Defaults are LLaVA-1.5's for instruction tuning."""

    kind: Literal["instruct"] = "instruct"
    """Tells this from other trainings in config.json."""
    trains: Literal["projector", "projector_and_language_model"] = "projector_and_language_model"
    """The projector alone (LLaVA's first stage), or the language model with it. The tower is frozen in both."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            name="adamw", lr=2e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, warmup_steps=156, clip_norm=1.0
        )
    )
    """One for all parameters; `part_lrs` by prefix: `{"model.model.multi_modal_projector": 2e-5}`."""


class InstructTask:
    """Chats and pictures -> negative log-likelihood of the assistant's turns."""

    def __init__(self, model: LlavaForConditionalGeneration, config: InstructConfig) -> None:
        """The tower is frozen; a language model that has LoRA keeps its choice of what trains."""
        self.model = model
        parts = model.model
        parts.vision_tower.requires_grad_(False)
        parts.multi_modal_projector.requires_grad_(True)
        if config.trains == "projector":
            parts.language_model.requires_grad_(False)
            model.lm_head.requires_grad_(False)
        elif any(not parameter.requires_grad for parameter in parts.language_model.parameters()):  # LoRA
            model.lm_head.requires_grad_(False)
        self._phase = Phase(name="train", modules=("model",), optimizer=config.optimizer)

    def modules(self) -> dict[str, nn.Module]:
        """The assistant."""
        return {"model": self.model}

    def phases(self, step: int) -> list[Phase]:
        """One."""
        return [self._phase]

    def loss(self, phase: Phase, batch: Batch, step: int) -> dict[str, Tensor]:
        """`token_loss` in nats a token; `token_accuracy`, the share of supervised tokens that are the likeliest."""
        self.model.model.vision_tower.eval()  # its quantizer may keep averages in training
        labels = batch["labels"][:, 1:]  # of the position before each
        asked = (labels != IGNORED).any(0).nonzero().squeeze(1)  # positions whose logits somebody needs
        pictures = {"pixel_values": batch["pixel_values"]} if "pixel_values" in batch else {}
        output = self.model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            **pictures,
            logits_to_keep=asked,
            use_cache=False,
        )
        logits, targets = output.logits, labels[:, asked]  # (b, k, V), (b, k)
        rows = [checkpoint(_summed_loss, *row, use_reentrant=False) for row in zip(logits, targets, strict=True)]
        learned = targets != IGNORED
        count = sum_over_ranks(learned.sum().float()) / world_size()
        with torch.no_grad():
            right = (logits.argmax(-1) == targets)[learned].float().mean()
        return {"token_loss": torch.stack(rows).sum() / count, "token_accuracy": right}

    def after_step(self, phase: Phase, terms: dict[str, Tensor]) -> None:
        """Nothing is bounded."""


def _summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """(k, V) and (k,) of one chat -> the sum of -ln p in float32; large vocabularies fit chat by chat only."""
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")
