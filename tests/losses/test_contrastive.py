"""The contrastive loss against a double loop, and two real processes against one with the joined batch."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from qlip.losses.contrastive import clip_loss

NUM_RANKS, PAIRS_PER_RANK, WIDTH = 2, 3, 5


def unit_vectors(count: int, *, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, WIDTH, generator=generator, dtype=torch.float64), dim=-1)


def brute_force(v: torch.Tensor, w: torch.Tensor, logit_scale: float) -> float:
    """Eq 2 with plain loops in float64, times 1 / (2B)."""
    scale, count, total = math.exp(logit_scale), len(v), 0.0
    for i in range(count):
        image_to_text = [scale * float(v[i] @ w[j]) for j in range(count)]
        text_to_image = [scale * float(v[j] @ w[i]) for j in range(count)]
        for logits in (image_to_text, text_to_image):
            total += logits[i] - math.log(sum(math.exp(logit) for logit in logits))
    return -total / (2 * count)


@pytest.mark.parametrize("logit_scale", [0.0, math.log(1 / 0.07), math.log(100)])
def test_equals_a_double_loop(logit_scale):
    v, w = unit_vectors(6, seed=0), unit_vectors(6, seed=1)
    loss = clip_loss(v, w, torch.tensor(logit_scale, dtype=torch.float64))
    assert loss.item() == pytest.approx(brute_force(v, w, logit_scale), rel=1e-5)


def test_known_values():
    same = torch.ones(4, 1)
    assert clip_loss(same, same, torch.tensor(2.0)).item() == pytest.approx(math.log(4), rel=1e-6)
    perfect = torch.eye(4)
    assert clip_loss(perfect, perfect, torch.tensor(math.log(100))).item() == pytest.approx(0, abs=1e-6)


def test_autocast_keeps_float32():
    v, w, scale = unit_vectors(6, seed=0).float(), unit_vectors(6, seed=1).float(), torch.tensor(math.log(100))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(clip_loss(v, w, scale), clip_loss(v.clone(), w.clone(), scale))
        under_autocast = clip_loss(v, w, scale)
    assert torch.equal(under_autocast, clip_loss(v, w, scale))


def loss_and_gradients(rows: slice) -> list[torch.Tensor]:
    """The loss of these rows under shared projections, and its gradient in both projections and the temperature."""
    weights = [(torch.eye(WIDTH) + 0.1 * k).requires_grad_(True) for k in (1, 2)]
    logit_scale = torch.tensor(2.0, requires_grad=True)
    inputs = [unit_vectors(NUM_RANKS * PAIRS_PER_RANK, seed=seed).float()[rows] for seed in (0, 1)]
    v, w = (F.normalize(x @ weight, dim=-1) for x, weight in zip(inputs, weights, strict=True))
    loss = clip_loss(v, w, logit_scale)
    loss.backward()
    return [loss.detach(), *(weight.grad for weight in weights), logit_scale.grad]


def run_rank(rank: int, folder: str) -> None:
    """One of two processes: average what an engine would average, and write it down."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=NUM_RANKS)
    results = loss_and_gradients(slice(rank * PAIRS_PER_RANK, (rank + 1) * PAIRS_PER_RANK))
    for result in results:
        dist.all_reduce(result)
    torch.save([result / NUM_RANKS for result in results], Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_the_joined_batch(tmp_path):
    torch.multiprocessing.spawn(run_rank, args=(str(tmp_path),), nprocs=NUM_RANKS)
    expected = loss_and_gradients(slice(None))
    for rank in range(NUM_RANKS):
        actual = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
