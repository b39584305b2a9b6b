"""An entropy code for bits under a stored model: how probable a one is, per bit and by what is around it.

A picture's bits take -sum log2 p(bit | context) bits of code, and a few bytes more for the range coder to end with; p
is counted over the rows of one file. The context of bit j is what bit j of the left and of the upper token is (0, 1, or
none at the border), and up to two earlier bits of the same token, `partners`, where they save more than they add to the
table. Bits that are as good as random keep their size.

Tokens that stand on one anti-diagonal depend on earlier ones only, and so do the bits of a token whose partners are
known: these are decoded in one call (`_steps`), and that is the order of the code. Each picture is a code of its own:
32-bit words of `constriction`'s range coder, most significant byte first, without the last word's trailing zeros.
Probabilities are k / 65536 with a whole k, which floats hold exactly, so machines agree.

Shapes: `r` rows, `n` tokens on a grid of `h` by `w`, `L` bits of a token, `c` contexts of a bit; of a step `t` tokens
and `b` bits of each. Rows are the last axis of what is indexed by token and bit, so that numpy copies long runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlip.core.errors import UserError

NAME = "left, upper, two partners; 1"
NEIGHBOUR_CONTEXTS = 9
MAX_PARTNERS = 2
NUM_CONTEXTS = NEIGHBOUR_CONTEXTS << MAX_PARTNERS  # c
WHOLE = 1 << 16  # what probabilities are counted in
ENTRY_BITS = 75  # of a file, for a table's entry: four hexadecimal digits, and in base64 once more for Arrow
SAMPLE_TOKENS = 100_000  # of a file, to choose partners by
MAX_BITS, MAX_ROW_BITS, MAX_CALL_BITS = 1 << 10, 1 << 20, 1 << 31  # of a token, of a picture, of a call
MAX_STEPS = 1 << 14  # of a picture: numpy is called for each
BLOCK_BITS = 1 << 22  # worked on at once
NO_TOKEN = 2  # what a neighbour is at the border
Step = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Rows and columns of tokens (t, 1), and bits (b,) of them, that are known together."""


