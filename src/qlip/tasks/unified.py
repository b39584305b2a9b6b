"""Next-token training of UM3 over text and images (QLIP section 9, Eq 6): one loss over packed rows.

The loss is -ln p within the modality of each target, averaged over the targets that all ranks have in a micro-batch.
The likelihood of each modality and of each task is logged by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlip.core import pixels
from qlip.core.distributed import sum_over_ranks, world_size
from qlip.core.precision import float32_region
from qlip.data.packing import IGNORED, TASKS, UNFILLED
from qlip.engine.interfaces import Batch, OptimizerConfig, Phase
from qlip.models.image_tokenizer import ImageTokenizer
from qlip.models.unified import UM3ForCausalLM
from qlip.models.visual_tokens import bits_to_vocabulary


@dataclass(kw_only=True, slots=True)
class UnifiedConfig:
    """Rates and losses. Defaults are Table 9's, with Lingua's end of the schedule."""

    kind: Literal["unified"] = "unified"
    """Tells this from other trainings in config.json."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            name="adamw",
            lr=1e-4,
            final_lr_share=0.1,
            betas=(0.9, 0.95),
            eps=1e-8,
            weight_decay=0.1,
            warmup_steps=2000,
            clip_norm=1.0,
        )
    )
    """One for all parameters."""
    z_loss: float = 0.0
    """Weight of the squared logarithm of the softmax's normaliser (PaLM, arXiv 2204.02311, has 1e-4); 0 is none."""


class UnifiedTask:
    """Packed rows of ids -> negative log-likelihood. Batches as `data.mixing` makes them."""

    def __init__(
        self, model: UM3ForCausalLM, config: UnifiedConfig, *, tokenizer: ImageTokenizer | None = None
    ) -> None:
        """`tokenizer` is needed for batches of pictures; it is frozen."""
        self.model, self.config, self.tokenizer = model, config, tokenizer
        self._phase = Phase(name="train", modules=("model",), optimizer=config.optimizer)

    def modules(self) -> dict[str, nn.Module]:
        """The model."""
        return {"model": self.model}

    def phases(self, step: int) -> list[Phase]:
        """One."""
        return [self._phase]

    def loss(self, phase: Phase, batch: Batch, step: int) -> dict[str, Tensor]:
        """`token_loss` in nats a token, and `z_loss` if it has a weight.

        Logged: nats a token of each modality and of each task that the batch has, over the targets of all ranks, and
        the share of samples that are text.
        """
        ids, labels = self._filled(batch)
        output = self.model(input_ids=ids, labels=labels, position_ids=batch["position_ids"])
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        learned = targets != IGNORED
        count = (sum_over_ranks(learned.sum().float()) / world_size()).clamp(min=1 / world_size())
        visual = targets >= self.model.config.text_vocab_size
        terms = {"token_loss": output.nll.sum() / count}
        if self.config.z_loss:
            terms["z_loss"] = self.config.z_loss * output.log_normalizer.square().sum() / count
        with torch.no_grad():
            parts = {"text_nll": learned & ~visual, "visual_nll": visual}
            parts |= {f"{name}_task_nll": learned & (batch["task_ids"] == number) for number, name in enumerate(TASKS)}
            masks = torch.stack(list(parts.values())).flatten(1).float()  # (parts, b s)
            sums = torch.stack([(masks * output.nll.flatten()).sum(1), masks.sum(1)])  # a product would be autocast
            sums = sum_over_ranks(torch.cat([sums, _share(batch["sample_counts"])], dim=1))
            found = (sums[1] > 0).tolist()
            figures = zip([*parts, "text_share"], found, sums[0] / sums[1], strict=True)
            terms |= {name: value for name, present, value in figures if present}
        return terms

    def after_step(self, phase: Phase, terms: dict[str, Tensor]) -> None:
        """Nothing is bounded."""

    def _filled(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Ids and labels (b, s), with those of the batch's pictures where the loader left their places open."""
        ids, labels = batch["input_ids"], batch["labels"]
        if "pixel_values" not in batch:
            return ids, labels
        assert self.tokenizer is not None, "pictures need a tokenizer"
        pictures = pixels.to_uint8(batch["pixel_values"])
        self.tokenizer.to(pictures.device)
        with float32_region(pictures.device.type):  # as `qlip tokenize` does: autocast would flip bits
            bits = self.tokenizer.encode(pictures).clone()
        config = self.model.config
        filled = bits_to_vocabulary(bits, config.visual_division, offset=config.text_vocab_size).flatten()
        return ids.masked_scatter(ids == UNFILLED, filled), labels.masked_scatter(labels == UNFILLED, filled)


def _share(counts: Tensor) -> Tensor:
    """Samples of each task (3,) -> (2, 1): text samples, all samples."""
    return torch.stack([counts[0], counts.sum()])[:, None]
