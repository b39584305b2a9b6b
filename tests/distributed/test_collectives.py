"""Every collective in two real gloo processes; the BSQ entropies of two ranks equal those of the joined batch."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from qlip.core import distributed
from qlip.core.errors import UserError
from qlip.quantizers.bsq import codebook_entropy, sample_entropy
from ranks import on_ranks

NUM_RANKS, IMAGES_PER_RANK, NUM_TOKENS, NUM_BITS = 2, 2, 3, 4
INV_TEMPERATURE = 5.0


def entropies_and_gradients(rows: slice) -> list[torch.Tensor]:
    """Sample entropy, codebook entropy for groups of 1 and 2 bits, each with its gradient in a shared projection."""
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_RANKS * IMAGES_PER_RANK, NUM_TOKENS, NUM_BITS)
    # different means per image: the entropy of a mean then differs from the mean of entropies
    x = torch.randn(shape, generator=generator, dtype=torch.float64) + torch.linspace(-2, 2, shape[0])[:, None, None]
    weight = (torch.eye(NUM_BITS, dtype=torch.float64) + 0.1).requires_grad_(True)
    u = F.normalize(x[rows] @ weight, dim=-1)
    values = [
        sample_entropy(u, inv_temperature=INV_TEMPERATURE),
        codebook_entropy(u, inv_temperature=INV_TEMPERATURE, group_size=1),
        codebook_entropy(u, inv_temperature=INV_TEMPERATURE, group_size=2),
    ]
    gradients = [torch.autograd.grad(value, weight, retain_graph=True)[0] for value in values]
    return [value.detach() for value in values] + gradients


def run_rank(rank: int, folder: str) -> None:
    """One of two processes. Values must agree as they are; gradients are averaged, as DDP and FSDP do."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=NUM_RANKS)
    results = entropies_and_gradients(slice(rank * IMAGES_PER_RANK, (rank + 1) * IMAGES_PER_RANK))
    for gradient in results[3:]:
        dist.all_reduce(gradient)
        gradient /= NUM_RANKS
    cpu = torch.device("cpu")
    collectives = {
        "rank": distributed.rank(),
        "world_size": distributed.world_size(),
        "mean": distributed.mean_over_ranks(torch.tensor([float(rank), 10.0])),
        "gathered": distributed.gather_with_grad(torch.full((2, 1), float(rank))),
        "any": [distributed.any_rank(flag, device=cpu) for flag in (rank == 1, False, True)],
    }
    torch.save({"entropies": results, "collectives": collectives}, Path(folder) / f"{rank}.pt")
    distributed.stop()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What both processes wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run_rank, args=(str(folder),), nprocs=NUM_RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(NUM_RANKS)]


def test_entropies_and_gradients_equal_the_joined_batch(ranks):
    expected = entropies_and_gradients(slice(None))
    for written in ranks:
        torch.testing.assert_close(written["entropies"], expected, rtol=1e-10, atol=1e-12)


def test_a_mean_of_entropies_would_be_caught():
    """The joined codebook entropy is above the mean over ranks of the ranks' own entropies, for both group sizes."""
    joined = entropies_and_gradients(slice(None))
    halves = [entropies_and_gradients(slice(start, start + 2)) for start in (0, 2)]
    for k in (1, 2):
        assert joined[k] > (halves[0][k] + halves[1][k]) / 2 + 1e-3


def test_collectives_return_their_result(ranks):
    for rank, written in enumerate(ranks):
        collectives = written["collectives"]
        assert (collectives["rank"], collectives["world_size"]) == (rank, 2)
        assert collectives["mean"].tolist() == [0.5, 10.0]
        assert collectives["gathered"].flatten().tolist() == [0, 0, 1, 1]
        assert collectives["any"] == [True, False, True]


def test_alone_every_collective_is_the_identity():
    x = torch.randn(2, 3)
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.mean_over_ranks(x) is x
    assert distributed.gather_with_grad(x) is x
    assert distributed.any_rank(True, device=x.device) and not distributed.any_rank(False, device=x.device)


def together(folder: str) -> list[str]:
    """What this rank is told when rank 1 alone, all ranks, rank 0 for all, and nobody makes a mistake."""

    def mistaken(ranks: tuple[int, ...]) -> int:
        if distributed.rank() in ranks:
            raise UserError("no such folder; mend it")
        return distributed.rank()

    said = []
    for ranks in ((1,), (0, 1), ()):
        try:
            said.append(str(distributed.on_all_ranks(partial(mistaken, ranks))))
        except UserError as error:
            said.append(str(error))
    try:
        distributed.on_first_rank(partial(mistaken, (0,)))
    except UserError as error:
        said.append(str(error))
    distributed.on_first_rank(partial(mistaken, (1,)))  # not run there
    return said + distributed.gather_objects(f"of {distributed.rank()}")


def test_a_mistake_of_one_rank_is_met_by_all(tmp_path):
    problem = "no such folder; mend it"
    for rank, said in enumerate(on_ranks(together, str(tmp_path), num_ranks=2, folder=tmp_path)):
        assert said == [f"rank 1: {problem}", problem, str(rank), problem, "of 0", "of 1"]
