"""Where a sequence stands in an image, which ids may follow, and draws that belong to a row: against loops over ids."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from qlip.core.errors import UserError
from qlip.models.modality import (
    NO_IMAGE,
    UNKNOWN,
    ModalityLogitsProcessor,
    SeededChoice,
    Vocabulary,
    hide_other_modality,
    ids_since_begin,
    image_spans,
)
from qlip.models.sampling import SamplingConfig, limited_logits

BEGIN, END = 3, 4
VOCABULARY = Vocabulary(text_size=5, division=(1, 2), num_tokens=2, image_begin=BEGIN, image_end=END)
FIRST, SECOND = (5, 6), (7, 8, 9, 10)  # ids of either sub-code
IMAGE = [5, 7, 6, 10]


def count_by_loop(ids: list[int]) -> list[int]:
    """What `ids_since_begin` says, one id after the other."""
    counts, now = [], UNKNOWN
    for one in ids:
        if one == BEGIN:
            now = 0
        elif one < VOCABULARY.text_size:
            now = NO_IMAGE
        elif now >= 0:
            now = min(now + 1, VOCABULARY.image_length)
        counts.append(now)
    return counts


def test_sizes_and_bounds():
    assert (VOCABULARY.visual_size, VOCABULARY.size, VOCABULARY.image_length) == (6, 11, 4)
    assert VOCABULARY.place_bounds() == [(5, 7), (7, 11)]


def test_every_short_sequence_is_counted_as_a_loop_counts_it():
    """All 6^5 sequences of texts, markers and visual ids; what no image can hold is counted too."""
    rows = list(itertools.product((0, 1, BEGIN, END, 5, 9), repeat=5))
    assert ids_since_begin(torch.tensor(rows), VOCABULARY).tolist() == [count_by_loop(row) for row in rows]


def test_more_visual_ids_than_an_image_has_wait_for_the_end():
    counts = ids_since_begin(torch.tensor([[BEGIN, *IMAGE, 5, 7, 5]]), VOCABULARY)
    assert counts.tolist() == [[0, 1, 2, 3, 4, 4, 4, 4]]


def allowed_by_rules(ids: list[int], *, images: bool) -> set[int]:
    """Which ids may follow, in words of the format."""
    now = count_by_loop(ids)[-1]
    if now == VOCABULARY.image_length:
        return {END}
    if now >= 0:
        return set(SECOND if now % 2 else FIRST)
    return set(range(VOCABULARY.text_size)) - {END} - (set() if images else {BEGIN})


@pytest.mark.parametrize("images", [True, False], ids=["may draw", "text only"])
def test_only_ids_of_the_right_modality_and_sub_code_may_follow(images):
    rows = [[0, 1, 2, 1, 0], [0, BEGIN, 5, 7, 6], [BEGIN, *IMAGE], [0, 1, 0, 1, BEGIN], [*IMAGE, END], [1, *IMAGE],
            [BEGIN, 5, 1, 5, 7], [BEGIN, 5, BEGIN, 5, 7], [*IMAGE, 5]]  # fmt: skip
    scores = torch.randn(len(rows), VOCABULARY.size)
    kept = ModalityLogitsProcessor(VOCABULARY, images=images)(torch.tensor(rows), scores)
    for row, before, after in zip(rows, scores, kept, strict=True):
        allowed = after.isfinite().nonzero().flatten().tolist()
        assert set(allowed) == allowed_by_rules(row, images=images), row
        assert torch.equal(after[allowed], before[allowed])


def test_the_other_modality_is_hidden_and_nothing_where_the_beginning_is_unknown():
    ids = torch.tensor([[0, BEGIN, *IMAGE, END, 1], [*IMAGE, END, 0, BEGIN, 5]])
    logits = torch.randn(2, 8, VOCABULARY.size)
    hidden = hide_other_modality(logits, ids_since_begin(ids, VOCABULARY), VOCABULARY)
    text = [[True, False, False, False, False, True, True, True], [True] * 6 + [False] * 2]
    visual = [[not one for one in text[0]], [True] * 4 + [False] * 2 + [True] * 2]
    assert hidden[..., :5].isfinite().all(-1).tolist() == text
    assert hidden[..., 5:].isfinite().all(-1).tolist() == visual
    assert torch.equal(hidden[hidden.isfinite()], logits[hidden.isfinite()])


@pytest.mark.parametrize(
    ("ids", "spans"),
    [
        ([0, BEGIN, *IMAGE, END, 1], [(2, 6)]),
        ([BEGIN, *IMAGE, END, BEGIN, *IMAGE, END], [(1, 5), (7, 11)]),
        ([BEGIN, *IMAGE], [(1, 5)]),
        ([BEGIN, 5, 7, 6, END, 1], []),
        ([BEGIN, 5, 7, 1, 6, 10], []),
        ([BEGIN, 5, 7], []),
        ([BEGIN, 5, BEGIN, *IMAGE, END], [(3, 7)]),
        ([BEGIN, *IMAGE, 5, END], []),
        ([*IMAGE, END], []),
        ([], []),
    ],
    ids=["one", "two", "not closed yet", "too short", "cut by text", "cut by the end", "begun twice", "too long",
         "no beginning", "empty"],
)  # fmt: skip
def test_spans_are_those_of_whole_images(ids, spans):
    assert image_spans(ids, VOCABULARY) == spans


# --- draws that belong to a row -------------------------------------------------------------------------------------


def drawn(scores: Tensor, seeds: list[int], *, steps: int = 1, **config: float) -> list[list[int]]:
    """Choices of every row over some steps with equal scores."""
    settings = SamplingConfig(**({"guidance": 1.0, "top_k": 0} | config))
    choice = SeededChoice(seeds, start=2, count=steps, config=settings)
    ids = torch.zeros(len(scores), 2, dtype=torch.int64)
    for _ in range(steps):
        chosen = choice(ids, scores)
        assert ((chosen == 0).sum(-1) == 1).all() and (chosen[chosen != 0] == float("-inf")).all()
        ids = torch.cat([ids, chosen.argmax(-1, keepdim=True)], dim=1)
    return ids[:, 2:].tolist()


def test_a_row_draws_the_same_alone_and_in_any_batch():
    scores = torch.randn(4, 11)
    together = drawn(scores, [5, 6, 7, 8], steps=6)
    assert together[::-1] == drawn(scores.flip(0), [8, 7, 6, 5], steps=6)
    assert together == [drawn(scores[row : row + 1], [5 + row], steps=6)[0] for row in range(4)]
    assert len({tuple(row) for row in drawn(scores[:1].expand(4, -1), [5, 6, 7, 8], steps=6)}) > 1


def test_temperature_zero_takes_the_most_probable():
    scores = torch.randn(3, 11)
    assert drawn(scores, [1, 2, 3], steps=2, temperature=0.0) == [[one, one] for one in scores.argmax(-1).tolist()]


@pytest.mark.parametrize("config", [{}, {"temperature": 2.0}, {"top_p": 0.8}, {"top_k": 3}], ids=str)
def test_many_seeds_draw_with_the_probabilities_of_the_softmax(config):
    """Chi-square over 4,000 seeds: 10 degrees of freedom, whose 99.9 % quantile is 29.6."""
    scores, num = torch.randn(1, 11), 4000
    counts = torch.bincount(
        torch.tensor(drawn(scores.expand(num, -1), list(range(num)), **config)).flatten(), minlength=11
    )
    limited = limited_logits(scores[0], SamplingConfig(**({"guidance": 1.0, "top_k": 0} | config)))
    expected = limited.double().softmax(-1) * num
    assert (counts[expected == 0] == 0).all()
    possible = expected > 0
    assert ((counts - expected)[possible] ** 2 / expected[possible]).sum() < 29.6


def test_impossible_settings_are_refused():
    with pytest.raises(UserError, match="top_p"):
        SeededChoice([0], start=0, count=1, config=SamplingConfig(top_p=0.0))
