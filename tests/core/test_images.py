"""The image opener: right RGB for every kind of picture, one-line rejections for everything broken or too large."""

import io
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from picture_files import encoded, picture, png_header
from PIL import Image, ImageOps, PngImagePlugin

from qlip.core.images import ImageLimits, ImageRejected, open_image

LIMITS = ImageLimits()


def opened(data: bytes) -> np.ndarray:
    image = open_image(data, limits=LIMITS)
    assert image.mode == "RGB"
    return np.asarray(image)


def rejection(source, limits: ImageLimits = LIMITS) -> str:
    with warnings.catch_warnings(), pytest.raises(ImageRejected) as caught:
        warnings.simplefilter("error")  # a rejection says everything; nothing else may be printed
        open_image(source, limits=limits)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_come_back_exactly(format):
    np.testing.assert_array_equal(opened(encoded(picture(), format)), np.asarray(picture()))


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "AVIF"])
def test_lossy_formats_have_the_right_size(format):
    assert opened(encoded(picture(20, 14), format)).shape == (14, 20, 3)


def test_reads_a_path_with_spaces_and_umlauts(tmp_path):
    path = tmp_path / "ein schönes Bild.png"
    path.write_bytes(encoded(picture()))
    np.testing.assert_array_equal(np.asarray(open_image(path, limits=LIMITS)), np.asarray(picture()))


def test_cmyk_palette_and_grey_become_the_right_rgb():
    red = Image.new("RGB", (9, 9), (255, 0, 0))
    cmyk = opened(encoded(red.convert("CMYK"), "JPEG", quality=100))
    assert abs(cmyk.astype(int) - [255, 0, 0]).max() <= 4
    np.testing.assert_array_equal(opened(encoded(red.convert("P", palette=Image.Palette.ADAPTIVE))), np.asarray(red))
    grey = opened(encoded(picture().convert("L")))
    np.testing.assert_array_equal(grey, np.repeat(np.asarray(picture().convert("L"))[..., None], 3, -1))
    bits = Image.fromarray(np.eye(8, dtype=bool))
    np.testing.assert_array_equal(opened(encoded(bits))[..., 0], np.eye(8) * 255)


def test_sixteen_bit_grey_is_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    for format in ("PNG", "TIFF"):
        np.testing.assert_array_equal(opened(encoded(Image.fromarray(ramp), format))[..., 1].ravel(), np.arange(256))
    wide = Image.fromarray(ramp.astype(np.int32))  # mode I
    np.testing.assert_array_equal(opened(encoded(wide, "TIFF"))[..., 2].ravel(), np.arange(256))


def test_alpha_is_composited_on_white():
    hidden = np.zeros((4, 4, 4), np.uint8)  # fully transparent black
    hidden[0, 0] = (10, 20, 30, 255)
    hidden[0, 1] = (0, 0, 0, 128)
    result = opened(encoded(Image.fromarray(hidden, "RGBA")))
    assert result[0, 0].tolist() == [10, 20, 30]
    assert result[0, 1].tolist() == [127, 127, 127]
    assert (result[1:] == 255).all()
    half = Image.merge("LA", (Image.new("L", (3, 3), 0), Image.new("L", (3, 3), 0)))
    assert (opened(encoded(half)) == 255).all()
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([0, 0, 0, 0, 0, 255])
    assert opened(encoded(palette, transparency=0)).tolist() == [[[255, 255, 255], [0, 0, 255]]]


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animated_and_multi_page_give_the_first_frame(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert opened(data)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(), "PNG", exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        expected = ImageOps.exif_transpose(image)
    result = open_image(data, limits=LIMITS)
    np.testing.assert_array_equal(np.asarray(result), np.asarray(expected))
    np.testing.assert_array_equal(np.asarray(ImageOps.exif_transpose(result)), np.asarray(expected))


def test_damaged_exif_does_not_cost_the_picture():
    assert opened(encoded(picture(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01")).shape == (10, 12, 3)


def test_zero_bytes_web_page_and_text_are_no_images(tmp_path):
    assert rejection(b"") == "not an image: zero bytes"
    assert rejection(b"<!DOCTYPE html><html>404</html>") == "not an image: a web page"
    assert rejection(b"hello") == "not an image: no known format"
    assert rejection(tmp_path / "nothing.jpg").endswith("no such file")
    assert rejection(tmp_path).endswith("no such file")


def test_postscript_is_not_opened():
    assert rejection(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n").startswith("not an image")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_files_are_rejected(format, share):
    data = encoded(picture(60, 60), format)
    assert rejection(data[: int(len(data) * share)])


def test_a_broken_checksum_is_rejected():
    data = bytearray(encoded(picture(60, 60)))
    start = data.index(b"IDAT")
    length = struct.unpack(">I", data[start - 4 : start])[0]
    data[start + 4 + length] ^= 0xFF  # first byte of the checksum; the pixels are whole
    assert rejection(bytes(data)).startswith("broken image")


def test_any_flipped_byte_gives_a_picture_or_a_rejection():
    for format in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"):
        data = encoded(picture(), format)
        for position in range(0, min(len(data), 120)):
            broken = bytearray(data)
            broken[position] ^= 0xA5
            try:
                assert open_image(bytes(broken), limits=LIMITS).mode == "RGB"
            except ImageRejected as error:
                assert "\n" not in str(error)


def test_text_chunk_bomb_is_rejected():
    info = PngImagePlugin.PngInfo()
    info.add_text("bomb", "0" * 80_000_000, zip=True)
    data = encoded(picture(), pnginfo=info)
    assert len(data) < 200_000
    assert rejection(data).startswith("broken image")


@pytest.mark.parametrize(
    ("width", "height", "bits", "colour"),
    [(60_000, 60_000, 1, 0), (11_000, 11_000, 8, 2), (9_500, 9_500, 8, 2), (2**31 - 1, 2**31 - 1, 8, 6)],
)
def test_too_many_pixels_are_rejected_from_the_header(width, height, bits, colour):
    assert rejection(png_header(width, height, bits=bits, colour=colour)).startswith("too many pixels")


def test_limits_are_the_callers():
    assert rejection(png_header(1, 5_000_000)).startswith("too elongated")
    assert rejection(encoded(picture(12, 10)), ImageLimits(max_pixels=119)).startswith("too many pixels")
    assert rejection(encoded(picture(12, 10)), ImageLimits(max_aspect_ratio=1.1)).startswith("too elongated")
    assert open_image(encoded(picture(12, 10)), limits=ImageLimits(max_pixels=120, max_aspect_ratio=1.2))


def test_large_files_are_not_read(tmp_path):
    path = tmp_path / "large.png"
    path.write_bytes(bytes(1001))
    assert rejection(path, ImageLimits(max_bytes=1000)).startswith("image file too large: 1001")
    assert rejection(bytes(1001), ImageLimits(max_bytes=1000)).startswith("image file too large")


def test_a_name_too_long_for_a_file_is_rejected():
    assert rejection(Path("x" * 5000)).startswith("unreadable image file")
