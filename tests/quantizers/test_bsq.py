"""Binary spherical quantization against enumeration of all 2^L codes, in float64."""

import math
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qlip.quantizers.bsq import (
    BinarySphericalQuantizer,
    binary_entropy,
    bit_probabilities,
    codebook_entropy,
    sample_entropy,
)

NUM_TOKENS = 6
EVERY_LENGTH_AND_GROUP = [(L, g) for L in range(1, 9) for g in range(1, L + 1) if L % g == 0]
EVERY_LENGTH_AND_GROUP += [(12, g) for g in (1, 2, 3, 4)]


def random_latents(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def enumerated_soft_code(u: Tensor, *, tau: float, logits: str, unit_codes: bool = True) -> Tensor:
    """(n, L) -> (n, 2^L): the softmax over every code, by its definition. First dimension most significant."""
    L = u.shape[-1]
    codes = torch.tensor(list(product((-1.0, 1.0), repeat=L)), dtype=torch.float64)
    codes = codes / math.sqrt(L) if unit_codes else codes
    if logits == "squared distance":
        return (-tau * (u[:, None, :] - codes[None, :, :]).square().sum(-1)).softmax(-1)
    return (2 * tau * u @ codes.T).softmax(-1)


def entropy(q: Tensor) -> Tensor:
    return -torch.where(q > 0, q * q.clamp_min(1e-300).log(), 0.0).sum(-1)


def enumerated_codebook_entropy(q: Tensor, *, num_bits: int, group_size: int) -> Tensor:
    """Entropy of the mean soft code, summed over the marginals of each group of bits."""
    num_groups = num_bits // group_size
    mean = q.mean(0).reshape([2**group_size] * num_groups)
    total = torch.zeros((), dtype=torch.float64)
    for group in range(num_groups):
        others = [axis for axis in range(num_groups) if axis != group]
        total += entropy(mean.sum(others) if others else mean)
    return total


@pytest.mark.parametrize("logits", ["squared distance", "inner product"])
@pytest.mark.parametrize(("num_bits", "group_size"), EVERY_LENGTH_AND_GROUP)
def test_entropies_equal_enumeration_over_all_codes(num_bits, group_size, logits):
    u = random_latents(NUM_TOKENS, num_bits)
    for tau in (0.3, 1.0, 10.0):
        q = enumerated_soft_code(u, tau=tau, logits=logits)
        torch.testing.assert_close(sample_entropy(u, inv_temperature=tau), entropy(q).mean(), rtol=0, atol=1e-10)
        torch.testing.assert_close(
            codebook_entropy(u, inv_temperature=tau, group_size=group_size),
            enumerated_codebook_entropy(q, num_bits=num_bits, group_size=group_size),
            rtol=0,
            atol=1e-10,
        )


@pytest.mark.parametrize("group_size", [1, 2, 3, 6])
@pytest.mark.parametrize("tau", [0.1, 1.0, 10.0])
def test_entropies_of_codes_of_plus_minus_1_equal_enumeration_off_the_sphere(tau, group_size):
    u = torch.randn(NUM_TOKENS, 6, dtype=torch.float64)
    q = enumerated_soft_code(u, tau=tau, logits="squared distance", unit_codes=False)
    per_sample = sample_entropy(u, inv_temperature=tau, unit_codes=False)
    codebook = codebook_entropy(u, inv_temperature=tau, group_size=group_size, unit_codes=False)
    expected = enumerated_codebook_entropy(q, num_bits=6, group_size=group_size)
    torch.testing.assert_close(per_sample, entropy(q).mean(), rtol=0, atol=1e-10)
    torch.testing.assert_close(codebook, expected, rtol=0, atol=1e-10)
    quantizer = BinarySphericalQuantizer(
        6, group_size=group_size, inv_temperature=tau, gamma_0=0.7, gamma=0.3, l2_norm=False, unit_codes=False
    )
    loss = quantizer.train()(u[None]).losses["quantizer"]
    torch.testing.assert_close(loss, (0.7 * entropy(q).mean() - 0.3 * expected) / tau, rtol=0, atol=1e-10)


@pytest.mark.parametrize("num_bits", [1, 5, 8])
def test_bit_probabilities_are_the_marginals_of_the_soft_code(num_bits):
    u = random_latents(NUM_TOKENS, num_bits)
    q = enumerated_soft_code(u, tau=3.0, logits="squared distance")
    ones = torch.tensor(list(product((0.0, 1.0), repeat=num_bits)), dtype=torch.float64)  # (2^L, L)
    torch.testing.assert_close(bit_probabilities(u, inv_temperature=3.0), q @ ones, rtol=0, atol=1e-12)


def test_codebook_entropy_never_grows_with_the_group_size():
    u = random_latents(NUM_TOKENS, 12)
    sizes = (1, 2, 4, 12)  # each divides the next
    entropies = [codebook_entropy(u, inv_temperature=10.0, group_size=g) for g in sizes]
    assert all(large <= small + 1e-12 for small, large in pairwise(entropies))
    assert entropies[-1] < entropies[0] - 0.01  # and the term is not the same one four times


@pytest.mark.parametrize("group_size", [1, 2, 7])
def test_sample_entropy_term_is_equal_for_every_group_size(group_size):
    z = random_latents(2, 8, 28)
    stats = BinarySphericalQuantizer(28, group_size=group_size).train()(z).stats
    assert stats["sample_entropy"] == sample_entropy(z, inv_temperature=1.0)


@pytest.mark.parametrize("group_size", [1, 4, 7])
@pytest.mark.parametrize("tau", [1.0, 10.0, 100.0])
def test_loss_lies_between_minus_l_ln_2_and_zero(tau, group_size):
    quantizer = BinarySphericalQuantizer(28, inv_temperature=tau, group_size=group_size).train()
    unscaled = tau * quantizer(random_latents(4, 16, 28)).losses["quantizer"]
    assert -28 * math.log(2) <= unscaled < 0


def test_loss_is_zero_when_all_tokens_are_equal():
    z = random_latents(1, 1, 28).expand(3, 5, 28)
    loss = BinarySphericalQuantizer(28, inv_temperature=10.0).train()(z).losses["quantizer"]
    assert abs(loss) < 1e-12


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("gamma_0", [0.0, 1.0, 3.0])
def test_loss_is_the_weighted_difference_divided_by_tau(gamma_0, gamma):
    z = random_latents(2, 8, 28)
    quantizer = BinarySphericalQuantizer(28, inv_temperature=10.0, gamma_0=gamma_0, gamma=gamma).train()
    confident = gamma_0 * sample_entropy(z, inv_temperature=10.0)
    balanced = gamma * codebook_entropy(z, inv_temperature=10.0, group_size=1)
    torch.testing.assert_close(quantizer(z).losses["quantizer"], (confident - balanced) / 10.0)


@pytest.mark.parametrize("unit_codes", [True, False])
def test_commitment_is_the_squared_distance_to_the_code_and_is_not_divided_by_tau(unit_codes):
    z = 3 * torch.randn(2, 8, 28, dtype=torch.float64)
    u = F.normalize(z, dim=-1)
    value = 28**-0.5 if unit_codes else 1.0
    closed_form = (1 + 28 * value**2 - 2 * value * u.abs().sum(-1)).mean()  # |u|^2 + |code|^2 - 2 u.code
    losses = [
        BinarySphericalQuantizer(28, inv_temperature=10.0, beta=beta, unit_codes=unit_codes).train()(z).losses
        for beta in (0.0, 0.25)
    ]
    torch.testing.assert_close(losses[1]["quantizer"] - losses[0]["quantizer"], 0.25 * closed_form, rtol=0, atol=1e-6)


def test_commitment_pulls_latents_to_their_codes():
    z = torch.randn(2, 8, 4, dtype=torch.float64, requires_grad=True)
    quantizer = BinarySphericalQuantizer(4, gamma_0=0.0, gamma=0.0, beta=1.0, l2_norm=False, unit_codes=False).train()
    output = quantizer(z)
    output.losses["quantizer"].backward()
    torch.testing.assert_close(z.grad, 2 * (z.detach() - output.z_q.detach()) / 16)  # 16 tokens; no gradient to codes


def test_at_tau_1_the_entropy_is_nearly_constant_and_the_loss_only_balances_bits():
    L = 28
    constant = L * math.log(2) - 2 / L
    isotropic = random_latents(1, 50_000, L)
    assert abs(sample_entropy(isotropic, inv_temperature=1.0) - constant) < 1e-3
    one_hot = torch.eye(L, dtype=torch.float64)[None]
    assert abs(sample_entropy(one_hot, inv_temperature=1.0) - constant) < 1e-2
    for shift in (0.0, 0.1, 1.0):
        u = F.normalize(isotropic + shift * L**-0.5, dim=-1)
        loss = BinarySphericalQuantizer(L).train()(u).losses["quantizer"]
        leading_order = -(2 / L) * (1 - u.mean((0, 1)).square().sum())
        assert abs(loss - leading_order) < 1e-3


@pytest.mark.parametrize(("tau", "expected"), [(1.0, -0.071), (10.0, -0.442), (100.0, -0.169)])
def test_loss_of_isotropic_latents_at_three_temperatures(tau, expected):
    loss = BinarySphericalQuantizer(28, inv_temperature=tau).train()(random_latents(1, 50_000, 28)).losses["quantizer"]
    assert abs(loss - expected) < 1e-3


@pytest.mark.parametrize("group_size", [1, 2, 3])
def test_entropy_gradients_equal_finite_differences(group_size):
    u = random_latents(4, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda u: sample_entropy(u, inv_temperature=5.0), u)
    assert torch.autograd.gradcheck(lambda u: codebook_entropy(u, inv_temperature=5.0, group_size=group_size), u)


def test_binary_entropy_is_zero_at_certainty_and_ln_2_in_the_middle():
    p = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(binary_entropy(p), torch.tensor([0.0, math.log(2), 0.0], dtype=torch.float64))


def test_straight_through_jacobian_is_the_identity_over_sqrt_l():
    z = torch.randn(28, dtype=torch.float64)
    quantizer = BinarySphericalQuantizer(28, l2_norm=False).eval()
    jacobian = torch.autograd.functional.jacobian(lambda z: quantizer(z[None, None]).z_q[0, 0], z)
    torch.testing.assert_close(jacobian, torch.eye(28, dtype=torch.float64) / math.sqrt(28))


def test_codes_of_plus_minus_1_have_the_identity_as_jacobian():
    z = torch.randn(28, dtype=torch.float64)
    quantizer = BinarySphericalQuantizer(28, l2_norm=False, unit_codes=False).eval()
    assert torch.equal(quantizer(z[None, None]).z_q[0, 0], torch.where(z > 0, 1.0, -1.0).double())
    jacobian = torch.autograd.functional.jacobian(lambda z: quantizer(z[None, None]).z_q[0, 0], z)
    assert torch.equal(jacobian, torch.eye(28, dtype=torch.float64))


def test_with_the_sphere_the_jacobian_of_the_norm_comes_on_top():
    z = torch.randn(28, dtype=torch.float64)
    quantizer = BinarySphericalQuantizer(28).eval()
    jacobian = torch.autograd.functional.jacobian(lambda z: quantizer(z[None, None]).z_q[0, 0], z)
    u = z / z.norm()
    torch.testing.assert_close(
        jacobian, (torch.eye(28, dtype=torch.float64) - torch.outer(u, u)) / z.norm() / math.sqrt(28)
    )


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_exactly_zero_is_bit_0_and_the_negative_value(zero):
    output = BinarySphericalQuantizer(28).eval()(torch.full((1, 2, 28), zero))
    assert not output.bits.any()
    assert torch.equal(output.z_q, torch.full((1, 2, 28), -torch.tensor(28**-0.5).item()))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_code_vectors_are_exact_float32_and_decode_repeats_them_bit_for_bit(dtype, training):
    quantizer = BinarySphericalQuantizer(28).train(training)
    z = torch.randn(3, 50, 28).to(dtype)
    output = quantizer(z)
    value = torch.tensor(28**-0.5, dtype=torch.float32)
    assert output.z_q.dtype == torch.float32
    assert torch.equal(output.z_q, torch.where(z > 0, value, -value))
    assert torch.equal(output.bits, z > 0)
    assert torch.equal(quantizer.decode(output.bits), output.z_q)


def test_autocast_does_not_reach_the_quantizer():
    quantizer = BinarySphericalQuantizer(28, group_size=7).train()
    z = torch.randn(2, 8, 28)
    plain = quantizer(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = quantizer(z)
    assert torch.equal(plain.losses["quantizer"], under_autocast.losses["quantizer"])
    assert torch.equal(plain.z_q, under_autocast.z_q)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("group_size", [1, 7])
def test_the_compiler_sees_one_graph_also_under_autocast(group_size, training):
    quantizer = BinarySphericalQuantizer(28, group_size=group_size, beta=0.25).train(training)
    compiled = torch.compile(quantizer, fullgraph=True, backend="eager")
    z = torch.randn(2, 8, 28)
    plain = quantizer(z)
    assert torch.equal(compiled(z).z_q, plain.z_q)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = compiled(z)
    assert torch.equal(under_autocast.z_q, plain.z_q)
    assert under_autocast.losses == plain.losses


def test_the_exporter_sees_no_autocast_region():
    class Codes(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quantizer = BinarySphericalQuantizer(28)

        def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
            output = self.quantizer(z)
            return output.bits, self.quantizer.decode(output.bits)

    z = torch.randn(2, 8, 28)
    program = torch.export.export(Codes().eval(), (z,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert not [module for module in program.graph_module.modules() if module is not program.graph_module]
    z = torch.randn(5, 8, 28)
    bits, code = program.module()(z)
    assert torch.equal(bits, z > 0)
    assert torch.equal(code, BinarySphericalQuantizer(28).decode(bits))


@pytest.mark.parametrize("group_size", [1, 7])
@pytest.mark.parametrize("tau", [1.0, 100.0])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e18])
def test_values_and_gradients_stay_finite(scale, tau, group_size):
    z = (torch.randn(2, 64, 28) * scale).requires_grad_()
    output = BinarySphericalQuantizer(28, inv_temperature=tau, group_size=group_size).train()(z)
    (output.losses["quantizer"] + output.z_q.sum()).backward()
    assert output.losses["quantizer"].isfinite()
    assert output.z_q.isfinite().all()
    assert z.grad.isfinite().all()


def test_gradients_stay_finite_when_a_bit_is_dead_and_the_temperature_low():
    u = torch.eye(28)[:1].expand(1, 4, 28).clone().requires_grad_()  # every token is certain of the same bit
    BinarySphericalQuantizer(28, inv_temperature=100.0).train()(u).losses["quantizer"].backward()
    assert u.grad.isfinite().all()


def test_latents_beyond_float32_squares_still_give_finite_code_vectors():
    assert BinarySphericalQuantizer(28).eval()(torch.full((1, 1, 28), 1e30)).z_q.isfinite().all()


def test_eval_mode_returns_no_losses_and_train_mode_does():
    quantizer = BinarySphericalQuantizer(28)
    z = torch.randn(1, 4, 28)
    assert quantizer.eval()(z).losses == {}
    output = quantizer.train()(z)
    assert set(output.losses) == {"quantizer"}
    assert not any(value.requires_grad for value in output.stats.values())


def test_stats_see_dead_bits():
    z = torch.randn(2, 500, 28).abs()
    z[..., :7] *= torch.randint(0, 2, z[..., :7].shape) * 2 - 1  # only the first seven bits vary
    stats = BinarySphericalQuantizer(28).train()(z).stats
    assert stats["bits_alive"] == 0.25
    assert abs(stats["bit_entropy"] - 0.25 * math.log(2)) < 1e-2


@pytest.mark.parametrize("group_size", [0, 3])
def test_impossible_group_sizes_are_refused(group_size):
    with pytest.raises(ValueError, match=f"group_size {group_size} must divide 28 bits"):
        BinarySphericalQuantizer(28, group_size=group_size)


def test_a_group_too_large_to_enumerate_encodes_but_does_not_train():
    """Group size changes the loss alone, so that a checkpoint with any of them gives its bits."""
    z = torch.randn(2, 5, 28)
    quantizer = BinarySphericalQuantizer(28, group_size=28).eval()
    assert torch.equal(quantizer(z).bits, z > 0)
    with pytest.raises(ValueError, match=r"group_size 28 makes 2\^28 codes: use at most 16 bits"):
        quantizer.train()(z)


@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("num_parts", [2, 4])
def test_the_joint_correction_gives_loss_and_gradient_of_the_joined_batch(num_parts, group_size):
    quantizer = BinarySphericalQuantizer(
        6, group_size=group_size, inv_temperature=10.0, gamma_0=0.7, gamma=1.3, beta=0.25
    ).train()
    z = torch.randn(8, 5, 6, dtype=torch.float64)
    z[:4] += 0.7  # micro-batches that use other codes, as those of one caption or class would
    z.requires_grad_()
    joined = quantizer(z).losses["quantizer"]
    (expected,) = torch.autograd.grad(joined, z)
    parts = [quantizer(part) for part in z.chunk(num_parts)]
    mean = torch.stack([part.losses["quantizer"] for part in parts]).mean()
    correction = quantizer.joint_correction(torch.stack([part.average_code for part in parts]))
    torch.testing.assert_close(mean + correction, joined, rtol=0, atol=1e-7)  # codes are float32 in the beta term
    (gradient,) = torch.autograd.grad(mean + correction, z)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-7)
    assert correction < -1e-3  # the entropy of a mean is above the mean of entropies


@pytest.mark.parametrize("group_size", [1, 2])
def test_a_single_micro_batch_needs_no_correction(group_size):
    quantizer = BinarySphericalQuantizer(6, group_size=group_size, inv_temperature=10.0).train()
    z = random_latents(2, 5, 6).requires_grad_()
    correction = quantizer.joint_correction(quantizer(z).average_code[None])
    assert correction == 0
    (gradient,) = torch.autograd.grad(correction, z)
    assert not gradient.any()


@pytest.mark.parametrize(("group_size", "shape"), [(1, (6,)), (2, (3, 4))])
def test_the_average_code_is_the_mean_soft_code_of_every_group(group_size, shape):
    z = random_latents(2, 5, 6)
    quantizer = BinarySphericalQuantizer(6, group_size=group_size, inv_temperature=3.0)
    average = quantizer.train()(z).average_code
    assert average.shape == shape
    q = enumerated_soft_code(z.flatten(0, 1), tau=3.0, logits="inner product").mean(0).reshape([2] * 6)
    for group in range(6 // group_size):
        others = [axis for axis in range(6) if axis // group_size != group]
        marginal = q.sum(others).flatten()
        expected = marginal[1] if group_size == 1 else marginal
        torch.testing.assert_close(average[group], expected, rtol=0, atol=1e-12)
    assert quantizer.eval()(z).average_code is None
