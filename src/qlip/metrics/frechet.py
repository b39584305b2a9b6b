"""Frechet distance between two sets of features, in float64 (FID is this over Inception features, arXiv 1706.08500).

Shapes: `n` samples, `d` features. The caller names the feature network: over the project's own encoder the number is
`fd_encoder`, never FID.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from qlip.core.distributed import sum_over_ranks


class Moments(Protocol):
    """Anything with a mean (d,) and a covariance (d, d)."""

    @property
    def mean(self) -> Tensor: ...

    @property
    def covariance(self) -> Tensor: ...


class Gaussian(NamedTuple):
    """Moments known in advance, e.g. read from a reference file."""

    mean: Tensor
    covariance: Tensor


class FeatureStatistics:
    """Running sums of features, from which mean and covariance follow; parts of a data set can be merged."""

    def __init__(self, num_features: int, *, device: torch.device | str = "cpu") -> None:
        """`device` keeps the float64 sums: d^2 numbers, 32 MiB for Inception's 2048."""
        self.count = 0
        self.total = torch.zeros(num_features, dtype=torch.float64, device=device)
        self.outer = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, features: Tensor, *, sample_index: Tensor | None = None) -> None:
        """Add features (n, d) of any dtype; rows whose `sample_index` (n,) is -1 are padding and are dropped.

        Raises `ValueError` for another shape.
        """
        if features.ndim != 2 or features.shape[1] != len(self.total):
            raise ValueError(f"features are {tuple(features.shape)}, give (samples, {len(self.total)})")
        if sample_index is not None:
            features = features[sample_index.to(features.device) != -1]
        features = features.to(self.total)  # float64 before any sum
        self.count += len(features)
        self.total += features.sum(0)
        self.outer += features.T @ features

    def merge(self, other: FeatureStatistics) -> None:
        """Add another part's sums, as if its features had been given here."""
        self.count += other.count
        self.total += other.total.to(self.total)
        self.outer += other.outer.to(self.outer)

    def over_ranks(self) -> FeatureStatistics:
        """The sums of all ranks together, on every rank; all ranks call it together."""
        joined = FeatureStatistics(len(self.total), device=self.total.device)
        joined.count = int(sum_over_ranks(torch.tensor(self.count, device=self.total.device)))
        joined.total += sum_over_ranks(self.total)  # added, so that a single process shares no memory with the result
        joined.outer += sum_over_ranks(self.outer)
        return joined

    @property
    def mean(self) -> Tensor:
        """(d,) float64. Raises `ValueError` without samples."""
        if self.count < 1:
            raise ValueError("no features yet, so there is no mean: call update first")
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """(d, d) float64, unbiased (divisor n - 1). Raises `ValueError` with fewer than two samples."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count}: give more pictures")
        mean = self.mean
        return (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2)``, zero for equal moments; computed on the CPU in float64.

    The trace of the root is the sum of the roots of the eigenvalues of ``A^T S2 A`` with ``S1 = A A^T``, a symmetric
    matrix with the spectrum of ``S1^1/2 S2 S1^1/2``. So it is real for covariances of any rank, unlike a general
    matrix square root. Raises `ValueError` for moments of different widths or fewer than two samples.
    """
    mean_a, mean_b = (x.mean.to("cpu", torch.float64) for x in (a, b))
    covariance_a, covariance_b = (x.covariance.to("cpu", torch.float64) for x in (a, b))
    if mean_a.shape != mean_b.shape:
        raise ValueError(f"features of different networks: widths {len(mean_a)} and {len(mean_b)}")
    values, vectors = torch.linalg.eigh(covariance_a)
    real = values > values[-1] * len(values) * torch.finfo(values.dtype).eps  # the rest is zero but for rounding
    factor = vectors[:, real] * values[real].sqrt()
    product = factor.T @ covariance_b @ factor
    root_trace = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * root_trace
    return max(distance.item(), 0.0)
