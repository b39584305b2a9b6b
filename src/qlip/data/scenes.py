"""Procedural captioned scenes: one to four coloured shapes on a textured background, with exact ground truth.

The embedded default data of qlip: offline, captioned, exactly checkable. A shard's scenes are a pure function of
(seed, split, shard number). The train split never shows the colour-shape pairs of `HELD_OUT_PAIRS`; the test split
draws all pairs alike, so zero-shot figures can be told apart for pairs never seen.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from qlip.data.scene_shapes import SHAPES, coverage

SHAPE_NAMES = tuple(SHAPES)
COLOURS = {  # GenEval's ten, as sRGB
    "red": (214, 32, 38),
    "orange": (246, 138, 18),
    "yellow": (250, 222, 36),
    "green": (34, 146, 58),
    "blue": (32, 82, 208),
    "purple": (126, 44, 158),
    "pink": (250, 140, 188),
    "brown": (118, 70, 34),
    "black": (16, 16, 18),
    "white": (248, 248, 246),
}
COLOUR_NAMES = tuple(COLOURS)
BACKGROUNDS = {
    "gray": (142, 144, 148),
    "beige": (206, 192, 164),
    "sky blue": (150, 196, 226),
    "mint": (160, 208, 184),
    "slate": (84, 96, 112),
    "lavender": (184, 176, 214),
}
BACKGROUND_NAMES = tuple(BACKGROUNDS)
TEXTURES = ("plain", "striped", "speckled", "shaded")
SIZES = {"small": (0.15, 0.18), "medium": (0.2, 0.235), "large": (0.3, 0.42)}  # radius, share of the picture side
SINGLE_OBJECT_SIZES = (0.15, 0.25, 0.6)  # how often a scene with one object shows it small, medium, large
SIZE_NAMES = tuple(SIZES)
MAX_OBJECTS = 4
HELD_OUT_PAIRS = frozenset(  # (colour, shape): one colour of every shape, one shape of every colour
    (COLOUR_NAMES[(3 * s + 1) % len(COLOUR_NAMES)], shape) for s, shape in enumerate(SHAPE_NAMES)
)


@dataclass(kw_only=True, slots=True)
class SceneConfig:
    """How scenes are drawn."""

    image_size: int = 64
    """Side of the square pictures in pixels."""
    object_counts: tuple[float, ...] = (0.55, 0.15, 0.15, 0.15)
    """Probabilities of 1, 2, 3 and 4 objects."""
    seed: int = 0
    """Another seed gives other scenes of the same distribution."""


@dataclass(kw_only=True, slots=True)
class SceneBatch:
    """`b` scenes as tensors, up to `k` = 4 objects each; object 0 is the largest or first and names the class."""

    num_objects: Tensor
    """(b,) 1..4; the slots beyond are not drawn."""
    shape: Tensor
    """(b, k) index into SHAPE_NAMES."""
    colour: Tensor
    """(b, k) index into COLOUR_NAMES."""
    size: Tensor
    """(b, k) index into SIZE_NAMES."""
    centre: Tensor
    """(b, k, 2) x, y as shares of the side."""
    radius: Tensor
    """(b, k) share of the side."""
    angle: Tensor
    """(b, k) radians, clockwise."""
    rgb: Tensor
    """(b, k, 3) jittered object colours in [0, 1]."""
    background: Tensor
    """(b,) index into BACKGROUND_NAMES."""
    texture: Tensor
    """(b,) index into TEXTURES."""
    noise_seed: int
    """Seed of textures and jitters of the whole batch."""


def scene_generator(*parts: object) -> torch.Generator:
    """A generator seeded by the sha256 of the parts: equal on every machine and Python."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % 2**63)


