"""The arithmetic behind `qlip check`: memory per GPU, the largest batch that fits, time. Knows numbers, not models.

Every moment of a training step holds ``constant + slope x samples`` bytes, so two measured steps (`step_cost.py`) of
different batch size give the memory of any batch size: the largest such sum over the moments. What depends on how the
run is spread over GPUs is added by formula; `docs/check.md` derives each and says how far off they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from qlip.engine.step_cost import StepCost

FLOAT32 = 4
LOGIT_COPIES = 4
"""(b, B) float32 matrices alive at once in the backward pass of the CLIP loss: two saved, two being computed."""
CHUNK_COPIES = 3
"""(b, chunk) float32 matrices alive at once when logits are computed in chunks: one is of the chunk before."""
MAX_LOGIT_BYTES = 1e9
"""What a suggested chunk keeps the logits below."""
CONTEXT_BYTES = 1.5e9
"""CUDA context, cuBLAS and cuDNN workspaces."""
FRAGMENTATION = 0.05
"""Share of activations that the allocator holds beyond what is alive."""
CONTRASTIVE_FLOPS = 12
"""Per pair of rows, per width: two products forward, four backward, a multiplication and an addition each."""


@dataclass(kw_only=True, slots=True)
class Fixed:
    """Numbers of parameters, which decide what is held whatever the batch size."""

    weights: int
    """Of all modules, trained or frozen."""
    trained: int
    """Of those that an optimizer moves: a gradient and two moments each."""
    averaged: int = 0
    """Of the exponential average; 0 without one."""
    replicated: int = 0
    """Of networks beside the task's modules (LPIPS), which every GPU holds whole."""
    largest_block: int = 0
    """Of the largest transformer block, the unit in which sharded weights are gathered."""
    outside_blocks: int = 0
    """Outside transformer blocks, which stay gathered through a step."""


