"""FSQ, LFQ and VQ against brute force and against the library's own codes, indices and losses."""

import math
import sys
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from transformers.initialization import guard_torch_init_functions
from vector_quantize_pytorch import FSQ, LFQ

from qlip.core.errors import UserError
from qlip.quantizers.build import KINDS, QuantizerConfig, build_quantizer, fsq_num_bits, latent_width
from qlip.quantizers.ids import bits_to_ids, bits_to_subcodes
from qlip.quantizers.others import FiniteScalarQuantizer, LookupFreeQuantizer, VectorQuantizer

SMALL_LEVELS = [(3,), (4, 4), (8, 5, 3), (5, 6, 7), (2, 2, 2), (2, 5, 8), (16, 1000)]


def library_fsq(levels: tuple[int, ...]) -> FSQ:
    """The library's module with its table of all codes."""
    return FSQ(list(levels), preserve_symmetry=2 in levels)


def spelled(digits: Tensor, levels: tuple[int, ...]) -> Tensor:
    """(c, d) digits -> (c, L) bool by Python's own binary format."""
    rows = [
        "".join(f"{digit:0{math.ceil(math.log2(level))}b}" for digit, level in zip(row, levels, strict=True))
        for row in digits.tolist()
    ]
    return torch.tensor([[character == "1" for character in row] for row in rows])


@pytest.mark.parametrize("levels", SMALL_LEVELS)
def test_fsq_decodes_every_code_to_the_librarys(levels):
    library = library_fsq(levels)
    digits = library.indices_to_level_indices(torch.arange(math.prod(levels)))
    assert digits.unique(dim=0).shape[0] == math.prod(levels)
    assert torch.equal(FiniteScalarQuantizer(levels).decode(spelled(digits, levels)), library.implicit_codebook)


@pytest.mark.parametrize("levels", SMALL_LEVELS)
def test_fsq_codes_and_digits_are_the_librarys(levels):
    z = 5 * torch.randn(4, 64, len(levels))
    output = FiniteScalarQuantizer(levels).eval()(z)
    library = library_fsq(levels)
    code, indices = library(z)
    assert torch.equal(output.z_q, code)
    assert torch.equal(output.bits.flatten(0, 1), spelled(library.indices_to_level_indices(indices.flatten()), levels))


@pytest.mark.parametrize("levels", [(3, 4), (2, 5), (1000, 7)])
def test_fsq_reaches_the_first_and_the_last_level_and_no_further(levels):
    quantizer = FiniteScalarQuantizer(levels).eval()
    ends = torch.tensor([[[-1e30] * 2, [1e30] * 2]])
    digits = torch.tensor([[0, 0], [level - 1 for level in levels]])
    assert torch.equal(quantizer(ends).bits[0], spelled(digits, levels))


def test_fsq_codes_are_the_levels_in_order():
    z = torch.linspace(-4, 4, 1001)[None, :, None]
    for level in (3, 4, 9, 16):
        ids = bits_to_ids(FiniteScalarQuantizer([level]).eval()(z).bits).flatten()
        assert ids.diff().unique().tolist() == [0, 1]
        assert (ids[0], ids[-1]) == (0, level - 1)


def test_fsq_with_two_levels_takes_the_sign_and_equal_steps():
    z = torch.randn(2, 50, 3)
    output = FiniteScalarQuantizer([2, 2, 3]).eval()(z)
    assert torch.equal(output.bits[..., :2], z[..., :2] >= 0)
    assert set(output.z_q[..., :2].unique().tolist()) == {-1.0, 1.0}
    assert set(output.z_q[..., 2].unique().tolist()) == {-1.0, 0.0, 1.0}


def test_fsq_of_28_bits_stores_no_table():
    quantizer = FiniteScalarQuantizer([16] * 7).eval()
    z = torch.randn(2, 8, 7)
    output = quantizer(z)
    assert output.bits.shape == (2, 8, 28)
    assert torch.equal(quantizer.decode(output.bits), output.z_q)
    assert sum(x.numel() for x in quantizer.library.on(z.device).buffers()) < 100


