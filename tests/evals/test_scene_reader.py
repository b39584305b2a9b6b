"""Scenes read back out of their pictures: every object where it is, nothing where nothing is."""

from __future__ import annotations

from collections import deque

import pytest
import torch
from torch import Tensor

from qlip.core.errors import UserError
from qlip.data.scene_shapes import SHAPES, coverage
from qlip.data.scenes import (
    COLOUR_NAMES,
    COLOURS,
    SHAPE_NAMES,
    SceneConfig,
    render,
    sample_scenes,
    scene_records,
)
from qlip.evals.scene_pieces import connected, num_parts
from qlip.evals.scene_reader import FoundObject, read_scene, read_scenes
from qlip.evals.scene_templates import match_shapes


def drawn(num: int, *, image_size: int, seed: int = 3) -> tuple[Tensor, list[dict]]:
    scenes = sample_scenes(
        num, split="test", shard=0, config=SceneConfig(seed=seed, object_counts=(0.25, 0.25, 0.25, 0.25))
    )
    return render(scenes, image_size=image_size), scene_records(scenes)


def painted(*objects: tuple[str, str, float, float, float], image_size: int = 48) -> Tensor:
    """A picture (3, h, w) uint8 of objects (colour, shape, x, y, radius) on grey."""
    canvas = torch.full((3, image_size, image_size), 143.0)
    for colour, shape, x, y, radius in objects:
        mask = coverage(
            torch.tensor([SHAPE_NAMES.index(shape)]),
            torch.tensor([[x, y]]),
            torch.tensor([radius]),
            torch.tensor([0.0]),
            image_size=image_size,
        )
        canvas = torch.lerp(canvas, torch.tensor(COLOURS[colour], dtype=torch.float32)[:, None, None], mask)
    return canvas.round().to(torch.uint8)


def is_right(found: list[FoundObject], record: dict, *, tolerance: float) -> bool:
    """Every true object was found with its shape and colour at its place, and no other."""
    true = {(obj["shape"], obj["colour"], obj["x"], obj["y"], obj["radius"]) for obj in record["objects"]}
    for obj in found:
        near = [
            (shape, colour, x, y, radius)
            for shape, colour, x, y, radius in true
            if (shape, colour) == (obj.shape, obj.colour)
            and max(abs(x - obj.x), abs(y - obj.y), abs(radius - obj.radius)) < tolerance
        ]
        true -= set(near[:1])
        if not near:
            return False
    return not true


@pytest.mark.parametrize("image_size", [32, 48, 64, 128])
def test_every_object_of_rendered_scenes_is_read(image_size: int) -> None:
    pictures, records = drawn(64, image_size=image_size)
    right = [is_right(f, r, tolerance=0.02) for f, r in zip(read_scenes(pictures), records, strict=True)]
    assert sum(right) >= 0.99 * len(right)


def test_blurred_and_noisy_scenes_are_read() -> None:
    pictures, records = drawn(96, image_size=48, seed=8)
    blurred = torch.nn.functional.avg_pool2d(pictures.float(), 3, stride=1, padding=1, count_include_pad=False)
    noise = 10 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    found = read_scenes((blurred + noise).clamp(0, 255).to(torch.uint8))
    right = [is_right(f, r, tolerance=0.04) for f, r in zip(found, records, strict=True)]
    assert sum(right) >= 0.95 * len(right)


def test_one_picture_is_read_as_in_a_batch() -> None:
    pictures, _ = drawn(70, image_size=48)
    alone, within = read_scene(pictures[69]), read_scenes(pictures)[69]
    assert [(obj.shape, obj.colour) for obj in alone] == [(obj.shape, obj.colour) for obj in within]
    places = [[(obj.x, obj.y, obj.radius) for obj in found] for found in (alone, within)]
    torch.testing.assert_close(*map(torch.tensor, places))
    assert read_scenes(pictures[:0]) == []


@pytest.mark.parametrize(
    "objects",
    [
        pytest.param(
            [("red", "cross", 0.28, 0.5, 0.21), ("blue", "cross", 0.68, 0.5, 0.21)], id="touching, two colours"
        ),
        pytest.param(
            [("red", "circle", 0.3, 0.5, 0.22), ("red", "circle", 0.68, 0.5, 0.22)], id="touching, one colour"
        ),
        pytest.param([("white", "star", 0.3, 0.5, 0.2), ("black", "star", 0.7, 0.5, 0.2)], id="opposite colours"),
        pytest.param([("brown", "arrow", 0.2, 0.2, 0.15)], id="smallest"),
        pytest.param([("pink", "circle", 0.5, 0.5, 0.48)], id="almost the whole picture"),
    ],
)
def test_hard_places(objects: list[tuple[str, str, float, float, float]]) -> None:
    found = read_scene(painted(*objects))
    assert sorted((obj.colour, obj.shape) for obj in found) == sorted((colour, shape) for colour, shape, *_ in objects)