@dataclass(kw_only=True, slots=True)
class Spread:
    """How a run is spread over GPUs."""

    num_gpus: int
    """Processes, one GPU each."""
    parallel: Literal["none", "ddp", "fsdp"]
    """`fsdp` divides weights, gradients, moments and the average by the GPUs."""
    global_batch: int
    """Samples per optimizer step over all GPUs; 0 is one micro-batch per GPU."""

    def samples_per_gpu(self, micro_batch: int) -> int:
        """Samples of one optimizer step on one GPU, at least one micro-batch."""
        return max(micro_batch, self.global_batch // self.num_gpus)

    def all_samples(self, micro_batch: int) -> int:
        """Samples of one optimizer step over all GPUs."""
        return self.samples_per_gpu(micro_batch) * self.num_gpus

    def micro_batches(self, micro_batch: int) -> int:
        """How often each GPU computes a micro-batch per step."""
        return math.ceil(self.samples_per_gpu(micro_batch) / micro_batch)

    @property
    def shares(self) -> int:
        """Into how many parts weights and their like are divided."""
        return self.num_gpus if self.parallel == "fsdp" else 1


@dataclass(kw_only=True, slots=True)
class Contrast:
    """Sizes of a loss over all pairs."""

    width: int = 0
    """Of the shared embedding; 0 when no pairs are compared."""
    chunk: int = 0
    """Columns of logits held at once; 0 is all."""


class Moments:
    """Two measured steps as a function of the batch size."""

    def __init__(self, small: StepCost, large: StepCost, *, sizes: tuple[int, int]) -> None:
        """`small` and `large` are one step of the same task at two batch sizes, whose operations correspond."""
        assert len(small.held) == len(large.held), "the two steps differ in their operations"
        low, high = (np.array(cost.held, dtype=np.float64) for cost in (small, large))
        self._slope = (high - low) / (sizes[1] - sizes[0])
        self._constant = low - self._slope * sizes[0]
        self._gradients = np.array(small.gradients, dtype=np.float64)
        self.waiting = (large.waiting - small.waiting) / (sizes[1] - sizes[0])
        """Bytes per sample that wait for a later phase."""
        saved = [max(cost.saved.values()) for cost in (small, large)]
        self.saved = (saved[1] - saved[0]) / (sizes[1] - sizes[0])
        """Bytes per sample that the largest graph of a phase keeps for its backward pass."""

    def peak(self, micro_batch: int, *, gradients_stay: bool, shares: int = 1) -> tuple[float, float]:
        """Bytes of activations and of gradients at the fullest moment.

        `gradients_stay` when earlier micro-batches have left theirs; each of `shares` GPUs holds its part of them.
        """
        activations = self._constant + self._slope * micro_batch - self._gradients
        gradients = np.full_like(activations, self._gradients.max()) if gradients_stay else self._gradients
        fullest = int((activations + gradients / shares).argmax())
        return float(activations[fullest]), float(gradients[fullest] / shares)


def logit_bytes(rows: int, columns: int, *, chunk: int) -> float:
    """Bytes of the logits of `rows` pairs of this GPU against `columns` pairs of all."""
    if chunk and chunk < columns:
        return float(CHUNK_COPIES * rows * chunk * FLOAT32)
    return float(LOGIT_COPIES * rows * columns * FLOAT32)


def suggested_chunk(rows: int, columns: int) -> int:
    """0 when all logits fit `MAX_LOGIT_BYTES`, else the largest power of two of columns that does."""
    if logit_bytes(rows, columns, chunk=0) <= MAX_LOGIT_BYTES:
        return 0
    return power_of_two(max(1, int(MAX_LOGIT_BYTES / (CHUNK_COPIES * rows * FLOAT32))))


def power_of_two(largest: int) -> int:
    """The largest power of two up to `largest`, which is at least 1."""
    return 1 << (largest.bit_length() - 1)


@dataclass(kw_only=True, slots=True)
class MemoryPlan:
    """Everything that decides the memory of one GPU but the micro-batch."""

    moments: Moments
    """Of the step."""
    fixed: Fixed
    """Parameters."""
    spread: Spread
    """GPUs."""
    contrast: Contrast
    """The loss over all pairs."""
    sample_bytes: int
    """Of one sample of a batch: pixels and ids."""

    def parts(self, micro_batch: int) -> dict[str, float]:
        """Bytes by what holds them, at the fullest moment of a step."""
        fixed, spread = self.fixed, self.spread
        micro_batches = spread.micro_batches(micro_batch)
        activations, gradients = self.moments.peak(micro_batch, gradients_stay=micro_batches > 1, shares=spread.shares)
        parts = {
            "weights": FLOAT32 * (fixed.weights / spread.shares + fixed.replicated),
            "optimizer moments": 2 * FLOAT32 * fixed.trained / spread.shares,
            "averaged weights": FLOAT32 * fixed.averaged / spread.shares,
            "gradients": gradients,
            "gathered weights": self._gathered(),
            "activations": activations,
            "waiting micro-batches": (micro_batches - 1) * micro_batch * self.moments.waiting,
            "batch": float(micro_batch * self.sample_bytes),
            **self._pairs(micro_batch, activations),
        }
        parts["reserve"] = CONTEXT_BYTES + FRAGMENTATION * activations
        return parts

    def total(self, micro_batch: int) -> float:
        """Bytes of all parts together."""
        return sum(self.parts(micro_batch).values())

    def bytes_per_sample(self, micro_batch: int) -> float:
        """Bytes that one more sample takes at this micro-batch."""
        return (self.total(micro_batch + 8) - self.total(micro_batch)) / 8

    def _gathered(self) -> float:
        """With sharding: one block in use, one on its way, the gradient of one; all outside blocks with gradients."""
        if self.spread.parallel != "fsdp" or self.spread.num_gpus == 1:
            return 0.0
        return float(FLOAT32 * (3 * self.fixed.largest_block + 2 * self.fixed.outside_blocks))

    def _pairs(self, micro_batch: int, activations: float) -> dict[str, float]:
        """Features of all pairs and logits. With several micro-batches logits exist while no activations do."""
        if not self.contrast.width:
            return {}
        rows, columns = self.spread.samples_per_gpu(micro_batch), self.spread.all_samples(micro_batch)
        several = self.spread.micro_batches(micro_batch) > 1
        gathered = 4 * columns if self.spread.num_gpus > 1 else 0  # images and texts, with gradients
        features = float((gathered + 4 * rows * several) * self.contrast.width * FLOAT32)
        logits = logit_bytes(rows, columns, chunk=self.contrast.chunk)
        return {"features of all pairs": features, "logits": max(0.0, logits - activations * several)}

    def largest_batch(self, limit: float) -> int:
        """The largest micro-batch whose total is within `limit` bytes; 0 when not even one sample fits.

        From a GPU's whole share of the global batch on there is one micro-batch, which needs less beside it.
        """
        share = max(1, self.spread.global_batch // self.spread.num_gpus)

        def fits(size: int) -> bool:
            return self.total(size) <= limit

        return largest_fitting(fits, least=share, most=1 << 20) or largest_fitting(fits, least=1, most=share)


def largest_fitting(fits: Callable[[int], bool], *, least: int, most: int) -> int:
    """The largest integer from `least` to `most` for which `fits` holds, by bisection; 0 when not for `least`."""
    if not fits(least):
        return 0
    low, high = least, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def amortised_flops(usual: dict[str, float], rare: dict[str, float], *, every: int) -> dict[str, float]:
    """FLOPs of a step by dtype when every so many steps are of the `rare` kind."""
    names = usual.keys() | rare.keys()
    return {name: usual.get(name, 0) + (rare.get(name, 0) - usual.get(name, 0)) / every for name in sorted(names)}


@dataclass(kw_only=True, slots=True)
class Speed:
    """What a GPU is assumed to reach."""

    tflops: float
    """Peak of bf16 matrix products, in 10^12 per second. Float32 (as TF32) is taken to have half of it."""
    mfu: float
    """Share of the peak that is reached."""

    def seconds(self, flops: dict[str, float]) -> float:
        """Of one GPU for FLOPs by dtype."""
        low = sum(value for name, value in flops.items() if name != "float32")
        return (low + 2 * flops.get("float32", 0.0)) / (self.tflops * 1e12 * self.mfu)
