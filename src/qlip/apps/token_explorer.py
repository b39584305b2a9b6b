"""What can be done with the tokens of one picture: look at their bits, flip them, swap them, decode; no page here.

Shapes: `S` side of the pictures, `n` = rows x columns tokens in row-major order, `L` bits of a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from einops import rearrange, reduce, repeat
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from qlip.core.errors import UserError
from qlip.data.transforms import prepared_pixels
from qlip.evals.scene_zero_shot import TEMPLATES
from qlip.evals.zero_shot import class_weights
from qlip.metrics.image_quality import psnr
from qlip.models.image_tokenizer import ImageTokenizer, QLIPTokenizer

DIFFERENCE_GAIN = 4  # shown errors are so many times the real ones
TOUCHED = 0.15  # share of a patch under the brush; a brush as wide as a patch touches one wherever it is set down
MASK_SIDE = 448  # pixels that strokes are drawn with
PLANE_COLUMNS = 14  # bit planes side by side
PLANE_SIDE = 60  # least pixels of one, each token enlarged in whole steps
PLANE_GAP, NUMBER_HEIGHT = 6, 18  # pixels between planes; of the line with the number above each
ZERO, ONE, PAPER, INK = (30, 41, 59), (251, 191, 36), (255, 255, 255), (51, 65, 85)  # colours of the sheet


def prepare(image: Image.Image, tokenizer: ImageTokenizer) -> Tensor:
    """RGB picture -> (3, S, S) uint8 on the CPU: shortest side to S, the centre square."""
    return prepared_pixels(image, size=tokenizer.image_size)


def encode(tokenizer: ImageTokenizer, picture: Tensor) -> Tensor:
    """(3, S, S) uint8 -> (n, L) bool, both on the CPU."""
    return tokenizer.encode(picture[None].to(tokenizer.device))[0].cpu()


def decode(tokenizer: ImageTokenizer, bits: Tensor) -> Tensor:
    """(n, L) bool -> (3, S, S) uint8, both on the CPU."""
    return tokenizer.decode(bits[None].to(tokenizer.device))[0].cpu()


def difference_picture(a: Tensor, b: Tensor, *, gain: int = DIFFERENCE_GAIN) -> Tensor:
    """Absolute difference of two (3, S, S) uint8, times `gain`, cut at 255: (3, S, S) uint8, black where equal."""
    return ((a.int() - b.int()).abs() * gain).clamp(max=255).to(torch.uint8)


def change_by_patch(a: Tensor, b: Tensor, *, grid: tuple[int, int]) -> Tensor:
    """Two (3, S, S) uint8 -> (n,) float64: absolute difference averaged over each patch, 0 to 255."""
    rows, columns = grid
    return reduce((a.double() - b.double()).abs(), "d (r i) (c j) -> (r c)", "mean", r=rows, c=columns)


@dataclass(kw_only=True, slots=True, frozen=True)
class Figures:
    """What a reconstruction costs and how close it is."""

    psnr: float
    """dB, infinite for equal pictures."""
    num_bits: int
    """Of all tokens together."""
    bits_per_pixel: float
    """`num_bits` over S x S; 8-bit RGB has 24."""


def figures(original: Tensor, reconstruction: Tensor, bits: Tensor) -> Figures:
    """Of two (3, S, S) uint8 and the (n, L) bits between them."""
    height, width = original.shape[-2:]
    return Figures(
        psnr=float(psnr(original[None], reconstruction[None])),
        num_bits=bits.numel(),
        bits_per_pixel=bits.numel() / (height * width),
    )


def bit_planes(bits: Tensor, *, grid: tuple[int, int]) -> Tensor:
    """(n, L) bool -> (L, rows, columns) bool: one picture for each bit."""
    rows, columns = grid
    return rearrange(bits, "(r c) l -> l r c", r=rows, c=columns)


@dataclass(kw_only=True, slots=True, frozen=True)
class ContactSheet:
    """All bit planes on one picture, their numbers above them."""

    picture: Image.Image
    """RGB."""
    corners: tuple[tuple[int, int], ...]
    """Left and top of each plane in pixels, by its number."""
    size: tuple[int, int]
    """Width and height of a plane in pixels."""

    def bit_at(self, x: float, y: float) -> int | None:
        """The number of the plane at a pixel, its number's line included; None between them."""
        for bit, (left, top) in enumerate(self.corners):
            if left <= x < left + self.size[0] and top - NUMBER_HEIGHT <= y < top + self.size[1]:
                return bit
        return None


