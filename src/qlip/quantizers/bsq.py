"""Binary spherical quantization with closed-form entropies (QLIP Eq 1; BSQ-ViT, arXiv 2406.07548).

Shapes: `b` images, `n` tokens, `L` bits, `g` bits per group, `c` = 2^g codes of a group.
The codebook {-1/sqrt(L), +1/sqrt(L)}^L is never stored. `docs/bsq.md` ties every equation to a function and a test.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from qlip.core.distributed import mean_over_ranks
from qlip.quantizers.base import Quantized
from qlip.quantizers.ids import ids_to_bits


def bit_probabilities(u: Tensor, *, inv_temperature: float) -> Tensor:
    """P(bit = 1) of the soft code: ``sigmoid(4 tau u_i / sqrt(L))``. (..., L) -> (..., L).

    The softmax over all 2^L codes with logits -tau * distance^2 factorises into bits because every code and every
    latent on the sphere has the same norm.
    """
    return torch.sigmoid(4 * inv_temperature * u * u.shape[-1] ** -0.5)


def entropy_terms(p: Tensor) -> Tensor:
    """-p ln p, element-wise, with a finite slope at p = 0, where a saturated sigmoid would give 0 * inf = NaN."""
    return torch.special.entr(p.clamp_min(torch.finfo(p.dtype).tiny))


def binary_entropy(p: Tensor) -> Tensor:
    """Entropy in nats of a coin with P(1) = p, element-wise; zero (below 1e-35) at p = 0 and p = 1."""
    return entropy_terms(p) + entropy_terms(1 - p)


def sample_entropy(u: Tensor, *, inv_temperature: float) -> Tensor:
    """E[H(q)]: the entropy of one token's soft code, averaged over all tokens and ranks. Scalar, nats.

    (b, n, L) -> (). A product of coins has the sum of their entropies, whatever the grouping.
    """
    per_token = binary_entropy(bit_probabilities(u, inv_temperature=inv_temperature)).sum(-1)
    return mean_over_ranks(per_token.mean())


def codebook_entropy(u: Tensor, *, inv_temperature: float, group_size: int) -> Tensor:
    """H(E[q]): the entropy of the average soft code over the global batch, summed over groups. Scalar, nats.

    (b, n, L) -> (). Group size 1 needs only the mean of each bit; group size g enumerates the 2^g codes of every
    group (g = 9 costs 512 numbers per group and token). The mean runs over all ranks **before** the entropy.
    """
    if group_size == 1:
        p = bit_probabilities(u, inv_temperature=inv_temperature)
        return binary_entropy(mean_over_ranks(p.flatten(0, -2).mean(0))).sum()
    codes = ids_to_bits(torch.arange(2**group_size, device=u.device), group_size)  # (c, g)
    code_vectors = (2 * codes.to(u.dtype) - 1) * u.shape[-1] ** -0.5
    grouped = rearrange(u, "... (j g) -> (...) j g", g=group_size)
    q = (2 * inv_temperature * grouped @ code_vectors.T).softmax(-1)  # (tokens, j, c)
    return entropy_terms(mean_over_ranks(q.mean(0))).sum()


class BinarySphericalQuantizer(nn.Module):
    """Latents -> sign bits on the unit sphere, with the entropy loss of Eq 1.

    ``L_BSQ = (E[H(q)] - gamma H(E[q])) / tau``: confident tokens, balanced code use. `bit_i = (u_i > 0)`, so exactly
    zero is bit 0, value -1. No parameters, no buffers, always float32.
    """

    def __init__(
        self,
        num_bits: int = 28,
        *,
        group_size: int = 1,
        inv_temperature: float = 1.0,
        gamma: float = 1.0,
        l2_norm: bool = True,
    ) -> None:
        """`inv_temperature` is tau; `l2_norm` puts latents on the sphere first (Eq 1 assumes it).

        Raises `ValueError` when the group size does not divide the bits or needs more than 2^16 codes.
        """
        super().__init__()
        if group_size < 1 or num_bits % group_size or group_size > 16:
            raise ValueError(f"group_size {group_size} must divide {num_bits} bits and be at most 16 (2^g codes)")
        self.num_bits = num_bits
        self.group_size = group_size
        self.inv_temperature = inv_temperature
        self.gamma = gamma
        self.l2_norm = l2_norm

    def forward(self, z: Tensor) -> Quantized:
        """(b, n, L) latents of any scale -> `Quantized`; losses `quantizer`, stats in nats and shares."""
        with torch.autocast(device_type=z.device.type, enabled=False):  # signs and entropies need float32
            z = z.float() if z.dtype in (torch.bfloat16, torch.float16) else z
            u = F.normalize(z, dim=-1, eps=1e-12) if self.l2_norm else z
            bits = u.detach() > 0
            hard = self.decode(bits).to(u.dtype)
            soft = u * self.num_bits**-0.5
            z_q = hard + (soft - soft.detach())  # forward: hard exactly; backward: identity times 1/sqrt(L)
            if not self.training:
                return Quantized(z_q=z_q, bits=bits)
            per_sample = sample_entropy(u, inv_temperature=self.inv_temperature)
            codebook = codebook_entropy(u, inv_temperature=self.inv_temperature, group_size=self.group_size)
            loss = (per_sample - self.gamma * codebook) / self.inv_temperature
        share_of_ones = mean_over_ranks(bits.float().flatten(0, -2).mean(0))
        stats = {
            "sample_entropy": per_sample.detach(),
            "codebook_entropy": codebook.detach(),
            "bit_entropy": binary_entropy(share_of_ones).mean(),  # of the hard bits; ln 2 is perfect balance
            "bits_alive": (binary_entropy(share_of_ones) > 0.05).float().mean(),
        }
        return Quantized(z_q=z_q, bits=bits, losses={"quantizer": loss}, stats=stats)

    def decode(self, bits: Tensor) -> Tensor:
        """(..., L) bool -> (..., L) float32 code vectors of norm 1, entries +-float32(L^-1/2)."""
        scale = torch.tensor(self.num_bits**-0.5, dtype=torch.float32, device=bits.device)
        return (2.0 * bits.float() - 1.0) * scale
