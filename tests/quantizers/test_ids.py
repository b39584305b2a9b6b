"""Ids are exact: against Python's integers, at the ends of the range, and between neighbours."""

import pytest
import torch

from qlip.quantizers.ids import bits_to_ids, bits_to_subcodes, ids_to_bits, subcodes_to_bits

LARGEST = 2**28 - 1


def python_bits(number: int, num_bits: int) -> list[bool]:
    return [character == "1" for character in f"{number:0{num_bits}b}"]


def random_ids(num: int, num_bits: int) -> torch.Tensor:
    return torch.randint(0, 2**num_bits, (num,))


@pytest.mark.parametrize("number", [0, 1, 2**24, 2**24 + 1, 2**27, LARGEST - 1, LARGEST])
def test_known_numbers_first_bit_most_significant(number):
    bits = torch.tensor(python_bits(number, 28))
    assert bits_to_ids(bits).item() == number
    assert torch.equal(ids_to_bits(torch.tensor(number), 28), bits)


def test_random_codes_equal_python_integers():
    bits = torch.rand(1_000, 28) < 0.5
    expected = [int("".join("1" if bit else "0" for bit in row), 2) for row in bits.tolist()]
    assert bits_to_ids(bits).tolist() == expected


@pytest.mark.parametrize("num_bits", [1, 28, 62])
def test_round_trip_of_random_ids(num_bits):
    ids = random_ids(100_000, num_bits)
    bits = ids_to_bits(ids, num_bits)
    assert bits.dtype == torch.bool
    assert bits.shape == (100_000, num_bits)
    assert torch.equal(bits_to_ids(bits), ids)


def test_codes_that_differ_in_the_last_bit_are_neighbours():
    bits = torch.rand(100_000, 28) < 0.5
    bits[:, -1] = False
    neighbours = bits.clone()
    neighbours[:, -1] = True
    assert torch.equal(bits_to_ids(neighbours), bits_to_ids(bits) + 1)


def test_a_float32_sum_would_get_most_ids_wrong():
    bits = torch.rand(100_000, 28) < 0.5
    exact = bits_to_ids(bits)
    in_float32 = (bits.float() * 2.0 ** torch.arange(27, -1, -1)).sum(-1).long()
    wrong = (in_float32 != exact).float().mean()
    assert wrong > 0.7
    assert (in_float32 - exact).abs().max() == 8


@pytest.mark.parametrize("number", [0, 1, 2**53 + 1, 2**62 - 1])
def test_62_bits_fit(number):
    assert torch.equal(ids_to_bits(torch.tensor(number), 62), torch.tensor(python_bits(number, 62)))
    assert bits_to_ids(ids_to_bits(torch.tensor(number), 62)).item() == number


@pytest.mark.parametrize(("num_subcodes", "bits_each"), [(2, 14), (4, 7), (28, 1), (1, 28)])
def test_sub_codes_are_the_digits_of_the_id(num_subcodes, bits_each):
    ids = random_ids(10_000, 28)
    bits = ids_to_bits(ids, 28)
    codes = bits_to_subcodes(bits, num_subcodes)
    assert codes.shape == (10_000, num_subcodes)
    assert codes.dtype == torch.int64
    digits = [(ids >> (bits_each * (num_subcodes - 1 - j))) & (2**bits_each - 1) for j in range(num_subcodes)]
    assert torch.equal(codes, torch.stack(digits, -1))
    assert torch.equal(subcodes_to_bits(codes, 28), bits)


@pytest.mark.parametrize("division", [2, 4, (14, 14), (10, 9, 9), (1, 27), (28,)])
def test_a_million_random_codes_come_back_exactly(division):
    bits = torch.rand(1_000_000, 28) < 0.5
    ids, codes = bits_to_ids(bits), bits_to_subcodes(bits, division)
    assert torch.equal(ids_to_bits(ids, 28), bits)
    assert torch.equal(subcodes_to_bits(codes, 28 if isinstance(division, int) else division), bits)
    sizes = [28 // division] * division if isinstance(division, int) else list(division)
    joined = torch.zeros_like(ids)
    for j, size in enumerate(sizes):
        assert codes[:, j].max() < 2**size
        joined = (joined << size) | codes[:, j]
    assert torch.equal(joined, ids)


def test_leading_axes_are_kept():
    bits = torch.rand(2, 3, 5, 28) < 0.5
    assert bits_to_ids(bits).shape == (2, 3, 5)
    assert bits_to_subcodes(bits, 2).shape == (2, 3, 5, 2)
    assert torch.equal(subcodes_to_bits(bits_to_subcodes(bits, 4), 28), bits)


def test_no_ids_at_all_is_fine():
    assert ids_to_bits(torch.zeros(0, dtype=torch.int64), 28).shape == (0, 28)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="63 bits do not fit an int64 id"):
        bits_to_ids(torch.zeros(1, 63, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"ids must be int64, got torch\.float32"):
        ids_to_bits(torch.tensor([3.0]), 28)
    with pytest.raises(ValueError, match="outside the 28-bit range"):
        ids_to_bits(torch.tensor([LARGEST + 1]), 28)
    with pytest.raises(ValueError, match="outside the 28-bit range"):
        ids_to_bits(torch.tensor([-1]), 28)
    with pytest.raises(ValueError, match="3 sub-codes do not divide 28 bits"):
        bits_to_subcodes(torch.zeros(1, 28, dtype=torch.bool), 3)
    with pytest.raises(ValueError, match="3 sub-codes do not divide 28 bits"):
        subcodes_to_bits(torch.zeros(1, 3, dtype=torch.int64), 28)
    with pytest.raises(ValueError, match=r"sub-codes of \[14, 13\] bits do not make 28 bits"):
        bits_to_subcodes(torch.zeros(1, 28, dtype=torch.bool), (14, 13))
    with pytest.raises(ValueError, match="there are 2 sub-codes, but a division into 3"):
        subcodes_to_bits(torch.zeros(1, 2, dtype=torch.int64), (10, 9, 9))
    with pytest.raises(ValueError, match="outside the 14-bit range"):
        subcodes_to_bits(torch.tensor([[0, 2**14]]), 28)
