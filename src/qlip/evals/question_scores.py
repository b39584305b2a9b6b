"""Answers -> figures: exact match by kind of question, POPE's yes and no, VQA's agreement with people.

Rules are those of the benchmarks' public pages: visualqa.org/evaluation for `normalised` and `agreement`,
arXiv 2305.10355 (POPE) and its public script for `says_yes`.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlip.core.errors import UserError
from qlip.data.question_files import Question

NORMALISATION = "vqa: lower case, punctuation, articles, number words as digits, contractions"
YES_RULE = "the first sentence says No, no or not: no; anything else: yes"
ASKED_PEOPLE = 10
"""Answers that VQA's rule takes."""
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBER_WORDS = {word: str(number) for number, word in enumerate(NUMBERS)} | {"none": "0"}
ARTICLES = ("a", "an", "the")
CONTRACTED = {  # beginnings by ending; those that make another word without an apostrophe (its, were, ill) are left out
    "n't": "are ca could did does do had has have is might must need should was were wo would",
    "'ve": "could i might should they we would you",
    "'re": "they you",
    "'s": "that there what where who how he she",
    "'ll": "that they you",
    "'d": "they you",
    "'m": "i",
}
CONTRACTIONS = {
    start + ending.replace("'", ""): start + ending for ending, starts in CONTRACTED.items() for start in starts.split()
}
PUNCTUATION = re.compile(r"""[;/\[\]"{}()=+\\_\-><@`,?!]""")
COMMA_IN_NUMBER = re.compile(r"(?<=\d),(?=\d)")
FULL_STOP = re.compile(r"\.(?!\d)")
MOST_SHOWN = 5  # answers that details name
YES_NO = ("yes", "no")
NAN = float("nan")


@dataclass(kw_only=True, slots=True, frozen=True)
class Answered:
    """A question with the model's answer."""

    question: Question
    text: str
    """The answer as it was written."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Scores:
    """What answers are worth."""

    figures: dict[str, float]
    """`<figure>_baseline` is what the card's `baseline` says."""
    details: dict[str, Any]
    card: dict[str, Any]
    """Which rule was used, on how much of what."""


def normalised(text: str) -> str:
    """An answer as VQA compares it: `A T-shirt, two.` -> `t shirt 2`.

    Lower case; no full stops except in decimals; no commas inside numbers; brackets, quotes, dashes, commas, slashes
    and marks are spaces, while apostrophes, colons, per cent and currency signs stay; no articles; zero to ten and none
    are digits; `dont` is `don't`.
    """
    text = COMMA_IN_NUMBER.sub("", text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))
    text = FULL_STOP.sub("", PUNCTUATION.sub(" ", text))
    words = (NUMBER_WORDS.get(word, word) for word in text.split() if word not in ARTICLES)
    return " ".join(CONTRACTIONS.get(word, word) for word in words)


def says_yes(text: str) -> bool:
    """How POPE reads an answer: no if `No`, `no` or `not` is a word of its first sentence, else yes."""
    words = text.split(".")[0].replace(",", "").split()
    return not {"No", "no", "not"} & set(words)


def agreement(answer: str, people: Sequence[str]) -> float:
    """VQA's accuracy in [0, 1]: min(1, matches / 3) among nine of the ten, averaged over the ten ways to leave one out.

    All texts are normalised already.
    """
    matches, num = people.count(answer), len(people)
    with_match_left_out = min(1.0, (matches - 1) / 3) if matches else 0.0
    return (matches * with_match_left_out + (num - matches) * min(1.0, matches / 3)) / num


def score_kinds(answered: Sequence[Answered]) -> Scores:
    """Exact match of normalised texts for each kind of question; beside it the most frequent true answer of that kind.

    `accuracy_mean_of_kinds` weighs kinds alike, `accuracy_all_questions` questions. Kinds of yes and no also have the
    share of yes among the answers and among the truths: an assistant that does not look says one of them always.
    """
    kinds: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for entry in answered:
        kinds[entry.question.kind].append((normalised(entry.text), normalised(entry.question.answers[0])))
    figures: dict[str, float] = {}
    details: dict[str, Any] = {}
    right, most_frequent = {}, {}
    for kind, pairs in sorted(kinds.items()):
        truths, given = Counter(truth for _, truth in pairs), Counter(answer for answer, _ in pairs)
        majority, most_frequent[kind] = _most_frequent(truths)
        right[kind] = sum(answer == truth for answer, truth in pairs)
        figures[f"accuracy_{kind}"] = right[kind] / len(pairs)
        figures[f"accuracy_{kind}_baseline"] = most_frequent[kind] / len(pairs)
        if set(truths) <= set(YES_NO):
            figures[f"yes_share_{kind}"] = given["yes"] / len(pairs)
            figures[f"true_yes_share_{kind}"] = truths["yes"] / len(pairs)
        details[kind] = {"questions": len(pairs), "majority": majority, "given": dict(given.most_common(MOST_SHOWN))}
    for suffix, counts in (("", right), ("_baseline", most_frequent)):
        shares = [counts[kind] / len(pairs) for kind, pairs in kinds.items()]
        figures[f"accuracy_mean_of_kinds{suffix}"] = sum(shares) / len(shares)
        figures[f"accuracy_all_questions{suffix}"] = sum(counts.values()) / len(answered)
    card = {"baseline": "majority answer", "normalisation": NORMALISATION}
    return Scores(figures=figures, details={"kinds": details}, card=card)


