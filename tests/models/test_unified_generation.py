"""transformers' `generate` with a UM3: whatever the prompt and the strategy, what is written keeps to the format."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qlip.models.modality import SeededChoice, image_spans
from qlip.models.sampling import SamplingConfig
from qlip.models.unified import UM3ForCausalLM
from tiny_unified import tiny_um3

PAD, BOS, EOS, BEGIN, END, TEXT = 0, 1, 2, 38, 39, 40
LENGTH = 12
IMAGE = [id for place in range(6) for id in (40 + (7 * place) % 16, 56 + (5 * place + 3) % 16)]


def write(model: UM3ForCausalLM, prompts: list[list[int]], *, new: int = 40, **options: Any) -> list[list[int]]:
    """What is written behind prompts, padded on the left, without what fills rows up behind EOS."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
    options = {"do_sample": True, "max_new_tokens": new, "top_k": 0, "pad_token_id": PAD} | options
    written = model.generate(ids, attention_mask=mask, **options)[:, longest:].tolist()
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in written]


def assert_well_formed(prompt: list[int], written: list[int], *, images: bool = True) -> None:
    """Images have exactly m ids, each in its place, then END; END is nowhere else; the last may be cut off."""
    ids = prompt + written
    starts = [place for place, one in enumerate(ids) if one == BEGIN]
    inside = set()
    for start in starts:
        body = ids[start + 1 : start + 1 + LENGTH]
        assert all(40 + 16 * (place % 2) <= one < 56 + 16 * (place % 2) for place, one in enumerate(body))
        inside |= set(range(start + 1, start + 2 + LENGTH))
        if len(ids) > start + 1 + LENGTH:
            assert ids[start + 1 + LENGTH] == END
    for place in range(len(prompt), len(ids)):
        if place not in inside:
            assert ids[place] < TEXT and ids[place] != END
    if not images:
        assert BEGIN not in written


@pytest.mark.parametrize("offset", range(LENGTH + 1))
def test_a_prompt_that_ends_inside_an_image_is_completed(offset):
    model = tiny_um3()
    (written,) = write(model, [[BOS, 5, BEGIN, *IMAGE[:offset]]], new=LENGTH - offset + 3)
    assert_well_formed([BOS, 5, BEGIN, *IMAGE[:offset]], written)
    whole = [BOS, BEGIN, *IMAGE[:offset], *written]
    assert written[LENGTH - offset] == END and len(image_spans(whole, model.vocabulary)) == 1


