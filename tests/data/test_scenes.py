"""Scenes: reproducible, within the picture, never overlapping, painted in the named colours, truthfully described."""

import re
from itertools import pairwise
from random import Random

import pytest
import torch
from torch import Tensor

from qlip.data.scene_shapes import SHAPES, coverage
from qlip.data.scene_text import (
    NUMBER_WORDS,
    dense_caption,
    medium_caption,
    place,
    plural,
    question_answers,
    relation,
    short_caption,
    story,
)
from qlip.data.scenes import (
    COLOUR_NAMES,
    COLOURS,
    HELD_OUT_PAIRS,
    SHAPE_NAMES,
    SceneBatch,
    SceneConfig,
    render,
    sample_scenes,
    scene_records,
)

GENEVAL_COLOURS = {"red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"}
SINGULAR = {plural(shape): shape for shape in SHAPE_NAMES} | {shape: shape for shape in SHAPE_NAMES}
ALL_TEXTS = {
    "short": short_caption,
    "medium": medium_caption,
    "dense": lambda record, random: dense_caption(record),
    "story": story,
}


def scenes_of(split: str, *, num: int = 500, shard: int = 0, seed: int = 0) -> SceneBatch:
    return sample_scenes(num, split=split, shard=shard, config=SceneConfig(seed=seed))


def masks_of(scenes: SceneBatch, *, image_size: int, zoom: float = 1.0) -> Tensor:
    """(b, k, h, w) true coverage of every object; zoom 0.5 shows the picture in the middle of one twice its side."""
    masks = torch.zeros(*scenes.shape.shape, image_size, image_size)
    for slot in range(scenes.shape.shape[1]):
        drawn = (scenes.num_objects > slot).nonzero().squeeze(-1)
        masks[drawn, slot] = coverage(
            scenes.shape[drawn, slot],
            (scenes.centre[drawn, slot] - 0.5) * zoom + 0.5,
            scenes.radius[drawn, slot] * zoom,
            scenes.angle[drawn, slot],
            image_size=image_size,
        )
    return masks


def pairs_of(scenes: SceneBatch) -> set[tuple[str, str]]:
    return {(obj["colour"], obj["shape"]) for record in scene_records(scenes) for obj in record["objects"]}


# --- drawing ---------------------------------------------------------------------------------------------------


def test_a_shard_is_a_pure_function_of_seed_split_and_number():
    first, again = scenes_of("train", num=50, shard=3), scenes_of("train", num=50, shard=3)
    assert scene_records(first) == scene_records(again)
    assert torch.equal(render(first, image_size=32), render(again, image_size=32))


def test_another_seed_split_or_number_gives_other_scenes():
    first = scene_records(scenes_of("train", num=50))
    for other in (
        scenes_of("train", num=50, shard=1),
        scenes_of("test", num=50),
        scenes_of("train", num=50, seed=1),
    ):
        assert scene_records(other) != first


def test_vocabulary():
    assert len(SHAPE_NAMES) >= 10
    assert set(COLOUR_NAMES) == GENEVAL_COLOURS
    assert len(COLOUR_NAMES) == 10


def test_train_never_shows_the_held_out_pairs_and_test_shows_all_pairs():
    train = set().union(*(pairs_of(scenes_of("train", num=2_000, shard=shard)) for shard in range(3)))
    test = set().union(*(pairs_of(scenes_of("test", num=2_000, shard=shard)) for shard in range(3)))
    every_pair = {(colour, shape) for colour in COLOUR_NAMES for shape in SHAPE_NAMES}
    assert train == every_pair - HELD_OUT_PAIRS
    assert test == every_pair


def test_every_shape_and_every_colour_lacks_one_pair():
    assert {shape for _, shape in HELD_OUT_PAIRS} == set(SHAPE_NAMES)
    assert {colour for colour, _ in HELD_OUT_PAIRS} == set(COLOUR_NAMES)
    assert len(HELD_OUT_PAIRS) == 10


