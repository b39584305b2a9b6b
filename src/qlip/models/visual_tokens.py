"""How a language model reads and writes image tokens of 28 bits, of which 2^28 would be no vocabulary.

A token is cut into K sub-codes ("division": 28 = 14 + 14, or 4 x 7), the first bits first, most significant bit first
(`quantizers/ids.py`). Three heads share one interface (`VisualHead`); what one position of the sequence holds is a
*piece* of `w` integers:

| head    | positions a token | w | parameters in, out (width d)          | what it costs                             |
|---------|-------------------|---|---------------------------------------|-------------------------------------------|
| flat    | K                 | 1 | d sum 2^l_j each                      | K times the sequence, steps and cache     |
| depth   | 1                 | K | the same, and a few blocks of width d | K small steps of the head for each token  |
| bitwise | 1                 | L | d (L + 1) each                        | cheapest; bits independent given the past |

At width 1280, 256 patches and 2 x 14 bits: flat is 512 positions and 84.0M parameters in both tables, depth 256
positions and 165.2M with four blocks (82.7M with 4 x 7 bits), bitwise 256 positions and 0.07M.

flat is what the paper's arithmetic says (512 tokens a picture); depth is UniTok's (arXiv 2502.20321), bitwise
Infinity's (arXiv 2412.04431). Shapes: `b` pictures, `n` tokens, `L` bits, `d` width, `K` sub-codes, `w` piece width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaModel

from qlip.quantizers.base import digit_bits
from qlip.quantizers.ids import bits_to_subcodes, subcodes_to_bits

HeadKind = Literal["flat", "depth", "bitwise"]
HEAD_KINDS: tuple[HeadKind, ...] = ("flat", "depth", "bitwise")
MAX_SUBCODE_BITS = 16  # a table of 65,536 rows; 2^28 rows of width 1280 would be 344 billion parameters

Choose = Callable[[Tensor, Tensor], Tensor]
"""Logits (m, ..., V) and uniform numbers (b, ...) -> the choice (b, ...) int64; m is 2 b under guidance."""


def bits_to_vocabulary(bits: Tensor, division: Sequence[int], *, offset: int = 0) -> Tensor:
    """(b, n, L) bool -> (b, n K) int64 ids of one vocabulary: sub-code j of each token follows those before it.

    Sub-code j has the ids ``offset + sum_{i<j} 2^l_i + code``, so that halves of a token keep tables of their own;
    `offset` is where the visual part of a vocabulary begins.
    """
    codes = bits_to_subcodes(bits, division)
    starts = torch.tensor(_starts(division), device=bits.device) + offset
    return rearrange(codes + starts, "b n K -> b (n K)")


def vocabulary_to_bits(ids: Tensor, division: Sequence[int], *, offset: int = 0) -> Tensor:
    """(b, n K) int64 ids -> (b, n, L) bool, the inverse of `bits_to_vocabulary`.

    Raises `ValueError` for an id that is no code of its place, and for a number of ids that K does not divide.
    """
    if ids.shape[-1] % len(division):
        raise ValueError(f"{ids.shape[-1]} ids are no whole number of tokens of {len(division)} sub-codes")
    starts = torch.tensor(_starts(division), device=ids.device) + offset
    codes = rearrange(ids, "b (n K) -> b n K", K=len(division)) - starts
    return subcodes_to_bits(codes, list(division))


def _starts(division: Sequence[int]) -> list[int]:
    """Where the codes of every sub-code begin in one table."""
    return [sum(1 << size for size in division[:j]) for j in range(len(division))]


class VisualHead(Protocol):
    """The embedding of image tokens and the prediction of the next one."""

    positions_per_token: int
    """Positions of the sequence that a token takes."""
    piece_width: int
    """w: integers of one position, as many as uniform numbers are drawn for it."""

    def pieces(self, bits: Tensor) -> Tensor:
        """(b, n, L) bool -> (b, n P, w) int64."""

    def bits(self, pieces: Tensor) -> Tensor:
        """(b, n P, w) int64 -> (b, n, L) bool, the inverse."""

    def embed(self, pieces: Tensor, *, place: int = 0) -> Tensor:
        """(b, s, w) pieces that begin at `place` of a token -> (b, s, d) input embeddings."""

    def nll(self, hidden: Tensor, pieces: Tensor) -> Tensor:
        """States (b, n P, d) and the pieces that follow them -> (b, n P) float32, -ln p in nats."""

    def draw(self, hidden: Tensor, uniforms: Tensor, choose: Choose, *, place: int) -> Tensor:
        """States (m, d) and uniform numbers (b, w) -> a piece (b, w) int64 at `place` of a token."""


class _SubcodeTables(nn.Module):
    """Input and output tables of K sub-codes, each with rows of its own and a part that is linear in its bits.

    Codes that differ in one bit are near each other in QLIP's space, which a table alone has to learn row by row: the
    vector of a code is ``table[code] + sum_i (+-1)_i a_i``, its logit ``h . out[code] + sum_i (+-1)_i h . b_i``.
    """

    def __init__(self, hidden_size: int, division: Sequence[int]) -> None:
        super().__init__()
        if not division or min(division) < 1 or max(division) > MAX_SUBCODE_BITS:
            raise ValueError(f"sub-codes of {list(division)} bits: give 1 to {MAX_SUBCODE_BITS} bits each")
        self.division = tuple(division)
        self.starts = _starts(division)
        num_codes, num_bits = sum(1 << size for size in division), sum(division)
        self.embedding = nn.Embedding(num_codes, hidden_size)
        self.bit_embedding = nn.Linear(num_bits, hidden_size, bias=False)
        self.output = nn.Linear(hidden_size, num_codes, bias=False)
        self.bit_output = nn.Linear(hidden_size, num_bits, bias=False)

    def embed(self, codes: Tensor, place: int) -> Tensor:
        """(...) codes of sub-code `place` -> (..., d)."""
        size = self.division[place]
        signs = (2 * digit_bits(codes, size).to(torch.int64) - 1).to(self.bit_embedding.weight.dtype)
        of_bits = F.linear(signs, self.bit_embedding.weight[:, self._bits_of(place)])
        return self.embedding(codes + self.starts[place]) + of_bits

    def logits(self, hidden: Tensor, place: int) -> Tensor:
        """(..., d) -> (..., 2^l) of sub-code `place`."""
        start, size = self.starts[place], self.division[place]
        of_bits = _signed_sums(F.linear(hidden, self.bit_output.weight[self._bits_of(place)]))
        return F.linear(hidden, self.output.weight[start : start + (1 << size)]) + of_bits

    def nll(self, hidden: Tensor, codes: Tensor, place: int) -> Tensor:
        """(b, n, d), (b, n) -> (b, n) float32."""
        logits = self.logits(hidden, place).float()  # logarithms of thousands of classes
        return F.cross_entropy(logits.flatten(0, -2), codes.flatten(), reduction="none").view(codes.shape)

    def _bits_of(self, place: int) -> slice:
        first = sum(self.division[:place])
        return slice(first, first + self.division[place])


def _signed_sums(values: Tensor) -> Tensor:
    """(..., l) -> (..., 2^l): for every code the sum of the values, each with the sign of its bit, first bit on top."""
    sums = torch.zeros_like(values[..., :1])
    for value in values.unbind(-1):
        sums = (sums[..., None] + torch.stack([-value, value], dim=-1)[..., None, :]).flatten(-2)
    return sums


class FlatHead(nn.Module):
    """Sub-codes as successive positions: an ordinary vocabulary, exact joint distribution, any language model."""

    piece_width = 1

    def __init__(self, hidden_size: int, division: Sequence[int]) -> None:
        """Raises `ValueError` for sub-codes that would need too large a table."""
        super().__init__()
        self.tables = _SubcodeTables(hidden_size, division)
        self.positions_per_token = len(division)

    def pieces(self, bits: Tensor) -> Tensor:
        """(b, n, L) bool -> (b, n K, 1) int64."""
        return rearrange(bits_to_subcodes(bits, self.tables.division), "b n K -> b (n K) 1")

    def bits(self, pieces: Tensor) -> Tensor:
        """(b, n K, 1) int64 -> (b, n, L) bool."""
        codes = rearrange(pieces, "b (n K) 1 -> b n K", K=self.positions_per_token)
        return subcodes_to_bits(codes, self.tables.division)

    def embed(self, pieces: Tensor, *, place: int = 0) -> Tensor:
        """(b, s, 1) -> (b, s, d)."""
        if pieces.shape[1] == 1:
            return self.tables.embed(pieces[..., 0], place)
        assert place == 0, "longer parts begin with a token"
        count, length = self.positions_per_token, pieces.shape[1]
        codes = rearrange(F.pad(pieces[..., 0], (0, -length % count)), "b (n K) -> b n K", K=count)
        parts = [self.tables.embed(codes[..., j], j) for j in range(count)]
        return rearrange(torch.stack(parts, dim=2), "b n K d -> b (n K) d")[:, :length]

    def nll(self, hidden: Tensor, pieces: Tensor) -> Tensor:
        """(b, n K, d), (b, n K, 1) -> (b, n K)."""
        count = self.positions_per_token
        parts = [
            self.tables.nll(hidden[:, place::count], pieces[:, place::count, 0], place)
            for place in range(self.positions_per_token)
        ]
        return rearrange(torch.stack(parts, dim=-1), "b n K -> b (n K)")

    def draw(self, hidden: Tensor, uniforms: Tensor, choose: Choose, *, place: int) -> Tensor:
        """(m, d), (b, 1) -> (b, 1)."""
        return choose(self.tables.logits(hidden, place), uniforms[:, 0])[:, None]


class DepthHead(nn.Module):
    """One position for a token; a small causal transformer over its K sub-codes, each seeing those before it.

    The head's sequence is the trunk's state, then the embeddings of sub-codes 0 to K-2, from the trunk's own tables.
    """

    positions_per_token = 1

    def __init__(self, hidden_size: int, division: Sequence[int], *, num_layers: int, trunk: LlamaConfig) -> None:
        """`num_layers` blocks as those of `trunk`. Raises `ValueError` for sub-codes that need too large a table."""
        super().__init__()
        self.tables = _SubcodeTables(hidden_size, division)
        self.piece_width = len(division)
        config = LlamaConfig(**(trunk.to_dict() | {"num_hidden_layers": num_layers}))
        self.blocks = LlamaModel(config)
        self.blocks.embed_tokens = nn.Identity()  # its inputs come embedded

    def pieces(self, bits: Tensor) -> Tensor:
        """(b, n, L) bool -> (b, n, K) int64."""
        return bits_to_subcodes(bits, self.tables.division)

    def bits(self, pieces: Tensor) -> Tensor:
        """(b, n, K) int64 -> (b, n, L) bool."""
        return subcodes_to_bits(pieces, self.tables.division)

    def embed(self, pieces: Tensor, *, place: int = 0) -> Tensor:
        """(b, s, K) -> (b, s, d), the sum over sub-codes."""
        return torch.stack([self.tables.embed(pieces[..., j], j) for j in range(self.piece_width)]).sum(0)

    def nll(self, hidden: Tensor, pieces: Tensor) -> Tensor:
        """(b, n, d), (b, n, K) -> (b, n)."""
        earlier = [self.tables.embed(pieces[..., j], j) for j in range(self.piece_width - 1)]
        sequence = rearrange(torch.stack([hidden, *earlier], dim=2), "b n K d -> (b n) K d")
        states = rearrange(self._states(sequence), "(b n) K d -> b n K d", b=len(hidden))
        parts = [self.tables.nll(states[:, :, j], pieces[..., j], j) for j in range(self.piece_width)]
        return torch.stack(parts).sum(0)

    def draw(self, hidden: Tensor, uniforms: Tensor, choose: Choose, *, place: int) -> Tensor:
        """(m, d), (b, K) -> (b, K). The few states of the head are computed anew for every sub-code."""
        sequence, codes = hidden[:, None], []
        for j in range(self.piece_width):
            codes.append(choose(self.tables.logits(self._states(sequence)[:, -1], j), uniforms[:, j]))
            if j + 1 < self.piece_width:
                drawn = self.tables.embed(codes[-1], j)
                drawn = drawn.repeat(len(hidden) // len(drawn), 1)  # both halves under guidance
                sequence = torch.cat([sequence, drawn[:, None]], dim=1)
        return torch.stack(codes, dim=-1)

    def _states(self, sequence: Tensor) -> Tensor:
        return self.blocks(inputs_embeds=sequence, use_cache=False).last_hidden_state


class BitwiseHead(nn.Module):
    """One position for a token; L classifiers of a bit, independent of each other given the past.

    No joint distribution within a token: errors add up, against which training may flip bits of the history (Infinity's
    self-correction, which also re-quantizes residuals; one scale has none).
    """

    positions_per_token = 1

    def __init__(self, hidden_size: int, num_bits: int) -> None:
        super().__init__()
        self.piece_width = num_bits
        self.embedding = nn.Linear(num_bits, hidden_size)
        self.output = nn.Linear(hidden_size, num_bits)

    def pieces(self, bits: Tensor) -> Tensor:
        """(b, n, L) bool -> (b, n, L) int64."""
        return bits.to(torch.int64)

    def bits(self, pieces: Tensor) -> Tensor:
        """(b, n, L) int64 -> (b, n, L) bool."""
        return pieces.to(torch.bool)

    def embed(self, pieces: Tensor, *, place: int = 0) -> Tensor:
        """(b, s, L) -> (b, s, d), linear in the signs of the bits."""
        return self.embedding((2 * pieces - 1).to(self.embedding.weight.dtype))

    def nll(self, hidden: Tensor, pieces: Tensor) -> Tensor:
        """(b, n, d), (b, n, L) -> (b, n)."""
        logits = self.output(hidden).float()
        return F.binary_cross_entropy_with_logits(logits, pieces.float(), reduction="none").sum(-1)

    def draw(self, hidden: Tensor, uniforms: Tensor, choose: Choose, *, place: int) -> Tensor:
        """(m, d), (b, L) -> (b, L)."""
        logits = self.output(hidden)
        return choose(torch.stack([torch.zeros_like(logits), logits], dim=-1), uniforms)


def build_head(
    kind: HeadKind, *, hidden_size: int, num_bits: int, division: Sequence[int], depth_layers: int, trunk: LlamaConfig
) -> FlatHead | DepthHead | BitwiseHead:
    """The head of that name. Raises `ValueError` for a division that is not that of `num_bits` bits."""
    if kind != "bitwise" and sum(division) != num_bits:
        raise ValueError(f"sub-codes of {list(division)} bits do not make {num_bits} bits")
    if kind == "flat":
        return FlatHead(hidden_size, division)
    if kind == "depth":
        return DepthHead(hidden_size, division, num_layers=depth_layers, trunk=trunk)
    return BitwiseHead(hidden_size, num_bits)


def flip_bits(bits: Tensor, *, largest_share: float) -> Tensor:
    """(b, n, L) bool with a share of bits flipped that is drawn for each picture in [0, largest_share]."""
    share = torch.rand(len(bits), 1, 1, device=bits.device) * largest_share
    return bits ^ (torch.rand(bits.shape, device=bits.device) < share)
