"""Cuts the picture of a scene into pieces: what stands out from the background, and what of it hangs together.

Shapes: `b` pictures, `h`, `w` pixels. Levels are 0 to 255. Labels are (b, h, w) int64: 0 outside all pieces, else one
number per piece, never shared between pictures.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlip.data.scenes import COLOURS

CONTRAST = 24.0  # levels by which an object's pixel differs from the background at least; textures stay below
GREY_WEIGHT = 0.6  # of differences in brightness, which textures are made of, against differences in hue
RELATIVE_CONTRAST = 0.5  # a pixel of a faded object still differs half as much as the most different one around it
PEAK_REACH = 0.1  # share of the side; how far around
SMALLEST_PIECE = 0.006  # share of the picture; less is neither an object nor a fragment worth joining
GROWTH = 6  # pixels that parts grow back after they were told apart by their cores
PALETTE = torch.tensor(list(COLOURS.values()), dtype=torch.float32)


def background(pictures: Tensor) -> Tensor:
    """The plane of colour behind the objects of (b, 3, h, w) levels, same shape.

    Starts from the median of the rim and is fitted anew to the pixels that are near it, three times.
    """
    b, _, height, width = pictures.shape
    rows = torch.cat([pictures[:, :, :2], pictures[:, :, -2:]], 2).flatten(2)
    columns = torch.cat([pictures[..., :2], pictures[..., -2:]], 3).flatten(2)
    flat = torch.ones(height, width)
    row, column = torch.linspace(-1, 1, height)[:, None] * flat, torch.linspace(-1, 1, width) * flat
    design = torch.stack([flat, row, column], -1).flatten(0, 1)  # (h w, 3)
    pixels = pictures.flatten(2).mT  # (b, h w, 3)
    plane = torch.cat([rows, columns], 2).median(2).values[:, None].expand_as(pixels)
    damping = torch.diag(torch.tensor([1e-3, 1e-3 * height * width, 1e-3 * height * width]))  # solvable in any case
    for spread in (30.0, 20.0, 15.0):
        weight = torch.exp(-((pixels - plane) / spread).square().sum(-1, keepdim=True) / 2)
        weighted = (design * weight).mT  # (b, 3, h w)
        plane = plane + design @ torch.linalg.solve(weighted @ design + damping, weighted @ (pixels - plane))
    return plane.mT.reshape(b, 3, height, width)


def nearest_colour(difference: Tensor, behind: Tensor) -> tuple[Tensor, Tensor]:
    """Which named colour, laid over the background to some degree, gives each pixel, and to what degree.

    `difference` and `behind` are (b, 3, h, w) levels: the picture less its background, and the background.
    Returns (b, h, w) index into COLOURS and (b, h, w) in [0, 1].
    """
    step = PALETTE - behind.mean((2, 3))[:, None]  # (b, 10, 3): one background colour is exact enough here
    length = step.square().sum(-1)[:, :, None]
    product = step @ difference.flatten(2)  # (b, 10, h w)
    share = (product / length).clamp(0, 1)
    rest = share * (share * length - 2 * product)  # squared distance, less that of the pixel itself
    best = rest.argmin(1, keepdim=True)
    return best.reshape(difference[:, 0].shape), share.gather(1, best).reshape(difference[:, 0].shape)


def standing_out(difference: Tensor, share: Tensor) -> Tensor:
    """(b, h, w) bool, the pixels of objects: more than half a named colour, or faded but clear in its surroundings.

    `difference` (b, 3, h, w) levels from the background, `share` (b, h, w) as `nearest_colour` gives it.
    """
    grey = difference.mean(1, keepdim=True)
    contrast = ((difference - grey).square().sum(1) + GREY_WEIGHT**2 * 3 * grey[:, 0].square()).sqrt()
    reach = round(PEAK_REACH * contrast.shape[-1])
    calm = torch.nn.functional.avg_pool2d(contrast, 3, stride=1, padding=1)
    peak = torch.nn.functional.max_pool2d(calm, (2 * reach + 1, 1), stride=1, padding=(reach, 0))
    peak = torch.nn.functional.max_pool2d(peak, (1, 2 * reach + 1), stride=1, padding=(0, reach))
    return (contrast > CONTRAST) & ((share > 0.5) | (contrast > RELATIVE_CONTRAST * peak))


def _neighbours(values: Tensor) -> list[Tensor]:
    """(b, h, w) -> the four neighbours of every pixel, 0 outside."""
    padded = torch.nn.functional.pad(values, (1, 1, 1, 1))
    return [padded[:, 1:-1, 2:], padded[:, 1:-1, :-2], padded[:, 2:, 1:-1], padded[:, :-2, 1:-1]]


def connected(mask: Tensor, *, kinds: Tensor | None = None) -> Tensor:
    """Labels of the connected pieces of (b, h, w) bool.

    Pixels connect along their sides, and with `kinds` (b, h, w) only where these are equal.
    """
    kinds = torch.zeros_like(mask) if kinds is None else kinds
    beside = mask[:, :, 1:] & mask[:, :, :-1] & (kinds[:, :, 1:] == kinds[:, :, :-1])
    below = mask[:, 1:] & mask[:, :-1] & (kinds[:, 1:] == kinds[:, :-1])
    starts = mask & ~torch.nn.functional.pad(beside, (1, 0))
    runs = starts.flatten().cumsum(0).reshape(mask.shape) * mask  # pixels side by side in a row are one run
    upper, lower = runs[:, :-1][below], runs[:, 1:][below]
    label = torch.arange(int(runs.max()) + 1)  # of each run; touching runs get the larger label until all agree
    while True:
        ends = label[upper], label[lower]
        larger = torch.maximum(*ends)
        joined = label.clone()
        for end in ends:
            joined.scatter_reduce_(0, end, larger, "amax")
        joined = joined[joined]
        if torch.equal(joined, label):
            return label[runs]
        label = joined


def eroded(mask: Tensor) -> Tensor:
    """The pixels all of whose four neighbours belong too."""
    return mask & torch.stack(_neighbours(mask)).all(0)


def dilated(mask: Tensor) -> Tensor:
    """The pixels that belong, and those beside them."""
    return mask | torch.stack(_neighbours(mask)).any(0)


def large_pieces(labels: Tensor) -> Tensor:
    """The labels without the pieces that are too small, the rest numbered 1, 2, ..."""
    counts = torch.bincount(labels.flatten(), minlength=labels.numel() + 1)
    kept = counts >= SMALLEST_PIECE * labels[0].numel()
    kept[0] = False
    return (kept.cumsum(0) * kept)[labels]


def grown(labels: Tensor, mask: Tensor) -> Tensor:
    """The labels, spread over the pixels of `mask` around them."""
    for _ in range(GROWTH):
        around = torch.stack(_neighbours(labels)).amax(0) * mask
        labels = torch.where(labels > 0, labels, around)
    return labels


def num_parts(labels: Tensor, whole: Tensor) -> Tensor:
    """(b, h, w) how many different labels lie in the whole piece that a pixel belongs to, 0 outside."""
    inside = (labels > 0) & (whole > 0)
    base = int(labels.max()) + 1
    pairs = (whole[inside] * base + labels[inside]).unique()
    counts = torch.bincount(pairs // base, minlength=int(whole.max()) + 1)
    return counts[whole] * (whole > 0)