def test_a_ring_in_pieces_is_one_ring() -> None:
    picture = painted(("blue", "ring", 0.5, 0.5, 0.3))
    picture[:, 23:25] = 143  # cut across by two pixels of background
    assert [(obj.colour, obj.shape) for obj in read_scene(picture)] == [("blue", "ring")]


def test_an_object_half_faded_beside_a_strong_one_is_found() -> None:
    strong, faded = painted(("black", "square", 0.3, 0.3, 0.2)), painted(("blue", "circle", 0.7, 0.7, 0.2))
    mixed = torch.where((strong != 143).any(0), strong, (143 + 0.45 * (faded.float() - 143)).to(torch.uint8))
    assert {obj.shape for obj in read_scene(mixed)} == {"square", "circle"}


def test_specks_beside_an_object_are_no_objects() -> None:
    picture = painted(("red", "star", 0.5, 0.5, 0.3))
    picture[:, 2:5, 2:6] = 250
    picture[:, 40:43, 41:46] = 0
    assert [(obj.colour, obj.shape) for obj in read_scene(picture)] == [("red", "star")]


def _plain() -> Tensor:
    return torch.full((3, 48, 48), 128)


def _slope() -> Tensor:
    return torch.linspace(90, 150, 48).expand(3, 48, 48)


def _pixel_noise() -> Tensor:
    return torch.randint(256, (3, 48, 48), generator=torch.Generator().manual_seed(1))


def _grey_noise() -> Tensor:
    return _plain() + 8 * torch.randn(1, 48, 48, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "picture",
    [
        pytest.param(_plain(), id="one colour"),
        pytest.param(torch.zeros(3, 48, 48), id="black"),
        pytest.param(_slope(), id="slope of brightness"),
        pytest.param(_grey_noise(), id="texture"),
        pytest.param(_pixel_noise(), id="noise"),
    ],
)
def test_where_nothing_is_nothing_is_found(picture: Tensor) -> None:
    assert read_scene(picture.to(torch.uint8)) == []


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        pytest.param(torch.zeros(3, 48, 48), "uint8", id="floats"),
        pytest.param(torch.zeros(48, 48, 3, dtype=torch.uint8), "square RGB", id="channels last"),
        pytest.param(torch.zeros(1, 48, 48, dtype=torch.uint8), "square RGB", id="grey"),
        pytest.param(torch.zeros(3, 48, 64, dtype=torch.uint8), "square RGB", id="not square"),
        pytest.param(torch.zeros(3, 8, 8, dtype=torch.uint8), "24 or more", id="too small"),
        pytest.param(torch.zeros(1, 3, 48, 48, dtype=torch.uint8), "one square RGB", id="a batch"),
    ],
)
def test_what_is_no_picture_is_refused(picture: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_scene(picture)


def flooded(mask: Tensor, kinds: Tensor) -> set[frozenset[tuple[int, ...]]]:
    """The connected pieces by visiting one pixel after the other."""
    left = set(map(tuple, mask.nonzero().tolist()))
    pieces = set()
    while left:
        queue, piece = deque([left.pop()]), []
        while queue:
            b, y, x = pixel = queue.popleft()
            piece.append(pixel)
            for near in ((b, y + 1, x), (b, y - 1, x), (b, y, x + 1), (b, y, x - 1)):
                if near in left and kinds[near] == kinds[pixel]:
                    left.remove(near)
                    queue.append(near)
        pieces.add(frozenset(piece))
    return pieces


@pytest.mark.parametrize("with_kinds", [False, True], ids=["alike", "kinds"])
def test_connected_pieces_are_those_of_a_flood(with_kinds: bool) -> None:
    g = torch.Generator().manual_seed(5)
    mask, kinds = torch.rand(3, 20, 17, generator=g) < 0.6, torch.randint(2, (3, 20, 17), generator=g)
    labels = connected(mask, kinds=kinds if with_kinds else None)
    found = {frozenset(map(tuple, (labels == value).nonzero().tolist())) for value in labels.unique().tolist() if value}
    assert found == flooded(mask, kinds if with_kinds else torch.zeros_like(kinds))
    inside = num_parts(labels, mask.long())  # as if all pixels were one whole
    assert inside[mask].unique().tolist() == [len(found)] and not inside[~mask].any()


def test_a_shape_gives_its_own_centre_and_radius() -> None:
    num = len(SHAPES)
    centre, radius = torch.tensor([0.45, 0.55]).expand(num, 2), torch.full((num,), 0.3)
    match = match_shapes(coverage(torch.arange(num), centre, radius, torch.zeros(num), image_size=64))
    assert match.shape.tolist() == list(range(num))
    assert match.likeness.min() > 0.97
    torch.testing.assert_close(match.radius / 64, radius, atol=0.005, rtol=0)
    torch.testing.assert_close(torch.stack([match.x, match.y], 1) / 64, centre, atol=0.005, rtol=0)


def test_all_colours_are_named() -> None:
    for colour in COLOUR_NAMES:
        (found,) = read_scene(painted((colour, "diamond", 0.4, 0.6, 0.2)))
        assert found.colour == colour
        assert 0.97 < found.confidence <= 1 + 1e-6
