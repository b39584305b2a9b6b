"""The contracts of training: Batch, Phase, Task, Evaluator, Tracker. Read this first.

    shards -> Batch -> Task.loss(phase, batch) -> trainer (backward, clip, optimizer) -> run folder -> Evaluator

A task says what one training step means and owns no optimizer, no EMA, no parallelism and no file; the trainer trains
any task. Parallel wrappers are applied in place to `Task.modules()`, so a task never notices them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Batch = dict[str, Any]
"""Keys: `pixel_values` (b, 3, h, w) CLIP-normalised; `input_ids`, `attention_mask` (b, t) int64; `labels` (b,) int64;
`key` list of sample names; `sample_index` (b,) int64, -1 marks padding that every metric drops."""


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """One optimizer and its schedule: linear warm-up, then cosine to zero over the run's steps."""

    name: str = "adamw"
    """`adamw`, or `lamb` (NVIDIA's variant with global gradient clipping to 1 inside, as timm has it)."""
    lr: float = 5e-4
    """Peak learning rate of parameters that no entry of `part_lrs` covers."""
    part_lrs: dict[str, float] = field(default_factory=dict)
    """Peak learning rate by parameter-name prefix, the longest match wins, e.g. `{"model.vision_decoder": 2e-3}`."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the moment estimates."""
    eps: float = 1e-6
    """Added to the denominator."""
    weight_decay: float = 0.05
    """Decoupled; never on biases, norms, position tables, CLS, logit_scale or anything of at most one dimension."""
    warmup_steps: int = 2000
    """Linear warm-up (step + 1) / warmup_steps."""
    clip_norm: float = 5.0
    """Global gradient norm above which gradients are scaled down; 0 turns clipping off."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Phase:
    """One backward pass and one optimizer. Ordinary tasks have one phase, the GAN stage two."""

    name: str
    modules: tuple[str, ...]
    """Keys of `Task.modules()` that this phase trains (those parameters with requires_grad at construction)."""
    optimizer: OptimizerConfig


class Task(Protocol):
    """What one training step means."""

    def modules(self) -> dict[str, nn.Module]:
        """Everything with weights, by name; names prefix the parameters in checkpoints and `part_lrs`."""

    def phases(self, step: int) -> list[Phase]:
        """The phases of this step, in order."""

    def loss(self, phase: Phase, batch: Batch, step: int) -> dict[str, Tensor]:
        """Scalars. Keys ending in `_loss` are already weighted and are summed; the rest is only logged."""

    def after_step(self, phase: Phase) -> None:
        """Called after the optimizer step: clamp what has bounds."""


class Evaluator(Protocol):
    """What a number means. Works alone (`qlip eval`) and inside training."""

    def run(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Named figures of the model."""

    def card(self) -> dict[str, Any]:
        """The protocol behind the figures: data, count, filter, networks, versions."""


class Tracker(Protocol):
    """Where figures go besides metrics.jsonl."""

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Record scalars of one step."""

    def close(self) -> None:
        """Write what is buffered."""
