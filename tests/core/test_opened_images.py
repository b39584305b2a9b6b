"""Pictures that somebody else has opened, and arrays: the same RGB and the same rejections as their files."""

import io
import struct

import numpy as np
import pytest
from picture_files import encoded, files_of_every_mode, picture, png_header
from PIL import Image, ImageFile, ImageOps

from qlip.core.errors import UserError
from qlip.core.images import ImageLimits, ImageRejected, array_to_rgb, open_image, upright_rgb

LIMITS = ImageLimits()


@pytest.mark.parametrize("kind", files_of_every_mode())
def test_an_opened_picture_becomes_what_its_file_becomes(kind):
    data = files_of_every_mode()[kind]
    expected = np.asarray(open_image(data, limits=LIMITS))
    lazy = Image.open(io.BytesIO(data))
    np.testing.assert_array_equal(np.asarray(upright_rgb(lazy, limits=LIMITS)), expected)
    np.testing.assert_array_equal(np.asarray(upright_rgb(lazy, limits=LIMITS)), expected)  # now it is decoded
    copy = Image.open(io.BytesIO(data)).copy()
    np.testing.assert_array_equal(np.asarray(upright_rgb(copy, limits=LIMITS)), expected)


def test_the_callers_picture_is_left_alone():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(io.BytesIO(encoded(picture(), "PNG", exif=exif)))
    result = upright_rgb(image, limits=LIMITS)
    assert image.size == (12, 10) and result.size == (10, 12)
    assert image.getexif()[0x0112] == 6 and not result.getexif()
    plain = picture()
    assert upright_rgb(plain, limits=LIMITS) is not plain


def test_orientation_is_not_applied_to_a_picture_that_somebody_has_turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(io.BytesIO(encoded(picture(), "PNG", exif=exif)))
    expected = np.asarray(ImageOps.exif_transpose(image))
    for turned in (ImageOps.exif_transpose(image), image.convert("RGB"), image.convert("RGBA")):
        np.testing.assert_array_equal(np.asarray(upright_rgb(turned, limits=LIMITS)), expected)


def test_the_frame_that_somebody_has_chosen_is_kept():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    for format in ("GIF", "PNG", "TIFF"):
        image = Image.open(io.BytesIO(encoded(frames[0], format, save_all=True, append_images=frames[1:])))
        image.seek(1)
        assert upright_rgb(image, limits=LIMITS).getpixel((0, 0)) == (0, 255, 0)
        image.seek(0)
        assert upright_rgb(image, limits=LIMITS).getpixel((0, 0)) == (255, 0, 0)


def opened_rejection(image: Image.Image) -> str:
    with pytest.raises(ImageRejected) as caught:
        upright_rgb(image, limits=LIMITS)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("width", "height"), [(60_000, 60_000), (11_000, 11_000), (1, 5000), (5_000_000, 1)])
def test_an_opened_picture_is_refused_before_it_is_decoded(monkeypatch, width, height):
    def load(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as users do who are tired of the warning
    image = Image.open(io.BytesIO(png_header(width, height, bits=1, colour=0)))
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    expected = "too many pixels" if min(width, height) > 1 else "too elongated"
    assert opened_rejection(image).startswith(f"{expected}: {width} x {height}")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP"])
def test_an_opened_file_that_is_cut_is_rejected(format):
    data = encoded(picture(60, 60), format)
    assert opened_rejection(Image.open(io.BytesIO(data[: len(data) // 2]))).startswith("broken image")


def test_an_opened_png_with_a_broken_checksum_is_rejected():
    data = bytearray(encoded(picture(60, 60)))
    start = data.index(b"IDAT")
    data[start + 4 + struct.unpack(">I", data[start - 4 : start])[0]] ^= 0xFF
    assert opened_rejection(Image.open(io.BytesIO(bytes(data)))).startswith("broken image")


def test_a_closed_file_postscript_and_half_pictures_are_refused(monkeypatch):
    image = Image.open(io.BytesIO(encoded(picture())))
    image.close()
    assert opened_rejection(image).startswith("broken image")
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    assert opened_rejection(Image.open(io.BytesIO(script))).startswith("PostScript")
    assert opened_rejection(Image.new("F", (3, 3))).startswith("floating-point")
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(UserError, match="LOAD_TRUNCATED_IMAGES = False"):
        open_image(encoded(picture()), limits=LIMITS)


def test_arrays_of_whole_numbers_become_pictures():
    pixels = np.asarray(picture())
    for dtype in (np.uint8, np.int16, np.int64):
        np.testing.assert_array_equal(np.asarray(array_to_rgb(pixels.astype(dtype), limits=LIMITS)), pixels)
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16, 1)
    np.testing.assert_array_equal(np.asarray(array_to_rgb(ramp, limits=LIMITS))[..., 0].ravel(), np.arange(256))
    mask = array_to_rgb(np.eye(4, dtype=bool)[..., None], limits=LIMITS)
    np.testing.assert_array_equal(np.asarray(mask)[..., 2], np.eye(4) * 255)
    hidden = np.zeros((2, 2, 4), np.uint8)
    assert (np.asarray(array_to_rgb(hidden, limits=LIMITS)) == 255).all()


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (np.full((2, 2, 3), 256), "int64 pixels from 256 to 256"),
        (np.full((2, 2, 3), -1, np.int8), "int8 pixels from -1"),
        (np.zeros((2, 2, 2), np.uint8), "2 channels"),
        (np.zeros((0, 2, 3), np.uint8), "image without pixels: 2 x 0"),
        (np.zeros((5000, 1, 3), np.uint8), "too elongated: 1 x 5000, limit 50 to 1"),
        (np.broadcast_to(np.uint8(0), (60_000, 60_000, 1)), "too many pixels"),
    ],
)
def test_other_arrays_are_rejected(pixels, reason):
    with pytest.raises(ImageRejected, match=reason):
        array_to_rgb(pixels, limits=LIMITS)
