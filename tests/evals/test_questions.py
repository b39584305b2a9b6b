"""Answers and their figures: hand-computed numbers, brute force, known answers of blind assistants, resuming."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_sources import ListSource, png

from qlip.core.errors import UserError
from qlip.data.items import Item
from qlip.data.question_files import Question
from qlip.data.sources import open_source
from qlip.data.tar_reader import Skip
from qlip.evals import answers as asking_module
from qlip.evals.inputs import EvalInput
from qlip.evals.protocols import SHORT_ANSWER, find_protocol
from qlip.evals.question_scores import (
    Answered,
    agreement,
    normalised,
    says_yes,
    score_kinds,
    score_match,
    score_yes_no,
)
from qlip.evals.questions import QuestionEvaluator, asked_text
from qlip.models.assistant import AnswerSettings, ChatPrompt

CPU = torch.device("cpu")
PICTURE = png(np.zeros((4, 4, 3), np.uint8))


class Parrot:
    """Answers from a function of the question; keeps what it was asked."""

    name, image_size, abilities = "Parrot", 16, frozenset(("answer",))

    def __init__(self, says: Any = lambda text: "yes") -> None:
        self.says = says
        self.batches: list[list[str]] = []

    def identity(self) -> dict[str, Any]:
        return {"model_fingerprint": "parrot" * 4, "dtype": "float32"}

    def answer_what_fits(self, prompts: list[ChatPrompt], settings: AnswerSettings | None = None) -> list[str]:
        texts = [prompt.messages[0]["content"][1]["text"] for prompt in prompts]
        assert settings is not None and settings.temperature == 0 and settings.max_new_tokens == 16
        assert all(len(prompt.images) == 1 and prompt.images[0].mode == "RGB" for prompt in prompts)
        self.batches.append(texts)
        return [self.says(text) for text in texts]


def answered(said: str, *truth: str, kind: str = "", file: str = "") -> Answered:
    return Answered(question=Question(question_id=0, text="?", kind=kind, answers=truth, file=file), text=said)


def scenes(*counts: int) -> ListSource:
    """A scene for each count, with a question of existence and one of count."""
    asked = [
        [
            {"kind": "existence", "question": "Is there a ring?", "answer": "yes" if count > 1 else "no"},
            {"kind": "count", "question": "How many shapes are there?", "answer": ("one", "two", "three")[count - 1]},
        ]
        for count in counts
    ]
    return ListSource(
        [Item(key=f"{i:04d}", image=PICTURE, record={"questions": found}) for i, found in enumerate(asked)]
    )


def run(protocol: str, source: Any, parrot: Any, **options: Any) -> tuple[dict[str, float], QuestionEvaluator]:
    evaluator = QuestionEvaluator(find_protocol(protocol), EvalInput(source=source, batch_size=3, **options))
    return evaluator.run(parrot, CPU), evaluator


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("A Dog.", "dog"),
        ("the  left\nof an apple", "left of apple"),
        ("Two", "2"),
        ("none", "0"),
        ("1,000 people", "1000 people"),
        ("yes, it is!", "yes it is"),
        ("T-shirt", "t shirt"),
        ("3.5", "3.5"),
        ("dont", "don't"),
        ("don\N{RIGHT SINGLE QUOTATION MARK}t", "don't"),
        ("girl's", "girl's"),
        ("its", "its"),
        ("2:50 pm", "2:50 pm"),
        ("50%", "50%"),
        ("The", ""),
    ],
)
def test_answers_are_compared_as_vqa_does(text, wanted):
    assert normalised(text) == wanted
    assert normalised(wanted) == wanted


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("Yes", True),
        ("No", False),
        ("no, there is none", False),
        ("There is not a dog.", False),
        ("Yes. There is no cat", True),
        ("Nothing", True),
        ("", True),
    ],
)
def test_pope_reads_the_first_sentence(text, yes):
    assert says_yes(text) == yes


@pytest.mark.parametrize("matches", range(11))
def test_agreement_is_brute_force_over_nine_of_ten(matches):
    people = ["red"] * matches + ["blue"] * (10 - matches)
    nines = itertools.combinations(people, 9)
    assert agreement("red", people) == pytest.approx(np.mean([min(1, nine.count("red") / 3) for nine in nines]))


def test_kinds_have_exact_match_beside_the_counted_majority():
    rows = [("one", "1", "count"), ("2", "two", "count"), ("3", "two", "count"), ("yes", "no", "existence")]
    scores = score_kinds([answered(said, truth, kind=kind) for said, truth, kind in rows])
    assert scores.figures == pytest.approx(
        {
            "accuracy_count": 2 / 3,
            "accuracy_count_baseline": 2 / 3,
            "accuracy_existence": 0,
            "accuracy_existence_baseline": 1,
            "yes_share_existence": 1,
            "true_yes_share_existence": 0,
            "accuracy_mean_of_kinds": 1 / 3,
            "accuracy_mean_of_kinds_baseline": 5 / 6,
            "accuracy_all_questions": 1 / 2,
            "accuracy_all_questions_baseline": 3 / 4,
        }
    )
    assert scores.details["kinds"]["count"]["majority"] == "2"


def test_yes_and_no_by_hand():
    rows = [("yes", "yes"), ("Yes.", "yes"), ("no", "yes"), ("yes", "no"), ("No", "no")]
    figures = score_yes_no([answered(*row) for row in rows]).figures
    wanted = {"accuracy": 3 / 5, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes_share": 3 / 5}
    assert {name: figures[name] for name in wanted} == pytest.approx(wanted)
    never = score_yes_no([answered("no", "no")]).figures
    assert np.isnan(never["precision"]) and never["f1"] == 0 and never["accuracy"] == 1


def test_three_categories_have_a_mean_and_three_files_their_own_figures():
    rows = [
        answered(said, truth, kind=kind, file=f"coco_pope_{kind}")
        for kind, said in (("random", "yes"), ("popular", "no"), ("adversarial", "yes"))
        for truth in ("yes", "no", "yes")
    ]
    scores = score_yes_no(rows)
    assert scores.figures["f1_random"] == scores.figures["f1_adversarial"] == pytest.approx(0.8)
    assert scores.figures["f1_popular"] == 0 and scores.figures["f1_mean"] == pytest.approx(1.6 / 3)
    assert scores.figures["f1"] == pytest.approx(8 / 12)
    assert scores.card["categories"] == {"adversarial": 3, "popular": 3, "random": 3}
    json.dumps(scores.details, allow_nan=False)
    assert scores.details["files"]["coco_pope_popular"]["precision"] is None


def test_match_with_ten_people_or_one():
    ten = [answered("The Red", *["red"] * 2, *["blue"] * 8), answered("dog", *["a dog"] * 10)]
    scores = score_match(ten)
    assert scores.figures["vqa_accuracy"] == pytest.approx((agreement("r", ["r"] * 2 + ["b"] * 8) + 1) / 2)
    assert scores.figures["vqa_accuracy_baseline"] == 0.5 and "ten people" in scores.card["answer_rule"]
    one = score_match([answered("Two.", "2"), answered("x", "2"), answered("y", "z")])
    assert one.figures == pytest.approx({"vqa_accuracy": 1 / 3, "vqa_accuracy_baseline": 2 / 3})
    assert one.details["constant_answer"] == "2" and "exact" in one.card["answer_rule"]


def test_every_question_of_every_scene_is_asked_once_as_it_stands():
    parrot, counts = Parrot(lambda text: "two" if text.startswith("How") else "yes"), (1, 2, 2, 3)
    figures, evaluator = run("scenes-questions-v1", scenes(*counts), parrot)
    assert [len(batch) for batch in parrot.batches] == [3, 3, 2]
    assert Counter(itertools.chain(*parrot.batches)) == {"Is there a ring?": 4, "How many shapes are there?": 4}
    assert figures["accuracy_count"] == figures["accuracy_count_baseline"] == Counter(counts).most_common(1)[0][1] / 4
    assert figures["accuracy_existence"] == 0.75 and figures["yes_share_existence"] == 1
    card = evaluator.card()
    assert (card["count"], card["complete"], card["baseline"]) == (8, True, "majority answer")
    assert run("scenes-questions-v1", scenes(*counts), parrot, max_samples=2)[1].card()["complete"] is False


def pope(folder: Path, **changes: Any) -> Path:
    (folder / "a.png").write_bytes(PICTURE)
    lines = [
        {"question_id": i, "image": "a.png", "text": f"Is there a thing {i}?", "label": ("yes", "no")[i % 2]} | changes
        for i in range(6)
    ]
    lines[0]["text"] += f"\n{SHORT_ANSWER}"
    file = folder / "coco_pope_random.json"
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def test_always_yes_gets_popes_known_figures_and_answers_as_its_scorer_reads_them(tmp_path):
    parrot = Parrot()
    figures, evaluator = run("pope-v1", open_source(str(pope(tmp_path))), parrot)
    for suffix in ("", "_baseline"):
        found = {name: figures[name + suffix] for name in ("accuracy", "precision", "recall", "f1", "yes_share")}
        assert found == pytest.approx({"accuracy": 0.5, "precision": 0.5, "recall": 1, "f1": 2 / 3, "yes_share": 1})
    asked = list(itertools.chain(*parrot.batches))
    assert all(text.count(SHORT_ANSWER) == 1 and text.endswith(f"\n{SHORT_ANSWER}") for text in asked)
    evaluator.write_answers(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "pope-v1_answers.jsonl").read_text().splitlines()]
    assert [row["question_id"] for row in rows] == list(range(6)) and rows[1]["text"] == "yes"
    assert rows[1]["prompt"] == "Is there a thing 1?" and rows[1]["metadata"] == {"category": "random"}
    assert set(rows[0]) == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
    assert len({row["answer_id"] for row in rows}) == 6


def test_a_suffix_is_asked_on_its_own_line():
    question = Question(question_id=1, text="Why? ")
    assert asked_text(question, suffix="") == "Why?" and asked_text(question, suffix="Be brief.") == "Why?\nBe brief."


@pytest.mark.parametrize(
    ("protocol", "changes", "said"),
    [
        ("pope-v1", {"label": "maybe"}, "no label yes or no"),
        ("pope-v1", {"label": None}, "no label yes or no"),
        ("vqa-match-v1", {"label": None}, "has 0 answers"),
        ("vqa-match-v1", {"label": None, "answers": ["a", "b"]}, "has 2 answers"),
        ("scenes-questions-v1", {}, "is none of a scene"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_the_first_question(tmp_path, protocol, changes, said):
    parrot = Parrot()
    with pytest.raises(UserError, match=said):
        run(protocol, open_source(str(pope(tmp_path, **changes))), parrot)
    assert not parrot.batches


def test_one_and_ten_answers_do_not_mix(tmp_path):
    file = pope(tmp_path)
    row = {"question_id": 9, "image": "a.png", "text": "?", "answers": ["a"] * 10}
    file.write_text(file.read_text() + "\n" + json.dumps(row))
    with pytest.raises(UserError, match="question 9 has another number of answers"):
        run("vqa-match-v1", open_source(str(file)), Parrot())
    figures, _ = run("vqa-answers-v1", open_source(str(file)), Parrot(lambda text: "" if "thing" in text else "a"))
    assert figures == {"answered": pytest.approx(1 / 7)}


def test_other_models_and_data_without_questions_are_refused():
    class Clock(Parrot):
        abilities = frozenset(("reconstruct",))

    with pytest.raises(UserError, match="answers no questions: leave scenes-questions-v1 out"):
        run("scenes-questions-v1", scenes(1), Clock())
    with pytest.raises(UserError, match="holds no questions"):
        run("scenes-questions-v1", ListSource([Item(key="a", image=PICTURE)]), Parrot())


def test_unusable_pictures_are_counted_and_too_many_stop():
    source = scenes(*[1] * 30)
    source.found[3] = Item(key="bad", image=b"no picture", record=source.found[3].record)
    _, evaluator = run("scenes-questions-v1", source, Parrot())
    card = evaluator.card()
    assert (card["count"], card["skipped_reasons"]) == (58, {"not an image": 1})
    source.found[4] = Skip(key="gone", reason="missing picture: x.png", shard="")
    with pytest.raises(UserError, match=r"2 of 30 pictures cannot be used.*first is"):
        run("scenes-questions-v1", source, Parrot())


def test_a_stopped_evaluation_goes_on_with_the_next_part(tmp_path, monkeypatch):
    monkeypatch.setattr(asking_module, "PART", 4)
    source, whole = scenes(1, 2, 3, 1, 2), Parrot()
    wanted, _ = run("scenes-questions-v1", source, whole)
    first, times = Parrot(), iter(range(100))

    def stops(text: str) -> str:
        if next(times) == 5:
            raise KeyboardInterrupt
        return "yes"

    first.says = stops
    with pytest.raises(KeyboardInterrupt):
        run("scenes-questions-v1", source, first, folder=tmp_path)
    second = Parrot()
    figures, evaluator = run("scenes-questions-v1", source, second, folder=tmp_path)
    assert figures == wanted and evaluator.card()["resumed_parts"] == 1
    assert sum(map(len, second.batches)) == 6
    broken = next(tmp_path.rglob("answers_000001.json"))
    broken.write_text(broken.read_text()[:20])
    _, evaluator = run("scenes-questions-v1", source, Parrot(), folder=tmp_path)
    assert evaluator.card()["resumed_parts"] == 2


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_share_the_parts_and_join_them_in_order(monkeypatch, num_ranks):
    monkeypatch.setattr(asking_module, "PART", 3)
    told = {f"Is there a thing {i}?": str(i) for i in range(11)}
    questions = [[{"kind": "existence", "question": text, "answer": "yes"}] for text in told]
    source = ListSource([Item(key=q[0]["question"], image=PICTURE, record={"questions": q}) for q in questions])
    asking = asking_module.Asking(source=source, ask=lambda asked, _: [told[question.text] for question in asked])
    alone = asking_module.collect_answers(asking, title="alone")
    assert [entry.text for entry in alone.answered] == list(told.values())
    monkeypatch.setattr(asking_module.distributed, "world_size", lambda: num_ranks)
    shares = []
    for rank in range(num_ranks):
        monkeypatch.setattr(asking_module.distributed, "rank", lambda rank=rank: rank)
        shares.append(asking_module._own_parts(asking, "share", None))
    monkeypatch.setattr(asking_module.distributed, "on_all_ranks", lambda action: None)
    monkeypatch.setattr(asking_module.distributed, "gather_objects", lambda own: shares)
    assert asking_module.collect_answers(asking, title="joined") == alone
    assert sum(len(part.rows) for part in shares[0]) < len(told)
