"""Memory of batch sizes that were not measured, of several micro-batches and GPUs; batches that fit; time."""

from __future__ import annotations

import pytest
import torch
from tiny_steps import SHAPES, dry_run
from torch import nn

from qlip.engine.planner import (
    CHUNK_COPIES,
    LOGIT_COPIES,
    Contrast,
    Fixed,
    MemoryPlan,
    Moments,
    Speed,
    Spread,
    amortised_flops,
    largest_fitting,
    logit_bytes,
    power_of_two,
    suggested_chunk,
)
from qlip.engine.step_cost import Meter, StepCost
from qlip.losses.contrastive import clip_loss

NO_PAIRS = Contrast()


def moments_of(run, *, step: int = 0) -> Moments:
    return Moments(*(run.cost(SHAPES, batch_size=size, step=step) for size in (8, 16)), sizes=(8, 16))


@pytest.mark.parametrize(("stage", "checkpointing"), [(1, False), (1, True), (2, False)])
def test_two_steps_tell_the_peak_of_any_batch_size(stage, checkpointing):
    run = dry_run(stage, checkpointing=checkpointing)
    moments = moments_of(run)
    for size in (24, 64):
        measured = max(run.cost(SHAPES, batch_size=size, step=0).held)
        logits = LOGIT_COPIES * 4 * size**2 if stage == 1 else 0  # grow with the square, and are added by formula
        predicted = sum(moments.peak(size, gradients_stay=False))
        assert predicted - 0.02 * logits - 1 <= measured <= predicted + logits + 1


def test_the_fullest_moment_moves_with_the_batch_and_with_sharding():
    """Moments: 100 bytes of gradients and 1 per sample at the end, 10 per sample in the middle."""
    small = StepCost(held=[0, 10, 101], gradients=[0, 0, 100], saved={"a": 5})
    large = StepCost(held=[0, 20, 102], gradients=[0, 0, 100], saved={"a": 10})
    moments = Moments(small, large, sizes=(1, 2))
    assert moments.saved == 5
    assert moments.peak(1, gradients_stay=False) == (1, 100)
    assert moments.peak(50, gradients_stay=False) == (500, 0)
    assert moments.peak(50, gradients_stay=True) == (500, 100)
    assert moments.peak(5, gradients_stay=False, shares=4) == (50, 0)
    assert moments.peak(5, gradients_stay=False, shares=1) == (5, 100)


@pytest.mark.parametrize("stage", [1, 2])
def test_several_micro_batches_are_those_of_the_real_loop(stage):
    """One measured micro-batch, and what several leave behind, against the real loop over three of them."""
    size, several = 16, 3
    run = dry_run(stage)
    once, thrice = run.cost(SHAPES, batch_size=size, step=0), None
    thrice = run.cost(SHAPES, batch_size=size, step=0, micro_batches=several)
    trained = sum(p.numel() for p in run.modules.parameters() if p.requires_grad)
    plan = MemoryPlan(
        moments=moments_of(run),
        fixed=Fixed(weights=0, trained=trained),
        spread=Spread(num_gpus=1, parallel="none", global_batch=several * size),
        contrast=Contrast(width=16) if stage == 1 else NO_PAIRS,
        sample_bytes=0,
    )
    parts = plan.parts(size)
    predicted = sum(parts[name] for name in ("activations", "gradients", "waiting micro-batches"))
    predicted += parts.get("features of all pairs", 0) + parts.get("logits", 0)
    assert predicted == pytest.approx(max(thrice.held), rel=0.02)
    passes = once.flops["bfloat16"] + (once.forward_flops["bfloat16"] if stage == 1 else 0)
    assert thrice.flops["bfloat16"] == several * passes


@pytest.mark.parametrize(("chunk", "copies"), [(0, LOGIT_COPIES), (128, CHUNK_COPIES)])
def test_the_contrastive_loss_holds_the_stated_copies_of_its_logits(chunk, copies):
    num, width = 1024, 8
    images, texts = (torch.randn(num, width, requires_grad=True) for _ in range(2))
    scale = nn.Parameter(torch.ones(1))
    with Meter([images, texts, scale]) as meter:
        clip_loss(images, texts, scale, chunk_size=chunk).backward()
    stated = logit_bytes(num, num, chunk=chunk)
    assert stated == copies * num * (chunk or num) * 4
    features = 4 * num * width * 4 + 8 * num * 4  # both sides with gradients; a few numbers per row and column
    assert 0.95 * stated < max(meter.cost.held) <= stated + 2 * features