def test_records_hold_what_was_drawn():
    scenes = scenes_of("test", num=50)
    for i, record in enumerate(scene_records(scenes)):
        assert len(record["objects"]) == scenes.num_objects[i]
        assert record["class_name"] == f"{record['objects'][0]['colour']} {record['objects'][0]['shape']}"
        for j, obj in enumerate(record["objects"]):
            assert obj["colour"] == COLOUR_NAMES[scenes.colour[i, j]]
            assert abs(obj["x"] - scenes.centre[i, j, 0].item()) <= 1e-4
            assert abs(obj["y"] - scenes.centre[i, j, 1].item()) <= 1e-4


def test_counts_follow_the_asked_probabilities():
    config = SceneConfig(object_counts=(0.0, 0.0, 1.0, 0.0))
    assert (sample_scenes(100, split="train", shard=0, config=config).num_objects == 3).all()


@pytest.mark.parametrize("num", [1, 2, 5])
def test_small_batches_of_any_mix_of_counts_can_be_drawn(num):
    for shard in range(20):
        assert len(scene_records(scenes_of("train", num=num, shard=shard))) == num


def test_objects_never_overlap():
    for shard in range(2):
        masks = masks_of(scenes_of("test", num=1_000, shard=shard), image_size=64)
        assert masks.sum(1).max() <= 1 + 1e-5


@pytest.mark.parametrize("shape", SHAPE_NAMES)
def test_a_shape_reaches_no_further_than_its_radius_along_either_axis(shape):
    angle = torch.linspace(-0.17, 0.17, 9)
    index, centre = torch.full((9,), SHAPE_NAMES.index(shape)), torch.full((9, 2), 0.5)
    covered = coverage(index, centre, torch.full((9,), 0.4), angle, image_size=512).amax(0) > 0.5
    offset = ((torch.arange(512) + 0.5) / 512 - 0.5).abs() / 0.4
    assert offset[covered.any(0)].max() <= 1
    assert offset[covered.any(1)].max() <= 1


def test_objects_keep_their_radius_to_the_border_and_several_to_their_quarter_too():
    scenes = scenes_of("test", num=5_000)
    drawn = torch.arange(4) < scenes.num_objects[:, None]
    centre, radius = scenes.centre, scenes.radius[..., None]
    assert ((centre - radius)[drawn] >= 0).all()
    assert ((centre + radius)[drawn] <= 1).all()
    several = drawn & (scenes.num_objects > 1)[:, None]
    from_middle = (centre - 0.5).abs()
    assert ((from_middle - radius)[several] >= 0).all()
    quarter = (centre > 0.5).long() @ torch.tensor([1, 2])
    for i in several.any(1).nonzero().squeeze(-1).tolist():
        mine = quarter[i][drawn[i]]
        assert len(mine.unique()) == len(mine)


def test_objects_lie_inside_the_picture():
    masks = masks_of(scenes_of("test", num=1_000), image_size=128, zoom=0.5)
    outside = masks.clone()
    outside[..., 31:97, 31:97] = 0  # the picture and the pixel its edge is softened over
    assert outside.max() == 0


@pytest.mark.parametrize("shape", SHAPE_NAMES)
def test_anti_aliased_area_at_64_pixels_is_the_true_area(shape):
    index = torch.tensor([SHAPE_NAMES.index(shape)] * 6)
    centre = 0.5 + 0.02 * torch.rand(6, 2)
    radius = torch.tensor([0.13, 0.16, 0.2, 0.22, 0.3, 0.36])
    angle = torch.linspace(-0.17, 0.17, 6)
    areas = [coverage(index, centre, radius, angle, image_size=size).mean((1, 2)) for size in (64, 1024)]
    torch.testing.assert_close(areas[0], areas[1], rtol=0.02, atol=0)


