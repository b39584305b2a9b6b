"""Stage 1 as a joint task: micro-batches and ranks give the joined batch, and the probe the weight's own gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from align_passes import assert_equal_gradients, cut, double_batch, gradients, one_pass, total, two_passes
from tiny_qlip import scene_batch, tiny_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from qlip.core import distributed
from qlip.engine.interfaces import JointTask
from qlip.models.qlip.modeling import QLIPModel
from qlip.nn.blocks import BlockStack
from qlip.tasks.align import AlignConfig, AlignTask


@pytest.mark.parametrize("num_micro_batches", [2, 4])
@pytest.mark.parametrize(("contrastive", "group_size"), [("clip", 1), ("clip", 7), ("siglip", 1)])
def test_two_passes_over_micro_batches_equal_the_joined_batch(contrastive, group_size, num_micro_batches):
    model = tiny_model(group_size=group_size).double()
    model.vision_model.quantizer.inv_temperature = 20.0  # so that the codebook's entropy matters
    config = AlignConfig(contrastive=contrastive, contrastive_chunk=3, pixel_weight=0.1, quantizer_weight=3.0)
    task, batch = AlignTask(model, config), double_batch()
    assert isinstance(task, JointTask)
    loss = total(one_pass(task, batch))
    expected = gradients(task)
    assert len(expected) == sum(len(list(task.modules()[name].parameters())) for name in task.phases(0)[0].modules)
    found = two_passes(task, cut(batch, num_micro_batches))
    torch.testing.assert_close(found, loss.detach(), rtol=1e-6, atol=0)
    assert_equal_gradients(gradients(task), expected, tolerance=1e-5)

    for part in cut(batch, num_micro_batches):  # what a mean over micro-batches would have given instead
        one_pass(task, part)
    naive = gradients(task)
    name = "model.vision_model.quant_embed.c_proj.weight"
    assert (naive[name] / num_micro_batches - expected[name]).abs().max() > 1e-2 * expected[name].abs().max()


def last_linear(model: QLIPModel) -> nn.Linear:
    mlp = model.vision_model.encoder.layers[-1].mlp
    return mlp.w3 if hasattr(mlp, "w3") else mlp.fc2


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("quantizer", ["bsq", "none"])
def test_the_probe_measures_the_weights_own_gradient_and_changes_no_bit_of_training(quantizer, checkpointing):
    model, batch = tiny_model(quantizer=quantizer).double(), double_batch()
    for module in model.modules():
        if isinstance(module, BlockStack):
            module.gradient_checkpointing = checkpointing
    plain, probing = AlignTask(model, AlignConfig()), AlignTask(model, AlignConfig(probe_every=2))
    terms = plain.loss(plain.phases(0)[0], batch, 2)
    norms = [
        torch.autograd.grad(terms[name], last_linear(model).weight, retain_graph=True)[0].norm()
        for name in ("contrastive", "mse")
    ]
    total(terms).backward()
    expected = gradients(plain)
    probed = one_pass(probing, batch, 2)
    torch.testing.assert_close(probed["probe/contrastive"].double(), norms[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(probed["probe/pixel"].double(), norms[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(probed["probe/ratio"].double(), norms[0] / norms[1], rtol=1e-6, atol=0)
    found = gradients(probing)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(torch.equal(probed[name], value) for name, value in terms.items())


def test_the_probe_is_right_under_autocast():
    model, batch = tiny_model(), scene_batch()
    figures = {}
    for dtype in (torch.float32, torch.bfloat16):
        task = AlignTask(model, AlignConfig(probe_every=1))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            figures[dtype] = task.loss(task.phases(0)[0], batch, 0)
    for name in ("probe/contrastive", "probe/pixel", "probe/ratio"):
        assert figures[torch.bfloat16][name].dtype == torch.float32
        torch.testing.assert_close(figures[torch.bfloat16][name], figures[torch.float32][name], rtol=0.05, atol=0)


def test_the_probe_measures_once_in_its_steps_on_the_first_micro_batch():
    task = AlignTask(tiny_model(), AlignConfig(probe_every=3))
    (phase,) = task.phases(0)
    first, second = cut(scene_batch(), 2)
    alone = AlignTask(task.model, task.config).loss(phase, first, 3)
    with torch.no_grad():
        assert "probe/ratio" not in task.parts(phase, first, 3).terms  # the pass that caches features
    assert torch.equal(task.parts(phase, first, 3).terms["probe/ratio"], alone["probe/ratio"])
    assert "probe/ratio" not in task.parts(phase, second, 3).terms
    assert "probe/ratio" not in task.loss(phase, first, 4)


def ranks_task() -> AlignTask:
    """Everything that ranks exchange, with activation checkpointing."""
    model = tiny_model().double()
    model.vision_model.quantizer.inv_temperature = 20.0
    model.logit_scale = nn.Parameter(model.logit_scale.detach().reshape(1))  # what sharding asks for
    config = AlignConfig(contrastive="siglip", balance="running", pixel_weight=0.1, quantizer_weight=3.0, probe_every=1)
    task = AlignTask(model, config)
    for module in model.modules():
        if isinstance(module, BlockStack):
            module.gradient_checkpointing = True
    with torch.no_grad():
        model.logit_scale.fill_(4.7)  # a step cannot take it away from the bound, so the clamp shows
    return task


def step_of(task: AlignTask, batches: list) -> dict:
    """One step without an optimizer: loss, gradients, probe, and what `after_step` leaves."""
    (phase,) = task.phases(0)
    written: dict = {}
    if len(batches) > 1:
        written["loss"] = two_passes(task, batches)
        written["gradients"] = gradients(task)
    terms = {name: value.detach() for name, value in one_pass(task, batches[0], 1).items()}
    if len(batches) == 1:
        written["loss"], written["gradients"] = total(terms), gradients(task)
        written["probe"] = {name: value for name, value in terms.items() if name.startswith("probe/")}
    for module in task.modules().values():
        if hasattr(module, "reshard"):
            module.reshard()
    task.after_step(phase, terms)
    written["pixel_weight"] = task.modules()["balance"]()
    written["logit_scale"] = distributed.whole(task.model.logit_scale.detach())
    return written


def run_rank(rank: int, folder: str) -> None:
    """One of two processes: its half of the batch, sharded as an engine would, at once and in two micro-batches."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (2,))
    for num_micro_batches in (1, 2):
        task = ranks_task()
        for stack in [part for part in task.model.modules() if isinstance(part, BlockStack)]:
            for block in stack.layers:
                fully_shard(block, mesh=mesh)
        for name in task.phases(0)[0].modules:
            fully_shard(task.modules()[name], mesh=mesh, reshard_after_forward=False)
        written = step_of(task, cut(cut(double_batch(), 2)[rank], num_micro_batches))
        torch.save(written, Path(folder) / f"{num_micro_batches} {rank}.pt")
    distributed.stop()