def test_sharding_divides_what_it_should():
    def plan(parallel, num_gpus: int) -> dict[str, float]:
        cost = StepCost(held=[8, 40], gradients=[0, 32], saved={"a": 1})
        return MemoryPlan(
            moments=Moments(cost, cost, sizes=(1, 2)),
            fixed=Fixed(weights=80, trained=8, averaged=80, replicated=10, largest_block=4, outside_blocks=16),
            spread=Spread(num_gpus=num_gpus, parallel=parallel, global_batch=0),
            contrast=Contrast(width=2),
            sample_bytes=7,
        ).parts(3)

    copied, sharded = plan("ddp", 8), plan("fsdp", 8)
    assert copied["weights"] == 4 * (80 + 10) and sharded["weights"] == 4 * (80 / 8 + 10)
    assert copied["optimizer moments"] == 8 * sharded["optimizer moments"] == 8 * 8
    assert copied["averaged weights"] == 8 * sharded["averaged weights"] == 4 * 80
    assert copied["gradients"] == 32 and sharded["gradients"] == 4
    assert copied["gathered weights"] == 0 and sharded["gathered weights"] == 4 * (3 * 4 + 2 * 16)
    assert copied["batch"] == 21
    assert copied["features of all pairs"] == 4 * 24 * 2 * 4  # images, texts and their gradients, 8 x 3 pairs
    assert copied["logits"] == LOGIT_COPIES * 3 * 24 * 4
    assert "features of all pairs" not in {k for k, v in plan("none", 1).items() if v}


def test_spread_counts_samples():
    spread = Spread(num_gpus=8, parallel="ddp", global_batch=4096)
    assert (spread.samples_per_gpu(64), spread.all_samples(64), spread.micro_batches(64)) == (512, 4096, 8)
    assert spread.micro_batches(512) == 1 and spread.shares == 1
    assert (spread.all_samples(1024), spread.micro_batches(1024)) == (8192, 1)
    alone = Spread(num_gpus=1, parallel="fsdp", global_batch=0)
    assert (alone.samples_per_gpu(7), alone.micro_batches(7), alone.shares) == (7, 1, 1)


@pytest.mark.parametrize("global_batch", [0, 64, 4096])
def test_the_largest_batch_fits_and_the_next_does_not(global_batch):
    small = StepCost(held=[50, 1000], gradients=[0, 400], saved={"a": 1})
    large = StepCost(held=[100, 1010], gradients=[0, 400], saved={"a": 2})
    plan = MemoryPlan(
        moments=Moments(small, large, sizes=(1, 2)),
        fixed=Fixed(weights=100, trained=100),
        spread=Spread(num_gpus=2, parallel="ddp", global_batch=global_batch),
        contrast=Contrast(width=4, chunk=16),
        sample_bytes=12,
    )
    for more in (0, 1, 5e3, 1e5, 1e6):
        limit = plan.total(1) + more
        found = plan.largest_batch(limit)
        fitting = [size for size in range(1, 8000) if plan.total(size) <= limit]
        assert found == max(fitting) < 7999
    assert plan.largest_batch(1.0) == 0


def test_bisection_finds_every_bound():
    for bound in range(0, 40):
        assert largest_fitting(lambda size, bound=bound: size <= bound, least=1, most=30) == min(bound, 30)
    assert [power_of_two(n) for n in (1, 2, 3, 4, 1023, 1024)] == [1, 2, 2, 4, 512, 1024]


def test_the_suggested_chunk_keeps_logits_below_a_gigabyte():
    assert suggested_chunk(512, 65_536) == 0
    chunk = suggested_chunk(8192, 65_536)
    assert chunk == 8192
    assert logit_bytes(8192, 65_536, chunk=chunk) <= 1e9 < logit_bytes(8192, 65_536, chunk=2 * chunk)
    assert logit_bytes(4, 8, chunk=8) == logit_bytes(4, 8, chunk=0) == LOGIT_COPIES * 32 * 4


def test_time_counts_float32_twice_and_rare_steps_in_their_share():
    usual, rare = {"bfloat16": 10.0}, {"bfloat16": 10.0, "float32": 32.0}
    flops = amortised_flops(usual, rare, every=16)
    assert flops == {"bfloat16": 10.0, "float32": 2.0}
    assert Speed(tflops=1e-12, mfu=0.5).seconds(flops) == pytest.approx((10 + 4) / 0.5)