def score_yes_no(answered: Sequence[Answered]) -> Scores:
    """POPE's figures over all questions, and for each category where there are several; yes is the positive answer.

    With three categories `f1_mean` is the mean of theirs, the figure that LLaVA-1.5 reports. The baseline says yes to
    everything.
    """
    groups: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    files: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for entry in answered:
        pair = (says_yes(entry.text), entry.question.answers[0].strip().lower() == "yes")
        groups[entry.question.kind].append(pair)
        files[entry.question.file].append(pair)
    everything = [pair for pairs in groups.values() for pair in pairs]
    parts = [("", everything), *((f"_{name or 'other'}", pairs) for name, pairs in sorted(groups.items()))]
    figures: dict[str, float] = {}
    for suffix, pairs in parts if len(groups) > 1 else parts[:1]:
        by_saying_yes = _yes_no_figures([(True, truth) for _, truth in pairs])
        for name, value in _yes_no_figures(pairs).items():
            figures[name + suffix] = value
            figures[f"{name}{suffix}_baseline"] = by_saying_yes[name]
    if len(groups) == 3:
        for suffix in ("", "_baseline"):
            figures[f"f1_mean{suffix}"] = sum(figures[f"f1_{name or 'other'}{suffix}"] for name in groups) / 3
    by_file = {name: _yes_no_figures(pairs) for name, pairs in files.items()} if len(files) > 1 else {}
    details = {
        name: {figure: None if value != value else value for figure, value in found.items()}  # JSON has no NaN
        for name, found in by_file.items()
    }
    card = {
        "baseline": "always yes",
        "answer_rule": YES_RULE,
        "categories": {name or "other": len(pairs) for name, pairs in sorted(groups.items())},
    }
    neither = sum(normalised(entry.text).split()[:1] not in (["yes"], ["no"]) for entry in answered)
    return Scores(figures=figures, details={"files": details, "neither_yes_nor_no": neither}, card=card)


def _yes_no_figures(pairs: Sequence[tuple[bool, bool]]) -> dict[str, float]:
    """Of (said yes, is yes); precision and recall are NaN where nothing was said or is yes, F1 is 0 then."""
    said, true = sum(answer for answer, _ in pairs), sum(truth for _, truth in pairs)
    both = sum(answer and truth for answer, truth in pairs)
    return {
        "accuracy": sum(answer == truth for answer, truth in pairs) / len(pairs),
        "precision": both / said if said else NAN,
        "recall": both / true if true else NAN,
        "f1": 2 * both / (said + true) if said + true else 0.0,
        "yes_share": said / len(pairs),
    }


def score_match(answered: Sequence[Answered]) -> Scores:
    """`vqa_accuracy`: exact match with the one answer, or `agreement` with ten people's; normalised all of them.

    The baseline is the one answer that would score best if it were always given.
    """
    by_people = len(answered[0].question.answers) > 1
    total, constant = 0.0, defaultdict[str, float](float)
    for entry in answered:
        people = [normalised(answer) for answer in entry.question.answers]
        worth = {answer: agreement(answer, people) if by_people else 1.0 for answer in dict.fromkeys(people)}
        total += worth.get(normalised(entry.text), 0.0)
        for answer, value in worth.items():
            constant[answer] += value
    best, value = _most_frequent(constant)
    rule = "ten people, min(1, matches / 3), one left out" if by_people else "exact match with one answer"
    return Scores(
        figures={"vqa_accuracy": total / len(answered), "vqa_accuracy_baseline": value / len(answered)},
        details={"constant_answer": best},
        card={"baseline": "best constant answer", "answer_rule": rule, "normalisation": NORMALISATION},
    )


def score_nothing(answered: Sequence[Answered]) -> Scores:
    """`answered`: share of answers that are not empty; for answers that a benchmark's own scorer reads."""
    share = sum(bool(entry.text.strip()) for entry in answered) / len(answered)
    return Scores(figures={"answered": share}, details={}, card={"baseline": ""})


def _most_frequent(counts: Mapping[str, float]) -> tuple[str, float]:
    """The first in the alphabet of those that count most, and its count."""
    best = min(counts, key=lambda answer: (-counts[answer], answer))
    return best, counts[best]


def refuse_unscorable(question: Question, *, scorer: str, source: str) -> None:
    """Raise `UserError` for a question without what `scorer` needs to judge an answer."""
    where = f"{source}: question {question.question_id}"
    num = len(question.answers)
    if scorer == "kinds" and (question.file or not question.kind or num != 1):
        raise UserError(f"{where} is none of a scene: give scenes, or take --evals pope-v1 or vqa-match-v1")
    if scorer == "yes_no" and (num != 1 or question.answers[0].strip().lower() not in YES_NO):
        raise UserError(
            f"{where} has no label yes or no: give POPE's own files (coco_pope_random.json, ...), or take "
            "--evals vqa-answers-v1, which scores nothing"
        )
    if scorer == "match" and num not in (1, ASKED_PEOPLE):
        raise UserError(
            f"{where} has {num} answers: give one (`answer`) or ten (`answers`), or take --evals vqa-answers-v1, which "
            "scores nothing"
        )