@pytest.mark.parametrize("shape", SHAPE_NAMES)
def test_a_shape_is_inside_where_its_distance_is_negative(shape):
    pixel = (torch.arange(256) + 0.5) / 256
    x, y = (pixel[None, None, :] - 0.5) / 0.3, (pixel[None, :, None] - 0.5) / 0.3
    inside = SHAPES[shape](x.expand(1, 256, 256), y.expand(1, 256, 256)) < 0
    index = torch.tensor([SHAPE_NAMES.index(shape)])
    covered = coverage(index, torch.tensor([[0.5, 0.5]]), torch.tensor([0.3]), torch.zeros(1), image_size=256)
    assert torch.equal(covered > 0.5, inside)
    assert 0.1 < inside.float().mean() / 0.36 < 0.7  # of the square around it: neither empty nor full


def test_rendered_pixels_are_nearest_to_the_named_colour():
    scenes = scenes_of("test", num=500)
    pictures = render(scenes, image_size=64)
    masks = masks_of(scenes, image_size=64)
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    image, slot, row, column = (masks == 1).nonzero(as_tuple=True)
    painted = pictures[image, :, row, column].float()
    named = torch.cdist(painted, palette).argmin(-1)
    assert (named == scenes.colour[image, slot]).float().mean() >= 0.99


def test_pictures_are_uint8_of_the_asked_size():
    pictures = render(scenes_of("train", num=3), image_size=48)
    assert pictures.dtype == torch.uint8
    assert pictures.shape == (3, 3, 48, 48)


# --- texts -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return scene_records(scenes_of("test", num=1_500))


def words_about_objects(text: str, record: dict) -> list[str]:
    """Lower-case words, without the background's name ("sky blue" is not a blue object)."""
    return re.findall(r"[a-z]+", text.lower().replace(record["background"], ""))


@pytest.mark.parametrize("kind", ALL_TEXTS)
def test_texts_name_only_what_is_there(records, kind):
    random = Random(0)
    for record in records:
        words = words_about_objects(ALL_TEXTS[kind](record, random), record)
        objects = record["objects"]
        assert {SINGULAR[word] for word in words if word in SINGULAR} <= {obj["shape"] for obj in objects}
        assert {word for word in words if word in COLOURS} <= {obj["colour"] for obj in objects}
        pairs = {(a, SINGULAR[b]) for a, b in pairwise(words) if a in COLOURS and b in SINGULAR}
        assert pairs <= {(obj["colour"], obj["shape"]) for obj in objects}


@pytest.mark.parametrize("kind", ALL_TEXTS)
def test_number_words_count_the_objects(records, kind):
    random = Random(1)
    num_counted = 0
    for record in records:
        text = ALL_TEXTS[kind](record, random)
        counted = re.findall(r"\b(one|two|three|four) (?:shapes?|of them|" + "|".join(SINGULAR) + r")\b", text)
        num_counted += len(counted)
        assert all(NUMBER_WORDS.index(word) == len(record["objects"]) for word in counted)
    assert num_counted > 10


def lies(a: dict, b: dict, words: str) -> bool:
    """The relation by its meaning: the named direction is the true one, and no smaller than the other offset."""
    dx, dy = a["x"] - b["x"], a["y"] - b["y"]
    offset = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[words]
    return offset > 0 and offset >= max(abs(dx), abs(dy))


def in_place(obj: dict, words: str) -> bool:
    """A place by its meaning, on the picture's thirds or so."""
    row = "top" if obj["y"] < 0.38 else "bottom" if obj["y"] > 0.62 else None
    column = "left" if obj["x"] < 0.38 else "right" if obj["x"] > 0.62 else None
    return words.split() == ([w for w in (row, column) if w] or ["center"])


def test_relations_agree_with_the_coordinates(records):
    several = [record["objects"] for record in records if len(record["objects"]) > 1]
    for objects in several:
        assert lies(objects[0], objects[1], relation(objects[0], objects[1]))
    assert {relation(objects[0], objects[1]) for objects in several} == {"left of", "right of", "above", "below"}