def test_fsq_refuses_bits_that_spell_no_level():
    quantizer = FiniteScalarQuantizer([5, 4])
    assert quantizer.decode(torch.tensor([True, False, False, True, True])).shape == (2,)  # 4 of 0..4, 3 of 0..3
    with pytest.raises(ValueError, match=r"a digit beyond its levels \(5, 4\)"):
        quantizer.decode(torch.tensor([True, False, True, False, False]))


@pytest.mark.parametrize("levels", [(), (1, 4), (4, 1001), (0,)])
def test_fsq_refuses_impossible_levels(levels):
    with pytest.raises(ValueError, match="one or more fsq_levels, each from 2 to 1000"):
        FiniteScalarQuantizer(levels)
    with pytest.raises(ValueError, match="one or more fsq_levels"):
        fsq_num_bits(levels)


def test_fsq_levels_and_bits_must_agree():
    assert fsq_num_bits([8, 5, 3, 2]) == 3 + 3 + 2 + 1
    assert latent_width("fsq", num_bits=9, fsq_levels=[8, 5, 3, 2]) == 4
    assert [latent_width(kind, num_bits=28) for kind in ("bsq", "lfq", "vq")] == [28, 28, 28]
    with pytest.raises(ValueError, match=r"\[8, 5\] make 6 bits: set num_bits to 6"):
        build_quantizer(QuantizerConfig(kind="fsq", fsq_levels=[8, 5]))


