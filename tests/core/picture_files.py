"""Small pictures as files, honest and hostile."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def picture(width: int = 12, height: int = 10, *, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width: int, height: int, *, bits: int = 8, colour: int = 2) -> bytes:
    """A PNG that claims a size and holds almost nothing."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def files_of_every_mode() -> dict[str, bytes]:
    """One small file per kind of picture that a plain conversion to RGB gets wrong, and some that it gets right."""
    rgb, grey = picture(), picture().convert("L")
    ramp = np.linspace(0, 65535, 120).round().astype(np.uint16).reshape(10, 12)
    alpha = Image.fromarray((ramp >> 8).astype(np.uint8))
    palette = rgb.convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
    files = {
        "RGB": encoded(rgb),
        "jpeg": encoded(rgb, "JPEG"),
        "grey": encoded(grey),
        "one bit": encoded(rgb.convert("1")),
        "sixteen bits": encoded(Image.fromarray(ramp)),
        "sixteen bits tiff": encoded(Image.fromarray(ramp), "TIFF"),
        "thirty-two bits": encoded(Image.fromarray(ramp.astype(np.int32)), "TIFF"),
        "CMYK": encoded(rgb.convert("CMYK"), "JPEG"),
        "palette": encoded(palette),
        "transparent palette": encoded(palette, transparency=3),
        "transparent grey": encoded(grey, transparency=128),
        "RGBA": encoded(Image.merge("RGBA", (*rgb.split(), alpha))),
        "LA": encoded(Image.merge("LA", (grey, alpha))),
        "animated": encoded(rgb, "GIF", save_all=True, append_images=[picture(seed=1), picture(seed=2)]),
        "animated webp": encoded(rgb, "WEBP", save_all=True, append_images=[picture(seed=1)]),
        "animated png": encoded(rgb, "PNG", save_all=True, append_images=[picture(seed=1)]),
    }
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        files[f"orientation {orientation}"] = encoded(rgb, "PNG", exif=exif)
    return files