def test_medium_captions_of_two_objects_state_a_true_relation(records):
    pattern = re.compile(r"an? (\w+) (\w+) (left of|right of|above|below) an? (\w+) (\w+)")
    pairs = [record for record in records if len(record["objects"]) == 2]
    for record in pairs:
        a, b = record["objects"]
        found = pattern.fullmatch(medium_caption(record, Random(0)))
        assert found.group(1, 2) == (a["colour"], a["shape"])
        assert found.group(4, 5) == (b["colour"], b["shape"])
        assert lies(a, b, found.group(3))
    assert len(pairs) > 100


def test_dense_captions_tell_every_object_size_place_and_the_background(records):
    for record in records:
        text = dense_caption(record)
        head, things = text.split(": ")
        assert head.endswith(f"{record['texture']} {record['background']} background")
        told = re.findall(r"an? (small|medium|large) (\w+) (\w+) at the ([a-z ]+?)(?=,| and |$)", things)
        assert [(size, colour, shape) for size, colour, shape, _ in told] == [
            (obj["size"], obj["colour"], obj["shape"]) for obj in record["objects"]
        ]
        assert all(in_place(obj, words) for obj, (*_, words) in zip(record["objects"], told, strict=True))


def right_answer(question: str, objects: list[dict]) -> str:
    """The answer worked out from the question's words and the record alone."""
    if question == "How many shapes are there?":
        return ["zero", "one", "two", "three", "four"][len(objects)]
    if found := re.fullmatch(r"Is there an? (\w+) (\w+)\?", question):
        return "yes" if any((obj["colour"], obj["shape"]) == found.groups() for obj in objects) else "no"
    if found := re.fullmatch(r"What color is the (\w+)\?", question):
        (obj,) = [obj for obj in objects if obj["shape"] == found[1]]  # one only, or the question has no answer
        return obj["colour"]
    if found := re.fullmatch(r"Where is the (\w+)\?", question):
        (obj,) = [obj for obj in objects if obj["shape"] == found[1]]
        return next(w for w in PLACES if in_place(obj, w))
    found = re.fullmatch(r"Where is the (\w+) (\w+) seen from the (\w+) (\w+)\?", question)
    (a,) = [obj for obj in objects if (obj["colour"], obj["shape"]) == found.group(1, 2)]
    (b,) = [obj for obj in objects if (obj["colour"], obj["shape"]) == found.group(3, 4)]
    return next(words for words in ("left of", "right of", "above", "below") if lies(a, b, words))


PLACES = ["center", "top", "bottom", "left", "right", "top left", "top right", "bottom left", "bottom right"]


def test_questions_have_their_one_right_answer(records):
    random = Random(2)
    answers: dict[str, set[str]] = {}
    for record in records:
        for item in question_answers(record, random, colours=COLOUR_NAMES, shapes=SHAPE_NAMES):
            assert item["answer"] == right_answer(item["question"], record["objects"])
            answers.setdefault(item["kind"], set()).add(item["answer"])
    assert set(answers) == {"existence", "count", "colour", "position"}
    assert answers["existence"] == {"yes", "no"}
    assert answers["colour"] == set(COLOUR_NAMES)


def test_places_cover_the_picture():
    named = {place({"x": x, "y": y}) for x in (0.1, 0.5, 0.9) for y in (0.1, 0.5, 0.9)}
    assert named == set(PLACES)


def test_texts_are_a_function_of_the_record_and_the_random_seed(records):
    def texts(seed: int) -> list:
        random = Random(seed)
        written = [[make(record, random) for make in ALL_TEXTS.values()] for record in records[:100]]
        asked = [question_answers(r, random, colours=COLOUR_NAMES, shapes=SHAPE_NAMES) for r in records[:100]]
        return [written, asked]

    assert texts(7) == texts(7)
    assert texts(7) != texts(8)


def test_articles_and_plurals_read_well(records):
    random = Random(3)
    for record in records[:300]:
        for make in ALL_TEXTS.values():
            text = make(record, random)
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text)
            assert not re.search(r"\bcrosss\b|  ", text)
