"""The Frechet distance against closed forms, scipy's root, torch-fidelity's value, and covariances of low rank."""

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


def brute_force(x: torch.Tensor, y: torch.Tensor) -> float:
    """For ``S1 = A^T A`` and ``S2 = B^T B``, centred samples over (n - 1)^1/2: ``tr (S1 S2)^1/2`` is the sum of the
    singular values of ``S1^1/2 S2^1/2``, which are those of ``A B^T``. No root of a singular matrix is taken."""
    means = [z.double().mean(0) for z in (x, y)]
    a, b = ((z.double() - mean) / (len(z) - 1) ** 0.5 for z, mean in zip((x, y), means, strict=True))
    cross = torch.linalg.svdvals(a @ b.T).sum()
    return ((means[0] - means[1]).square().sum() + a.square().sum() + b.square().sum() - 2 * cross).item()


def outside_value(x: torch.Tensor, y: torch.Tensor) -> float:
    """torch-fidelity's FID of two sets of features."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric  # not for every rank

    sides = [fid_features_to_statistics(features.double()) for features in (x, y)]
    return fid_statistics_to_metric(*sides, verbose=False)["frechet_inception_distance"]


@pytest.mark.parametrize(
    ("mean_a", "deviation_a", "mean_b", "deviation_b"),
    [(1.0, 2.0, -2.0, 3.0), (0.3, 0.01, 0.3, 70.0), (-4.0, 5.0, 9.0, 5.0), (2.0, 0.0, 2.5, 0.7)],
    ids=["plain", "equal-means", "equal-deviations", "point"],
)
def test_one_dimension(mean_a, deviation_a, mean_b, deviation_b):
    a, b = (
        Gaussian(torch.tensor([mean]).double(), torch.tensor([[deviation]]).double() ** 2)
        for mean, deviation in ((mean_a, deviation_a), (mean_b, deviation_b))
    )
    expected = (a.mean - b.mean).item() ** 2 + (a.covariance.sqrt() - b.covariance.sqrt()).item() ** 2
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_equal_covariances_leave_the_means():
    covariance = random_covariance(12, rank=30, seed=6)
    m, n = torch.randn(2, 12, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    expected = (m - n).square().sum().item()
    assert frechet_distance(Gaussian(m, covariance), Gaussian(n, covariance)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_two_by_two_covariances_that_do_not_commute(seed):
    """Both roots of the eigenvalues p, q of S1 S2: ``(sqrt p + sqrt q)^2 = tr(S1 S2) + 2 sqrt(det S1 det S2)``."""
    a, b = (Gaussian(torch.randn(2).double(), random_covariance(2, rank=3, seed=10 * seed + k)) for k in (1, 2))
    product = a.covariance @ b.covariance
    assert (product - product.T).abs().max() > 1e-3
    root = (product.trace() + 2 * (a.covariance.det() * b.covariance.det()).sqrt()).sqrt()
    expected = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)


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


@pytest.mark.parametrize(
    ("num_x", "num_y", "width"), [(6, 6, 64), (6, 40, 64), (30, 12, 48)], ids=["few", "second-full", "uneven"]
)
def test_low_rank_equals_brute_force(num_x, num_y, width):
    """Rounding in the null space of the second costs 1e-8 under a root, so 1e-9 holds for full rank only."""
    generator = torch.Generator().manual_seed(8)
    x, y = (torch.randn(count, width, generator=generator).abs() for count in (num_x, num_y))
    for first, second in ((x, y), (y, x)):
        distance = frechet_distance(statistics(first), statistics(second))
        assert distance == pytest.approx(brute_force(x, y), rel=1e-6)


@pytest.mark.parametrize("disturbance", [0.1, 1.0], ids=["near", "far"])
def test_equals_torch_fidelity(disturbance):
    """Full rank, and both equal the brute force. `near` is a distance of 0.05 between traces of 278."""
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(400, 48, generator=generator).abs() @ torch.rand(48, 48, generator=generator)
    y = x + disturbance * torch.randn(400, 48, generator=generator)
    distance = frechet_distance(statistics(x), statistics(y))
    assert distance == pytest.approx(outside_value(x, y), rel=1e-6)
    assert distance == pytest.approx(brute_force(x, y), rel=1e-7)


def test_equals_torch_fidelity_at_low_rank():
    """There the package's general eigenvalues are rougher than ours: three parts in 10^7 here."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 64, generator=generator).abs()
    y = x + 0.3 * torch.randn(6, 64, generator=generator)
    distance = frechet_distance(statistics(x), statistics(y))
    assert distance == pytest.approx(outside_value(x, y), rel=1e-6)
    exact = brute_force(x, y)
    assert abs(distance - exact) < abs(outside_value(x, y) - exact)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_parts_padded_and_merged_equal_numpy(dtype):
    """Batches of 8 whose last is padded, dealt to three statistics, one of which gets nothing."""
    x = (torch.randn(37, 5, generator=torch.Generator().manual_seed(11)) * 2 + 7).to(dtype)
    parts = [FeatureStatistics(5) for _ in range(3)]
    for number, start in enumerate(range(0, 37, 8)):
        rows = torch.arange(start, min(start + 8, 37))
        padding = 8 - len(rows)
        index = torch.cat([rows, rows.new_full((padding,), -1)])
        parts[number % 2].update(torch.cat([x[rows], x[rows[-1:]].expand(padding, 5)]), sample_index=index)
    whole = FeatureStatistics(5)
    for part in parts:
        whole.merge(part)
    assert whole.count == 37
    np.testing.assert_allclose(whole.mean, x.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(whole.covariance, np.cov(x.double().numpy(), rowvar=False), rtol=1e-9, atol=1e-12)


def test_over_ranks_alone_is_a_copy():
    own = statistics(torch.ones(4, 3))
    joined = own.over_ranks()
    joined.update(torch.ones(1, 3))
    assert (joined.count, own.count) == (5, 4)
    assert own.total.tolist() == [4.0] * 3 and joined.total.tolist() == [5.0] * 3


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