def test_two_sharded_processes_equal_one_with_the_joined_batch(tmp_path):
    """Loss, gradients, gradient norms and running balance, of one micro-batch a rank and of two."""
    torch.multiprocessing.spawn(run_rank, args=(str(tmp_path),), nprocs=2)
    expected = step_of(ranks_task(), [double_batch()])
    assert expected["pixel_weight"] != 0.1 and expected["logit_scale"].exp().item() == pytest.approx(100)
    for num_micro_batches in (1, 2):
        ranks = [torch.load(tmp_path / f"{num_micro_batches} {rank}.pt") for rank in range(2)]
        mean_loss = torch.stack([found["loss"] for found in ranks]).mean()
        torch.testing.assert_close(mean_loss, expected["loss"], rtol=1e-6, atol=0)
        for found in ranks:
            assert_equal_gradients(found["gradients"], expected["gradients"], tolerance=1e-5)
            torch.testing.assert_close(found["logit_scale"], expected["logit_scale"], rtol=0, atol=0)
        assert torch.equal(ranks[0]["pixel_weight"], ranks[1]["pixel_weight"])
        if num_micro_batches == 1:
            for found in ranks:
                torch.testing.assert_close(found["probe"], expected["probe"], rtol=1e-5, atol=0)
                torch.testing.assert_close(found["pixel_weight"], expected["pixel_weight"], rtol=1e-5, atol=0)
