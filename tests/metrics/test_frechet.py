"""The Frechet distance against closed forms, scipy's matrix square root, and covariances of low rank."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from qlip.metrics.frechet import FeatureStatistics, Gaussian, frechet_distance


def random_covariance(d: int, *, rank: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(d, rank, generator=generator, dtype=torch.float64)
    return factor @ factor.T / rank


def statistics(features: torch.Tensor) -> FeatureStatistics:
    result = FeatureStatistics(features.shape[1])
    result.update(features)
    return result


def test_one_dimension():
    a = Gaussian(torch.tensor([1.0]), torch.tensor([[4.0]]))
    b = Gaussian(torch.tensor([-2.0]), torch.tensor([[9.0]]))
    assert frechet_distance(a, b) == pytest.approx((1 + 2) ** 2 + (2 - 3) ** 2)


def test_diagonal_and_commuting_covariances():
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.rand(6, generator=generator, dtype=torch.float64) + 0.1 for _ in range(2))
    m, n = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = ((m - n).square().sum() + (s.sqrt() - t.sqrt()).square().sum()).item()
    assert frechet_distance(Gaussian(m, s.diag()), Gaussian(n, t.diag())) == pytest.approx(expected, rel=1e-12)
    basis, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    rotated = (Gaussian(basis @ m, basis @ s.diag() @ basis.T), Gaussian(basis @ n, basis @ t.diag() @ basis.T))
    assert frechet_distance(*rotated) == pytest.approx(expected, rel=1e-10)


def test_equals_scipy_sqrtm():
    a, b = (Gaussian(torch.randn(16).double(), random_covariance(16, rank=40, seed=k)) for k in (1, 2))
    root = scipy.linalg.sqrtm((a.covariance @ b.covariance).numpy()).real
    expected = (a.mean - b.mean).square().sum() + (a.covariance + b.covariance).trace() - 2 * np.trace(root)
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected.item(), rel=1e-9)


def test_low_rank_covariances():
    zero = torch.zeros(32, dtype=torch.float64)
    a = Gaussian(zero, random_covariance(32, rank=5, seed=3))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(a, Gaussian(zero, 4 * a.covariance)) == pytest.approx(a.covariance.trace().item(), rel=1e-6)
    point = Gaussian(zero, torch.zeros(32, 32, dtype=torch.float64))
    assert frechet_distance(a, point) == pytest.approx(a.covariance.trace().item(), rel=1e-12)
    # ranges that meet in zero only: the cross term vanishes
    left, right = (torch.diag(torch.tensor(d, dtype=torch.float64)) for d in ([1.0, 2, 0, 0], [0.0, 0, 3, 4]))
    assert frechet_distance(Gaussian(zero[:4], left), Gaussian(zero[:4], right)) == pytest.approx(10)


def test_fewer_samples_than_features():
    x = torch.randn(10, 48, generator=torch.Generator().manual_seed(4))
    assert frechet_distance(statistics(x), statistics(x)) == pytest.approx(0, abs=1e-4)
    assert frechet_distance(statistics(x), statistics(x + 2)) == pytest.approx(4 * 48, rel=1e-5)


def test_statistics_equal_numpy_and_merge():
    x = torch.randn(50, 7, generator=torch.Generator().manual_seed(5)) + 3
    whole = statistics(x)
    np.testing.assert_allclose(whole.mean, x.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(whole.covariance, np.cov(x.double().numpy(), rowvar=False), rtol=1e-9, atol=1e-12)
    first, second = statistics(x[:13]), statistics(x[13:30])
    second.update(x[30:])
    first.merge(second)
    assert first.count == 50
    torch.testing.assert_close(first.covariance, whole.covariance)


def test_padding_is_dropped_and_half_precision_is_summed_in_float64():
    x = torch.randn(6, 3).bfloat16()
    padded = FeatureStatistics(3)
    padded.update(torch.cat([x, torch.full((2, 3), 1e6).bfloat16()]), sample_index=torch.tensor([*range(6), -1, -1]))
    assert padded.count == 6
    torch.testing.assert_close(padded.mean, x.double().mean(0))


def test_too_few_samples_and_wrong_widths_are_refused():
    empty, one = FeatureStatistics(3), statistics(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="call update first"):
        _ = empty.mean
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        frechet_distance(one, one)
    with pytest.raises(ValueError, match="widths 3 and 4"):
        frechet_distance(statistics(torch.zeros(2, 3)), statistics(torch.zeros(2, 4)))
    with pytest.raises(ValueError, match=r"give \(samples, 3\)"):
        empty.update(torch.zeros(2, 4))
