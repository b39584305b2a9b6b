"""The one way a picture from outside enters qlip: limits from the header first, then pixels, always RGB with 8 bits.

Everything that reads image bytes (shards, folders, the command line, the playground) calls `open_image`.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")  # the others are rare, or start programs (EPS)
ORIENTATIONS = {  # EXIF value -> what turns the stored picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
EXIF_ORIENTATION = 0x0112


@dataclass(kw_only=True, slots=True)
class ImageLimits:
    """What is still a picture; beyond it is an accident or an attack, rejected before its pixels are decoded."""

    max_bytes: int = 50_000_000
    """Size of the encoded file."""
    max_pixels: int = 89_000_000
    """Width times height. Above 89 million Pillow itself takes a picture for a decompression bomb."""
    max_aspect_ratio: float = 50.0
    """Longer side over shorter side."""


class ImageRejected(ValueError):  # noqa: N818 - a verdict on the data, not a fault of the program
    """A picture that cannot be used. One line `kind` or `kind: detail`; ledgers count by kind."""


def open_image(source: bytes | Path, *, limits: ImageLimits) -> Image.Image:
    """Encoded picture -> upright RGB, 8 bits a channel, first frame, without metadata.

    Alpha is composited on white, 16-bit grey is scaled, EXIF orientation is applied once. Raises `ImageRejected`
    for anything broken, truncated or over the limits, and for nothing else.
    """
    data = _read(source, limits)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES, "half pictures must fail, never train"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damaged metadata around good pixels
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check_size(image, limits)
                if image.format == "PNG":
                    _check_png(data)
                image.load()
                return _upright(_to_rgb(image), orientation=_orientation(image))
        except ImageRejected:
            raise
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise ImageRejected("too many pixels: decompression bomb") from None
        except Image.UnidentifiedImageError:
            raise ImageRejected(_unidentified(data)) from None
        except Exception as error:  # on hostile bytes Pillow's readers raise nearly every type
            raise ImageRejected(f"broken image: {' '.join(str(error).split()) or type(error).__name__}") from None


def _read(source: bytes | Path, limits: ImageLimits) -> bytes:
    if isinstance(source, Path) and not source.is_file():  # a pipe would be waited for
        raise ImageRejected(f"unreadable image file: {source}: no such file")
    try:
        num_bytes = source.stat().st_size if isinstance(source, Path) else len(source)
        if num_bytes > limits.max_bytes:
            raise ImageRejected(f"image file too large: {num_bytes} bytes, limit {limits.max_bytes}")
        return source.read_bytes() if isinstance(source, Path) else source
    except OSError as error:
        raise ImageRejected(f"unreadable image file: {error}") from None


def _check_size(image: Image.Image, limits: ImageLimits) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageRejected(f"image without pixels: {width} x {height}")
    if width * height > limits.max_pixels:
        raise ImageRejected(f"too many pixels: {width} x {height}, limit {limits.max_pixels}")
    if max(width, height) > limits.max_aspect_ratio * min(width, height):
        raise ImageRejected(f"too elongated: {width} x {height}, limit {limits.max_aspect_ratio:g} to 1")


def _check_png(data: bytes) -> None:
    """Every chunk's checksum: Pillow skips those of the pixel chunks when it decodes."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        image.verify()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _scaled_grey(np.asarray(image))
    if image.mode == "F":
        raise ImageRejected("floating-point pixels: their white is unknown")
    if image.has_transparency_data:
        image = image.convert("RGBA")  # plain conversion to RGB shows what transparency hides
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _scaled_grey(grey: np.ndarray) -> Image.Image:
    """16-bit (or wider) grey -> RGB, white at 65535 or at the brightest pixel of a wider range; never clipped."""
    values = grey.astype(np.float64).clip(min=0)
    white = max(65535.0, values.max())
    return Image.fromarray((values * (255 / white)).round().astype(np.uint8)).convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # damaged EXIF raises nearly every type; the pixels are good
        return 1


def _upright(image: Image.Image, *, orientation: int) -> Image.Image:
    if orientation in ORIENTATIONS:
        image = image.transpose(ORIENTATIONS[orientation])
    image.info = {}  # nobody may turn it a second time
    return image


def _unidentified(data: bytes) -> str:
    start = data[:512].lstrip().lower()
    if not data:
        return "not an image: zero bytes"
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        return "not an image: a web page"
    return "not an image: no known format"
