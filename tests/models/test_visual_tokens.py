"""Bits, sub-codes and vocabularies agree with plain counting; every head is a distribution over all codes."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_generators import HEADS, all_bits, captions, some_bits, tiny_config, tiny_generator
from torch import Tensor
from torch.nn import functional as F

from qlip.models.text_to_image import SIZES, TextToImageConfig, TextToImageModel
from qlip.models.visual_tokens import bits_to_vocabulary, build_head, flip_bits, vocabulary_to_bits

DIVISIONS = [(14, 14), (7, 7, 7, 7), (10, 9, 9), (1, 16, 11)]
DIVIDED = ("flat", "depth")


def counted(bits: list[bool], division: tuple[int, ...]) -> list[int]:
    """Sub-codes of one token as a reader of binary numbers finds them."""
    digits = "".join(str(int(bit)) for bit in bits)
    ends = [sum(division[: j + 1]) for j in range(len(division))]
    return [int(digits[end - size : end], 2) for size, end in zip(division, ends, strict=True)]


@pytest.mark.parametrize("division", DIVISIONS, ids=str)
@pytest.mark.parametrize("offset", [0, 128_256])
def test_a_vocabulary_is_what_counting_gives_and_comes_back(division, offset):
    bits = some_bits(2, tokens=5, width=28)
    ids = bits_to_vocabulary(bits, division, offset=offset)
    assert ids.dtype == torch.int64 and ids.shape == (2, 5 * len(division))
    wanted = []
    for token in bits[0].tolist():
        start = offset
        for code, size in zip(counted(token, division), division, strict=True):
            wanted.append(start + code)
            start += 2**size
    assert ids[0].tolist() == wanted
    assert torch.equal(vocabulary_to_bits(ids, division, offset=offset), bits)


def test_the_first_and_the_last_code_of_every_table():
    zeros, ones = torch.zeros(1, 1, 28, dtype=torch.bool), torch.ones(1, 1, 28, dtype=torch.bool)
    assert bits_to_vocabulary(zeros, (14, 14), offset=5).tolist() == [[5, 5 + 16384]]
    assert bits_to_vocabulary(ones, (14, 14), offset=5).tolist() == [[5 + 16383, 5 + 32767]]


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([4, 4, 4], "3 ids are no whole number of tokens of 2 sub-codes"),
        ([0, 0], "outside the 3-bit range"),
        ([16, 8], "outside the 3-bit range"),
        ([10, 7], "outside the 3-bit range"),
        ([2, 10], "outside the 3-bit range"),
    ],
    ids=["half a token", "second table", "beyond", "before its table", "before the offset"],
)
def test_foreign_ids_are_refused(ids, said):
    """With offset 3 the first sub-code has ids 3 to 10, the second 11 to 18."""
    with pytest.raises(ValueError, match=said):
        vocabulary_to_bits(torch.tensor([ids]), (3, 3), offset=3)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("division", DIVISIONS, ids=str)
def test_pieces_are_sub_codes_and_come_back(head, division):
    built = head_of(head, division, num_bits=28)
    bits = some_bits(2, tokens=5, width=28)
    pieces = built.pieces(bits)
    assert pieces.shape == (2, 5 * built.positions_per_token, built.piece_width) and pieces.dtype == torch.int64
    tokens = bits[1].tolist()
    wanted = [list(map(int, token)) if head == "bitwise" else counted(token, division) for token in tokens]
    assert pieces[1].flatten().tolist() == [number for token in wanted for number in token]
    assert torch.equal(built.bits(pieces), bits)


def head_of(kind: str, division: tuple[int, ...], *, num_bits: int):
    """Of width 16."""
    trunk = tiny_config().trunk_config()
    options = {"num_bits": num_bits, "division": division, "depth_layers": 1, "trunk": trunk}
    return build_head(kind, hidden_size=16, **options)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    ("tokens", "num_bits", "division"), [(1, 6, (3, 3)), (1, 6, (1, 2, 3)), (2, 3, (2, 1))], ids=["3+3", "1+2+3", "two"]
)
def test_the_likelihood_of_all_codes_sums_to_one(head, tokens, num_bits, division):
    """Brute force over all 64 pictures of 6 bits."""
    model = tiny_generator(head, grid=[1, tokens], num_bits=num_bits, division=list(division))
    bits = all_bits(6).unflatten(1, (tokens, num_bits))
    features, mask = (part[1:2].expand(64, *part.shape[1:]) for part in captions(2))
    with torch.no_grad():
        likelihood = (-model(features, mask, bits).nll.double().sum(1)).exp()
    assert likelihood.sum().item() == pytest.approx(1, abs=1e-5)
    assert likelihood.max() > 3 * likelihood.min()  # not the uniform guess


def vector_of(table: Tensor, of_bits: Tensor, division: tuple[int, ...], place: int, code: int) -> Tensor:
    """(d,): the row of a code, and plus or minus a vector for each of its bits; both with their places as rows."""
    row = sum(2**size for size in division[:place]) + code
    signs = [1 if digit == "1" else -1 for digit in f"{code:0{division[place]}b}"]
    first = sum(division[:place])
    return table[row] + sum(sign * of_bits[first + i] for i, sign in enumerate(signs))


@pytest.mark.parametrize("kind", DIVIDED)
def test_the_loss_of_sub_codes_is_that_of_a_written_loop(kind):
    division = (1, 3, 2)
    model = tiny_generator(kind, division=list(division))
    bits, (features, mask) = some_bits(2), captions(2)
    with torch.no_grad():
        output = model(features, mask, bits)
        states, tables = output.hidden_states, model.head.tables
        inputs = tables.embedding.weight, tables.bit_embedding.weight.mT
        outputs = tables.output.weight, tables.bit_output.weight
        total = torch.zeros(2, 6)
        for row in range(2):
            for token in range(6):
                codes = counted(bits[row, token].tolist(), division)
                sequence = [states[row, token]]
                for j, code in enumerate(codes):
                    state = states[row, 3 * token + j] if kind == "flat" else None
                    if kind == "depth":
                        state = model.head.blocks(inputs_embeds=torch.stack(sequence)[None]).last_hidden_state[0, -1]
                    logits = [state @ vector_of(*outputs, division, j, other) for other in range(2 ** division[j])]
                    total[row, token] -= torch.stack(logits).log_softmax(0)[code]
                    sequence.append(vector_of(*inputs, division, j, code))
    found = output.nll if kind == "depth" else output.nll.unflatten(1, (6, 3)).sum(-1)
    assert torch.allclose(found, total, atol=1e-4)
    assert output.loss.item() == pytest.approx(total.mean().item(), abs=1e-4)


def test_the_loss_of_bits_is_that_of_a_written_loop():
    model = tiny_generator("bitwise")
    bits, (features, mask) = some_bits(2), captions(2)
    with torch.no_grad():
        output = model(features, mask, bits)
        probability = model.head.output(output.hidden_states).double().sigmoid()
    wanted = -torch.where(bits, probability, 1 - probability).log().sum(-1)
    assert torch.allclose(output.nll.double(), wanted, atol=1e-4)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("num_bits", "division"), [(28, (14, 14)), (28, (10, 9, 9)), (5, (5,))], ids=str)
def test_fresh_weights_guess_uniformly(head, num_bits, division):
    model = TextToImageModel(tiny_config(head, num_bits=num_bits, division=list(division))).eval()
    with torch.no_grad():
        loss = model(*captions(2), some_bits(2, width=num_bits)).loss
    assert loss.item() == pytest.approx(num_bits * math.log(2), rel=1e-6)


def parameters_of(**fields: object) -> dict[str, int]:
    with torch.device("meta"):
        model = TextToImageModel(TextToImageConfig(**fields))
    counts = {"all": model, "head": model.head}
    counts |= {"blocks": model.head.blocks} if fields.get("head") == "depth" else {}
    return {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in counts.items()}


def of_bits(num_bits: int, *, width: int = 1280) -> int:
    """What the part that is linear in the bits has, in and out."""
    return 2 * num_bits * width


def test_the_papers_generator_has_its_parameters():
    """LlamaGen-XL with its 16,384 codes has 777.7M, a second table pair 41.9M more."""
    llamagen = parameters_of(num_bits=14, division=[14])["all"] - of_bits(14)
    counts = parameters_of()
    flat = counts["all"] - of_bits(28)
    assert round(llamagen / 1e6, 1) == 777.7 and round(flat / 1e6, 1) == 819.6
    assert flat - llamagen == 2 * 16384 * 1280
    assert counts["head"] - of_bits(28) == 2 * 2 * 16384 * 1280 and round(counts["head"] / 1e6) == 84


@pytest.mark.parametrize(
    ("head", "division", "millions"),
    [("depth", (14, 14), 165.2), ("depth", (7, 7, 7, 7), 82.6), ("bitwise", (14, 14), 0.07)],
    ids=["depth 14+14", "depth 4x7", "bitwise"],
)
def test_heads_cost_what_the_table_says(head, division, millions):
    counts = parameters_of(head=head, division=list(division))
    assert counts["head"] / 1e6 == pytest.approx(millions, abs=0.1 if millions > 1 else 0.005)
    if head == "depth":
        assert counts["head"] == 2 * 1280 * sum(2**size for size in division) + of_bits(28) + counts["blocks"]
        assert round(counts["blocks"] / 1e6, 1) == 81.3
    else:
        assert counts["head"] == of_bits(28) + 1280 + 28


@pytest.mark.parametrize(("size", "millions"), [("b", 111), ("l", 343), ("xl", 775)])
def test_sizes_are_llamagens(size, millions):
    """As published for its class-conditional models, which have no caption projector of 1.6M to 4.3M."""
    counts = parameters_of(**SIZES[size], num_bits=14, division=[14])
    projector = (2048 + SIZES[size]["hidden_size"]) * SIZES[size]["hidden_size"]
    assert (counts["all"] - projector) / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize(
    ("kind", "division", "said"),
    [
        ("flat", (14, 13), "do not make 28 bits"),
        ("depth", (28,), "give 1 to 16 bits each"),
        ("flat", (28,), "give 1 to 16 bits each"),
        ("flat", (12, 16, 0), "give 1 to 16 bits each"),
        ("flat", (), "do not make 28 bits"),
    ],
    ids=str,
)
def test_divisions_that_cannot_be_are_refused(kind, division, said):
    with pytest.raises(ValueError, match=said):
        head_of(kind, division, num_bits=28)


@pytest.mark.parametrize("head", HEADS)
def test_an_embedding_is_the_sum_over_its_rows(head):
    """Of a whole sequence, of one without its last piece, and piece by piece."""
    built = head_of(head, (1, 3, 2), num_bits=6)
    pieces = built.pieces(some_bits(2))
    whole = built.embed(pieces)
    if head == "bitwise":
        signs = some_bits(2).float() * 2 - 1
        assert torch.allclose(whole, F.linear(signs, built.embedding.weight, built.embedding.bias), atol=1e-6)
        return
    table, of_bits = built.tables.embedding.weight, built.tables.bit_embedding.weight.mT
    codes = [counted(token, (1, 3, 2)) for token in some_bits(2).flatten(0, 1).tolist()]
    wanted = [[vector_of(table, of_bits, (1, 3, 2), j, code) for j, code in enumerate(token)] for token in codes]
    wanted = torch.stack([torch.stack(token) for token in wanted]).unflatten(0, (2, 6))
    assert torch.allclose(whole, wanted.sum(2) if head == "depth" else wanted.flatten(1, 2), atol=1e-5)
    if head == "flat":
        for position in range(18):  # as sampling embeds them
            one = built.embed(pieces[:, position : position + 1], place=position % 3)
            assert torch.allclose(one, whole[:, position : position + 1], atol=1e-6)
        assert torch.equal(built.embed(pieces[:, :-1]), whole[:, :-1])


def test_flipped_bits_are_a_share_drawn_for_each_picture():
    bits = some_bits(200, tokens=20, width=28)
    shares = (flip_bits(bits, largest_share=0.3) ^ bits).float().mean((1, 2))
    assert shares.max() < 0.36 and shares.mean().item() == pytest.approx(0.15, abs=0.02)
    assert shares.std().item() == pytest.approx(0.3 / math.sqrt(12), abs=0.02)  # uniform in [0, 0.3]
    assert torch.equal(flip_bits(bits, largest_share=0.0), bits)