STRATEGIES: dict[str, dict[str, Any]] = {
    "sampling": {},
    "greedy": {"do_sample": False},
    "two beams": {"do_sample": False, "num_beams": 2},
    "beams drawn": {"num_beams": 3},
    "top-p": {"top_p": 0.95, "temperature": 0.7},
    "top-k after the format": {"top_k": 1},
    "without cache": {"use_cache": False},
    "guided": {"guidance_scale": 3.0, "negative_prompt_ids": torch.tensor([[BOS, BEGIN]] * 4)},
    "repetition": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_keeps_to_the_format(strategy):
    prompts = [[BOS, 7, 8, 9, BEGIN], [BOS, BEGIN], [BOS, BEGIN, *IMAGE, END], [BOS, 3, BEGIN, *IMAGE[:5]]]
    if strategy == "guided":
        prompts = [prompts[0], prompts[1], prompts[0], prompts[1]]
    for prompt, written in zip(prompts, write(tiny_um3(), prompts, **STRATEGIES[strategy]), strict=True):
        assert written
        assert_well_formed(prompt, written)


@pytest.mark.parametrize("softmax", ["separate", "joint"])
def test_images_begin_by_themselves_only_where_they_may(softmax):
    model = tiny_um3(softmax=softmax)
    prompts = [[BOS, id] for id in range(3, 35)]
    free = write(model, prompts, new=30)
    text_only = write(model, prompts, new=30, images=False)
    assert any(BEGIN in row for row in free)
    for prompt, drawn, written in zip(prompts, free, text_only, strict=True):
        assert_well_formed(prompt, drawn)
        assert_well_formed(prompt, written, images=False)


def test_padding_on_the_left_changes_nothing():
    model = tiny_um3()
    prompts = [[BOS, 7, 8, 9, 10, 11, BEGIN], [BOS, BEGIN, *IMAGE[:3]], [BOS, 5]]
    together = write(model, prompts, do_sample=False)
    assert together == [write(model, [prompt], do_sample=False)[0] for prompt in prompts]


def test_a_cached_step_sees_one_new_id():
    model, seen = tiny_um3(), []
    model.model.register_forward_hook(
        lambda _, inputs, options, out: seen.append(options["input_ids"].shape[1]), with_kwargs=True
    )
    write(model, [[BOS, 5, 6, BEGIN]], new=LENGTH + 1)
    assert seen == [4] + [1] * LENGTH


def test_guidance_moves_what_is_drawn_and_one_is_none():
    model, prompts = tiny_um3(), [[BOS, 7, 8, BEGIN], [BOS, 9, 4, BEGIN]]
    negative = torch.tensor([[BOS, BEGIN]] * 2)
    plain, none, strong = (
        write(model, prompts, do_sample=False, new=LENGTH, guidance_scale=scale, negative_prompt_ids=negative)
        for scale in (None, 1.0, 8.0)
    )
    assert plain == none != strong


def test_an_image_that_is_cut_off_is_none():
    (written,) = write(tiny_um3(), [[BOS, 5, BEGIN]], new=LENGTH - 1)
    assert len(written) == LENGTH - 1
    assert image_spans([BOS, 5, BEGIN, *written], tiny_um3().vocabulary) == []


@pytest.mark.parametrize(
    ("prompt", "first"),
    [
        ([BOS, BEGIN, *IMAGE, 41, 57], {END}),
        ([BOS, *IMAGE], set(range(TEXT)) - {END}),
        (IMAGE, set(range(TEXT)) - {END}),
        ([BOS, BEGIN, 41, 57, 5], set(range(TEXT)) - {END}),
        ([BOS, END], set(range(TEXT)) - {END}),
        ([BOS, BEGIN, BEGIN], set(range(40, 56))),
        ([BOS, BEGIN, 70, 71, 70], set(range(56, 72))),
    ],
    ids=["an image too long", "no beginning", "visual ids alone", "text inside an image", "an end alone",
         "begun twice", "sub-codes at wrong places"],
)  # fmt: skip
def test_prompts_that_no_image_can_have_end_too(prompt, first):
    """An image that is too long is closed; visual ids without a beginning are taken for text that is over."""
    for seed in range(3):
        torch.manual_seed(seed)
        (written,) = write(tiny_um3(), [prompt], new=20)
        assert 0 < len(written) <= 20
        assert written[0] in first


def seeded(seeds: list[int], *, start: int, **config: Any) -> list[SeededChoice]:
    settings = SamplingConfig(**({"guidance": 1.0, "top_k": 0} | config))
    return [SeededChoice(seeds, start=start, count=40, config=settings)]


def test_seeded_rows_are_the_same_alone_and_together():
    model, prompts = tiny_um3(), [[BOS, 7, 8, BEGIN], [BOS, 9, 4, BEGIN], [BOS, 9, 4, BEGIN]]

    def drawn(rows: list[int], seeds: list[int]) -> list[list[int]]:
        own = seeded(seeds, start=4)
        return write(model, [prompts[row] for row in rows], do_sample=False, logits_processor=own, new=LENGTH + 8)

    together = drawn([0, 1, 2], [3, 4, 5])
    assert together[1] != together[2]
    assert together == [drawn([row], [3 + row])[0] for row in range(3)]


def test_temperature_zero_is_greedy():
    model, prompts = tiny_um3(), [[BOS, 7, 8, BEGIN]]
    own = seeded([1], start=4, temperature=0.0)
    assert write(model, prompts, do_sample=False, logits_processor=own) == write(model, prompts, do_sample=False)


def probabilities(model: UM3ForCausalLM, ids: list[int]) -> Tensor:
    return model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)


def test_draws_follow_equation_6():
    """First visual id over 2,000 seeds: chi-square with 15 degrees of freedom, 99.9 % quantile 37.7."""
    model, prompt, num = tiny_um3(), [BOS, 7, 8, BEGIN], 2000
    written = write(model, [prompt] * num, do_sample=False, logits_processor=seeded(list(range(num)), start=4), new=1)
    counts = torch.bincount(torch.tensor(written).flatten(), minlength=72)[40:56]
    share = probabilities(model, prompt)[40:56]
    expected = share / share.sum() * num
    assert counts.sum() == num and ((counts - expected) ** 2 / expected).sum() < 37.7
