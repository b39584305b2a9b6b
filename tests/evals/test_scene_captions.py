"""Captions of scenes: every caption the data can have is understood, and judged as it deserves; evaluation by hand."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from tiny_sources import Halver, ListSource, png
from tiny_writers import Speaker

from qlip.core.errors import UserError
from qlip.data.items import Item
from qlip.data.scene_prompts import prompt_captions
from qlip.data.scene_text import dense_caption, medium_caption, shape_caption, short_caption
from qlip.data.scenes import COLOUR_NAMES, SceneConfig, sample_scenes, scene_records
from qlip.evals.inputs import EvalInput
from qlip.evals.protocols import find_protocol
from qlip.evals.scene_captions import SceneCaptionEvaluator
from qlip.evals.scene_sentences import FIGURES, judge_caption, most_frequent_answers, read_caption
from qlip.evals.written import MOST_BYTES, text_rows, texts_of

CPU = torch.device("cpu")
RECORDS = scene_records(sample_scenes(500, split="test", shard=0, config=SceneConfig()))
STAR = {"shape": "star", "colour": "red", "size": "small", "x": 0.1, "y": 0.1, "radius": 0.16}
RING = {"shape": "ring", "colour": "blue", "size": "large", "x": 0.8, "y": 0.8, "radius": 0.3}
SCENE = {"objects": [STAR, RING], "background": "sky blue", "texture": "plain", "class_name": "red star"}


def scenes(records: list[dict[str, Any]]) -> ListSource:
    """Pictures that the speaker knows."""
    pictures = [png(np.full((16, 16, 3), i, np.uint8)) for i in range(len(records))]
    return ListSource(
        [
            Item(key=f"{i:04d}", image=picture, record={"scene": record})
            for i, (picture, record) in enumerate(zip(pictures, records, strict=True))
        ]
    )


def run(source: ListSource, model: Any, **options: Any) -> tuple[dict[str, float], SceneCaptionEvaluator]:
    evaluator = SceneCaptionEvaluator(find_protocol("scenes-captions-v1"), EvalInput(source=source, **options))
    return evaluator.run(model, CPU), evaluator


def test_dense_captions_say_everything():
    for record in RECORDS:
        assert judge_caption(dense_caption(record), record) == dict.fromkeys(FIGURES, True)


def test_every_other_caption_is_right_in_what_it_says():
    for number, record in enumerate(RECORDS):
        random, objects = Random(number), record["objects"]
        captions = [make(record, random) for make in (shape_caption, short_caption, medium_caption) for _ in range(4)]
        for caption in captions + list(prompt_captions(record).values()):
            judged, words = judge_caption(caption, record), caption.split()
            names_shapes = not caption.startswith("something") and "shape" not in words
            names_colours = sum(word in COLOUR_NAMES for word in words) - caption.count("sky blue") == len(objects)
            wanted = {"parsed": True, "objects": names_shapes, "counts": True, "all": False}
            assert judged == wanted | {"colours": names_shapes and names_colours}, (caption, record)


@pytest.mark.parametrize(
    "caption",
    [
        "",
        ".",
        "a red",
        "a dog",
        "a red star and",
        "a red star, ",
        "five stars",
        "no stars",
        "two",
        "two shapes: ",
        "a red star of a blue ring",
        "a star red",
        "a red star at the middle",
        "something",
        "two shapes on a red background: a star and a ring",
        "a red star" * 300,
    ],
)
def test_other_words_are_not_understood_and_all_is_wrong(caption):
    assert read_caption(caption) is None
    assert judge_caption(caption, SCENE) == dict.fromkeys(FIGURES, False)


@pytest.mark.parametrize(
    ("caption", "right"),
    [
        (" A Red  star AND a blue ring. ", "objects colours counts"),
        ("a blue ring and a red star", "objects colours counts"),
        ("a blue star and a red ring", "objects counts"),
        ("a red star and a ring", "objects counts"),
        ("a red star", ""),
        ("two stars", "counts"),
        ("a star, a ring and a star", ""),
        ("three shapes: a red star and a blue ring", "objects colours"),
        ("a red star left of a blue ring", "objects colours counts"),
        ("a star and something blue", None),
    ],
)
def test_a_caption_gets_what_it_deserves(caption, right):
    wanted = dict.fromkeys(FIGURES, False)
    wanted |= {} if right is None else dict.fromkeys(["parsed", *right.split()], True)
    assert judge_caption(caption, SCENE) == wanted


@pytest.mark.parametrize(
    ("change", "figures"),
    [
        (("plain", "striped"), ("parsed", "objects", "colours", "counts")),
        (("top left", "bottom"), ("parsed", "objects", "colours", "counts")),
        (("small", "large"), ("parsed", "objects", "colours", "counts")),
        (("sky blue", "mint"), ("parsed", "objects", "colours", "counts")),
        (("red", "pink"), ("parsed", "objects", "counts")),
        (("star", "ring"), ("parsed", "counts")),
        (("two shapes", "four shapes"), ("parsed", "objects", "colours")),
    ],
)
def test_one_wrong_word_of_a_dense_caption(change, figures):
    caption = dense_caption(SCENE)
    assert change[0] in caption
    judged = judge_caption(caption.replace(*change), SCENE)
    assert {name for name in FIGURES if judged[name]} == set(figures)


def test_figures_are_shares_beside_the_most_frequent_answer(tmp_path):
    records = RECORDS[:40]
    says = [dense_caption(record) for record in records[:20]] + ["a dog"] * 10 + ["\n a star \0\n", *[""] * 9]
    model = Speaker(says)
    figures, evaluator = run(scenes(records), model, batch_size=7)
    said_cleanly = [*says[:30], "a star", *[""] * 9]
    for name in FIGURES:
        found = [judge_caption(said, record)[name] for said, record in zip(said_cleanly, records, strict=True)]
        assert figures[name] == sum(found) / 40
    assert "parsed_baseline" not in figures and figures["parsed"] == 21 / 40
    card = evaluator.card()
    assert (card["count"], card["empty_captions"], card["decoding"], card["complete"]) == (40, 9, "greedy", True)
    assert (card["baseline"], card["duplicates"], len(card["pixels_sha256"])) == ("most frequent answer", 0, 64)
    assert {name: figures[f"{name}_baseline"] for name in FIGURES[1:]} == most_frequent_answers(records)
    assert len(set(model.seeds)) == len(model.seeds) == 40 and {one.temperature for one in model.settings} == {0}
    by_number = evaluator.details["by_number_of_objects"]
    assert sum(entry["scenes"] for entry in by_number.values()) == 40
    assert evaluator.details["captions_that_say_all_colours"] == 20 and len(evaluator.details["wrong"]) == 10
    evaluator.write_answers(tmp_path)
    rows = json.loads((tmp_path / "scenes-captions-v1_captions.json").read_text())
    assert [row["image_id"] for row in rows] == list(range(40)) and rows[30]["caption"] == "a star"
    assert run(scenes(records), model, max_samples=30)[1].card()["complete"] is False


def test_no_caption_for_all_scenes_beats_the_most_frequent_answer():
    """Of the captions that say all of one scene, and of one written by hand."""
    records = [*RECORDS[:20], *RECORDS[:2], SCENE, SCENE, SCENE]
    shares = [
        {
            name: sum(judge_caption(dense_caption(said), record)[name] for record in records) / len(records)
            for name in FIGURES
        }
        for said in records
    ]
    wanted = {name: max(share[name] for share in shares) for name in FIGURES[1:]}
    assert most_frequent_answers(records) == wanted and wanted["all"] == 3 / len(records)
    turned = SCENE | {"objects": [RING, STAR]}
    assert most_frequent_answers([SCENE, turned]) == dict.fromkeys(FIGURES[1:], 1.0)


def test_a_broken_picture_leaves_its_number_free(tmp_path):
    source = scenes(RECORDS[:4])
    source.found[1] = Item(key="0001", image=b"broken", record={"scene": RECORDS[1]})
    evaluator = run(source, Speaker(["a star"] * 4), max_skip_share=0.5)[1]
    evaluator.write_answers(tmp_path)
    rows = json.loads((tmp_path / "scenes-captions-v1_captions.json").read_text())
    assert [row["image_id"] for row in rows] == [0, 2, 3]


def test_a_finished_part_is_not_written_again(tmp_path):
    source, model = scenes(RECORDS[:5]), Speaker(["a star"] * 5)
    first, _ = run(source, model, folder=tmp_path)
    again, evaluator = run(source, Speaker([]), folder=tmp_path)
    assert again == first and evaluator.card()["resumed_parts"] == 1


def test_other_models_and_other_data_are_refused_before_any_work():
    with pytest.raises(UserError, match=r"a Halver writes no captions: leave scenes-captions-v1 out.*unified model"):
        run(scenes(RECORDS[:3]), Halver())
    model = Speaker(["a star"] * 3)
    for source, said in (
        (ListSource([Item(key="a", image=b"")]), "needs scene shards"),
        (scenes(RECORDS[:1]), "1 scenes; give at least 2"),
        (ListSource([]), "0 scenes"),
    ):
        with pytest.raises(UserError, match=said) as error:
            run(source, model)
        assert "\n" not in str(error.value) and not model.seeds


def test_texts_survive_as_rows():
    texts = ["", "a star", "Zwölf \N{GRINNING FACE}", "x" * MOST_BYTES, "ü" * MOST_BYTES, "a\nb\u2028 c", "\ud800"]
    wanted = [*texts[:4], "ü" * (MOST_BYTES // 2), "a b c", "?"]
    assert texts_of(text_rows(texts)) == wanted
    assert texts_of(text_rows([])) == []
