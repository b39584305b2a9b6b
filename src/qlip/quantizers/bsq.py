"""Binary spherical quantization with closed-form entropies (QLIP Eq 1; BSQ-ViT, arXiv 2406.07548).

Shapes: `b` images, `n` tokens, `L` bits, `g` bits per group, `c` = 2^g codes of a group.
The codebook {-1/sqrt(L), +1/sqrt(L)}^L is never stored. With `unit_codes=False`, the convention of the public BSQ-ViT
without its norm, the entries are -1 and +1. `docs/bsq.md` ties every equation to a function and a test.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from qlip.core.distributed import mean_over_ranks
from qlip.core.precision import float32_region
from qlip.quantizers.base import Quantized, check_group_size, check_num_codes, digit_bits, straight_through


def code_value(num_bits: int, *, unit_codes: bool) -> float:
    """The absolute value of every entry of a code vector: 1/sqrt(L), which makes its norm 1, or 1."""
    return num_bits**-0.5 if unit_codes else 1.0


def bit_probabilities(u: Tensor, *, inv_temperature: float, unit_codes: bool = True) -> Tensor:
    """P(bit = 1) of the soft code: ``sigmoid(4 tau u_i / sqrt(L))``, or ``sigmoid(4 tau u_i)``. (..., L) -> (..., L).

    The softmax over all 2^L codes with logits -tau * distance^2 factorises into bits because every code has the same
    norm.
    """
    return torch.sigmoid(4 * inv_temperature * u * code_value(u.shape[-1], unit_codes=unit_codes))


def entropy_terms(p: Tensor) -> Tensor:
    """-p ln p, element-wise, with a finite slope at p = 0, where a saturated sigmoid would give 0 * inf = NaN."""
    return torch.special.entr(p.clamp_min(torch.finfo(p.dtype).tiny))


def binary_entropy(p: Tensor) -> Tensor:
    """Entropy in nats of a coin with P(1) = p, element-wise; zero (below 1e-35) at p = 0 and p = 1."""
    return entropy_terms(p) + entropy_terms(1 - p)


def sample_entropy(u: Tensor, *, inv_temperature: float, unit_codes: bool = True) -> Tensor:
    """E[H(q)]: the entropy of one token's soft code, averaged over all tokens and ranks. Scalar, nats.

    (b, n, L) -> (). A product of coins has the sum of their entropies, whatever the grouping.
    """
    p = bit_probabilities(u, inv_temperature=inv_temperature, unit_codes=unit_codes)
    return mean_over_ranks(binary_entropy(p).sum(-1).mean())


def average_code(u: Tensor, *, inv_temperature: float, group_size: int, unit_codes: bool = True) -> Tensor:
    """E[q]: the mean soft code over all tokens and ranks. (b, n, L) -> (L,) P(bit = 1), or (L/g, c) for groups g > 1.

    Group size g enumerates the 2^g codes of every group (g = 9 costs 512 numbers per group and token).
    Raises `ValueError` for groups of more than 16 bits.
    """
    check_num_codes(group_size)
    if group_size == 1:
        p = bit_probabilities(u, inv_temperature=inv_temperature, unit_codes=unit_codes)
        return mean_over_ranks(p.flatten(0, -2).mean(0))
    codes = digit_bits(torch.arange(2**group_size, device=u.device), group_size)  # (c, g)
    code_vectors = (2 * codes.to(u.dtype) - 1) * code_value(u.shape[-1], unit_codes=unit_codes)
    grouped = rearrange(u, "... (j g) -> (...) j g", g=group_size)
    q = (2 * inv_temperature * grouped @ code_vectors.T).softmax(-1)  # (tokens, j, c)
    return mean_over_ranks(q.mean(0))


def average_code_entropy(average: Tensor, *, group_size: int) -> Tensor:
    """Entropy of a mean soft code, summed over groups, in nats. (..., L) -> (...), or (..., L/g, c) -> (...)."""
    return binary_entropy(average).sum(-1) if group_size == 1 else entropy_terms(average).sum((-2, -1))


def codebook_entropy(u: Tensor, *, inv_temperature: float, group_size: int, unit_codes: bool = True) -> Tensor:
    """H(E[q]): the entropy of the average soft code over the global batch, summed over groups. Scalar, nats.

    (b, n, L) -> (). Group size 1 needs only the mean of each bit. The mean runs over all ranks **before** the entropy.
    Raises `ValueError` for groups of more than 16 bits.
    """
    average = average_code(u, inv_temperature=inv_temperature, group_size=group_size, unit_codes=unit_codes)
    return average_code_entropy(average, group_size=group_size)


def bit_stats(bits: Tensor) -> dict[str, Tensor]:
    """(b, n, L) bool -> how well the hard bits are used over all ranks, for the log of any quantizer.

    `bit_entropy` in nats, mean over bits: ln 2 is perfect balance. `bits_alive`: the share of bits above 0.05 nats.
    """
    entropy = binary_entropy(mean_over_ranks(bits.float().flatten(0, -2).mean(0)))  # (L,)
    return {"bit_entropy": entropy.mean(), "bits_alive": (entropy > 0.05).float().mean()}


class BinarySphericalQuantizer(nn.Module):
    """Latents -> sign bits on the unit sphere, with the entropy loss of Eq 1.

    ``L_BSQ = (gamma_0 E[H(q)] - gamma H(E[q])) / tau + beta E[|sg(code) - u|^2]``: confident tokens, balanced code use
    and, where asked for, latents near their codes. `bit_i = (u_i > 0)`, so exactly zero is bit 0, the negative value.
    No parameters, no buffers, always float32.
    """

    def __init__(
        self,
        num_bits: int = 28,
        *,
        group_size: int = 1,
        inv_temperature: float = 1.0,
        gamma_0: float = 1.0,
        gamma: float = 1.0,
        beta: float = 0.0,
        l2_norm: bool = True,
        unit_codes: bool = True,
    ) -> None:
        """`inv_temperature` is tau; `l2_norm` puts latents on the sphere first (Eq 1 assumes it).

        `unit_codes` gives code vectors norm 1, entries +-1/sqrt(L), and divides the straight-through gradient by
        sqrt(L); without it entries are +-1 and the gradient is the identity. Eq 1 has gamma_0 = 1 and beta = 0.
        Raises `ValueError` when the group size does not divide the bits; in training, when it is above 16.
        """
        super().__init__()
        check_group_size(num_bits, group_size)
        self.num_bits = num_bits
        self.latent_dim = num_bits
        self.group_size = group_size
        self.inv_temperature = inv_temperature
        self.gamma_0 = gamma_0
        self.gamma = gamma
        self.beta = beta
        self.l2_norm = l2_norm
        self.unit_codes = unit_codes

    def forward(self, z: Tensor) -> Quantized:
        """(b, n, L) latents of any scale -> `Quantized`; losses `quantizer`, stats in nats and shares."""
        with float32_region(z.device.type):  # signs and entropies need float32
            z = z.float() if z.dtype in (torch.bfloat16, torch.float16) else z
            u = F.normalize(z, dim=-1, eps=1e-12) if self.l2_norm else z
            bits = u.detach() > 0
            code = self.decode(bits).to(u.dtype)
            z_q = straight_through(code, u * code_value(self.num_bits, unit_codes=self.unit_codes))
            if not self.training:
                return Quantized(z_q=z_q, bits=bits)
            tau, unit_codes = self.inv_temperature, self.unit_codes
            per_sample = sample_entropy(u, inv_temperature=tau, unit_codes=unit_codes)
            average = average_code(u, inv_temperature=tau, group_size=self.group_size, unit_codes=unit_codes)
            codebook = average_code_entropy(average, group_size=self.group_size)
            loss = (self.gamma_0 * per_sample - self.gamma * codebook) / tau
            if self.beta:
                loss = loss + self.beta * mean_over_ranks((code - u).square().sum(-1).mean())
            stats = {"sample_entropy": per_sample.detach(), "codebook_entropy": codebook.detach(), **bit_stats(bits)}
        return Quantized(z_q=z_q, bits=bits, losses={"quantizer": loss}, stats=stats, average_code=average)

    def joint_correction(self, average_codes: Tensor) -> Tensor:
        """``-gamma / tau (H(mean_m E_m[q]) - mean_m H(E_m[q]))`` for m micro-batches of equal size. Scalar.

        average_codes (m, L), or (m, L/g, c) for groups g > 1: the `average_code` of each. Added to the mean of their
        losses it gives the loss of the joined batch; exactly 0 for m = 1. The other terms are means over tokens.
        """
        joined = average_code_entropy(average_codes.mean(0), group_size=self.group_size)
        apart = average_code_entropy(average_codes, group_size=self.group_size).mean(0)
        return -(self.gamma / self.inv_temperature) * (joined - apart)

    def decode(self, bits: Tensor) -> Tensor:
        """(..., L) bool -> (..., L) float32 code vectors, entries +-float32(L^-1/2), or +-1."""
        value = code_value(self.num_bits, unit_codes=self.unit_codes)
        scale = torch.tensor(value, dtype=torch.float32, device=bits.device)
        return (2.0 * bits.float() - 1.0) * scale
