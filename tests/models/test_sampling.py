"""Cached sampling is what the whole model says at every step; a picture belongs to its caption and its seed alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny_generators import HEADS, all_bits, captions, some_bits, tiny_generator
from torch import Tensor

from qlip.core.errors import UserError
from qlip.models.sampling import Sampler, SamplingConfig, choose, limited_logits, uniform_numbers
from qlip.models.text_to_image import TextToImageModel

PLAIN = {"guidance": 1.0, "top_k": 0}
SEEDS = [7, 8, 2**63 - 1]


class Watched(Sampler):
    """Keeps the state from which every piece was drawn."""

    def __init__(self, model: TextToImageModel, config: SamplingConfig) -> None:
        super().__init__(model, config, compile=False)
        self.states: list[Tensor] = []
        step = self._advance

        def watched(hidden: Tensor, *rest: object, **options: object) -> tuple[Tensor, Tensor]:
            self.states.append(hidden.clone())
            return step(hidden, *rest, **options)

        self._advance = watched


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("guidance", [1.0, 3.0], ids=["plain", "guided"])
@torch.no_grad()
def test_cached_states_and_choices_are_those_of_the_whole_model(head, guidance):
    model = tiny_generator(head)
    features, mask = captions()
    sampler = Watched(model, SamplingConfig(guidance=guidance, top_k=0))
    for seeds in (SEEDS, [1, 2, 3]):  # the second batch finds the cache of the first
        sampler.states.clear()
        bits = sampler.sample(features, mask, seeds=seeds)
        whole = model(features, mask, bits).hidden_states
        if guidance != 1:
            nothing = torch.ones(3, dtype=torch.bool)
            whole = torch.cat([whole, model(features, mask, bits, dropped=nothing).hidden_states])
        cached = torch.stack(sampler.states, dim=1)
        assert cached.shape == whole.shape and (cached - whole).abs().max() < 1e-5
        pieces = model.head.pieces(bits)
        uniforms = uniform_numbers(seeds, count=pieces.shape[1], width=pieces.shape[2])
        for position in range(pieces.shape[1]):
            place = position % model.head.positions_per_token
            drawn = model.head.draw(whole[:, position], uniforms[:, position], sampler._choose, place=place)
            assert torch.equal(drawn, pieces[:, position])


@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_codes_are_drawn_as_often_as_their_likelihood_says(head):
    """A picture of one token of 6 bits, 8,000 times from one state (two for flat)."""
    model, num = tiny_generator(head, grid=[1, 1], scale=0.5), 8_000
    features, mask = (part[1:2] for part in captions(2))
    codes = all_bits(6)
    likelihood = (-model(features.expand(64, -1, -1), mask.expand(64, -1), codes[:, None]).nll.sum(1)).exp()
    sampler = Sampler(model, SamplingConfig(**PLAIN))
    uniforms = torch.rand(num, model.head.positions_per_token, model.head.piece_width)
    hidden, real, cache = sampler._prefill(features.expand(num, -1, -1), mask.expand(num, -1), num_keys=6)
    first, hidden = sampler._step(hidden, uniforms[:, 0], real, torch.tensor(4), cache, place=0, is_last=False)
    pieces = first[:, None]
    if head == "flat":
        last, _ = sampler._step(hidden, uniforms[:, 1], real, torch.tensor(5), cache, place=1, is_last=True)
        pieces = torch.stack([first, last], dim=1)
    ids = model.head.bits(pieces)[:, 0].long() @ (2 ** torch.arange(5, -1, -1))
    share = ids.bincount(minlength=64) / num
    assert (share - likelihood).abs().max() < 0.019  # five standard errors of a share of 1/8
    assert (share - likelihood).abs().sum() / 2 < 0.05 and likelihood.max() > 0.04


@pytest.mark.parametrize("head", HEADS)
def test_guidance_of_one_is_none(head):
    """The doubled batch with a scale that rounds to 1 in float32 draws what the single one draws."""
    model = tiny_generator(head)
    single = Sampler(model, SamplingConfig(guidance=1.0)).sample(*captions(), seeds=SEEDS)
    doubled = Sampler(model, SamplingConfig(guidance=1 + 1e-12)).sample(*captions(), seeds=SEEDS)
    other = Sampler(model, SamplingConfig(guidance=4.0)).sample(*captions(), seeds=SEEDS)
    assert torch.equal(single, doubled) and not torch.equal(single, other)


def test_guidance_moves_logits_away_from_those_of_no_caption():
    conditional, unconditional = torch.randn(5, 8), torch.randn(5, 8)
    both, uniforms = torch.cat([conditional, unconditional]), torch.rand(5)
    wanted = unconditional + 2.5 * (conditional - unconditional)
    assert torch.equal(
        choose(both, uniforms, SamplingConfig(guidance=2.5)), choose(wanted, uniforms, SamplingConfig(guidance=1.0))
    )
    for scale, logits in ((1 + 1e-12, conditional), (0.0, unconditional)):
        found = choose(both, uniforms, SamplingConfig(guidance=scale))
        assert torch.equal(found, choose(logits, uniforms, SamplingConfig(guidance=1.0)))


@pytest.mark.parametrize("head", HEADS)
def test_a_picture_does_not_depend_on_its_neighbours(head):
    model, (features, mask) = tiny_generator(head), captions()
    sampler = Sampler(model, SamplingConfig(guidance=3.0))
    together = sampler.sample(features, mask, seeds=SEEDS)
    order = torch.tensor([2, 0, 1])
    mixed = sampler.sample(features[order], mask[order], seeds=[SEEDS[i] for i in order])
    assert torch.equal(mixed, together[order])
    for row in range(3):
        own = (features[row : row + 1], mask[row : row + 1])
        assert torch.equal(sampler.sample(*own, seeds=SEEDS[row : row + 1])[0], together[row])
    assert torch.equal(sampler.sample(features, mask, seeds=SEEDS), together)
    assert not torch.equal(sampler.sample(features, mask, seeds=[1, 2, 3]), together)
    other = sampler.sample(features.flip(1), mask, seeds=SEEDS)
    assert (other != together).flatten(1).any(1)[2]  # another caption, the same seed


def test_a_seeds_numbers_are_its_own():
    numbers = uniform_numbers([3, 5], count=4, width=2)
    assert numbers.shape == (2, 4, 2) and numbers.min() >= 0 and numbers.max() < 1
    torch.manual_seed(99)
    assert torch.equal(uniform_numbers([5], count=4, width=2)[0], numbers[1])
    assert torch.equal(uniform_numbers([5, 3, 5], count=4, width=2), numbers[[1, 0, 1]])


@pytest.mark.parametrize("head", HEADS)
def test_progress_is_told_after_every_token(head):
    model, seen = tiny_generator(head), []
    bits = Sampler(model, SamplingConfig(guidance=1.0)).sample(
        *captions(), seeds=SEEDS, on_tokens=lambda done, bits: seen.append((done, bits.clone()))
    )
    assert [done for done, _ in seen] == list(range(1, 7))
    for done, partial in seen:
        assert torch.equal(partial[:, :done], bits[:, :done]) and not partial[:, done:].any()


GRID = (torch.arange(20_000) + 0.5) / 20_000


def test_a_choice_is_the_exact_inverse_of_the_cumulative_distribution():
    logits = torch.randn(30) * 3
    found = choose(logits.expand(20_000, 30), GRID, SamplingConfig(**PLAIN))
    cumulative = np.cumsum(np.exp(logits.double().numpy()))
    wanted = np.searchsorted(cumulative, GRID.double().numpy() * cumulative[-1], side="right")
    assert found.tolist() == wanted.tolist()
    share = found.bincount(minlength=30) / 20_000
    assert (share - logits.softmax(0)).abs().max() <= 1.01 / 20_000


@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
def test_a_temperature_divides_the_logits(temperature):
    logits = torch.randn(30)
    found = choose(logits.expand(20_000, 30), GRID, SamplingConfig(**PLAIN, temperature=temperature))
    wanted = (logits / temperature).softmax(0)
    assert (found.bincount(minlength=30) / 20_000 - wanted).abs().max() <= 1.01 / 20_000


def kept_by_hand(logits: list[float], *, top_k: int, top_p: float) -> set[int]:
    """Largest first until there are `top_k`, or their share of what `top_k` left reaches `top_p`."""
    order = sorted(range(len(logits)), key=lambda code: -logits[code])
    order = order[:top_k] if top_k else order
    total = sum(math.exp(logits[code]) for code in order)
    kept, reached = set(), 0.0
    for code in order:
        if reached >= top_p:
            break
        kept.add(code)
        reached += math.exp(logits[code]) / total
    return kept


@pytest.mark.parametrize("top_k", [0, 1, 5, 30, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.4, 1e-6])
def test_top_k_and_top_p_keep_what_sorting_by_hand_keeps(top_k, top_p):
    logits = torch.randn(4, 5, 30) * 2
    config = SamplingConfig(guidance=1.0, top_k=top_k, top_p=top_p)
    limited = limited_logits(logits, config)
    for row, found in zip(logits.flatten(0, 1), limited.flatten(0, 1), strict=True):
        kept = kept_by_hand(row.tolist(), top_k=top_k, top_p=top_p)
        assert set(found.isfinite().nonzero()[:, 0].tolist()) == kept
        assert torch.equal(found[list(kept)], row[list(kept)])
    drawn = choose(logits[0, :1].expand(20_000, 30), GRID, config)
    assert set(drawn.tolist()) <= kept_by_hand(logits[0, 0].tolist(), top_k=top_k, top_p=top_p)


def test_equal_logits():
    """At the border of top-k all stay; temperature 0 takes the first of the most probable."""
    logits = torch.tensor([1.0, 3.0, 1.0, 3.0, 0.0, 1.0])
    found = limited_logits(logits, SamplingConfig(top_k=3))
    assert found.isfinite().tolist() == [True, True, True, True, False, True]
    assert limited_logits(logits, SamplingConfig(top_k=0, top_p=0.1)).isfinite().sum() == 1
    assert choose(logits[None], torch.tensor([0.999]), SamplingConfig(guidance=1.0, temperature=0.0)).item() == 1


def test_temperature_zero_is_the_most_probable_whatever_the_numbers():
    logits = torch.randn(50, 7)
    config = SamplingConfig(guidance=1.0, temperature=0.0, top_p=0.5)
    assert torch.equal(choose(logits, torch.rand(50), config), logits.argmax(-1))
    model = tiny_generator()
    sampler = Sampler(model, SamplingConfig(temperature=0.0))
    assert torch.equal(sampler.sample(*captions(), seeds=SEEDS), sampler.sample(*captions(), seeds=[1, 2, 3]))


def test_what_is_excluded_is_never_drawn():
    """Not even at the ends of [0, 1), where cumulative sums are flat."""
    ends = torch.tensor([0.0, 2.0**-24, 1 - 2.0**-24])
    for kept in (1, 6, 3000):
        for start in (0, 500, 4096 - kept):
            logits = torch.full((4096,), float("-inf"))
            logits[start : start + kept] = torch.randn(kept) * 5 - 80
            found = choose(logits.expand(3, -1), ends, SamplingConfig(**PLAIN))
            assert start <= found.min() and found.max() < start + kept


def test_low_precision_logits_are_chosen_in_full():
    """bf16 sums of 16,384 shares would stop growing at 1/256 each."""
    logits = torch.zeros(1, 16384, dtype=torch.bfloat16)
    found = choose(logits.expand(200, -1), GRID[5::100], SamplingConfig(**PLAIN))
    assert torch.equal(found, (GRID[5::100] * 16384).long())


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("guidance", (-1.0, float("nan"), float("inf"))),
        ("temperature", (-0.5, float("nan"), float("inf"), 1e-40)),
        ("top_k", (-1,)),
        ("top_p", (0.0, 1.5, -1.0, float("nan"))),
    ],
)
def test_impossible_numbers_are_one_line(field, values):
    for value in values:
        with pytest.raises(UserError, match=f"^{field} is {value}: give ") as error:
            Sampler(tiny_generator(), SamplingConfig(**{field: value}))
        assert "\n" not in str(error.value)


def test_the_smallest_temperature_takes_the_most_probable():
    logits = torch.randn(50, 7) * 30
    config = SamplingConfig(guidance=1.0, temperature=1e-3)
    assert torch.equal(choose(logits, torch.rand(50), config), logits.argmax(-1))


def test_a_model_in_training_is_refused():
    with pytest.raises(AssertionError, match="evaluation mode"):
        Sampler(tiny_generator().train(), SamplingConfig()).sample(*captions(), seeds=SEEDS)


def test_other_batches_and_ids_of_a_learned_table():
    model = tiny_generator(caption_encoder="learned", caption_vocab_size=9)
    sampler = Sampler(model, SamplingConfig())
    ids, (_, mask) = torch.arange(12).reshape(3, 4) % 9, captions()
    found = sampler.sample(ids, mask, seeds=SEEDS)
    for num in (1, 2, 3):
        assert torch.equal(sampler.sample(ids[:num], mask[:num], seeds=SEEDS[:num]), found[:num])
    assert found.shape == some_bits().shape and found.dtype == torch.bool


@torch.no_grad()
def test_compiled_batches_are_filled_up_to_one_size(monkeypatch):
    """A stand-in for the compiler counts the sizes that it would have to compile for."""
    rows: set[int] = set()

    def compiler(step, **options):
        assert options == {"mode": "reduce-overhead", "fullgraph": True}

        def compiled(hidden: Tensor, *rest: object, **places: object) -> tuple[Tensor, Tensor]:
            rows.add(len(hidden))
            return step(hidden, *rest, **places)

        return compiled

    monkeypatch.setattr(torch, "compile", compiler)
    model = tiny_generator("flat")
    features, mask = captions()
    sampler = Sampler(model, SamplingConfig(guidance=3.0), compile=True)
    whole = sampler.sample(features, mask, seeds=SEEDS)
    lengths: list[int] = []
    last = sampler.sample(features[2:], mask[2:], seeds=SEEDS[2:], on_tokens=lambda _, bits: lengths.append(len(bits)))
    assert torch.equal(last, whole[2:]) and set(lengths) == {1} and rows == {6}
