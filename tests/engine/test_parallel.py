"""EMA against its closed form, activation checkpointing against plain gradients, devices and processes refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qlip.core.errors import UserError
from qlip.engine.parallel import (
    autocast,
    averaged_module,
    exponential_average,
    make_scalars_vectors,
    pick_device,
    pick_parallel,
    set_activation_checkpointing,
    update_average,
)
from qlip.models.qlip.modeling import QLIPModel
from qlip.nn.blocks import BlockStack
from qlip.recipes.model import ModelConfig, TowerSize


def test_average_is_the_closed_form_of_the_recursion():
    """It starts at the first weights it sees: ``d^(t-1) w_1 + sum_{i=2..t} (1 - d) d^(t-i) w_i``."""
    decay, module = 0.9, nn.BatchNorm1d(3)
    average = exponential_average(module, decay)
    seen = []
    for t in range(5):
        with torch.no_grad():
            module.weight.copy_(torch.randn(3))
            module.running_mean.copy_(torch.randn(3))
        seen.append((module.weight.detach().clone(), module.running_mean.clone()))
        update_average(average, module)
        for index, name in enumerate(("weight", "running_mean")):
            terms = [seen[0][index] * decay**t]
            terms += [(1 - decay) * decay ** (t - i) * seen[i][index] for i in range(1, t + 1)]
            torch.testing.assert_close(getattr(averaged_module(average), name).detach(), sum(terms))
    assert not torch.equal(averaged_module(average).weight, module.weight)


def test_what_does_not_move_has_an_average_that_does_not_move():
    module = nn.Linear(4, 4)
    average = exponential_average(module, 0.99)
    for _ in range(20):
        update_average(average, module)
    assert torch.equal(averaged_module(average).weight, module.weight)


def test_activation_checkpointing_gives_equal_gradients():
    tower = TowerSize(hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24)
    sizes = ModelConfig(image_size=16, patch_size=8, encoder=tower, decoder=tower, text=tower, projection_dim=8)
    model = QLIPModel(sizes.build_config()).train()
    pixels, ids = torch.randn(2, 3, 16, 16), torch.tensor([[49406, 320, 49407], [49406, 1125, 49407]])

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        output = model(pixels, ids)
        (output.reconstructions.square().mean() + output.logits_per_image.square().mean()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    set_activation_checkpointing(model, enabled=True)
    stacks = [module for module in model.modules() if isinstance(module, BlockStack)]
    assert len(stacks) == 3 and all(stack.gradient_checkpointing for stack in stacks)
    recomputed = gradients()
    assert plain.keys() == recomputed.keys() and len(plain) > 50
    for name in plain:
        torch.testing.assert_close(recomputed[name], plain[name], rtol=0, atol=0)
    set_activation_checkpointing(model, enabled=False)
    assert not any(stack.gradient_checkpointing for stack in stacks)


def test_the_kind_of_parallelism_follows_the_number_of_processes(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert {pick_parallel(kind) for kind in ("auto", "none", "ddp", "fsdp")} == {"none"}
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert [pick_parallel(kind) for kind in ("auto", "ddp", "fsdp")] == ["ddp", "ddp", "fsdp"]
    with pytest.raises(UserError, match="torchrun started 2 processes: take ddp or fsdp, or start one process"):
        pick_parallel("none")


def test_scalars_become_vectors_with_the_same_value_and_permission():
    module = nn.Module()
    module.scale, module.rest = nn.Parameter(torch.tensor(2.5)), nn.Parameter(torch.ones(2, 3))
    module.frozen = nn.Parameter(torch.tensor(1.0), requires_grad=False)
    make_scalars_vectors(module)
    shapes = {name: (tuple(p.shape), p.requires_grad) for name, p in module.named_parameters()}
    assert shapes == {"scale": ((1,), True), "rest": ((2, 3), True), "frozen": ((1,), False)}
    assert module.scale.item() == 2.5


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "meta:x"])
def test_devices_that_are_not_there_are_refused(name):
    with pytest.raises(UserError, match="qlip doctor"):
        pick_device(name)


def test_autocast_follows_the_precision():
    device = torch.device("cpu")
    for precision, expected in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with autocast(device, precision):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == expected
