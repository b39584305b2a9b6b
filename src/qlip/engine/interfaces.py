"""The contracts of training: Batch, Phase, Task, Evaluator, Tracker. Read this first.

    shards -> Batch -> Task.loss(phase, batch) -> trainer (backward, clip, optimizer) -> run folder -> Evaluator

A task says what one training step means and owns no optimizer, no EMA, no parallelism and no file; the trainer trains
any task. Parallel wrappers are applied in place to `Task.modules()`, so a task never notices them. Two rules keep it
so: modules are used through their `forward` (parameters beside it only after it, in the same step), and a loss of
several processes has the loss of the joined batch as its mean over ranks (`core/distributed.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Batch = dict[str, Any]
"""Keys: `pixel_values` (b, 3, h, w) CLIP-normalised; `input_ids`, `attention_mask` (b, t) int64; `labels` int64, (b,)
classes, or (b, t) of chats, where -100 is not learned; `key` list of sample names; `sample_index` (b,) int64, -1 marks
padding that every metric drops."""


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """One optimizer and its schedule: linear warm-up, then a cosine over the run's steps."""

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
    final_lr_share: float = 0.0
    """Share of the peak rate at which the cosine ends."""
    clip_norm: float = 5.0
    """Global gradient norm above which gradients are scaled down; 0 turns clipping off."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Phase:
    """One backward pass and one optimizer. Ordinary tasks have one phase, the GAN stage two."""

    name: str
    modules: tuple[str, ...]
    """Keys of `Task.modules()` that this phase trains (those parameters with requires_grad at construction)."""
    optimizer: OptimizerConfig


@dataclass(kw_only=True, slots=True)
class Parts:
    """What one micro-batch contributes to a loss that looks at all micro-batches of a step together."""

    terms: dict[str, Tensor]
    """Means over the micro-batch, as `Task.loss` returns them; the trainer averages them over micro-batches."""
    features: dict[str, Tensor]
    """What `JointTask.joint_loss` needs: the trainer joins each along dimension 0, in the order of micro-batches."""


class Task(Protocol):
    """What one training step means."""

    def modules(self) -> dict[str, nn.Module]:
        """Everything with weights, by name; names prefix the parameters in checkpoints and `part_lrs`."""

    def phases(self, step: int) -> list[Phase]:
        """The phases of this step, in order."""

    def loss(self, phase: Phase, batch: Batch, step: int) -> dict[str, Tensor]:
        """Scalars. Keys ending in `_loss` are already weighted and are summed; the rest is only logged.

        A step of several micro-batches calls it once for each, all of one phase before the next phase.
        """

    def after_step(self, phase: Phase, terms: dict[str, Tensor]) -> None:
        """Called after the optimizer step with this rank's detached terms: clamp what has bounds, move averages.

        Not called for a step that was skipped.
        """


@runtime_checkable
class JointTask(Task, Protocol):
    """A task whose loss is more than a mean over samples: ``loss = parts.terms + joint_loss(parts.features)``.

    With several micro-batches per step the trainer computes the features of all of them without gradient, the joint
    loss and its gradient in the features, and then every micro-batch again with that gradient (GradCache, arXiv
    2101.06983): value and gradient are those of the joined batch, in the memory of one micro-batch.
    """

    def parts(self, phase: Phase, batch: Batch, step: int) -> Parts:
        """Terms and features of one micro-batch; called twice for each, with equal random state."""

    def joint_loss(self, phase: Phase, features: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Terms that depend on all micro-batches, from their joined features; keys as in `Task.loss`."""


class Loader(Protocol):
    """Endless micro-batches of one rank, whose position can be saved."""

    def __iter__(self) -> Iterator[Batch]:
        """From the resumed position, else from the beginning."""

    def state_dict(self) -> dict[str, Any]:
        """The position behind the last batch, as JSON values."""

    def resume(self, states: list[dict[str, Any]]) -> None:
        """Go on from the states of all ranks: exactly with as many ranks and workers, else from the next epoch on."""


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

    def images(self, step: int, name: str, pictures: Tensor) -> None:
        """Record a picture grid: (3, h, w) uint8."""

    def close(self) -> None:
        """Write what is buffered."""
