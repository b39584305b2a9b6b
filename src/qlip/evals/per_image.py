"""What one looks at after a mean: a row per picture, and a sheet of the pictures that came out worst."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from qlip.core.errors import UserError

NUM_WORST = 20
COLUMNS = 4
LEAST_SIDE = 128  # pixels on the sheet: smaller pictures are enlarged by whole factors
GAP, LINE_HEIGHT = 8, 18


@dataclass(kw_only=True, slots=True)
class PerImage:
    """One row per picture."""

    keys: list[str]
    columns: dict[str, Tensor]
    """Metric -> (n,) float64."""

    def worst(self, num: int = NUM_WORST) -> dict[str, float]:
        """Key -> PSNR of the pictures that scored lowest, worst first; empty without a PSNR."""
        if "psnr" not in self.columns:
            return {}
        psnr = self.columns["psnr"]
        return {self.keys[i]: float(psnr[i]) for i in psnr.argsort(stable=True)[:num].tolist()}


def write_per_image(path: Path, per_image: PerImage) -> None:
    """CSV: key, then a column per metric; the file appears whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["key", *per_image.columns])
    for key, *values in zip(per_image.keys, *(c.tolist() for c in per_image.columns.values()), strict=True):
        writer.writerow([key, *(f"{value:.6g}" for value in values)])
    _replace(path, text.getvalue().encode())


@torch.inference_mode()
def write_worst(
    path: Path, per_image: PerImage, *, read: Callable[[list[str]], Tensor], reconstruct: Callable[[Tensor], Tensor]
) -> None:
    """PNG of the twenty pictures of the lowest PSNR, worst first: original, reconstruction, PSNR and key.

    `read` gives the originals (n, 3, S, S) uint8 of keys, `reconstruct` what the model makes of them.
    """
    worst = per_image.worst()
    if not worst:
        return
    originals = read(list(worst))
    buffer = io.BytesIO()
    _sheet(list(worst.items()), originals, reconstruct(originals)).save(buffer, "PNG", optimize=True)
    _replace(path, buffer.getvalue())


def _sheet(labels: list[tuple[str, float]], originals: Tensor, reconstructions: Tensor) -> Image.Image:
    size = originals.shape[-1]
    side = size * max(1, -(-LEAST_SIDE // size))
    width, height = 2 * side + 2 + GAP, side + LINE_HEIGHT + GAP
    rows, columns = -(-len(labels) // COLUMNS), min(COLUMNS, len(labels))
    sheet = Image.new("RGB", (columns * width + GAP, rows * height + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for i, (key, psnr) in enumerate(labels):
        left, top = GAP + (i % COLUMNS) * width, GAP + (i // COLUMNS) * height
        for j, pictures in enumerate((originals, reconstructions)):
            array = pictures[i].permute(1, 2, 0).contiguous().cpu().numpy()
            picture = Image.fromarray(array).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(picture, (left + j * (side + 2), top))
        text = f"{psnr:.2f} dB  {Path(key).name}"
        while draw.textlength(text, font=font) > 2 * side:
            text = text[:-1]
        draw.text((left, top + side + 2), text, fill="black", font=font)
    return sheet


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(path.suffix + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free disk space or choose another --out") from None
