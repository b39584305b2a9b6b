"""Bits looked at, flipped and swapped, against loops over pixels and patches."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from qlip.apps import token_explorer as explorer
from qlip.core.errors import UserError
from qlip.data.scenes import SceneConfig, render, sample_scenes
from qlip.evals.scene_zero_shot import TEMPLATES
from qlip.models.image_tokenizer import ImageTokenizer, open_image_tokenizer
from tiny_tokenizer import save_tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ImageTokenizer:
    return open_image_tokenizer(save_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer") / "model"))


@pytest.fixture(scope="module")
def picture(tokenizer: ImageTokenizer) -> torch.Tensor:
    scenes = sample_scenes(1, split="test", shard=0, config=SceneConfig(image_size=40))
    image = Image.fromarray(render(scenes, image_size=40)[0].permute(1, 2, 0).numpy())
    return explorer.prepare(image, tokenizer)


def test_one_picture_is_encoded_and_decoded_as_in_a_batch_of_one(
    tokenizer: ImageTokenizer, picture: torch.Tensor
) -> None:
    bits = explorer.encode(tokenizer, picture)
    assert picture.shape == (3, 16, 16) and picture.dtype == torch.uint8 and bits.shape == (4, 28)
    assert torch.equal(bits, tokenizer.encode(picture[None])[0])
    assert torch.equal(explorer.decode(tokenizer, bits), tokenizer.decode(bits[None])[0])


def test_difference_is_amplified_and_cut() -> None:
    a = torch.tensor([10, 10, 250], dtype=torch.uint8).view(3, 1, 1)
    b = torch.tensor([13, 10, 0], dtype=torch.uint8).view(3, 1, 1)
    assert explorer.difference_picture(a, b, gain=5).flatten().tolist() == [15, 0, 255]
    assert torch.equal(explorer.difference_picture(a, b), explorer.difference_picture(b, a))


def test_figures_are_those_of_the_pixels(picture: torch.Tensor) -> None:
    other = (picture.int() + 5).clamp(max=255).to(torch.uint8)
    found = explorer.figures(picture, other, torch.zeros(4, 28, dtype=torch.bool))
    error = np.mean((picture.numpy().astype(float) - other.numpy()) ** 2)
    assert found.psnr == pytest.approx(10 * math.log10(255**2 / error))
    assert (found.num_bits, found.bits_per_pixel) == (112, 112 / 256)
    assert explorer.figures(picture, picture, torch.zeros(4, 28)).psnr == math.inf


def test_bit_planes_and_their_sheet_show_every_bit_where_it_belongs() -> None:
    grid, bits = (2, 3), torch.rand(6, 28) < 0.5
    planes = explorer.bit_planes(bits, grid=grid)
    sheet = explorer.contact_sheet(planes)
    pixels = np.array(sheet.picture)
    side = sheet.size[0] // 3
    assert sheet.size == (3 * side, 2 * side) and side * 3 >= explorer.PLANE_SIDE and len(sheet.corners) == 28
    for bit, (left, top) in enumerate(sheet.corners):
        for token in range(6):
            row, column = divmod(token, 3)
            assert planes[bit, row, column] == bits[token, bit]
            cell = pixels[top + row * side : top + (row + 1) * side, left + column * side : left + (column + 1) * side]
            assert (cell == (explorer.ONE if bits[token, bit] else explorer.ZERO)).all()
        assert sheet.bit_at(left + sheet.size[0] - 1, top + sheet.size[1] - 1) == bit
        assert sheet.bit_at(left, top - 2) == bit, "its number"
        assert sheet.bit_at(left + sheet.size[0] + 1, top) is None, "the gap beside it"


@pytest.mark.parametrize("size", [(12, 12), (7, 10), (3, 2), (1, 1)], ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("threshold", [0.0, 0.15, 0.5])
def test_cells_under_a_mask_of_any_size_are_those_covered_enough(size: tuple[int, int], threshold: float) -> None:
    rows, columns, fine = 4, 3, 8  # each pixel cut into 4 x 3 x fine parts, which lie in one cell each
    mask = torch.rand(size) < 0.4
    small = np.kron(mask.numpy(), np.ones((rows * fine, columns * fine)))
    parts = small.reshape(rows, size[0] * fine, columns, size[1] * fine)
    expected = parts.mean(axis=(1, 3)) > threshold + 1e-12
    assert explorer.cells_under(mask, grid=(rows, columns), threshold=threshold + 1e-12).tolist() == (
        expected.flatten().tolist()
    )


def test_a_stroke_covers_what_is_near_its_line() -> None:
    side, diameter, points = 64, 0.2, [(0.2, 0.3), (0.7, 0.3), (0.7, 0.9)]
    mask = explorer.painted(points, diameter=diameter, side=side)
    dense = [
        (start[0] + (end[0] - start[0]) * t, start[1] + (end[1] - start[1]) * t)
        for start, end in pairwise(points)
        for t in np.linspace(0, 1, 200)
    ]
    centres = (np.arange(side) + 0.5) / side
    distance = np.min(
        [(centres[None, :] - x) ** 2 + (centres[:, None] - y) ** 2 for x, y in dense], axis=0
    )  # (side, side), rows are y
    for slack, covered in ((-1.5 / side, True), (1.5 / side, False)):
        sure = np.sqrt(distance) < diameter / 2 + slack if covered else np.sqrt(distance) > diameter / 2 + slack
        assert (mask.numpy()[sure] == covered).all()


@pytest.mark.parametrize("place", [(0.25, 0.25), (0.5, 0.5), (0.5, 0.25), (0.01, 0.99), (0.4, 0.6)], ids=str)
def test_a_brush_as_wide_as_a_patch_always_touches_the_one_below_it(place: tuple[float, float]) -> None:
    cells = explorer.cells_under(explorer.painted([place], diameter=0.5), grid=(2, 2)).view(2, 2)
    assert cells[int(place[1] * 2), int(place[0] * 2)]


def test_a_stroke_outside_the_picture_touches_nothing() -> None:
    assert not explorer.painted([(-3.0, -3.0), (-2.0, 5.0)], diameter=0.1).any()


def test_flip_turns_exactly_the_chosen_bits_and_back() -> None:
    bits, cells, which = torch.rand(6, 28) < 0.5, torch.tensor([True, False, False, True, False, False]), [0, 27]
    flipped = explorer.flip(bits, cells, which=which)
    for token in range(6):
        for bit in range(28):
            assert (flipped[token, bit] != bits[token, bit]) == (bool(cells[token]) and bit in which)
    assert torch.equal(explorer.flip(flipped, cells, which=which), bits)
    assert torch.equal(explorer.flip(bits, cells, which=range(28))[cells], ~bits[cells])


def test_swap_takes_whole_tokens() -> None:
    bits, others, cells = torch.rand(6, 28) < 0.5, torch.rand(6, 28) < 0.5, torch.arange(6) % 2 == 0
    swapped = explorer.swap(bits, others, cells)
    assert torch.equal(swapped[cells], others[cells]) and torch.equal(swapped[~cells], bits[~cells])


def test_probabilities_are_the_softmax_of_the_models_own_logits(
    tokenizer: ImageTokenizer, picture: torch.Tensor
) -> None:
    labels = ["red circle", "blue star", "green square"]
    measured = tokenizer.measured  # type: ignore[attr-defined]
    texts = [template.format(label) for label in labels for template in TEMPLATES]
    with torch.inference_mode():
        embeds = measured.text_embeds(texts).view(3, len(TEMPLATES), -1).mean(1)
        image = measured.image_embeds(picture[None])[0]
        cosines = embeds @ image / embeds.norm(dim=-1)
        expected = (measured.model.logit_scale.exp() * cosines).softmax(0)
    found = explorer.classify(tokenizer, picture, labels)
    assert list(found) == labels
    assert list(found.values()) == pytest.approx(expected.tolist(), abs=1e-6)


def test_a_tokenizer_without_texts_cannot_classify(picture: torch.Tensor) -> None:
    class OfBits:
        name = "VQModel"

    with pytest.raises(UserError, match="VQModel reads no text"):
        explorer.classify(OfBits(), picture, ["red"])  # type: ignore[arg-type]


def test_change_is_averaged_over_each_patch() -> None:
    a, b = torch.randint(0, 256, (2, 3, 6, 8), dtype=torch.uint8)
    found = explorer.change_by_patch(a, b, grid=(3, 4))
    for cell in range(12):
        row, column = divmod(cell, 4)
        patch = np.s_[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert float(found[cell]) == pytest.approx(np.abs(a.numpy().astype(int) - b.numpy())[patch].mean())
