"""The grid of samples: every tile where and what it should be, and a file that is whole or not there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from qlip.core import pixels
from qlip.data.scene_shards import write_scene_shards
from qlip.data.scenes import SceneConfig
from qlip.data.sources import open_source
from qlip.evals.collect import first_pictures
from qlip.evals.sample_grid import reconstruction_grid, save_grid
from qlip.models.qlip.configuration import QLIPConfig
from qlip.models.qlip.modeling import QLIPModel, QLIPOutput
from qlip.recipes.model import ModelConfig, TowerSize

NUM, SIDE = 5, 16


def model_of(quantizer: str) -> QLIPModel:
    torch.manual_seed(0)
    tower = TowerSize(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24)
    sizes = ModelConfig(
        image_size=SIDE, patch_size=8, encoder=tower, decoder=tower, text=tower, context_length=16, projection_dim=16,
        quantizer=quantizer, initializer_range=0.3,
    )  # fmt: skip
    config: QLIPConfig = sizes.build_config()
    return QLIPModel(config).eval()


@pytest.fixture(scope="module")
def pixel_values(tmp_path_factory) -> torch.Tensor:
    """(NUM, 3, SIDE, SIDE): real scenes, read as evaluations read them."""
    folder = tmp_path_factory.mktemp("scenes") / "test"
    write_scene_shards(folder, num=NUM, split="test", config=SceneConfig(image_size=24))
    return pixels.from_uint8(first_pictures(open_source(str(folder)), num=NUM, size=SIDE)[1])


def as_picture(normalised: torch.Tensor) -> np.ndarray:
    """(3, h, w) CLIP-normalised -> (3, h, w) in [0, 255], rounded, by numpy alone."""
    mean, std = np.array(pixels.CLIP_MEAN), np.array(pixels.CLIP_STD)
    unit = normalised.detach().double().numpy() * std[:, None, None] + mean[:, None, None]
    return np.rint(unit.clip(0, 1) * 255).astype(int)


@pytest.mark.parametrize("quantizer", ["bsq", "none"])
def test_every_tile_and_every_line(quantizer, pixel_values):
    model = model_of(quantizer)
    grid = reconstruction_grid(model, pixel_values)
    assert grid.dtype == torch.uint8 and grid.shape == (3, 3 * SIDE + 4, NUM * SIDE + 2 * (NUM - 1))
    shown = grid.numpy().astype(int)
    untouched = np.ones(shown.shape[1:], dtype=bool)
    reconstructions = model(pixel_values).reconstructions
    for column in range(NUM):
        original = as_picture(pixel_values[column])
        reconstruction = as_picture(reconstructions[column])
        difference = np.minimum(4 * np.abs(original - reconstruction), 255)
        assert len(np.unique(original)) > 20 and (difference < 255).any() and (difference > 0).any()
        for row, (expected, slack) in enumerate([(original, 1), (reconstruction, 1), (difference, 4)]):
            tile = (slice(row * 18, row * 18 + SIDE), slice(column * 18, column * 18 + SIDE))
            distance = np.abs(shown[:, *tile] - expected)
            assert distance.max() <= slack and (distance > 0).mean() < 0.01  # float32 may round the other way
            untouched[tile] = False
    assert untouched.sum() == shown[0].size - 3 * NUM * SIDE**2
    assert (shown[:, untouched] == 255).all()


def test_a_perfect_reconstruction_has_a_black_third_row(pixel_values, monkeypatch):
    model = model_of("bsq")
    monkeypatch.setattr(model, "forward", lambda given: QLIPOutput(reconstructions=given))
    grid = reconstruction_grid(model, pixel_values[:1])
    assert torch.equal(grid[:, :SIDE], pixels.to_uint8(pixel_values[0]))
    assert torch.equal(grid[:, SIDE + 2 : 2 * SIDE + 2], grid[:, :SIDE])
    assert not grid[:, 2 * SIDE + 4 :].any() and grid.shape == (3, 3 * SIDE + 4, SIDE)


def test_the_file_is_the_grid(tmp_path):
    grid = torch.randint(0, 256, (3, 20, 33), dtype=torch.uint8)
    path = tmp_path / "samples" / "step_00000500.png"
    for picture in (grid.flip(1), grid):  # the second takes the place of the first
        save_grid(path, picture)
    with Image.open(path) as opened:
        assert (opened.format, opened.mode) == ("PNG", "RGB")
        assert np.array_equal(np.asarray(opened), grid.permute(1, 2, 0).numpy())
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "step_00000500.png"
    save_grid(path, torch.zeros(3, 4, 4, dtype=torch.uint8))
    before = path.read_bytes()

    def half(self, file, **options) -> None:
        file.write_bytes(b"\x89PNG")
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(OSError, match="no space"):
        save_grid(path, torch.ones(3, 4, 4, dtype=torch.uint8))
    assert path.read_bytes() == before
