"""The contrastive losses in two real gloo processes equal those of one process with the joined batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from qlip.core import distributed
from qlip.losses.contrastive import clip_loss, siglip_loss

NUM_RANKS, PAIRS_PER_RANK, WIDTH = 2, 5, 4
LOSSES = {"clip": clip_loss, "siglip": siglip_loss}
CHUNK_SIZES = [0, 1, 3, PAIRS_PER_RANK, NUM_RANKS * PAIRS_PER_RANK, 100]  # 3: a chunk with pairs of both ranks
ALL = slice(None)


def loss_and_gradients(name: str, rows: slice, *, chunk_size: int) -> list[torch.Tensor]:
    """The loss of these rows under shared projections; its gradient in them, the temperature and the bias."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, NUM_RANKS * PAIRS_PER_RANK, WIDTH)
    inputs = torch.randn(shape, generator=generator, dtype=torch.float64)[:, rows]
    shared = [(torch.eye(WIDTH, dtype=torch.float64) + 0.1 * k).requires_grad_(True) for k in (1, 2)]
    numbers = {"clip": [2.0], "siglip": [2.0, -1.5]}[name]
    shared += [torch.tensor([number], dtype=torch.float64, requires_grad=True) for number in numbers]
    v, w = (F.normalize(x @ weight, dim=-1) for x, weight in zip(inputs, shared[:2], strict=True))
    loss = LOSSES[name](v, w, *shared[2:], chunk_size=chunk_size)
    return [loss.detach(), *torch.autograd.grad(loss, shared)]


def run_rank(rank: int, folder: str) -> None:
    """One of two processes: average what an engine would average, and write down both that and its own loss."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=NUM_RANKS
    )
    written = {}
    for name in LOSSES:
        for chunk_size in CHUNK_SIZES:
            rows = slice(rank * PAIRS_PER_RANK, (rank + 1) * PAIRS_PER_RANK)
            results = loss_and_gradients(name, rows, chunk_size=chunk_size)
            own_loss = results[0].clone()
            for result in results:
                torch.distributed.all_reduce(result)
            written[f"{name} {chunk_size}"] = [own_loss, *(result / NUM_RANKS for result in results)]
    torch.save(written, Path(folder) / f"{rank}.pt")
    distributed.stop()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What both processes wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run_rank, args=(str(folder),), nprocs=NUM_RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(NUM_RANKS)]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_two_processes_equal_the_joined_batch(ranks, name, chunk_size):
    expected = loss_and_gradients(name, ALL, chunk_size=0)
    for written in ranks:
        torch.testing.assert_close(written[f"{name} {chunk_size}"][1:], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_every_rank_scores_its_own_rows(ranks, name):
    """The ranks' losses differ from each other and agree for every chunk size: only their mean is the joined one."""
    own = torch.stack([torch.stack([written[f"{name} {size}"][0] for size in CHUNK_SIZES]) for written in ranks])
    assert (own[0] - own[1]).abs().min() > 1e-3
    torch.testing.assert_close(own, own[:, :1].expand_as(own), rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_a_mean_of_losses_that_do_not_gather_would_be_caught(name):
    joined = loss_and_gradients(name, ALL, chunk_size=0)
    halves = [loss_and_gradients(name, slice(start, start + 5), chunk_size=0) for start in (0, 5)]
    for whole, first, second in zip(joined, *halves, strict=True):
        assert (whole - (first + second) / 2).abs().max() > 1e-3
