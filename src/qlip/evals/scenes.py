"""GenEval's six categories on scenes: prompts, judgement of the objects found, chance, and scenes that are right.

Prompts are records as in GenEval's evaluation_metadata.jsonl with shapes for classes (arXiv 2310.11513; facts:
djghosh13/geneval). Judged as there, with two differences: a place or a colour counts when any objects of the class have
it, while GenEval asks the surest ones only; and places are told apart as captions tell them, by the larger offset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import permutations, product
from typing import NamedTuple

import torch
from torch import Tensor

from qlip.core.errors import UserError
from qlip.data.scene_prompts import coloured, coloured_pair, counted, placed, single_object, two_objects
from qlip.data.scene_text import relation
from qlip.data.scenes import (
    COLOUR_NAMES,
    COLOURS,
    HELD_OUT_PAIRS,
    MAX_OBJECTS,
    SHAPE_NAMES,
    SceneBatch,
    SceneConfig,
    sample_scenes,
    scene_generator,
    scene_records,
)
from qlip.evals.geneval import RELATIONS, TAGS
from qlip.evals.scene_reader import FoundObject

DIAGONAL = 0.02  # share of the side; offsets that differ by less lie on the diagonal, where both words are true


class Judged(NamedTuple):
    """Whether a picture shows what its prompt says."""

    correct: bool
    reason: str
    """What is missing or too much, as `expected star>=2, found 1`; empty when correct."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneScore:
    """Pictures that show what their prompts say, per tag."""

    correct: dict[str, int]
    """By tag."""
    count: dict[str, int]
    """By tag, all pictures."""

    def shares(self) -> dict[str, float]:
        """The share that is right, by tag, and `overall`: the mean over the tags, as GenEval's."""
        shares = {tag: self.correct[tag] / self.count[tag] for tag in self.count}
        return {**shares, "overall": sum(shares.values()) / len(shares)}