@dataclass(kw_only=True, slots=True, frozen=True, eq=False)
class BitModel:
    """How probable ones are."""

    partners: np.ndarray
    """(L, 2) int: earlier bits of the same token; L is none."""
    ones: np.ndarray
    """(L, c) int in 1..65535: 65536 times the probability of a one. A context is ((left 3 + upper) 2 + partner) 2 +
    partner, where none is 2 as a neighbour and 0 as a partner."""

    @property
    def num_bits(self) -> int:
        """L."""
        return len(self.ones)

    @classmethod
    def fit(cls, bits: Tensor, *, grid: tuple[int, int], max_partners: int = MAX_PARTNERS) -> BitModel:
        """(r, n, L) bool -> their model: p = (ones + 1/2) / (count + 1) in every context.

        `max_partners` 0 leaves the left and upper token, which decodes in fewer steps. Raises `UserError` for
        pictures of more than 2^20 bits, or of a very long grid.
        """
        num_bits = bits.shape[2]
        partners = _partners(bits, grid=grid, max_partners=max_partners)
        if num_bits > MAX_BITS or _is_too_large(partners, grid=grid):
            raise UserError(f"pictures of {bits.shape[1]} x {num_bits} bits are too large for it; leave --compress out")
        counts = np.zeros((2, num_bits * NUM_CONTEXTS), np.int64)
        everything = _all_tokens(grid, num_bits)
        for block in _blocks(bits):
            field = _field(block, grid=grid)
            places, values = _places(field, everything, partners).ravel(), _values(field, everything).ravel()
            for value in (0, 1):
                counts[value] += np.bincount(places[values == value], minlength=counts.shape[1])
        ones = (WHOLE * (2 * counts[1] + 1) + counts.sum(0) + 1) // (2 * (counts.sum(0) + 1))
        return cls(partners=partners, ones=ones.clip(1, WHOLE - 1).reshape(num_bits, NUM_CONTEXTS))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> BitModel:
        """Raises `ValueError` for what is no model."""
        if values.get("name") != NAME:
            raise ValueError(f"bits are coded as {str(values.get('name'))[:50]!r}, not {NAME!r}")
        said, tables = values.get("partners"), values.get("ones")
        if not isinstance(said, list) or not isinstance(tables, list) or not len(said) == len(tables) <= MAX_BITS:
            raise ValueError(f"the model of the bits has no lists of one length up to {MAX_BITS}")
        partners = np.full((len(said), MAX_PARTNERS), len(said))
        ones = np.empty((len(said), NUM_CONTEXTS), np.int64)
        for bit, (some, table) in enumerate(zip(said, tables, strict=True)):
            if not isinstance(some, list) or len(some) > MAX_PARTNERS or any(type(p) is not int for p in some):
                raise ValueError(f"bit {bit} of the model has no list of up to {MAX_PARTNERS} partners")
            if any(not 0 <= partner < bit for partner in some):
                raise ValueError(f"bit {bit} of the model has partners {some}, not earlier bits")
            numbers = _from_hexadecimal(table, size=NEIGHBOUR_CONTEXTS << len(some))
            if numbers is None:
                raise ValueError(f"bit {bit} of the model has no table of {NEIGHBOUR_CONTEXTS << len(some)} numbers")
            partners[bit, : len(some)] = some
            ones[bit] = np.repeat(numbers, NUM_CONTEXTS // len(numbers))
        if not len(ones) or ones.min() < 1:
            raise ValueError("the model of the bits is empty or has a probability of 0")
        return cls(partners=partners, ones=ones)

    def to_json(self) -> dict[str, Any]:
        """JSON values: `ones` in hexadecimal, four digits each, without contexts of partners that are none."""
        partners = [[int(p) for p in some if p < self.num_bits] for some in self.partners]
        tables = [ones[:: 1 << (MAX_PARTNERS - len(some))] for ones, some in zip(self.ones, partners, strict=True)]
        return {"name": NAME, "partners": partners, "ones": [table.astype(">u2").tobytes().hex() for table in tables]}

    def code_lengths(self, bits: Tensor, *, grid: tuple[int, int]) -> np.ndarray:
        """(r, n, L) bool -> (r,) float64: -sum log2 p, what the bits of each picture should take, in bits."""
        step = _all_tokens(grid, self.num_bits)
        lengths = [np.empty(0)]
        for block in _blocks(bits):
            field = _field(block, grid=grid)
            ones = self.ones.ravel()[_places(field, step, self.partners)]
            lengths.append(-np.log2(np.where(_values(field, step), ones, WHOLE - ones) / WHOLE).sum((0, 1)))
        return np.concatenate(lengths)

    def encode(self, bits: Tensor, *, grid: tuple[int, int]) -> list[bytes]:
        """(r, n, L) bool -> r codes. Raises `UserError` without constriction."""
        stream = range_coding()
        family = stream.model.Bernoulli(perfect=False)
        steps = list(_steps(self.partners, grid=grid))
        coded: list[bytes] = []
        for block in _blocks(bits):
            field = _field(block, grid=grid)
            values = np.concatenate([_values(field, step).reshape(-1, len(block)) for step in steps])
            chances = np.concatenate([self._chances(field, step) for step in steps])
            symbols_of_rows = np.ascontiguousarray(values.T, np.int32)
            for symbols, chance in zip(symbols_of_rows, np.ascontiguousarray(chances.T), strict=True):
                encoder = stream.queue.RangeEncoder()
                encoder.encode(symbols, family, chance)
                coded.append(_to_bytes(encoder.get_compressed()))
        return coded

    def decode(self, coded: list[bytes], *, grid: tuple[int, int]) -> Tensor:
        """r codes -> (r, n, L) bool.

        Raises `ValueError` for what `encode` does not write, `UserError` without constriction.
        """
        num_bits, num_tokens = self.num_bits, grid[0] * grid[1]
        row_bits = num_tokens * num_bits
        if _is_too_large(self.partners, grid=grid) or len(coded) * row_bits > MAX_CALL_BITS:
            raise ValueError(f"{len(coded)} pictures of {row_bits} coded bits are too many")
        bits = np.empty((len(coded), num_tokens, num_bits), bool)
        rows_at_once = max(1, BLOCK_BITS // row_bits)
        for first in range(0, len(coded), rows_at_once):
            some = coded[first : first + rows_at_once]
            found = torch.from_numpy(self._decode(some, grid=grid))
            if self.encode(found, grid=grid) != some:  # a cut code is one of other bits, whose own code is longer
                raise ValueError("a picture's code is cut, or has more than its bits")
            bits[first : first + rows_at_once] = found
        return torch.from_numpy(bits)

    def _decode(self, coded: list[bytes], *, grid: tuple[int, int]) -> np.ndarray:
        stream = range_coding()
        family = stream.model.Bernoulli(perfect=False)
        row_bytes = 2 * grid[0] * grid[1] * self.num_bits + 8  # no bit takes more than 16
        if any(not isinstance(code, bytes) or len(code) > row_bytes for code in coded):
            raise ValueError(f"a picture's code is null or has more than {row_bytes} bytes")
        decoders = [stream.queue.RangeDecoder(_to_words(code)) for code in coded]
        field = _field(np.zeros((len(coded), grid[0] * grid[1], self.num_bits), bool), grid=grid)
        for step in _steps(self.partners, grid=grid):
            chances = np.ascontiguousarray(self._chances(field, step).T)
            try:
                values = [decoder.decode(family, row) for decoder, row in zip(decoders, chances, strict=True)]
            except AssertionError:  # constriction's, for words that no bits have
                raise ValueError("a picture's code is one of no bits") from None
            down, right, which = step
            field[down + 1, right + 1, which] = np.stack(values, axis=1).reshape(len(down), len(which), len(coded))
        return field[1:, 1:, :-1].reshape(-1, self.num_bits, len(coded)).transpose(2, 0, 1).astype(bool)

    def _chances(self, field: np.ndarray, step: Step) -> np.ndarray:
        """The probability that the bits of a step are ones: (t b, r) float32."""
        chances = (self.ones.ravel() / WHOLE).astype(np.float32)
        return chances[_places(field, step, self.partners)].reshape(-1, field.shape[-1])


def range_coding() -> Any:
    """constriction's `stream`. Raises `UserError` when it is not installed."""
    try:
        from constriction import stream
    except ImportError:
        raise UserError("compressed token files need constriction; pip install 'qlip[codec]'") from None
    return stream


def _levels(partners: np.ndarray) -> list[int]:
    """After how many calls each bit's partners are known."""
    levels: list[int] = []
    for some in partners:
        levels.append(max((levels[partner] + 1 for partner in some if partner < len(partners)), default=0))
    return levels


def _is_too_large(partners: np.ndarray, *, grid: tuple[int, int]) -> bool:
    num_steps = (grid[0] + grid[1] - 1) * (max(_levels(partners)) + 1)
    return num_steps > MAX_STEPS or grid[0] * grid[1] * len(partners) > MAX_ROW_BITS


def _steps(partners: np.ndarray, *, grid: tuple[int, int]) -> Iterator[Step]:
    """What is coded together: anti-diagonal by anti-diagonal, and in it bits without partners first."""
    height, width = grid
    levels = _levels(partners)
    by_level = [np.flatnonzero(np.array(levels) == level) for level in range(max(levels) + 1)]
    for diagonal in range(height + width - 1):
        down = np.arange(max(0, diagonal - width + 1), min(height, diagonal + 1))[:, None]
        for which in by_level:
            yield down, diagonal - down, which


def _all_tokens(grid: tuple[int, int], num_bits: int) -> Step:
    down, right = np.divmod(np.arange(grid[0] * grid[1])[:, None], grid[1])
    return down, right, np.arange(num_bits)


def _field(bits: np.ndarray, *, grid: tuple[int, int]) -> np.ndarray:
    """(r, n, L) -> (h + 1, w + 1, L + 1, r) int8: with a border above and on the left, and the bit of no partner."""
    rows, _, num_bits = bits.shape
    field = np.full((grid[0] + 1, grid[1] + 1, num_bits + 1, rows), NO_TOKEN, np.int8)
    field[1:, 1:, :-1] = bits.transpose(1, 2, 0).reshape(*grid, num_bits, rows)
    field[:, :, -1] = 0
    return field


def _values(field: np.ndarray, step: Step) -> np.ndarray:
    """(t, b, r)."""
    down, right, which = step
    return field[down + 1, right + 1, which]


def _places(field: np.ndarray, step: Step, partners: np.ndarray) -> np.ndarray:
    """(t, b, r) int: where in the flat `BitModel.ones`."""
    down, right, which = step
    contexts = field[down + 1, right, which] * np.int8(3) + field[down, right + 1, which]  # below 128
    for place in range(MAX_PARTNERS):
        contexts = contexts * np.int8(2) + field[down + 1, right + 1, partners[which, place]]
    return contexts + NUM_CONTEXTS * which[:, None]


def _partners(bits: Tensor, *, grid: tuple[int, int], max_partners: int) -> np.ndarray:
    """(L, 2): greedily the earlier bit that saves most, if that is more than the entries it adds to the table."""
    num_bits, num_tokens = bits.shape[2], bits.shape[0] * bits.shape[1]
    partners = np.full((num_bits, MAX_PARTNERS), num_bits)
    if not num_tokens:
        return partners
    sample = bits[:: -(-num_tokens // SAMPLE_TOKENS)].numpy()
    times = len(bits) / len(sample)
    everything = _all_tokens(grid, num_bits)
    field = _field(sample, grid=grid)
    neighbours = _places(field, everything, partners) % NUM_CONTEXTS >> MAX_PARTNERS  # (n, L, r)
    values = sample.transpose(1, 0, 2).reshape(-1, num_bits).astype(np.float32)  # sums of so few are exact
    for bit in range(1, num_bits):
        contexts, size = neighbours[:, bit].ravel(), NEIGHBOUR_CONTEXTS
        for place in range(max_partners):
            one_of = (contexts == np.arange(size)[:, None]).astype(np.float32)
            ones_of = one_of * values[:, bit]
            counts, ones = one_of.sum(1)[:, None], ones_of.sum(1)[:, None]
            counts_of_one, ones_of_one = one_of @ values[:, :bit], ones_of @ values[:, :bit]  # (c, earlier bits)
            split = _length(ones_of_one, counts_of_one) + _length(ones - ones_of_one, counts - counts_of_one)
            saved = (_length(ones, counts) - split).sum(0)
            best = int(saved.argmax())
            if saved[best] * times <= size * ENTRY_BITS:
                break
            partners[bit, place] = best
            contexts, size = contexts * 2 + values[:, best].astype(np.int64), size * 2
    return partners


def _length(ones: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Bits of code for so many symbols with so many ones, under the probability `BitModel.fit` gives them."""
    ones, counts = ones.astype(np.float64), counts.astype(np.float64)
    chance = (ones + 0.5) / (counts + 1)
    return -(ones * np.log2(chance) + (counts - ones) * np.log2(1 - chance))


def _blocks(bits: Tensor) -> Iterator[np.ndarray]:
    rows = max(1, BLOCK_BITS // max(1, bits.shape[1] * bits.shape[2]))
    return (block.cpu().numpy() for block in bits.split(rows) if len(block))


def _to_bytes(words: np.ndarray) -> bytes:
    code = words.astype(">u4").tobytes()
    return code[:-4] + code[-4:].rstrip(b"\0") if len(code) else code


def _to_words(code: bytes) -> np.ndarray:
    return np.frombuffer(code + bytes(-len(code) % 4), ">u4").astype(np.uint32)


def _from_hexadecimal(text: object, *, size: int) -> np.ndarray | None:
    if not isinstance(text, str) or len(text) != 4 * size:
        return None
    try:
        code = bytes.fromhex(text)
    except ValueError:
        return None
    return np.frombuffer(code, ">u2").astype(np.int64) if len(code) == 2 * size else None  # spaces are let through
