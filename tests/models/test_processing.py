"""The processor: pictures and arrays of every kind, refusals in one line, texts, and rounded pictures back."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from transformers import CLIPImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from qlip.core.images import ImageLimits, ImageRejected, open_image
from qlip.core.pixels import from_uint8, normalise
from qlip.models.qlip.processing import QLIPProcessor
from qlip.models.qlip.tokenizer import clip_tokenizer, text_tokenizer

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
SIXTEEN_BITS = np.linspace(0, 65535, 2000).round().astype(np.uint16).reshape(40, 50)


@pytest.fixture(scope="module")
def processor() -> QLIPProcessor:
    return QLIPProcessor.for_size(32)


def test_postprocess_returns_the_pictures_that_went_in():
    pictures = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    processor = QLIPProcessor(image_processor=CLIPImageProcessorPil(), tokenizer=clip_tokenizer(context_length=4))
    returned = processor.postprocess(from_uint8(pictures))
    assert len(returned) == 2 and returned[0].mode == "RGB"
    np.testing.assert_array_equal(np.asarray(returned[1]), pictures[1].permute(1, 2, 0).numpy())


def test_postprocess_rounds_and_clamps():
    processor = QLIPProcessor(image_processor=CLIPImageProcessorPil(), tokenizer=clip_tokenizer(context_length=4))
    unit = torch.tensor([-3.0, 0.4 / 255, 0.6 / 255, 99.6 / 255, 254.4 / 255, 7.0]).expand(1, 3, 1, 6)
    pixels = normalise(unit).requires_grad_()
    (picture,) = processor.postprocess(pixels)
    assert np.asarray(picture)[0, :, 0].tolist() == [0, 0, 1, 100, 254, 255]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_postprocess_takes_any_float_type_and_a_single_picture(processor, dtype):
    (picture,) = processor.postprocess(torch.zeros(3, 4, 6, dtype=dtype))
    assert picture.size == (6, 4) and picture.getpixel((0, 0)) == (123, 117, 104)  # the mean that CLIP subtracts
    with pytest.raises(ValueError, match=r"pixels must be .* got \(4, 6\)"):
        processor.postprocess(torch.zeros(4, 6))


def test_postprocess_undoes_the_normalisation_of_its_own_image_processor():
    halves = CLIPImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3, do_resize=False, do_center_crop=False)
    processor = QLIPProcessor(image_processor=halves, tokenizer=clip_tokenizer(context_length=4))
    (returned,) = processor.postprocess(processor(images=PICTURE, return_tensors="pt").pixel_values)
    np.testing.assert_array_equal(np.asarray(returned), np.asarray(PICTURE))


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixel_values(processor: QLIPProcessor, images, **options) -> torch.Tensor:
    return processor(images=images, return_tensors="pt", **options).pixel_values


def files_of_every_mode() -> dict[str, bytes]:
    grey, alpha = PICTURE.convert("L"), Image.fromarray((SIXTEEN_BITS >> 8).astype(np.uint8))
    palette = PICTURE.convert("P", palette=Image.Palette.ADAPTIVE)
    files = {
        "grey": encoded(grey),
        "one bit": encoded(PICTURE.convert("1")),
        "sixteen bits": encoded(Image.fromarray(SIXTEEN_BITS)),
        "CMYK": encoded(PICTURE.convert("CMYK"), "JPEG"),
        "palette": encoded(palette),
        "transparent palette": encoded(palette, transparency=3),
        "RGBA": encoded(Image.merge("RGBA", (*PICTURE.split(), alpha))),
        "LA": encoded(Image.merge("LA", (grey, alpha))),
        "animated": encoded(PICTURE, "GIF", save_all=True, append_images=[PICTURE.rotate(90), PICTURE.rotate(180)]),
    }
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        files[f"orientation {orientation}"] = encoded(PICTURE, "JPEG", exif=exif)
    return files


@pytest.mark.parametrize("kind", files_of_every_mode())
def test_a_picture_of_any_mode_enters_as_training_reads_its_file(processor, tmp_path, kind):
    data = files_of_every_mode()[kind]
    path = tmp_path / "ein Bild"
    path.write_bytes(data)
    expected = pixel_values(processor, open_image(data, limits=ImageLimits()))
    for source in (Image.open(io.BytesIO(data)), data, path, str(path)):
        assert torch.equal(pixel_values(processor, source), expected)


def test_a_list_mixes_kinds_freely(processor):
    array = np.asarray(PICTURE)
    mixed = [PICTURE, array, encoded(PICTURE), [torch.tensor(array), array[None]], array.astype(np.float32)]
    assert torch.equal(pixel_values(processor, mixed), pixel_values(processor, PICTURE).expand(6, -1, -1, -1))
    assert torch.equal(pixel_values(processor, tuple(mixed[:2])), pixel_values(processor, mixed[:2]))


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int64, torch.float32, torch.float64, torch.float16, torch.bfloat16]
)
def test_arrays_and_tensors_of_any_layout_equal_the_picture(processor, dtype):
    tensor = torch.tensor(np.asarray(PICTURE)).to(dtype)
    expected = pixel_values(processor, PICTURE)
    layouts = [tensor, tensor.permute(2, 0, 1), tensor[None], tensor.permute(2, 0, 1)[None]]
    arrays = [layout.numpy() for layout in layouts] if dtype != torch.bfloat16 else []
    for source in [*layouts, *arrays]:
        assert torch.equal(pixel_values(processor, source), expected)


def test_grey_boolean_and_sixteen_bit_arrays_equal_their_pictures(processor):
    grey = np.asarray(PICTURE.convert("L"))
    expected = pixel_values(processor, PICTURE.convert("L"))
    for source in (grey, grey[..., None], grey[None], torch.tensor(grey), grey.astype(np.float32)):
        assert torch.equal(pixel_values(processor, source), expected)
    assert torch.equal(pixel_values(processor, SIXTEEN_BITS), pixel_values(processor, Image.fromarray(SIXTEEN_BITS)))
    assert torch.equal(pixel_values(processor, grey > 99), pixel_values(processor, Image.fromarray(grey > 99)))


def test_where_both_readings_fit_numpy_is_channels_last_and_torch_channels_first(processor):
    array = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    expected = pixel_values(processor, Image.fromarray(array))
    assert torch.equal(pixel_values(processor, array), expected)
    assert torch.equal(pixel_values(processor, torch.tensor(array).permute(2, 0, 1)), expected)
    assert torch.equal(pixel_values(processor, torch.tensor(array), input_data_format="channels_last"), expected)
    with pytest.raises(ValueError, match="input_data_format must be one of channels_first, channels_last"):
        pixel_values(processor, array, input_data_format="NHWC")


def test_floats_from_0_to_1_need_do_rescale_false(processor):
    unit = np.asarray(PICTURE).astype(np.float32) / 255
    assert torch.allclose(pixel_values(processor, unit, do_rescale=False), pixel_values(processor, PICTURE), atol=1e-6)
    with pytest.warns(UserWarning, match="pass do_rescale=False"):
        pixel_values(processor, unit)


@pytest.mark.parametrize("image", [Image.new("RGB", (1, 1)), np.zeros((1, 1, 3), np.uint8), np.zeros((1, 1))])
def test_one_pixel_is_a_picture(processor, image):
    assert pixel_values(processor, image).shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (Image.new("RGB", (1, 5000)), "too elongated: 1 x 5000, limit 50 to 1"),
        (np.zeros((5000, 1, 3), np.uint8), "too elongated: 1 x 5000, limit 50 to 1"),
        (torch.zeros(3, 5000, 1), "too elongated: 1 x 5000, limit 50 to 1"),
        (np.broadcast_to(np.float32(0), (60_000, 60_000, 3)), "too many pixels: 60000 x 60000, limit 89000000"),
        ("https://example.org/cat.png", "not a file: https://example.org/cat.png: nothing is downloaded; give a file"),
        ("HTTP://example.org/cat.png", "not a file: HTTP://example.org/cat.png: nothing is downloaded; give a file"),
        ("no such cat.png", "unreadable image file: no such cat.png: no such file"),
        ("iVBORw0KGgo" * 1000, "not a file: a string of 11000 characters; give a path or bytes"),
        (b"<html>", "not an image: a web page"),
        (np.full((4, 4, 3), np.nan), "pixels that are not finite"),
        (np.full((4, 4, 3), 256), "int64 pixels from 256 to 256: expected 0 to 255"),
        (np.zeros((4, 4, 4)), "float64 pixels with 4 channels: give whole numbers from 0 to 255"),
        (np.zeros((5, 6, 2), np.uint8), "no axis of 1, 3 or 4 channels: an array of shape (5, 6, 2)"),
        (np.zeros(4), "not a picture: an array of shape (4,)"),
        (np.zeros((0, 4, 3), np.uint8), "image without pixels: 4 x 0"),
    ],
)
def test_what_is_no_picture_is_refused_in_one_line(processor, image, reason):
    with pytest.raises(ImageRejected) as caught:
        processor(images=[PICTURE, image], return_tensors="pt")
    assert str(caught.value) == reason
    assert caught.value.__notes__ == ["images[1]"]


def test_a_huge_picture_is_refused_before_it_is_decoded(processor, monkeypatch):
    def load(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # Pillow's own warning
    data = encoded(Image.new("1", (9500, 9500)))
    image = Image.open(io.BytesIO(data))
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    for source in (image, data):
        with pytest.raises(ImageRejected, match="too many pixels"):
            processor(images=source)


def test_nothing_and_other_types_are_refused(processor):
    for options in ({"images": []}, {"text": []}, {}):
        with pytest.raises(ValueError, match="at least one"):
            processor(**options)
    with pytest.raises(TypeError, match="a picture is a PIL image, a path, bytes, an array or a tensor, not int"):
        processor(images=3)


def test_clips_image_options_hold_for_one_call(processor):
    size, crop_size = {"shortest_edge": 64}, {"height": 64, "width": 64}
    assert torch.equal(
        pixel_values(processor, PICTURE, size=size, crop_size=crop_size),
        pixel_values(QLIPProcessor.for_size(64), PICTURE),
    )
    assert pixel_values(processor, PICTURE).shape == (1, 3, 32, 32)
    whole = pixel_values(processor, PICTURE, do_resize=False, do_center_crop=False)
    assert torch.allclose(whole[0], from_uint8(torch.tensor(np.asarray(PICTURE)).permute(2, 0, 1)), atol=1e-6)


def test_one_call_pads_and_cuts_texts_and_reads_markers_as_characters():
    processor = QLIPProcessor.for_size(32, context_length=9)
    both = processor(images=PICTURE, text=["a cat", "two dogs"], return_tensors="pt")
    assert both.pixel_values.shape == (1, 3, 32, 32)
    assert both.input_ids.shape == both.attention_mask.shape == (2, 4)
    texts = ["a <|endoftext|> cat", "a very long text about a cat and a dog"]
    encoded = processor(text=tuple(texts), return_tensors="pt")
    expected = text_tokenizer(processor.tokenizer)(texts)
    assert torch.equal(encoded.input_ids, expected["input_ids"]) and encoded.input_ids.shape == (2, 9)
    assert processor(text="a cat").input_ids == [49406, 320, 2368, 49407]


def test_text_options_of_the_caller_win(processor):
    assert processor(text=["a cat"], padding="max_length", return_tensors="pt").input_ids.shape == (1, 77)
    assert processor(text=["a cat"], max_length=3).input_ids == [[49406, 320, 49407]]
    assert processor(text="<|endoftext|>", split_special_tokens=False).input_ids == [49406, 49407, 49407]
    plain = processor(text=["a cat", "a"], text_kwargs={"padding": False}).input_ids
    assert [len(ids) for ids in plain] == [4, 3]


def test_another_back_end_becomes_pillows(processor):
    theirs = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    ours = QLIPProcessor(image_processor=theirs, tokenizer=processor.tokenizer)
    assert type(ours.image_processor) is CLIPImageProcessorPil
    assert torch.equal(pixel_values(ours, PICTURE), pixel_values(processor, PICTURE))
