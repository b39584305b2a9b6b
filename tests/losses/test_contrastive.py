"""Both contrastive losses, whole and chunked: double loops, closed forms, open_clip, finite differences, memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlip.losses.contrastive import clip_loss, siglip_loss

PAIRS, WIDTH = 8, 5
CHUNK_SIZES = [1, 3, 7, PAIRS, PAIRS + 5]
LOG_SCALES = [0.0, math.log(1 / 0.07), math.log(100)]


def unit_vectors(count: int, *, seed: int, width: int = WIDTH) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, width, generator=generator, dtype=torch.float64), dim=-1)


def examples(loss: Callable, *, count: int = PAIRS, width: int = WIDTH, log_scale: float = 2.0) -> list[Tensor]:
    """Leaves of images, texts, temperature and, for SigLIP, bias, in float64."""
    numbers = [torch.tensor(log_scale, dtype=torch.float64), torch.tensor([-1.5], dtype=torch.float64)]
    inputs = [unit_vectors(count, seed=seed, width=width) for seed in (0, 1)]
    inputs += numbers if loss is siglip_loss else numbers[:1]
    return [x.requires_grad_(True) for x in inputs]


def value_and_gradients(loss: Callable, inputs: list[Tensor], *, weight: float = 1.0, **options: Any) -> list[Tensor]:
    """Detached: the value, and the gradient of `weight` times it in every input."""
    value = loss(*inputs, **options)
    return [value.detach(), *torch.autograd.grad(weight * value, inputs)]


def clip_loop(v: Tensor, w: Tensor, log_scale: Tensor) -> float:
    """Eq 2 with plain loops in float64, times 1 / (2B)."""
    scale, count, total = math.exp(log_scale), len(v), 0.0
    for i in range(count):
        image_to_text = [scale * float(v[i] @ w[j]) for j in range(count)]
        text_to_image = [scale * float(v[j] @ w[i]) for j in range(count)]
        for logits in (image_to_text, text_to_image):
            total += logits[i] - math.log(sum(math.exp(logit) for logit in logits))
    return -total / (2 * count)


def siglip_loop(v: Tensor, w: Tensor, log_scale: Tensor, bias: Tensor) -> float:
    """Every pair is its own yes-or-no question."""
    total = 0.0
    for i in range(len(v)):
        for j in range(len(v)):
            logit = math.exp(log_scale) * float(v[i] @ w[j]) + float(bias)
            total += math.log(1 + math.exp(-logit if i == j else logit))
    return total / len(v)


LOOPS = {clip_loss: clip_loop, siglip_loss: siglip_loop}
both_losses = pytest.mark.parametrize("loss", LOOPS)


@both_losses
@pytest.mark.parametrize("log_scale", LOG_SCALES)
@pytest.mark.parametrize("chunk_size", [0, *CHUNK_SIZES])
def test_equals_a_double_loop(loss, log_scale, chunk_size):
    inputs = [x.detach() for x in examples(loss, log_scale=log_scale)]
    assert loss(*inputs, chunk_size=chunk_size).item() == pytest.approx(LOOPS[loss](*inputs), rel=1e-10)


@both_losses
@pytest.mark.parametrize("log_scale", LOG_SCALES)
@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_chunks_change_neither_value_nor_gradients(loss, log_scale, chunk_size):
    inputs = examples(loss, log_scale=log_scale)
    expected = value_and_gradients(loss, inputs, weight=0.3)
    actual = value_and_gradients(loss, inputs, weight=0.3, chunk_size=chunk_size)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    singles = [x.detach().float().requires_grad_(True) for x in inputs]
    actual = value_and_gradients(loss, singles, weight=0.3, chunk_size=chunk_size)
    assert {x.dtype for x in actual} == {torch.float32}
    torch.testing.assert_close([x.double() for x in actual], expected, rtol=1e-5, atol=1e-5)


@both_losses
def test_float32_stays_exact_over_many_chunks(loss):
    """One column at a time, 400 times, at the highest temperature: no more rounding than the whole matrix has."""
    inputs = examples(loss, count=400, width=16, log_scale=math.log(100))
    exact = value_and_gradients(loss, inputs)
    singles = [x.detach().float().requires_grad_(True) for x in inputs]
    for chunk_size in (1, 64):
        for actual, expected in zip(value_and_gradients(loss, singles, chunk_size=chunk_size), exact, strict=True):
            assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@both_losses
@pytest.mark.parametrize("chunk_size", [0, 2, 4])
def test_gradients_equal_finite_differences(loss, chunk_size):
    assert torch.autograd.gradcheck(
        lambda *inputs: loss(*inputs, chunk_size=chunk_size), examples(loss, count=5, width=3, log_scale=1.0)
    )


@pytest.mark.parametrize("chunk_size", [0, 3])
def test_equal_open_clip(chunk_size):
    v, w, log_scale, bias = examples(siglip_loss)
    for ours, theirs in (
        (clip_loss(v, w, log_scale, chunk_size=chunk_size), ClipLoss()(v, w, log_scale.exp())),
        (siglip_loss(v, w, log_scale, bias, chunk_size=chunk_size), SigLipLoss()(v, w, log_scale.exp(), bias)),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
        gradients = (torch.autograd.grad(loss, (v, w, log_scale), retain_graph=True) for loss in (ours, theirs))
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [0, 1, 3, 9])
def test_known_values(chunk_size):
    same, perfect = torch.ones(4, 1), torch.eye(4)
    hot, zero = torch.tensor(math.log(100)), torch.tensor(0.0)
    loss = clip_loss(same, same, torch.tensor(2.0), chunk_size=chunk_size)
    assert loss.item() == pytest.approx(math.log(4), rel=1e-6)
    assert clip_loss(perfect, perfect, hot, chunk_size=chunk_size).item() == pytest.approx(0, abs=1e-6)
    opposite = clip_loss(perfect, -perfect, hot, chunk_size=chunk_size)
    assert opposite.item() == pytest.approx(100 + math.log(3), rel=1e-6)
    all_low = clip_loss(same, -same, hot, chunk_size=chunk_size)  # every logit is -100, whose exp float32 hardly has
    assert all_low.item() == pytest.approx(math.log(4), rel=1e-6)
    # identical rows: every question has the logit s + bias; four answers no, but one of them should be yes
    logit = 2.0 - 3.0
    expected = math.log1p(math.exp(-logit)) + 3 * math.log1p(math.exp(logit))
    loss = siglip_loss(same, same, torch.tensor(math.log(2)), torch.tensor(-3.0), chunk_size=chunk_size)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    # a logit of 100 on the wrong side costs 100, without overflow
    assert siglip_loss(perfect, -perfect, hot, zero, chunk_size=chunk_size).item() == pytest.approx(
        100 + 3 * math.log(2), rel=1e-6
    )


@both_losses
@pytest.mark.parametrize("chunk_size", [0, 1, 4])
def test_one_pair(loss, chunk_size):
    inputs = examples(loss, count=1)
    value, *gradients = value_and_gradients(loss, inputs, chunk_size=chunk_size)
    assert value.item() == pytest.approx(LOOPS[loss](*(x.detach() for x in inputs)), abs=1e-12)
    if loss is clip_loss:  # nothing to choose between
        assert all(gradient.abs().max() == 0 for gradient in gradients)


@both_losses
@pytest.mark.parametrize("chunk_size", [0, 3])
def test_temperature_of_one_element(loss, chunk_size):
    """FSDP2 needs parameters of shape (1,): the loss is a scalar all the same, gradients have their shapes."""
    scalars = [x.detach().reshape(x.shape if x.ndim == 2 else ()).requires_grad_(True) for x in examples(loss)]
    vectors = [x.detach().reshape(x.shape if x.ndim == 2 else (1,)).requires_grad_(True) for x in scalars]
    expected = value_and_gradients(loss, scalars, chunk_size=chunk_size)
    actual = value_and_gradients(loss, vectors, chunk_size=chunk_size)
    assert [x.shape for x in actual] == [(), (PAIRS, WIDTH), (PAIRS, WIDTH), *[(1,)] * (len(vectors) - 2)]
    assert all(torch.equal(a, e.reshape(a.shape)) for a, e in zip(actual, expected, strict=True))


@both_losses
@pytest.mark.parametrize("chunk_size", [0, 3])
def test_autocast_keeps_float32(loss, chunk_size):
    """Forward and backward, both called inside; half-precision features get half-precision gradients."""
    inputs = [x.detach().float().requires_grad_(True) for x in examples(loss, log_scale=math.log(100))]
    expected = value_and_gradients(loss, inputs, chunk_size=chunk_size)
    with torch.autocast("cpu", torch.bfloat16):
        actual = value_and_gradients(loss, inputs, chunk_size=chunk_size)
    if chunk_size:
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    else:  # a backward pass of plain operations is the caller's
        assert torch.equal(actual[0], expected[0])
    half = [x.detach().bfloat16().requires_grad_(True) for x in inputs]
    value, *gradients = value_and_gradients(loss, half, chunk_size=chunk_size)
    assert value.dtype == torch.float32
    assert {gradient.dtype for gradient in gradients} == {torch.bfloat16}


@both_losses
@pytest.mark.parametrize("chunk_size", [0, 3])
def test_one_frozen_tower_and_no_gradient_at_all(loss, chunk_size):
    inputs = examples(loss)
    expected = torch.autograd.grad(loss(*inputs, chunk_size=chunk_size), inputs[0])[0]
    images, *rest = inputs
    frozen = [x.detach() for x in rest]
    assert torch.equal(torch.autograd.grad(loss(images, *frozen, chunk_size=chunk_size), images)[0], expected)
    with torch.no_grad():
        assert torch.equal(loss(*inputs, chunk_size=chunk_size), loss(images, *frozen, chunk_size=chunk_size).detach())


@both_losses
@pytest.mark.parametrize("chunk_size", [0, 3])
def test_a_nan_is_not_hidden(loss, chunk_size):
    inputs = [x.detach() for x in examples(loss)]
    inputs[0][-1, 0] = torch.nan
    assert loss(*inputs, chunk_size=chunk_size).isnan()


class LargestTensor(TorchDispatchMode):
    """Remembers how many elements the largest result of any operation had."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))])
        return result


def largest_tensor(loss: Callable, *, count: int, chunk_size: int) -> int:
    """In the forward and backward pass over `count` pairs."""
    inputs = examples(loss, count=count)
    with LargestTensor() as mode:
        loss(*inputs, chunk_size=chunk_size).backward()
    return mode.largest


@both_losses
def test_no_tensor_grows_with_the_square_of_the_batch(loss):
    for count in (128, 512):
        assert largest_tensor(loss, count=count, chunk_size=0) == count**2
        for chunk_size in (1, 8, 48):
            assert largest_tensor(loss, count=count, chunk_size=chunk_size) == count * max(chunk_size, WIDTH)


def test_wrong_chunk_sizes_are_refused():
    with pytest.raises(AssertionError):
        clip_loss(*examples(clip_loss), chunk_size=-1)
    with pytest.raises(AssertionError):
        siglip_loss(*examples(siglip_loss), chunk_size=-1)