def sample_scenes(num: int, *, split: str, shard: int, config: SceneConfig) -> SceneBatch:
    """Draw `num` scenes; split is `train` (held-out pairs excluded) or `test` (all pairs)."""
    g = scene_generator("scenes", config.seed, split, shard)
    k = MAX_OBJECTS

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=g)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=g)

    counts = torch.tensor(config.object_counts, dtype=torch.float32).multinomial(num, replacement=True, generator=g) + 1
    pairs = torch.tensor(
        [
            (c, s)
            for c, colour in enumerate(COLOUR_NAMES)
            for s, shape in enumerate(SHAPE_NAMES)
            if split != "train" or (colour, shape) not in HELD_OUT_PAIRS
        ]
    )
    chosen = pairs[integers(len(pairs), num, k)]  # (b, k, 2)
    single = counts == 1
    # Objects of one scene sit in different quadrants and leave a margin, so they never overlap.
    quadrant = torch.rand(num, k, generator=g).argsort(1)
    size = integers(2, num, k)
    num_single = int(single.sum())
    if num_single:  # multinomial refuses to draw nothing
        size[single, 0] = torch.tensor(SINGLE_OBJECT_SIZES).multinomial(num_single, replacement=True, generator=g)
    low = torch.tensor([SIZES[name][0] for name in SIZE_NAMES])[size]
    high = torch.tensor([SIZES[name][1] for name in SIZE_NAMES])[size]
    radius = low + (high - low) * torch.rand(num, k, generator=g)
    cell = torch.stack([quadrant % 2, quadrant // 2], -1).float() * 0.5 + 0.25
    centre = cell + uniform(-1, 1, num, k, 2) * (0.245 - radius).clamp(min=0)[..., None]
    free = radius[single, 0, None] + 0.02
    centre[single, 0] = free + (1 - 2 * free) * torch.rand(int(single.sum()), 2, generator=g)
    palette = torch.tensor(list(COLOURS.values())) / 255
    return SceneBatch(
        num_objects=counts,
        shape=chosen[..., 1],
        colour=chosen[..., 0],
        size=size,
        centre=centre,
        radius=radius,
        angle=uniform(-0.17, 0.17, num, k),
        rgb=(palette[chosen[..., 0]] + uniform(-0.025, 0.025, num, k, 3)).clamp(0, 1),
        background=integers(len(BACKGROUNDS), num),
        texture=integers(len(TEXTURES), num),
        noise_seed=int(integers(2**31, 1)),
    )


def _backgrounds(scenes: SceneBatch, *, image_size: int) -> Tensor:
    """(b, 3, h, w) backgrounds in [0, 1] with a light texture."""
    g = torch.Generator().manual_seed(scenes.noise_seed)
    b = len(scenes.num_objects)
    base = (torch.tensor(list(BACKGROUNDS.values())) / 255)[scenes.background][:, :, None, None]
    base = base + 0.04 * (torch.rand(b, 3, 1, 1, generator=g) - 0.5)
    pixel = (torch.arange(image_size) + 0.5) / image_size
    direction = 2 * torch.pi * torch.rand(b, generator=g)
    slope_x, slope_y = direction.cos()[:, None, None], direction.sin()[:, None, None]
    along = (pixel - 0.5)[None, None, :] * slope_x + (pixel - 0.5)[None, :, None] * slope_y  # (b, h, w)
    period = (0.15 + 0.15 * torch.rand(b, generator=g))[:, None, None]
    texture = torch.zeros(b, image_size, image_size)
    striped, speckled, shaded = (scenes.texture == TEXTURES.index(name) for name in TEXTURES[1:])
    texture[striped] = 0.03 * torch.sin(2 * torch.pi * along[striped] / period[striped])
    grain = torch.randn(int(speckled.sum()), 1, image_size // 2, image_size // 2, generator=g)
    texture[speckled] = 0.02 * torch.nn.functional.interpolate(grain, size=image_size, mode="nearest")[:, 0]
    texture[shaded] = 0.12 * along[shaded]
    return base + texture[:, None]


def render(scenes: SceneBatch, *, image_size: int) -> Tensor:
    """Paint scenes. Returns (b, 3, image_size, image_size) uint8, anti-aliased; later slots are painted on top."""
    canvas = _backgrounds(scenes, image_size=image_size)
    for slot in range(int(scenes.num_objects.max())):
        drawn = (scenes.num_objects > slot).nonzero().squeeze(-1)
        mask = coverage(
            scenes.shape[drawn, slot],
            scenes.centre[drawn, slot],
            scenes.radius[drawn, slot],
            scenes.angle[drawn, slot],
            image_size=image_size,
        )[:, None]
        colour = scenes.rgb[drawn, slot][:, :, None, None]
        canvas[drawn] = torch.lerp(canvas[drawn], colour.expand(-1, -1, image_size, image_size), mask)
    return (canvas.clamp(0, 1) * 255).round().to(torch.uint8)


def scene_records(scenes: SceneBatch) -> list[dict]:
    """Plain dictionaries of every scene: objects (shape, colour, size, x, y, radius), background, texture, class."""
    records = []
    for i, count in enumerate(scenes.num_objects.tolist()):
        objects = [
            {
                "shape": SHAPE_NAMES[scenes.shape[i, j]],
                "colour": COLOUR_NAMES[scenes.colour[i, j]],
                "size": SIZE_NAMES[scenes.size[i, j]],
                "x": round(float(scenes.centre[i, j, 0]), 4),
                "y": round(float(scenes.centre[i, j, 1]), 4),
                "radius": round(float(scenes.radius[i, j]), 4),
            }
            for j in range(count)
        ]
        records.append(
            {
                "objects": objects,
                "background": BACKGROUND_NAMES[scenes.background[i]],
                "texture": TEXTURES[scenes.texture[i]],
                "class_name": f"{objects[0]['colour']} {objects[0]['shape']}",
            }
        )
    return records
