"""What every quantizer promises, over the union of all kinds. A new kind is a line in `CASES`."""

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor

from qlip.quantizers.base import Quantized
from qlip.quantizers.build import KINDS, AnyQuantizer, QuantizerConfig, build_quantizer, latent_width

CASES = {
    "bsq": QuantizerConfig(kind="bsq", num_bits=12),
    "bsq, commitment": QuantizerConfig(kind="bsq", num_bits=12, group_size=4, beta=0.25),
    "bsq, codes of +-1": QuantizerConfig(kind="bsq", num_bits=12, group_size=3, l2_norm=False, unit_codes=False),
    "fsq": QuantizerConfig(kind="fsq", num_bits=12, fsq_levels=(16, 16, 16)),
    "fsq, uneven levels": QuantizerConfig(kind="fsq", num_bits=11, fsq_levels=(8, 5, 3, 7)),
    "fsq, two levels": QuantizerConfig(kind="fsq", num_bits=6, fsq_levels=(2, 2, 3, 4)),
    "lfq": QuantizerConfig(kind="lfq", num_bits=12, group_size=4),
    "lfq, one group": QuantizerConfig(kind="lfq", num_bits=6, group_size=6),
    "vq": QuantizerConfig(kind="vq", num_bits=12, group_size=4),
    "vq, one head": QuantizerConfig(kind="vq", num_bits=5, group_size=5),
}


@pytest.fixture(params=CASES)
def config(request) -> QuantizerConfig:
    return CASES[request.param]


@pytest.fixture
def quantizer(config) -> AnyQuantizer:
    return build_quantizer(config)


def latents(quantizer: AnyQuantizer, batch: int = 4) -> Tensor:
    return torch.randn(batch, 64, quantizer.latent_dim)


def assert_same_code(actual: Quantized, expected: Quantized) -> None:
    assert torch.equal(actual.z_q, expected.z_q)
    assert torch.equal(actual.bits, expected.bits)


def test_every_kind_has_a_case():
    assert {config.kind for config in CASES.values()} == set(KINDS)


@pytest.mark.parametrize("training", [False, True])
def test_shapes_and_dtypes(config, quantizer, training):
    output = quantizer.train(training)(latents(quantizer))
    assert quantizer.num_bits == config.num_bits
    assert quantizer.latent_dim == latent_width(config.kind, num_bits=config.num_bits, fsq_levels=config.fsq_levels)
    assert output.bits.shape == (4, 64, quantizer.num_bits)
    assert output.bits.dtype == torch.bool
    assert output.z_q.shape == (4, 64, quantizer.latent_dim)
    assert output.z_q.dtype == torch.float32


@pytest.mark.parametrize("training", [False, True])
def test_decode_repeats_the_code_vectors_bit_for_bit(quantizer, training):
    output = quantizer.train(training)(3 * latents(quantizer))
    decoded = quantizer.decode(output.bits)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, output.z_q)
    assert torch.equal(quantizer.decode(output.bits[0, 0]), output.z_q[0, 0])  # any leading shape


def test_training_and_evaluation_give_the_same_code_every_time(quantizer):
    z = latents(quantizer)
    first = quantizer.eval()(z)
    assert_same_code(quantizer(z), first)
    assert_same_code(quantizer.train()(z), first)


def test_a_sample_alone_gets_the_code_it_gets_in_a_batch(quantizer):
    z = latents(quantizer, batch=8)
    together = quantizer.eval()(z)
    for sample in range(8):
        alone = quantizer(z[sample : sample + 1])
        assert torch.equal(alone.bits[0], together.bits[sample])
        assert torch.equal(alone.z_q[0], together.z_q[sample])


def test_every_bit_takes_both_values(quantizer):
    bits = quantizer.eval()(latents(quantizer, batch=16)).bits.flatten(0, 1)
    assert bits.any(0).all()
    assert not bits.all(0).any()


def test_evaluation_gives_no_losses_and_training_a_finite_scalar(quantizer):
    z = latents(quantizer)
    output = quantizer.eval()(z)
    assert (output.losses, output.stats) == ({}, {})
    output = quantizer.train()(z)
    assert set(output.losses) == {"quantizer"}
    assert {"bit_entropy", "bits_alive"} <= set(output.stats)
    for value in [*output.losses.values(), *output.stats.values()]:
        assert value.shape == ()
        assert value.isfinite()
    assert not any(value.requires_grad for value in output.stats.values())
    assert 0 < output.stats["bit_entropy"] <= math.log(2) + 1e-6
    assert output.stats["bits_alive"] == 1


def test_gradient_reaches_every_latent_dimension_and_every_parameter(quantizer):
    z = latents(quantizer).requires_grad_()
    output = quantizer.train()(z)
    ((output.z_q * torch.randn_like(output.z_q)).sum() + output.losses["quantizer"]).backward()
    assert z.grad.isfinite().all()
    assert (z.grad != 0).flatten(0, 1).any(0).all()
    for name, parameter in quantizer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("training", [False, True])
def test_bf16_latents_and_autocast_still_get_float32_maths(quantizer, training):
    z = latents(quantizer).bfloat16()
    plain = quantizer.train(training)(z.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = quantizer(z)
    assert_same_code(under_autocast, plain)
    assert under_autocast.losses == plain.losses


def test_copies_and_pickles_give_the_same_code_also_after_use(quantizer):
    z = latents(quantizer)
    quantizer.train()(z)
    expected = quantizer.eval()(z)
    assert_same_code(copy.deepcopy(quantizer)(z), expected)
    assert_same_code(pickle.loads(pickle.dumps(quantizer))(z), expected)


def test_first_use_in_inference_mode_leaves_the_quantizer_trainable(quantizer):
    z = latents(quantizer).requires_grad_()
    with torch.inference_mode():
        quantizer.eval()(z)
    output = quantizer.train()(z)
    (output.z_q.sum() + output.losses["quantizer"]).backward()
    assert z.grad.isfinite().all()


def test_state_dict_carries_the_code(config, quantizer):
    other = build_quantizer(config)
    other.load_state_dict(quantizer.state_dict())
    z = latents(quantizer)
    assert_same_code(other.eval()(z), quantizer.eval()(z))


def test_built_on_the_meta_device_it_works_once_it_has_memory(config):
    with torch.device("meta"):
        quantizer = build_quantizer(config)
    quantizer.to_empty(device="cpu")
    tensors = [*quantizer.parameters(), *quantizer.buffers()]
    with torch.no_grad():
        for tensor in tensors:
            tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
    if tensors:  # a quantizer without state needs no initialisation and has no method for it
        quantizer.reset_parameters()
        assert all(tensor.isfinite().all() for tensor in tensors)
    output = quantizer.train()(latents(quantizer))
    assert output.z_q.isfinite().all()
    assert output.losses["quantizer"].isfinite()
    assert output.bits.flatten(0, 1).any(0).all()


def test_unknown_kinds_and_unread_options_are_named():
    with pytest.raises(ValueError, match="quantizer 'bqs' is unknown: did you mean 'bsq'"):
        build_quantizer(QuantizerConfig(kind="bqs"))
    with pytest.warns(UserWarning, match="inv_temperature, beta has no effect with quantizer vq"):
        build_quantizer(QuantizerConfig(kind="vq", group_size=7, inv_temperature=10.0, beta=0.25))
