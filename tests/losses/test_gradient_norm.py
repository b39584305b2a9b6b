"""The gradient at a layer, taken at its activations, equals autograd's at its weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qlip.core.errors import UserError
from qlip.losses.gradient_norm import LayerGradient


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.GELU(), nn.Linear(6, 2)).to(dtype)


def some_losses(output: torch.Tensor) -> list[torch.Tensor]:
    return [output.square().mean(), F.softplus(-output.sum(-1)).mean(), 1e-3 * output.abs().sum(0, keepdim=True).prod()]


@pytest.mark.parametrize("layer", [0, 2, 4])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
def test_gradient_and_norm_equal_autograds_at_the_real_weight(layer, shape):
    net = network()
    x = torch.randn(*shape, 5, dtype=torch.float64)
    with LayerGradient(net[layer]) as measured:
        output = net(x)
    for loss in some_losses(output):
        (expected,) = torch.autograd.grad(loss.sum(), net[layer].weight, retain_graph=True)
        torch.testing.assert_close(measured.gradient(loss), expected, rtol=1e-12, atol=1e-14)
        norm = measured.norm(loss)
        assert norm.shape == () and not norm.requires_grad
        torch.testing.assert_close(norm, expected.square().sum().sqrt(), rtol=1e-12, atol=0)


def test_the_graph_is_kept_and_no_parameter_gets_a_gradient():
    net, x = network(), torch.randn(3, 5, dtype=torch.float64)
    with LayerGradient(net[2]) as measured:
        loss = net(x).square().mean()
    before = [p.grad for p in net.parameters()]
    norm = measured.norm(loss)
    assert before == [p.grad for p in net.parameters()] == [None] * 6
    loss.backward()
    torch.testing.assert_close(net[2].weight.grad.norm(), norm)


def test_several_calls_of_a_layer_add_up_and_unseen_ones_count_nothing():
    net, x = network(), torch.randn(4, 5, dtype=torch.float64)
    with LayerGradient(net[2]) as measured:
        first, second = net(x), net(2 * x)
    net(3 * x)  # behind the block: not recorded
    both = first.square().mean() + second.abs().mean()
    for loss in (both, first.square().mean()):
        (expected,) = torch.autograd.grad(loss, net[2].weight, retain_graph=True)
        torch.testing.assert_close(measured.gradient(loss), expected, rtol=1e-12, atol=1e-14)


def test_recomputed_activations_are_counted_once():
    net, x = network(), torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    with LayerGradient(net[2]) as measured:  # measured inside the block too: the recording has ended by then
        loss = checkpoint(net, x, use_reentrant=False).square().mean()
        found = [measured.gradient(loss), measured.gradient(loss)]
    (expected,) = torch.autograd.grad(net(x).square().mean(), net[2].weight)
    for gradient in found:
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


def test_bfloat16_is_summed_in_float32():
    net, x = network(torch.float32), torch.randn(4096, 5)
    with LayerGradient(net[4]) as measured, torch.autocast("cpu", torch.bfloat16):
        output = net(x)
        gradient = measured.gradient(output.float().square().mean())
    assert output.dtype == torch.bfloat16 and gradient.dtype == torch.float32
    (expected,) = torch.autograd.grad(net(x).square().mean(), net[4].weight)
    torch.testing.assert_close(gradient, expected, rtol=2e-2, atol=1e-3)


def test_the_hook_goes_with_the_block_also_after_an_error():
    net = network()
    with pytest.raises(RuntimeError), LayerGradient(net[2]):
        net(torch.randn(3, 4, dtype=torch.float64))
    assert not net[2]._forward_hooks
    with LayerGradient(net[2]):
        assert net[2]._forward_hooks
    assert not net[2]._forward_hooks


def test_a_layer_that_was_not_seen_is_one_line():
    net = network()
    with LayerGradient(net[2]) as measured:
        pass
    with pytest.raises(UserError, match=r"turn off trainer\.compile") as refused:
        measured.norm(net(torch.randn(3, 5, dtype=torch.float64)).sum())
    assert "\n" not in str(refused.value)