@pytest.mark.parametrize("group_size", [1, 3, 12])
def test_lfq_codes_are_signs_and_its_indices_the_librarys(group_size):
    z = torch.randn(2, 32, 12)
    z[0, 0, :6] = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30])
    output = LookupFreeQuantizer(12, group_size=group_size).eval()(z)
    library = LFQ(codebook_size=2**group_size, num_codebooks=12 // group_size, keep_num_codebooks_dim=True).eval()
    assert torch.equal(output.z_q, torch.where(z > 0, 1.0, -1.0))
    assert torch.equal(bits_to_subcodes(output.bits, 12 // group_size), library(z).indices.long())


@pytest.mark.parametrize("group_size", [1, 3, 6])
@pytest.mark.parametrize("tau", [0.3, 1.0, 100.0])
def test_lfq_loss_is_the_librarys(group_size, tau):
    z = torch.randn(2, 32, 12)
    quantizer = LookupFreeQuantizer(
        12, group_size=group_size, inv_temperature=tau, gamma=0.5, commitment_weight=0.3
    ).train()
    library = LFQ(
        codebook_size=2**group_size,
        num_codebooks=12 // group_size,
        diversity_gamma=0.5,
        entropy_loss_weight=1.0,
        commitment_loss_weight=0.3,
    )
    expected = library.train()(z, inv_temperature=tau).entropy_aux_loss
    loss = quantizer(z).losses["quantizer"]
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-3)  # the library clamps the logarithm at 1e-5


def test_lfq_gradient_is_the_identity():
    quantizer = LookupFreeQuantizer(4).eval()
    jacobian = torch.autograd.functional.jacobian(lambda z: quantizer(z[None, None]).z_q[0, 0], torch.randn(4))
    assert torch.equal(jacobian, torch.eye(4))


@pytest.mark.parametrize("group_size", [1, 4, 12])
def test_vq_codes_are_the_nearest_by_brute_force(group_size):
    quantizer = VectorQuantizer(12, group_size=group_size).eval()
    nn.init.normal_(quantizer.library.codebook)
    z = torch.randn(2, 50, 12)
    output = quantizer(z)
    codebook = quantizer.library.codebook.detach()  # (h, c, g)
    assert codebook.shape == (12 // group_size, 2**group_size, group_size)
    for image, token in product(range(2), range(50)):
        for head, part in enumerate(z[image, token].split(group_size)):
            nearest = (codebook[head] - part).double().square().sum(-1).argmin()
            dims = slice(head * group_size, (head + 1) * group_size)
            assert bits_to_ids(output.bits[image, token, dims]) == nearest
            assert torch.equal(output.z_q[image, token, dims], codebook[head, nearest])


def test_vq_loss_is_the_squared_distance_and_moves_codebook_and_latents():
    quantizer = VectorQuantizer(12, group_size=4, commitment_weight=0.5).train()
    z = torch.randn(2, 50, 12, requires_grad=True)
    output = quantizer(z)
    code = output.z_q.detach()
    torch.testing.assert_close(output.losses["quantizer"], 0.5 * (code - z).square().mean())
    output.losses["quantizer"].backward()
    torch.testing.assert_close(z.grad, (z.detach() - code) / z.numel())
    torch.testing.assert_close(quantizer.library.codebook.grad.sum(1).flatten(), -z.grad.sum((0, 1)))


def test_vq_codebook_is_trained_by_the_optimizer_alone():
    quantizer = VectorQuantizer(12, group_size=4).train()
    z = torch.randn(4, 64, 12)
    before = quantizer.library.codebook.detach().clone()
    quantizer(z)
    assert torch.equal(quantizer.library.codebook, before)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.05)
    losses = []
    for _ in range(50):
        loss = quantizer(z).losses["quantizer"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_vq_initialisation_fills_its_range_and_leaves_loaded_tensors_alone():
    quantizer = VectorQuantizer(28, group_size=7)
    codebook = quantizer.library.codebook
    assert 0.95 / 128 < codebook.abs().max() <= 1 / 128
    loaded = codebook.detach().clone()
    codebook._is_hf_initialized = True  # transformers' mark of a tensor that came from a checkpoint
    with guard_torch_init_functions():
        quantizer.reset_parameters()
    assert torch.equal(codebook, loaded)
    del codebook._is_hf_initialized
    quantizer.reset_parameters()
    assert not torch.equal(codebook, loaded)
    assert 0.95 / 128 < codebook.abs().max() <= 1 / 128


def test_vq_of_a_fresh_model_uses_its_codes_although_latents_are_small():
    z = 0.005 * torch.randn(8, 64, 28)
    assert VectorQuantizer(28, group_size=4).train()(z).stats["bit_entropy"] > 0.05
    assert VectorQuantizer(28, group_size=7).train()(z).stats["bit_entropy"] > 0.6


def test_latents_that_are_not_numbers_pass_through_to_the_guards():
    for kind in KINDS:
        config = QuantizerConfig(kind=kind, num_bits=8, fsq_levels=(4,) * 4 if kind == "fsq" else ())
        quantizer = build_quantizer(config).train()
        output = quantizer(torch.full((1, 4, quantizer.latent_dim), torch.nan))
        assert output.z_q.isnan().all()


@pytest.mark.parametrize("quantizer", [LookupFreeQuantizer, VectorQuantizer])
@pytest.mark.parametrize("group_size", [0, 3, 28])
def test_impossible_group_sizes_are_refused(quantizer, group_size):
    said = "makes 2\\^28 codes: use at most 16 bits" if group_size == 28 else "must divide 28 bits"
    with pytest.raises(ValueError, match=f"group_size {group_size} {said}"):
        quantizer(28, group_size=group_size)


def test_vq_refuses_to_leave_its_codebook_untrained():
    with pytest.raises(ValueError, match=r"commitment_weight must be above 0, got 0\.0"):
        VectorQuantizer(12, group_size=4, commitment_weight=0.0)


@pytest.mark.parametrize(
    "build", [lambda: FiniteScalarQuantizer([4]), lambda: LookupFreeQuantizer(4), lambda: VectorQuantizer(7)]
)
def test_a_missing_library_is_named_with_the_remedy(build, monkeypatch):
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)  # import then fails
    with pytest.raises(UserError, match=r"^[^\n]*vector-quantize-pytorch package: pip install 'qlip\[quantizers\]'$"):
        build()
    assert fsq_num_bits([4, 4]) == 4  # what a config validates with needs no library
