"""FSQ, LFQ and VQ for comparison: adapters that give the library vector-quantize-pytorch our contract.

FSQ: arXiv 2309.15505. LFQ: arXiv 2310.05737. VQ: arXiv 1711.00937, as a product of small codebooks.
Shapes: `b` images, `n` tokens, `L` bits, `d` latent width, `h` groups (heads) of `g` bits, `c` = 2^g codes of a group.
The library comes with ``pip install 'qlip[quantizers]'`` and is imported when one of these is built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType

import torch
from torch import Tensor, nn

from qlip.core.distributed import mean_over_ranks
from qlip.core.errors import UserError
from qlip.core.precision import float32_region
from qlip.quantizers.base import Quantized, check_group_size, check_num_codes, digit_bits, straight_through
from qlip.quantizers.bsq import bit_stats, codebook_entropy, sample_entropy
from qlip.quantizers.ids import bits_to_ids, bits_to_subcodes


def import_library() -> ModuleType:
    """The library, imported late since it is optional and slow to load. Raises `UserError` without it."""
    try:
        import vector_quantize_pytorch
    except ImportError:
        remedy = "pip install 'qlip[quantizers]'"
        raise UserError(f"quantizers fsq, lfq and vq need the vector-quantize-pytorch package: {remedy}") from None
    return vector_quantize_pytorch


class Stateless:
    """A library module without weights, built on the device of the first input and kept out of `nn.Module`.

    Its buffers are constants. Registered, they would follow a model to the meta device, where transformers builds
    every model, and come back uninitialised.
    """

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        """`build` must survive pickling: a `functools.partial`, no lambda."""
        self.build = build
        self.built: dict[torch.device, nn.Module] = {}

    def on(self, device: torch.device) -> nn.Module:
        """The module in eval mode, with its constants on `device`."""
        if device not in self.built:
            with torch.inference_mode(False), torch.device(device):  # inference tensors could not be trained with later
                self.built[device] = self.build().eval()
        return self.built[device]


def level_widths(levels: Sequence[int]) -> list[int]:
    """Bits that hold the digits 0 to level - 1 of each dimension: ceil(log2(level)).

    Raises `ValueError` without levels or for one outside 2 to 1000: one level carries no bit, and from 1001 levels on
    the library's bound reaches past the last level.
    """
    if not levels or not all(2 <= level <= 1000 for level in levels):
        raise ValueError(f"quantizer fsq needs one or more fsq_levels, each from 2 to 1000, got {list(levels)}")
    return [(level - 1).bit_length() for level in levels]


class FiniteScalarQuantizer(nn.Module):
    """Each latent dimension is squashed and rounded to one of its levels; the digits, written in bits, are the code.

    Digit i takes ceil(log2(level_i)) bits, first bit most significant, dimension 0 first. No loss, no state. Codes
    follow the paper (even levels reach from -1 to 1 - 2/level); where any level is 2 all take the library's symmetric
    spacing from -1 to 1 (arXiv 2411.19842), because the paper's bound would give two levels the threshold -3.8.
    """

    def __init__(self, levels: Sequence[int]) -> None:
        """`levels` of each latent dimension: [16] * 7 make 28 bits. Raises as `level_widths` and `import_library`."""
        super().__init__()
        self.widths = level_widths(levels)
        self.levels = tuple(levels)
        self.symmetric = 2 in self.levels
        self.num_bits = sum(self.widths)
        self.latent_dim = len(self.levels)
        # return_indices would build a table of all codes (2^28 rows) and float32 ids
        options = {"levels": list(levels), "return_indices": False, "preserve_symmetry": self.symmetric}
        self.library = Stateless(partial(import_library().FSQ, **options))

    def forward(self, z: Tensor) -> Quantized:
        """(b, n, d) latents -> `Quantized`; the gradient also passes through the squashing tanh."""
        with float32_region(z.device.type):
            z_q, _ = self.library.on(z.device)(z.float())
            digits = self._digits(z_q.detach()).unbind(-1)
            bits = torch.cat([digit_bits(x, width) for x, width in zip(digits, self.widths, strict=True)], dim=-1)
            if not self.training:
                return Quantized(z_q=z_q, bits=bits)
            return Quantized(z_q=z_q, bits=bits, losses={"quantizer": z_q.new_zeros(())}, stats=bit_stats(bits))

    def decode(self, bits: Tensor) -> Tensor:
        """(..., L) bool -> (..., d) float32 code vectors. Raises `ValueError` for bits that spell no level."""
        digits = torch.stack([bits_to_ids(part) for part in bits.split(self.widths, dim=-1)], dim=-1)  # (..., d)
        levels = torch.tensor(self.levels, device=bits.device)
        if (digits >= levels).any():
            raise ValueError(f"bits spell a digit beyond its levels {self.levels}: pass bits that this quantizer made")
        if self.symmetric:  # in the library's order of operations, to repeat its codes bit for bit
            return digits.float() * (2.0 / (levels - 1)) - 1.0
        return (digits - levels // 2).float() / (levels // 2)

    def _digits(self, code: Tensor) -> Tensor:
        """(..., d) code vectors -> (..., d) int64 digits."""
        levels = torch.tensor(self.levels, device=code.device)
        digits = (code + 1.0) * (levels - 1) / 2 if self.symmetric else (code + 1.0) * (levels // 2)
        return digits.round().long()


class LookupFreeQuantizer(nn.Module):
    """The sign of each latent is a bit, its code +-1; the entropy loss sees groups of bits as codebooks. No state.

    ``L_LFQ = (E[H(q)] - gamma H(E[q])) / h + commitment_weight * mean (c - z)^2`` with `q` the softmax over the 2^g
    codes c of a group at logits 2 tau z.c: the library's loss. It is computed here because the library drops the result
    of its all_reduce, so that over many processes its H(E[q]) is of a local mean divided by their number.
    """

    def __init__(
        self,
        num_bits: int = 28,
        *,
        group_size: int = 1,
        inv_temperature: float = 1.0,
        gamma: float = 1.0,
        commitment_weight: float = 0.25,
    ) -> None:
        """`inv_temperature` is tau. Without commitment nothing bounds the latents, whose growth alone lowers E[H(q)].

        Raises as `check_group_size` and `import_library`.
        """
        super().__init__()
        check_group_size(num_bits, group_size)
        check_num_codes(group_size)
        self.num_bits = num_bits
        self.latent_dim = num_bits
        self.group_size = group_size
        self.inv_temperature = inv_temperature
        self.gamma = gamma
        self.commitment_weight = commitment_weight
        options = {"codebook_size": 2**group_size, "num_codebooks": num_bits // group_size}
        self.library = Stateless(partial(import_library().LFQ, **options))

    def forward(self, z: Tensor) -> Quantized:
        """(b, n, L) latents -> `Quantized`; entropies among the stats are sums over groups, as in BSQ, in nats."""
        with float32_region(z.device.type):
            z = z.float()
            code, _, _ = self.library.on(z.device)(z.detach())
            bits = code > 0
            z_q = straight_through(code, z)
            if not self.training:
                return Quantized(z_q=z_q, bits=bits)
            tau = self.inv_temperature
            per_sample = sample_entropy(z, inv_temperature=tau, unit_codes=False)
            codebook = codebook_entropy(z, inv_temperature=tau, group_size=self.group_size, unit_codes=False)
            num_groups = self.num_bits // self.group_size
            commitment = mean_over_ranks((code - z).square().mean())
            loss = (per_sample - self.gamma * codebook) / num_groups + self.commitment_weight * commitment
            stats = {"sample_entropy": per_sample.detach(), "codebook_entropy": codebook.detach(), **bit_stats(bits)}
        return Quantized(z_q=z_q, bits=bits, losses={"quantizer": loss}, stats=stats)

    def decode(self, bits: Tensor) -> Tensor:
        """(..., L) bool -> (..., L) float32 code vectors, entries +-1."""
        return 2.0 * bits.float() - 1.0


class VectorQuantizer(nn.Module):
    """Product quantization: each group of g latents becomes the nearest of its 2^g learned vectors; bits are its index.

    ``L_VQ = commitment_weight * mean (e - z)^2`` with gradient to both the codebook and the latents. The codebook is
    an ordinary parameter (h, c, g), trained by the optimizer; nothing is updated behind its back.
    """

    def __init__(self, num_bits: int = 28, *, group_size: int = 7, commitment_weight: float = 1.0) -> None:
        """Memory of a step grows with tokens * h * 2^g. Raises as `check_group_size` and `import_library`.

        Raises `ValueError` unless `commitment_weight` is positive: it is all that trains the codebook.
        """
        super().__init__()
        check_group_size(num_bits, group_size)
        check_num_codes(group_size)
        if commitment_weight <= 0:
            raise ValueError(f"commitment_weight must be above 0, got {commitment_weight}: it trains the codebook")
        self.num_bits = num_bits
        self.latent_dim = num_bits
        self.num_heads = num_bits // group_size
        self.library = import_library().VectorQuantize(
            dim=num_bits,
            codebook_size=2**group_size,
            codebook_dim=group_size,
            heads=self.num_heads,
            separate_codebook_per_head=True,
            commitment_weight=commitment_weight,
            learnable_codebook=True,
            ema_update=False,
            sync_codebook=False,  # the optimizer's gradients are averaged already
            rotation_trick=False,
            route_gradients_to_input=False,  # ours is exact
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every tensor afresh, also those that `to_empty` left without values.

        | tensor | rule |
        |---|---|
        | codebook | uniform within 1/c of 0, near the small latents of a fresh encoder, which all get one code where |
        | | vectors lie far apart (the library's own kaiming rule) |
        | `initted` (the library's flag: no k-means wanted) | true |
        | running cluster sizes | 1 (unused) |
        | running sums, the constant `zero` | 0 (the sums unused) |
        """
        codebook = self.library._codebook
        bound = 1 / self.library.codebook_size
        nn.init.uniform_(codebook.embed, -bound, bound)
        nn.init.ones_(codebook.initted)
        nn.init.ones_(codebook.cluster_size)
        nn.init.zeros_(codebook.embed_avg)
        nn.init.zeros_(self.library.zero)

    def forward(self, z: Tensor) -> Quantized:
        """(b, n, L) latents -> `Quantized`."""
        with float32_region(z.device.type):
            z = z.float()
            _, indices, loss = self.library(z)
            indices = indices.reshape(*z.shape[:-1], self.num_heads)  # the library leaves the axis out for one head
            bits = digit_bits(indices, self.num_bits // self.num_heads).flatten(-2)  # (b, n, L)
            z_q = straight_through(self.decode(bits).detach(), z)
            if not self.training:
                return Quantized(z_q=z_q, bits=bits)
            loss = mean_over_ranks(loss)
        return Quantized(z_q=z_q, bits=bits, losses={"quantizer": loss}, stats=bit_stats(bits))

    def decode(self, bits: Tensor) -> Tensor:
        """(..., L) bool -> (..., L) float32 code vectors."""
        indices = bits_to_subcodes(bits, self.num_heads)  # (..., h)
        heads = torch.arange(self.num_heads, device=bits.device)
        return self.library.codebook.float()[heads, indices].flatten(-2)