def contact_sheet(planes: Tensor) -> ContactSheet:
    """(L, rows, columns) bool -> planes enlarged in whole steps, at most `PLANE_COLUMNS` side by side."""
    scale = max(1, math.ceil(PLANE_SIDE / max(planes.shape[1:])))
    num, height, width = planes.shape[0], planes.shape[1] * scale, planes.shape[2] * scale
    across = min(num, PLANE_COLUMNS)
    down = math.ceil(num / across)
    step_x, step_y = width + PLANE_GAP, height + NUMBER_HEIGHT + PLANE_GAP
    sheet = Image.new("RGB", (across * step_x - PLANE_GAP, down * step_y - PLANE_GAP), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    corners = []
    for bit, plane in enumerate(planes):
        left, top = bit % across * step_x, bit // across * step_y + NUMBER_HEIGHT
        corners.append((left, top))
        draw.text((left + width / 2, top - 3), str(bit), fill=INK, font=font, anchor="md")
        colours = torch.where(plane[..., None], torch.tensor(ONE), torch.tensor(ZERO)).to(torch.uint8)  # (r, c, 3)
        sheet.paste(Image.fromarray(repeat(colours, "r c d -> (r i) (c j) d", i=scale, j=scale).numpy()), (left, top))
    return ContactSheet(picture=sheet, corners=tuple(corners), size=(width, height))


def painted(points: Sequence[tuple[float, float]], *, diameter: float, side: int = MASK_SIDE) -> Tensor:
    """A stroke of a round brush -> (side, side) bool. `points` (x, y) and `diameter` are shares of the picture."""
    mask = Image.new("1", (side, side))
    draw, radius = ImageDraw.Draw(mask), diameter * side / 2
    places = [(x * side, y * side) for x, y in points]
    for x, y in places:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=1)
    for start, end in pairwise(places):
        draw.line((start, end), fill=1, width=max(1, round(2 * radius)))
    return torch.from_numpy(np.array(mask))


def cells_under(mask: Tensor, *, grid: tuple[int, int], threshold: float = TOUCHED) -> Tensor:
    """Which patches a brush mask (h, w) bool of any size touches: (n,) bool, more than `threshold` of their area."""
    rows, columns = grid
    height, width = mask.shape
    area = _overlaps(rows, height) @ mask.double() @ _overlaps(columns, width).T  # (rows, columns) in pixels
    return (area * (rows * columns / (height * width)) > threshold).flatten()


def _overlaps(cells: int, pixels: int) -> Tensor:
    """(cells, pixels) float64: how much of each pixel lies in each of so many equal parts of a line."""
    edges = torch.arange(cells + 1, dtype=torch.float64) * pixels / cells
    left = torch.arange(pixels, dtype=torch.float64)
    shared = torch.minimum(edges[1:, None], left + 1) - torch.maximum(edges[:-1, None], left)
    return shared.clamp(min=0)


def flip(bits: Tensor, cells: Tensor, *, which: Sequence[int]) -> Tensor:
    """(n, L) bool with the bits `which` of the tokens `cells` (n,) bool turned over; twice gives the first again."""
    chosen = torch.zeros(bits.shape[1], dtype=torch.bool)
    chosen[list(which)] = True
    return bits ^ (cells[:, None] & chosen[None])


def swap(bits: Tensor, others: Tensor, cells: Tensor) -> Tensor:
    """(n, L) bool: tokens of `others` where `cells` (n,) bool is true, of `bits` elsewhere."""
    return torch.where(cells[:, None], others, bits)


@torch.inference_mode()
def classify(tokenizer: ImageTokenizer, picture: Tensor, labels: Sequence[str]) -> dict[str, float]:
    """Probability of each label for a picture (3, S, S) uint8: softmax of exp(logit_scale) times the cosine.

    Raises `UserError` for a tokenizer without a text tower.
    """
    if not isinstance(tokenizer, QLIPTokenizer):
        raise UserError(f"a {tokenizer.name} reads no text: take a QLIP tokenizer to classify")
    measured = tokenizer.measured
    embedding = measured.image_embeds(picture[None].to(tokenizer.device))[0].cpu()  # (e,)
    cosines = class_weights(measured, labels, [template.format for template in TEMPLATES]) @ embedding
    probabilities = (measured.model.logit_scale.exp().cpu() * cosines).softmax(0)
    return dict(zip(labels, probabilities.tolist(), strict=True))