def scene_prompts(*, num_per_category: int, seed: int) -> list[dict]:
    """Prompts in the order of `geneval.TAGS`: records `tag`, `include`, `exclude` for counts, `prompt`.

    Each category is a seeded shuffle of all its prompts, which starts over, shuffled anew, once all were taken:
    there are 10 single objects, 90 pairs, 30 counts, 100 colours, 360 places and 8,100 coloured pairs. Pairs of colour
    and shape that trainings never see may occur, see `has_unseen_pair`. Raises `UserError` for a number below 1.
    """
    if num_per_category < 1:
        raise UserError(f"{num_per_category} prompts per category: give at least 1")
    prompts = []
    for tag, known in _all_prompts().items():
        generator = scene_generator("prompts", seed, tag)
        rounds = -(-num_per_category // len(known))
        order = torch.cat([torch.randperm(len(known), generator=generator) for _ in range(rounds)])
        prompts += [known[index] for index in order[:num_per_category].tolist()]
    return prompts


def _all_prompts() -> dict[str, list[dict]]:
    """Every prompt there is, by tag."""

    def prompt(tag: str, text: str, *include: dict, exclude: tuple[dict, ...] = ()) -> dict:
        record: dict = {"tag": tag, "include": [{"class": "", "count": 1} | wanted for wanted in include]}
        return record | ({"exclude": list(exclude)} if exclude else {}) | {"prompt": text}

    shape_pairs, colour_pairs = list(permutations(SHAPE_NAMES, 2)), list(permutations(COLOUR_NAMES, 2))
    counts = list(product(range(2, MAX_OBJECTS + 1), SHAPE_NAMES))
    by_tag = {
        "single_object": [prompt("single_object", single_object(shape), {"class": shape}) for shape in SHAPE_NAMES],
        "two_object": [prompt("two_object", two_objects(a, b), {"class": a}, {"class": b}) for a, b in shape_pairs],
        "counting": [
            prompt(
                "counting",
                counted(num, shape),
                {"class": shape, "count": num},
                exclude=({"class": shape, "count": num + 1},),
            )
            for num, shape in counts
        ],
        "colors": [
            prompt("colors", coloured(colour, shape), {"class": shape, "color": colour})
            for colour, shape in product(COLOUR_NAMES, SHAPE_NAMES)
        ],
        "position": [
            prompt("position", placed(a, place, b), {"class": b}, {"class": a, "position": [place, 0]})
            for place, (a, b) in product(RELATIONS, shape_pairs)
        ],
        "color_attr": [
            prompt("color_attr", coloured_pair(c, a, d, b), {"class": a, "color": c}, {"class": b, "color": d})
            for (a, b), (c, d) in product(shape_pairs, colour_pairs)
        ],
    }
    return {tag: by_tag[tag] for tag in TAGS}


def has_unseen_pair(prompt: dict) -> bool:
    """Whether a prompt asks for a pair of colour and shape that the train split never shows."""
    return any((wanted.get("color"), wanted["class"]) in HELD_OUT_PAIRS for wanted in prompt["include"])


def judge(prompt: dict, objects: Sequence[FoundObject]) -> Judged:
    """Whether these objects are what the prompt includes, at least as many, and not as many as it excludes."""
    reasons = []
    groups: list[list[FoundObject] | None] = []  # None where the clause is not met, and no place can refer to it
    for wanted in prompt["include"]:
        name, count = wanted["class"], wanted["count"]
        group = [obj for obj in objects if obj.shape == name]
        missing = f"expected {name}>={count}, found {len(group)}" if len(group) < count else ""
        if not missing and "color" in wanted:
            coloured_so = [obj for obj in group if obj.colour == wanted["color"]]
            if len(coloured_so) < count:
                seen = ", ".join(sorted(obj.colour for obj in group))
                missing = f"expected {wanted['color']} {name}>={count}, found {len(coloured_so)} ({seen})"
            group = coloured_so
        if not missing and "position" in wanted:
            place, index = wanted["position"]
            targets = groups[index]
            if targets is None:
                missing = f"no target for {name} to be {place}"
            elif not any(obj is not to and place in _places(obj, to) for obj in group for to in targets):
                missing = f"expected {name} {place} {prompt['include'][index]['class']}, found none"
        groups.append(None if missing else group)
        reasons += [missing] if missing else []
    for unwanted in prompt.get("exclude", []):
        found = sum(obj.shape == unwanted["class"] for obj in objects)
        if found >= unwanted["count"]:
            reasons.append(f"expected {unwanted['class']}<{unwanted['count']}, found {found}")
    return Judged(correct=not reasons, reason="; ".join(reasons))


def _places(obj: FoundObject, target: FoundObject) -> set[str]:
    """How an object lies to another: one relation, or two on the diagonal."""
    here, there = {"x": obj.x, "y": obj.y}, {"x": target.x, "y": target.y}
    across, down = obj.x - target.x, obj.y - target.y
    if abs(abs(across) - abs(down)) >= DIAGONAL:
        return {relation(here, there)}
    return {"left of" if across < 0 else "right of", "above" if down < 0 else "below"}


def score_scenes(prompts: Sequence[dict], found: Sequence[Sequence[FoundObject]]) -> SceneScore:
    """How many pictures show what their prompts say; `found[i]` are the objects of the picture of `prompts[i]`."""
    score = SceneScore(correct={}, count={})
    for prompt, objects in zip(prompts, found, strict=True):
        tag = prompt["tag"]
        score.count[tag] = score.count.get(tag, 0) + 1
        score.correct[tag] = score.correct.get(tag, 0) + judge(prompt, objects).correct
    return score


def objects_of_record(record: dict) -> list[FoundObject]:
    """The true objects of a scene, out of its record, as if they had been read perfectly."""
    return [
        FoundObject(
            shape=obj["shape"], colour=obj["colour"], x=obj["x"], y=obj["y"], radius=obj["radius"], confidence=1.0
        )
        for obj in record["objects"]
    ]


def chance(prompts: Sequence[dict], records: Sequence[dict]) -> dict[str, float]:
    """By tag and `overall`, the share that is right when pictures pay no regard to their prompts.

    That is the mean over all pairs of a prompt and a true scene (a record of `scenes.scene_records`). Raises
    `UserError` without any scene.
    """
    if not records:
        raise UserError("chance needs scenes to draw pictures from: give some records")
    scenes = [objects_of_record(record) for record in records]
    share: dict[str, float] = {}  # by text, since prompts of small categories come several times
    for prompt in prompts:
        if prompt["prompt"] not in share:
            share[prompt["prompt"]] = sum(judge(prompt, objects).correct for objects in scenes) / len(scenes)
    by_tag: dict[str, list[float]] = {}
    for prompt in prompts:
        by_tag.setdefault(prompt["tag"], []).append(share[prompt["prompt"]])
    shares = {tag: sum(values) / len(values) for tag, values in by_tag.items()}
    return {**shares, "overall": sum(shares.values()) / len(shares)}


def ground_truth_scenes(prompts: Sequence[dict], *, seed: int) -> SceneBatch:
    """One scene for each prompt that shows exactly what it says: what a perfect generator would paint.

    Object i is the i-th that the prompt includes; all that it leaves open is drawn as in the test split. Raises
    `UserError` for what is no prompt of `scene_prompts`.
    """
    clauses = [_objects_wanted(prompt) for prompt in prompts]
    scenes = _layouts([len(wanted) for wanted in clauses], [_place_wanted(prompt) for prompt in prompts], seed=seed)
    palette = torch.tensor(list(COLOURS.values())) / 255
    jitter = scenes.rgb - palette[scenes.colour]
    for i, wanted in enumerate(clauses):
        for slot, clause in enumerate(wanted):
            scenes.shape[i, slot] = SHAPE_NAMES.index(clause["class"])
            if "color" in clause:
                scenes.colour[i, slot] = COLOUR_NAMES.index(clause["color"])
    scenes.rgb = (palette[scenes.colour] + jitter).clamp(0, 1)
    return scenes


def _objects_wanted(prompt: dict) -> list[dict]:
    """The clause of every object of a scene. Raises `UserError` for what no scene can show."""
    wanted = [clause for clause in prompt["include"] for _ in range(clause["count"])]
    unknown = {clause["class"] for clause in wanted} - set(SHAPE_NAMES)
    unknown |= {clause["color"] for clause in wanted if "color" in clause} - set(COLOUR_NAMES)
    problem = ", ".join(sorted(unknown)) or ("" if 1 <= len(wanted) <= MAX_OBJECTS else f"{len(wanted)} objects")
    if problem:
        raise UserError(f"no scene shows {prompt['prompt']!r:.60} ({problem}): take prompts of `scene_prompts`")
    return wanted


def _place_wanted(prompt: dict) -> str:
    """How the second object must lie to the first; empty where the prompt leaves it open."""
    places = [(i, clause["position"]) for i, clause in enumerate(prompt["include"]) if "position" in clause]
    if places and (len(prompt["include"]) != 2 or [places[0][0], places[0][1][1]] != [1, 0]):
        raise UserError(f"{prompt['prompt']!r:.60} places objects in another way: take prompts of `scene_prompts`")
    return places[0][1][0] if places else ""


def _layouts(counts: list[int], places: list[str], *, seed: int) -> SceneBatch:
    """Scenes of so many objects each, in such places."""
    g = scene_generator("ground truth", seed)
    num = len(counts) + 128  # scenes of each count to choose from: some fit any place
    pools = [
        sample_scenes(num, split="test", shard=count, config=SceneConfig(seed=seed, object_counts=tuple(weights)))
        for count, weights in enumerate(torch.eye(MAX_OBJECTS).tolist())
    ]
    by_place: dict[str, list[int]] = {place: [] for place in RELATIONS} | {"": list(range(num))}
    for row, record in enumerate(scene_records(pools[1])):
        by_place[relation(record["objects"][1], record["objects"][0])].append(row)
    rows = []
    for count, place in zip(counts, places, strict=True):
        fitting = by_place[place]
        rows.append((count - 1) * num + fitting[int(torch.randint(len(fitting), (1,), generator=g))])
    names = [field.name for field in fields(SceneBatch) if field.name != "noise_seed"]
    tensors: dict[str, Tensor] = {name: torch.cat([getattr(pool, name) for pool in pools])[rows] for name in names}
    return SceneBatch(**tensors, noise_seed=pools[0].noise_seed)
