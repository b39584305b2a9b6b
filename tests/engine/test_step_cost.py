"""What is measured without memory is what real tensors hold, the profiler sees and FLOP counters count."""

from __future__ import annotations

import math
import warnings
from contextlib import nullcontext

import pytest
import torch
from tiny_steps import SHAPES, dry_run, real_batch, real_modules, tiny_task
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from qlip.engine.step_cost import gpu_numerics, step_cost, without_memory
from qlip.engine.steps import accumulate_gradients, only_training, total_loss

FLOAT32 = {"device": torch.device("cpu"), "precision": nullcontext, "before_backward": lambda last: None}


def run_step(task, modules, batch, step: int) -> None:
    for phase in task.phases(step):
        with only_training(phase, modules):
            accumulate_gradients(task, phase, [batch], step, **FLOAT32)
        modules.zero_grad(set_to_none=True)


@pytest.mark.parametrize(("stage", "bf16", "checkpointing"), [(1, True, False), (1, False, True), (2, True, True)])
def test_fake_tensors_hold_and_compute_what_real_ones_do(stage, bf16, checkpointing):
    fake = dry_run(stage, bf16=bf16, checkpointing=checkpointing).cost(SHAPES, batch_size=4, step=0)
    task = tiny_task(stage)
    modules = real_modules(task, checkpointing=checkpointing)
    with gpu_numerics(bf16=bf16):
        real = step_cost(task, modules, [real_batch(4)], 0, bf16=bf16)
    assert fake.held == real.held and max(fake.held) > 0
    assert fake.gradients == real.gradients
    assert fake.saved == real.saved and min(fake.saved.values()) > 0
    assert fake.flops == real.flops and fake.forward_flops == real.forward_flops
    assert fake.waiting == real.waiting
    assert all(parameter.grad is None for parameter in modules.parameters())


@pytest.mark.parametrize(("stage", "least"), [(1, 0.999), (2, 0.8)])
def test_the_peak_is_what_the_allocator_reaches(stage, least):
    """The convolutions of stage 2 need workspaces inside an operation, which only the allocator sees."""
    task = tiny_task(stage)
    modules, batch = real_modules(task), real_batch(8)
    predicted = max(step_cost(task, modules, [batch], 1, bf16=False).held)
    run_step(task, modules, batch, 1)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run_step(task, modules, batch, 1)
    alive = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    assert alive == 0
    assert least < predicted / peak <= 1.0


def test_flops_are_those_of_pytorchs_counter_with_attention():
    task = tiny_task(1)
    modules, batch = real_modules(task), real_batch(4)
    counted = step_cost(task, modules, [batch], 1, bf16=False)
    aten = torch.ops.aten
    attention = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: (
            sdpa_backward_flop_count(grad, q, k, v)
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        run_step(task, modules, batch, 1)
    assert counted.flops == {"float32": counter.get_total_flops()}
    assert counter.get_total_flops() > 0


def test_forward_flops_are_the_closed_form():
    run = dry_run(1)
    model = run.modules["model"]
    width, ffn, layers, tokens, bits = 32, 48, 2, 16, 28
    blocks = layers * (2 * (tokens + 1) * (4 * width**2 + 3 * width * ffn) + 4 * (tokens + 1) ** 2 * width)
    bottleneck = 2 * tokens * (2 * width**2 + 2 * width * bits)
    patches = 2 * tokens * 3 * 8**2 * width
    assert run.forward_flops(model.vision_model, (1, 3, 32, 32)) == blocks + bottleneck + patches


def test_frozen_parts_cost_no_weight_gradients():
    """Stage 2 without adversary: through the frozen encoder forward only for bits, twice for the distance."""
    run = dry_run(2, gan_weight=0.0)
    model = run.modules["model"]
    encoder = run.forward_flops(model.vision_model, (1, 3, 32, 32))
    decoder = run.forward_flops(model.vision_decoder, (1, 16, 32))
    cost = run.cost(SHAPES, batch_size=1, step=1)
    bottleneck = 2 * 16 * (2 * 32**2 + 2 * 32 * 28)
    low = 3 * encoder - 2 * bottleneck + 3 * decoder  # pictures twice, reconstructions once; decoder trains
    assert low < sum(cost.flops.values()) < low + 2 * encoder + 4 * bottleneck


def test_checkpointing_computes_blocks_once_more_and_keeps_less():
    kept, recomputed = (dry_run(1, checkpointing=on).cost(SHAPES, batch_size=8, step=1) for on in (False, True))
    more = sum(recomputed.flops.values()) / sum(kept.flops.values())
    assert 1.1 < more < 4 / 3  # a third, without what lies outside blocks and each block's last product
    assert recomputed.saved["align"] < 0.5 * kept.saved["align"]


@pytest.mark.parametrize(("stage", "checkpointing"), [(1, False), (1, True), (2, True)])
def test_what_graphs_keep_is_part_of_what_is_held(stage, checkpointing):
    cost = dry_run(stage, checkpointing=checkpointing).cost(SHAPES, batch_size=8, step=1)
    assert 0 < max(cost.saved.values()) <= max(cost.held)


def test_emulated_gpu_numerics_keep_what_a_gpus_autocast_keeps(monkeypatch):
    """PyTorch's own CUDA autocast on fake CUDA tensors, whose forward pass needs no GPU."""
    ours = dry_run(1).cost(SHAPES, batch_size=4, step=1).saved["align"]
    with torch.device("meta"):
        task = tiny_task(1)
    modules = real_modules(task)
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    kept: dict[int, torch.UntypedStorage] = {}

    def attention(q, k, v, *, is_causal, dropout_p):
        return flash(*(x.to(torch.bfloat16) for x in (q, k, v)), dropout_p, is_causal, False)[0]

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[id(x.untyped_storage())] = x.untyped_storage()
        return x

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        without_memory(modules)
        before = [*modules.parameters(), *modules.buffers()]
        batch = {name: torch.empty(4, *shape, dtype=dtype) for name, (shape, dtype) in SHAPES.items()}
        known = {id(x.untyped_storage()) for x in (*before, *batch.values())}
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.set_autocast_enabled("cuda", True)
        try:
            with saved_tensors_hooks(keep, lambda x: x):
                loss = total_loss(task.loss(task.phases(1)[0], batch, 1))
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.clear_autocast_cache()
        assert loss.device.type == "cuda"
        theirs = sum(storage.nbytes() for key, storage in kept.items() if key not in known)
    assert math.isclose(ours, theirs, rel_tol=1e-3)


def test_a_random_crop_is_no_choice_and_every_patch_is_taken_back():
    before = F.layer_norm, F.scaled_dot_product_attention, torch.randint
    cost = dry_run(2, side=48).cost(SHAPES | {"pixel_values": ((3, 48, 48), torch.float32)}, batch_size=8, step=0)
    assert cost.waiting == 2 * 8 * 3 * 48 * 48 * 4  # crops of 32 px, whose memory is the whole pictures'
    assert before == (F.layer_norm, F.scaled_dot_product_attention, torch.randint)
