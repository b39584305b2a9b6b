"""Ten shapes as signed distance functions, and the anti-aliased renderer that paints scenes with them.

Every function takes coordinates x, y (o, h, w) in units of the object's radius, y downwards, and returns a distance
(negative inside) whose zero contour is the outline. Distances are exact on the outline, which is all anti-aliasing
needs. No shape reaches further than 1 along x or y at the angles drawn. The shapes fill
about the same area, so size does not give the shape away.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.85


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.74


def _diamond(x: Tensor, y: Tensor) -> Tensor:
    return (x.abs() + 0.78 * y.abs() - 0.78) / math.hypot(1, 0.78)  # taller than wide, unlike a turned square


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    slope = math.hypot(2, 1)
    sides = (2 * x.abs() - y - 0.95) / slope
    return torch.maximum(sides, y - 0.78)


def _star(x: Tensor, y: Tensor) -> Tensor:
    angle = torch.atan2(x, -y)
    sector = 2 * math.pi / 5
    folded = ((angle + sector / 2) % sector - sector / 2).abs()  # angle from the nearest tip, 0..36 degrees
    radius = torch.hypot(x, y)
    along, across = radius * folded.cos(), radius * folded.sin()
    tip, notch = 1.0, 0.45
    notch_x, notch_y = notch * math.cos(sector / 2), notch * math.sin(sector / 2)
    normal_x, normal_y = notch_y, tip - notch_x  # normal of the edge from the tip (1, 0) to the notch
    return ((along - tip) * normal_x + across * normal_y) / math.hypot(normal_x, normal_y)


def _heart(x: Tensor, y: Tensor) -> Tensor:
    x = x.abs()
    lobe_x, lobe_y, lobe_radius = 0.42, -0.3, 0.48
    normal_x, normal_y = 0.7669, 0.6417  # of the line through the tip (0, 0.95) that touches the lobe
    flank = normal_x * x + normal_y * (y - 0.95)
    above_touch = normal_y * (x - lobe_x) - normal_x * (y - lobe_y)
    wedge = torch.maximum(torch.maximum(flank, above_touch), lobe_y - y)
    return torch.minimum(torch.hypot(x - lobe_x, y - lobe_y) - lobe_radius, wedge)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    upright = torch.maximum(x - 0.32, y - 0.95)
    return torch.minimum(upright, torch.maximum(x - 0.95, y - 0.32))


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.7).abs() - 0.24


def _crescent(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(torch.hypot(x, y) - 0.95, 0.72 - torch.hypot(x - 0.5, y))


def _arrow(x: Tensor, y: Tensor) -> Tensor:
    y = y.abs()
    head = torch.maximum((y + 0.9 * x - 0.85) / math.hypot(1, 0.9), 0.0 - x)
    shaft = torch.maximum(torch.maximum(-0.95 - x, x - 0.1), y - 0.28)
    return torch.minimum(head, shaft)


SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "cross": _cross,
    "ring": _ring,
    "crescent": _crescent,
    "diamond": _diamond,
    "arrow": _arrow,
}


def coverage(shape: Tensor, centre: Tensor, radius: Tensor, angle: Tensor, *, image_size: int) -> Tensor:
    """Share of each pixel that each object covers.

    shape (o,) index into `SHAPES`; centre (o, 2) as x, y in [0, 1] of the picture; radius (o,) in the same unit;
    angle (o,) radians, clockwise. Returns (o, image_size, image_size) in [0, 1].
    """
    pixel = (torch.arange(image_size, dtype=torch.float32) + 0.5) / image_size
    dx = (pixel[None, None, :] - centre[:, 0, None, None]) / radius[:, None, None]
    dy = (pixel[None, :, None] - centre[:, 1, None, None]) / radius[:, None, None]
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    x, y = dx * cos + dy * sin, dy * cos - dx * sin
    covered = torch.empty(len(shape), image_size, image_size)
    for index, distance in enumerate(SHAPES.values()):
        chosen = (shape == index).nonzero().squeeze(-1)
        if len(chosen):
            pixels_inside = distance(x[chosen], y[chosen]) * (-image_size * radius[chosen, None, None])
            covered[chosen] = (pixels_inside + 0.5).clamp(0, 1)
    return covered
