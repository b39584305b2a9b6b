"""Prompts in GenEval's six categories: true phrases, judgement by hand, chance by brute force, a right reader."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from qlip.core.errors import UserError
from qlip.data.scene_prompts import prompt_captions
from qlip.data.scene_text import relation
from qlip.data.scenes import HELD_OUT_PAIRS, SceneConfig, render, sample_scenes, scene_records
from qlip.evals.geneval import TAGS, read_prompts
from qlip.evals.scene_reader import FoundObject, read_scenes
from qlip.evals.scenes import (
    SceneScore,
    chance,
    ground_truth_scenes,
    has_unseen_pair,
    judge,
    objects_of_record,
    scene_prompts,
    score_scenes,
)

PROMPTS = scene_prompts(num_per_category=120, seed=7)
EVERY_PROMPT = {prompt["prompt"]: prompt for prompt in scene_prompts(num_per_category=8100, seed=0)}


def records(num: int, *, counts: tuple[float, ...] = (0.25, 0.25, 0.25, 0.25)) -> list[dict]:
    return scene_records(sample_scenes(num, split="test", shard=2, config=SceneConfig(seed=1, object_counts=counts)))


def thing(words: str, x: float = 0.5, y: float = 0.5) -> FoundObject:
    colour, shape = words.split()
    return FoundObject(shape=shape, colour=colour, x=x, y=y, radius=0.2, confidence=1.0)


def test_the_prompts_are_geneval_s_records(tmp_path: Path) -> None:
    assert Counter(prompt["tag"] for prompt in PROMPTS) == dict.fromkeys(TAGS, 120)
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    assert [prompt.content for prompt in read_prompts(path)] == PROMPTS


def test_prompts_are_distinct_seeded_and_of_different_classes() -> None:
    for tag, known in zip(TAGS, (10, 90, 30, 100, 360, 8100), strict=True):
        texts = [prompt["prompt"] for prompt in PROMPTS if prompt["tag"] == tag]
        assert len(set(texts)) == min(known, 120)
        assert max(Counter(texts).values()) == -(-120 // known)  # all come equally often before one comes again
    for prompt in PROMPTS:
        classes = [wanted["class"] for wanted in prompt["include"]]
        assert len(classes) == len(set(classes))
    assert scene_prompts(num_per_category=120, seed=7) == PROMPTS
    assert scene_prompts(num_per_category=120, seed=8) != PROMPTS
    assert scene_prompts(num_per_category=5, seed=7)[5:10] == PROMPTS[120:125]
    with pytest.raises(UserError, match="at least 1"):
        scene_prompts(num_per_category=0, seed=0)


def test_unseen_pairs_are_marked() -> None:
    marked = [prompt for prompt in PROMPTS if has_unseen_pair(prompt)]
    assert {prompt["tag"] for prompt in marked} == {"colors", "color_attr"}
    names = {f"{colour} {shape}" for colour, shape in HELD_OUT_PAIRS}
    assert marked == [prompt for prompt in PROMPTS if any(name in prompt["prompt"] for name in names)]


def test_each_category_speaks_its_dialect() -> None:
    star, ring = {"class": "star", "count": 1}, {"class": "ring", "count": 1}
    assert EVERY_PROMPT["an arrow"]["include"] == [{"class": "arrow", "count": 1}]
    assert EVERY_PROMPT["a star and a ring"]["include"] == [star, ring]
    assert EVERY_PROMPT["a star left of a ring"]["include"] == [ring, star | {"position": ["left of", 0]}]
    assert EVERY_PROMPT["an orange star"]["include"] == [star | {"color": "orange"}]
    three = EVERY_PROMPT["three crosses"]
    assert three["include"] == [{"class": "cross", "count": 3}]
    assert three["exclude"] == [{"class": "cross", "count": 4}]


def test_captions_of_scenes_are_true_prompts_and_only_of_fitting_tags() -> None:
    tags = Counter()
    for record in records(400):
        captions = prompt_captions(record)
        assert captions == prompt_captions(record)
        tags.update(captions.keys())
        for tag, text in captions.items():
            prompt = EVERY_PROMPT.get(text)
            if prompt is None:  # no prompt asks for two objects of one colour
                assert tag == "color_attr" and len({obj["colour"] for obj in record["objects"]}) == 1
                continue
            assert prompt["tag"] == tag
            assert judge(prompt, objects_of_record(record)).correct
            assert len(record["objects"]) == sum(wanted["count"] for wanted in prompt["include"])
    assert set(tags) == set(TAGS)
    mixed = {"objects": [{"shape": s, "colour": "red", "x": 0.1, "y": 0.1} for s in ("star", "star", "ring")]}
    assert prompt_captions(mixed) == {}


PAIR = [thing("red star", 0.2), thing("blue ring", 0.8)]


@pytest.mark.parametrize(
    ("text", "objects", "reason"),
    [
        ("a star", [thing("red star")], ""),
        ("a star", [thing("red ring"), thing("blue star")], ""),
        ("a star", [], "expected star>=1, found 0"),
        ("a star and a ring", PAIR, ""),
        ("a star and a ring", PAIR[:1], "expected ring>=1, found 0"),
        ("three stars", [thing("red star")] * 3, ""),
        ("three stars", [thing("red star")] * 2, "expected star>=3, found 2"),
        ("three stars", [thing("red star")] * 4, "expected star<4, found 4"),
        ("a red star", PAIR, ""),
        ("a red star", [thing("blue star"), thing("red star")], ""),
        ("a red star", [thing("pink star"), thing("red ring")], "expected red star>=1, found 0 (pink)"),
        ("a star left of a ring", PAIR, ""),
        ("a star right of a ring", PAIR, "expected star right of ring, found none"),
        ("a star above a ring", PAIR, "expected star above ring, found none"),
        ("a star above a ring", [thing("red star", 0.3, 0.2), thing("red ring", 0.7, 0.7)], ""),
        ("a star above a ring", [thing("red star", 0.25, 0.25), thing("red ring", 0.76, 0.75)], ""),  # the diagonal
        ("a star left of a ring", [thing("red star", 0.25, 0.25), thing("red ring", 0.76, 0.75)], ""),
        ("a star below a ring", [thing("red star", 0.25, 0.25), thing("red ring", 0.76, 0.75)], "expected star below"),
        ("a star above a ring", [*PAIR, thing("red star", 0.8, 0.1)], ""),  # any pair will do
        ("a star left of a ring", PAIR[:1], "expected ring>=1, found 0; no target for star to be left of"),
        ("a red star and a blue ring", PAIR, ""),
        ("a blue star and a red ring", PAIR, "expected blue star>=1, found 0 (red); expected red ring>=1, found 0"),
    ],
)
def test_judgement(text: str, objects: list[FoundObject], reason: str) -> None:
    judged = judge(EVERY_PROMPT[text], objects)
    assert judged.correct == (reason == "")
    assert judged.reason.startswith(reason)


@pytest.fixture(scope="module")
def truth() -> tuple[list[dict], list[dict]]:
    """Prompts and the records of scenes that show them."""
    return PROMPTS, scene_records(ground_truth_scenes(PROMPTS, seed=5))


def test_ground_truth_shows_exactly_its_prompt(truth: tuple[list[dict], list[dict]]) -> None:
    for prompt, record in zip(*truth, strict=True):
        objects = record["objects"]
        wanted = [clause for clause in prompt["include"] for _ in range(clause["count"])]
        assert [obj["shape"] for obj in objects] == [clause["class"] for clause in wanted]
        assert all(
            clause.get("color", obj["colour"]) == obj["colour"] for clause, obj in zip(wanted, objects, strict=True)
        )
        if prompt["tag"] == "position":
            assert f" {relation(objects[1], objects[0])} " in prompt["prompt"]
    assert len({obj["colour"] for record in truth[1][:120] for obj in record["objects"]}) == 10  # the rest is drawn


@pytest.mark.parametrize(("image_size", "num"), [(48, 100), (64, 50)], ids=["48 pixels", "64 pixels"])
def test_the_reader_is_right_in_every_category(image_size: int, num: int) -> None:
    prompts = scene_prompts(num_per_category=num, seed=image_size)
    pictures = render(ground_truth_scenes(prompts, seed=image_size), image_size=image_size)
    shares = score_scenes(prompts, read_scenes(pictures)).shares()
    assert set(shares) == {*TAGS, "overall"}
    assert min(shares.values()) >= 0.99


def test_pictures_of_other_prompts_are_wrong(truth: tuple[list[dict], list[dict]]) -> None:
    prompts, scenes = truth
    shifted = [objects_of_record(record) for record in scenes[1:] + scenes[:1]]
    assert score_scenes(prompts, shifted).shares()["overall"] < 0.15


def test_ground_truth_is_the_same_at_every_call() -> None:
    first, second = (render(ground_truth_scenes(PROMPTS[::20], seed=0), image_size=32) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, render(ground_truth_scenes(PROMPTS[::20], seed=1), image_size=32))


@pytest.mark.parametrize(
    ("include", "message"),
    [
        pytest.param([{"class": "dog", "count": 1}], "'a thing' .dog.", id="a class of COCO"),
        pytest.param([{"class": "star", "count": 1, "color": "mauve"}], "mauve", id="another colour"),
        pytest.param([{"class": "star", "count": 5}], "5 objects", id="too many"),
        pytest.param([{"class": "star", "count": 2}, {"class": "ring", "count": 1, "position": ["above", 0]},
                      {"class": "cross", "count": 1}], "another way", id="three classes"),
    ],
)  # fmt: skip
def test_ground_truth_refuses_other_prompts(include: list[dict], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ground_truth_scenes([{"tag": "colors", "include": include, "prompt": "a thing"}], seed=0)


def test_chance_is_the_mean_over_all_pairs() -> None:
    prompts, scenes = scene_prompts(num_per_category=12, seed=2), records(60)
    expected = {
        tag: [judge(p, objects_of_record(r)).correct for p in prompts if p["tag"] == tag for r in scenes]
        for tag in TAGS
    }
    found = chance(prompts, scenes)
    for tag, verdicts in expected.items():
        assert found[tag] == pytest.approx(sum(verdicts) / len(verdicts), abs=1e-12)
    assert found["overall"] == pytest.approx(sum(found[tag] for tag in TAGS) / 6)
    with pytest.raises(UserError, match="give some records"):
        chance(prompts, [])


def test_chance_by_hand() -> None:
    single = [prompt for prompt in scene_prompts(num_per_category=10, seed=0) if prompt["tag"] == "single_object"]
    assert chance(single, records(50, counts=(1.0, 0.0, 0.0, 0.0))) == pytest.approx(
        {"single_object": 0.1, "overall": 0.1}  # one shape of ten, whichever it is
    )


def test_the_overall_score_weighs_categories_alike() -> None:
    score = SceneScore(correct={"colors": 1, "counting": 9}, count={"colors": 2, "counting": 10})
    assert score.shares() == pytest.approx({"colors": 0.5, "counting": 0.9, "overall": 0.7})
