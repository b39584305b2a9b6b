"""The report's pictures: held-out scenes through the tokens of each stage and back, and what the model calls them."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from qlip.core import pixels
from qlip.data.items import Item
from qlip.data.scenes import HELD_OUT_PAIRS
from qlip.data.sources import open_source
from qlip.evals.collect import first_pictures
from qlip.evals.scene_zero_shot import PAIRS, TEMPLATES
from qlip.evals.zero_shot import class_weights
from qlip.models.measured import MeasuredQLIP
from qlip.models.qlip.loading import load_model, load_processor
from qlip.models.qlip.modeling import QLIPModel, unit_norm

NUM_READ = 128  # samples looked at: enough to hold scenes with pairs that training never showed
NUM_PICTURES = 12
NUM_EXAMPLES = 4
NUM_ANSWERS = 5
GRID_COLUMNS, GRID_SCALE, GRID_GAP = 6, 3, 6


@dataclass(kw_only=True, slots=True)
class Scene:
    """One held-out picture with what each stage gave back."""

    caption: str
    """As the shard has it: foreign text."""
    pictures: dict[str, Image.Image]
    """`original`, then one per stage."""


@dataclass(kw_only=True, slots=True)
class Example:
    """One picture with one object, and the most probable classes."""

    picture: Image.Image
    """What the model saw."""
    truth: str
    """Its class."""
    unseen: bool
    """Whether training never showed this pair of colour and shape."""
    answers: list[tuple[str, float]]
    """Classes with their probability, most probable first."""


@dataclass(kw_only=True, slots=True)
class Looks:
    """Everything the report shows of the models at work."""

    image_size: int
    """Side of the pictures."""
    num_tokens: int
    """Tokens of a picture."""
    num_bits: int
    """Bits of a token."""
    scenes: list[Scene] = field(default_factory=list)
    """The first samples in shard order: not chosen."""
    examples: list[Example] = field(default_factory=list)
    """Two with pairs of the training set and two with pairs it never showed, where the data has them."""


@torch.inference_mode()
def look(exports: dict[str, Path], *, shards: str) -> Looks:
    """Send the first test samples through every model of `exports` (title -> model folder, at least one), on the CPU.

    Raises `UserError` when a folder is no model or the shards cannot be read.
    """
    models = {title: load_model(folder) for title, folder in exports.items()}
    first_title, first = next(iter(models.items()))
    vision = first.config.vision_config
    looks = Looks(image_size=vision.image_size, num_tokens=vision.grid_size**2, num_bits=vision.num_bits)
    items, pictures = first_pictures(open_source(shards), num=NUM_READ, size=vision.image_size)
    pixel_values = pixels.from_uint8(pictures)
    seen = pixel_values[:NUM_PICTURES]
    columns = {"original": _pictures(seen)}
    columns |= {title: _pictures(model(seen).reconstructions) for title, model in models.items()}
    for i, item in enumerate(items[:NUM_PICTURES]):
        caption = item.captions[0] if item.captions else item.key
        looks.scenes.append(Scene(caption=caption, pictures={title: row[i] for title, row in columns.items()}))
    looks.examples = _examples(first, exports[first_title], items, pixel_values)
    return looks


def _pictures(pixel_values: Tensor) -> list[Image.Image]:
    """(b, 3, S, S) CLIP-normalised -> pictures, clamped and rounded."""
    arrays = pixels.to_uint8(pixel_values).permute(0, 2, 3, 1).cpu().numpy()  # (b, S, S, 3)
    return [Image.fromarray(array) for array in arrays]


def _examples(model: QLIPModel, export: Path, items: list[Item], pixel_values: Tensor) -> list[Example]:
    """The first scenes with one object: two of seen and two of unseen pairs; none for data without ground truth."""
    chosen: dict[bool, list[tuple[int, str]]] = {False: [], True: []}
    for i, item in enumerate(items):
        objects = item.record.get("scene", {}).get("objects", [])
        if len(objects) == 1:
            pair = (objects[0]["colour"], objects[0]["shape"])
            chosen[pair in HELD_OUT_PAIRS].append((i, " ".join(pair)))
    half = NUM_EXAMPLES // 2
    rows = [(i, truth, unseen) for unseen, found in chosen.items() for i, truth in found[:half]]
    if not rows:
        return []
    pixel_values = pixel_values[[i for i, _, _ in rows]]
    templates = [template.format for template in TEMPLATES]
    weights = class_weights(MeasuredQLIP(model, load_processor(export)), PAIRS, templates)
    cosines = unit_norm(model.get_image_features(pixel_values).pooler_output) @ weights.T  # (b, classes)
    best = (model.logit_scale.exp() * cosines).softmax(-1).topk(NUM_ANSWERS)
    return [
        Example(
            picture=picture,
            truth=truth,
            unseen=unseen,
            answers=[(PAIRS[k], p) for k, p in zip(indices, probabilities, strict=True)],
        )
        for picture, (_, truth, unseen), indices, probabilities in zip(
            _pictures(pixel_values), rows, best.indices.tolist(), best.values.tolist(), strict=True
        )
    ]


def data_uri(picture: Image.Image) -> str:
    """A picture as a `data:` address with its PNG in base64."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_grid(path: Path, scenes: list[Scene]) -> None:
    """Write all scenes as one PNG: bands of six columns, one labelled row per stage, each pixel three by three."""
    titles = list(scenes[0].pictures)
    tile = scenes[0].pictures[titles[0]].width * GRID_SCALE
    font = ImageFont.load_default(size=max(11, min(20, tile // 9)))
    margin = round(max(font.getlength(title) for title in titles)) + 3 * GRID_GAP
    columns = min(GRID_COLUMNS, len(scenes))
    bands = -(-len(scenes) // columns)
    band_height = len(titles) * (tile + GRID_GAP) + 2 * GRID_GAP
    grid = Image.new("RGB", (margin + columns * (tile + GRID_GAP), bands * band_height - GRID_GAP), "white")
    draw = ImageDraw.Draw(grid)
    for band in range(bands):
        for row, title in enumerate(titles):
            top = GRID_GAP + band * band_height + row * (tile + GRID_GAP)
            draw.text((margin - 2 * GRID_GAP, top + tile // 2), title, fill="black", font=font, anchor="rm")
            for column, scene in enumerate(scenes[band * columns : (band + 1) * columns]):
                enlarged = scene.pictures[title].resize((tile, tile), Image.Resampling.NEAREST)
                grid.paste(enlarged, (margin + column * (tile + GRID_GAP), top))
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.save(path, optimize=True)
