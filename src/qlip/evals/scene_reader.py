"""Reads the objects of a scene back out of its picture: pieces, their colours, their shapes.

Classical vision, nothing learned. What could be read in several ways is read in the way whose shapes fit best: a
piece as one object or as several that touch, pieces close to one another as several objects or as one that broke.

Shapes: `b` pictures, `h`, `w` pixels, `o` objects of all pictures together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qlip.core.errors import UserError
from qlip.data.scenes import COLOUR_NAMES, SHAPE_NAMES
from qlip.evals.scene_pieces import (
    PALETTE,
    background,
    connected,
    dilated,
    eroded,
    grown,
    large_pieces,
    nearest_colour,
    num_parts,
    standing_out,
)
from qlip.evals.scene_templates import match_shapes

SMALLEST_SIDE = 24  # pixels; the smallest objects are seven pixels wide there
WORKING_SIDE = 48  # pixels; larger pictures are averaged down to this: shapes are still clear
LEAST_AREA = 0.02  # share of the picture that an object covers; the smallest ones of scenes cover 0.03
LEAST_LIKENESS = 0.8  # of an object to the nearest shape
STRANGE = 0.6  # a pixel this far from its piece's own colour, against the background's distance, is another's
GAIN = 0.03  # by how much shapes must fit better for a piece to be read as several objects
JOIN_STEPS = 2  # pieces up to twice as many pixels apart may be one object
FADE_STEPS = 4  # pixels around a piece over which a blurred edge fades out
FADED = 0.8  # an object's colour may be mixed with so much background that this share of it is left
PICTURES_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundObject:
    """One object that a picture shows."""

    shape: str
    """One of SHAPE_NAMES."""
    colour: str
    """One of COLOUR_NAMES."""
    x: float
    """Centre, share of the side from the left."""
    y: float
    """Centre, share of the side from the top."""
    radius: float
    """Share of the side."""
    confidence: float
    """Likeness to the rendered shape in [0, 1], less the share of the object that has another colour."""


class _Pieces(NamedTuple):
    """Pieces as the objects that they would be."""

    picture: Tensor  # (o,) index of the picture
    pixel: Tensor  # (o,) one of its pixels, counted over all pictures
    area: Tensor  # (o,) share of the picture
    colour: Tensor  # (o,) index into COLOUR_NAMES
    shape: Tensor  # (o,) index into SHAPE_NAMES
    score: Tensor  # (o,) confidence
    place: Tensor  # (o, 3) x, y, radius as shares of the side


def read_scene(picture: Tensor) -> list[FoundObject]:
    """The objects of one picture (3, h, h) uint8, the largest first. Raises `UserError` as `read_scenes`."""
    if picture.ndim != 3:
        raise UserError(f"a picture has the shape (3, h, h), not {tuple(picture.shape)}: give one square RGB picture")
    return read_scenes(picture[None])[0]


def read_scenes(pictures: Tensor) -> list[list[FoundObject]]:
    """The objects of every picture (b, 3, h, h) uint8, the largest first; an empty list where nothing stands out.

    Raises `UserError` for anything but uint8 square RGB pictures of 24 pixels a side or more.
    """
    if pictures.ndim != 4 or pictures.shape[1] != 3 or pictures.shape[2] != pictures.shape[3]:
        raise UserError(f"scenes have the shape (b, 3, h, h), not {tuple(pictures.shape)}: give square RGB pictures")
    if pictures.dtype != torch.uint8:
        raise UserError(f"scenes are read from uint8 pixels, not {pictures.dtype}: round them to 0..255 first")
    if pictures.shape[-1] < SMALLEST_SIDE:
        raise UserError(
            f"no shape shows in {pictures.shape[-1]} pixels a side: give pictures of {SMALLEST_SIDE} or more"
        )
    return [found for part in pictures.cpu().split(PICTURES_AT_ONCE) if len(part) for found in _read(part.float())]


@torch.inference_mode()
def _read(pictures: Tensor) -> list[list[FoundObject]]:
    if pictures.shape[-1] > WORKING_SIDE:
        pictures = torch.nn.functional.interpolate(pictures, size=(WORKING_SIDE, WORKING_SIDE), mode="area")
    difference = pictures - background(pictures)
    hue, share = nearest_colour(difference, pictures - difference)
    mask = standing_out(difference, share)
    fine = large_pieces(connected(mask))
    pieces = _measured(fine, pictures, difference)
    for cores in (connected(mask, kinds=hue), connected(eroded(mask))):
        parts = grown(large_pieces(cores), mask)
        parts = parts * (num_parts(parts, fine) > 1)
        pieces = _better(pieces, _measured(parts, pictures, difference), within=fine, gain=GAIN)
    near = mask
    for _ in range(JOIN_STEPS):
        near = dilated(near)
        joined = connected(near)
        whole = joined * (fine > 0)
        whole = whole * (num_parts(fine, whole) > 1)
        pieces = _better(pieces, _measured(whole, pictures, difference), within=joined, gain=-GAIN)
    return _listed(pieces, num_pictures=len(pictures))


def _measured(labels: Tensor, pictures: Tensor, difference: Tensor) -> _Pieces:
    """Every label as an object: labels (b, h, w), pictures and their difference from the background (b, 3, h, w)."""
    pixel = torch.full((int(labels.max()) + 1,), -1)
    pixel[labels.flatten()] = torch.arange(labels.numel())  # any one pixel of each label
    pixel[0] = -1
    values = (pixel >= 0).nonzero().squeeze(-1)
    pixel = pixel[values]
    picture = pixel // labels[0].numel()
    region, different = labels[picture] == values[:, None, None], difference[picture]  # (o, h, w), (o, 3, h, w)
    inner = eroded(region)
    inner = torch.where(inner.sum((1, 2), keepdim=True) >= 4, inner, region).float()
    inner = inner / inner.sum((1, 2), keepdim=True)
    step = torch.einsum("ohw,ochw->oc", inner, different)  # from the background to the object
    colour = torch.einsum("ohw,ochw->oc", inner, pictures[picture])
    length = step.square().sum(-1)[:, None, None].clamp(min=1)
    share = torch.einsum("oc,ochw->ohw", step, different) / length
    aside = different.square().sum(1) - length * share.square()  # squared distance from the line between the two
    strange = region & ((share < 0.2) | (aside > STRANGE**2 * length))
    around = region
    for _ in range(FADE_STEPS):
        around = dilated(around)
    covered = share.clamp(0, 1) * (around & (region | (labels[picture] == 0)))
    match = match_shapes(covered)
    return _Pieces(
        picture=picture,
        pixel=pixel,
        area=covered.mean((1, 2)),
        colour=_named(step, colour - step),
        shape=match.shape,
        score=match.likeness * (1 - strange.sum((1, 2)) / region.sum((1, 2))),
        place=torch.stack([match.x, match.y, match.radius], -1) / labels.shape[-1],
    )


def _named(step: Tensor, behind: Tensor) -> Tensor:
    """(o,) index of the named colour that explains a difference (o, 3) from the background (o, 3), perhaps faded."""
    full = PALETTE - behind[:, None]  # (o, 10, 3)
    share = ((full * step[:, None]).sum(-1) / full.square().sum(-1)).clamp(FADED, 1)[..., None]
    return (share * full - step[:, None]).square().sum(-1).argmin(1)


def _better(pieces: _Pieces, others: _Pieces, *, within: Tensor, gain: float) -> _Pieces:
    """The pieces, replaced by the other reading wherever that one's shapes fit better by more than `gain`.

    `within` (b, h, w) labels the places to decide about; a piece belongs to the place of its pixel.
    """
    old, new = within.flatten()[pieces.pixel], within.flatten()[others.pixel]
    num_places = int(within.max()) + 1

    def mean_score(place: Tensor, these: _Pieces) -> Tensor:
        area = torch.zeros(num_places).index_add(0, place, these.area)
        return torch.zeros(num_places).index_add(0, place, these.score * these.area) / area.clamp(min=1e-6)

    known = torch.zeros(num_places, dtype=torch.bool).index_fill(0, new, True)
    better = known & (mean_score(new, others) > mean_score(old, pieces) + gain)
    kept, taken = ~better[old], better[new]
    return _Pieces(*(torch.cat([a[kept], b[taken]]) for a, b in zip(pieces, others, strict=True)))


def _listed(pieces: _Pieces, *, num_pictures: int) -> list[list[FoundObject]]:
    """Per picture what is large enough and like a shape, the largest first."""
    found: list[list[FoundObject]] = [[] for _ in range(num_pictures)]
    objects = (pieces.area >= LEAST_AREA) & (pieces.score >= LEAST_LIKENESS)
    for index in pieces.area.argsort(descending=True, stable=True).tolist():
        if not objects[index]:
            continue
        x, y, radius = pieces.place[index].tolist()
        found[int(pieces.picture[index])].append(
            FoundObject(
                shape=SHAPE_NAMES[int(pieces.shape[index])],
                colour=COLOUR_NAMES[int(pieces.colour[index])],
                x=x,
                y=y,
                radius=radius,
                confidence=float(pieces.score[index]),
            )
        )
    return found
