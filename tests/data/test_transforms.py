"""Transforms: the processor's numbers for evaluation, torchvision's distribution for training, both reproducible."""

import io
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from shard_files import picture

from qlip.core.errors import UserError
from qlip.core.pixels import from_uint8, to_uint8
from qlip.data.transforms import prepared_pixels, random_box, random_resized_crop, resize_and_crop


@pytest.mark.parametrize("size", [(64, 64), (101, 67), (67, 101), (20, 33), (33, 500)])
def test_evaluation_equals_the_processor(size):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    image = picture(*size)
    expected = torch.as_tensor(np.asarray(processor(image)["pixel_values"][0]))
    result = resize_and_crop(image, size=32)
    assert result.shape == (3, 32, 32) and result.dtype == torch.float32 and result.is_contiguous()
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
    assert torch.equal(to_uint8(result), to_uint8(expected))


def test_filters_by_name():
    image = picture(50, 40)
    bicubic, bilinear, lanczos = (resize_and_crop(image, size=16, filter=f) for f in ("bicubic", "bilinear", "lanczos"))
    assert torch.equal(bicubic, resize_and_crop(image, size=16))
    assert not torch.equal(bicubic, bilinear) and not torch.equal(bicubic, lanczos)
    with pytest.raises(UserError, match="did you mean 'bicubic'"):
        resize_and_crop(image, size=16, filter="bicubc")


@pytest.mark.parametrize("size", [(64, 64), (63, 64), (257, 130), (31, 200), (20, 33), (131, 999), (16, 16)])
def test_adm_equals_its_steps_in_pillow(size):
    image = picture(*size)
    width, height = size
    expected = image
    while width >= 32 and height >= 32:
        width, height = width // 2, height // 2
        expected = expected.resize((width, height), Image.Resampling.BOX)
    scale = 16 / min(width, height)
    pixels = np.asarray(expected.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - 16) // 2, (pixels.shape[1] - 16) // 2
    result = prepared_pixels(image, size=16, filter="adm")
    np.testing.assert_array_equal(result.permute(1, 2, 0).numpy(), pixels[top : top + 16, left : left + 16])


@pytest.mark.parametrize("filter", ["bicubic", "bilinear", "lanczos", "adm"])
@pytest.mark.parametrize("size", [(40, 57), (1, 30), (9, 7)], ids=str)
def test_prepared_pixels_are_the_square_before_it_is_normalised(filter, size):
    image = picture(*size)
    pixels = prepared_pixels(image, size=16, filter=filter)
    assert (pixels.shape, pixels.dtype, pixels.is_contiguous()) == ((3, 16, 16), torch.uint8, True)
    assert torch.equal(from_uint8(pixels), resize_and_crop(image, size=16, filter=filter))


def test_squashed_pictures_keep_their_edges():
    image = picture(60, 20)
    pixels = prepared_pixels(image, size=16, filter="bilinear", crop="squash")
    expected = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), expected)
    with pytest.raises(UserError, match="did you mean 'centre'"):
        prepared_pixels(image, size=16, crop="center")
    with pytest.raises(UserError, match="'adm' is a centre crop: take"):
        prepared_pixels(image, size=16, filter="adm", crop="squash")


def test_random_crop_depends_on_its_random_alone():
    image = picture(50, 40)
    first = random_resized_crop(image, size=16, random=Random(1))
    torch.manual_seed(5)
    assert torch.equal(first, random_resized_crop(image, size=16, random=Random(1)))
    assert not torch.equal(first, random_resized_crop(image, size=16, random=Random(2)))
    assert first.shape == (3, 16, 16) and first.dtype == torch.float32


def test_whole_picture_when_the_scale_is_one_and_the_ratio_fits():
    image = picture(16, 16)
    boxes = {random_box(16, 16, scale=(1.0, 1.0), random=Random(i)) for i in range(50)}
    assert (0, 0, 16, 16) in boxes  # ratio near one, or the fallback
    assert torch.equal(
        random_resized_crop(image, size=16, scale=(1, 1), random=Random(0)), resize_and_crop(image, size=16)
    )


@pytest.mark.parametrize(
    ("width", "height"), [(100, 80), (80, 100), (300, 200), (1000, 20), (20, 1000), (1, 1), (1, 3)]
)
def test_boxes_stay_inside_and_match_torchvision_in_distribution(width, height):
    from torchvision.transforms import RandomResizedCrop

    random = Random(0)
    boxes = np.array([random_box(width, height, scale=(0.5, 1.0), random=random) for _ in range(400)])
    left, top, right, bottom = boxes.T
    assert (left >= 0).all() and (top >= 0).all() and (right <= width).all() and (bottom <= height).all()
    assert (right > left).all() and (bottom > top).all()
    image = Image.new("L", (width, height))
    theirs = np.array([RandomResizedCrop.get_params(image, [0.5, 1.0], [3 / 4, 4 / 3]) for _ in range(400)])  # i j h w
    for ours, other in (
        (top, theirs[:, 0]),
        (left, theirs[:, 1]),
        (bottom - top, theirs[:, 2]),
        (right - left, theirs[:, 3]),
    ):
        spread = max(ours.std(), other.std(), 1e-9)
        assert abs(ours.mean() - other.mean()) <= 0.3 * spread + 0.01  # four standard errors of 400 draws


def test_natural_photographs_survive_the_round_trip():
    data = pytest.importorskip("skimage.data")
    image = Image.fromarray(data.astronaut())
    pixels = resize_and_crop(image, size=64)
    expected = np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(to_uint8(pixels).permute(1, 2, 0).numpy(), expected)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    assert (resize_and_crop(Image.open(buffer), size=64) - pixels).abs().mean() < 0.03
