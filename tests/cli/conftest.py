"""A shell for `qlip` commands, and one tiny random model folder."""

from pathlib import Path

import pytest
from tiny_runs import Shell

from qlip.models.qlip.loading import save_model
from qlip.models.qlip.modeling import QLIPModel
from qlip.models.qlip.processing import QLIPProcessor
from qlip.recipes.model import ModelConfig, TowerSize


@pytest.fixture
def qlip(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capfd)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tower = TowerSize(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24)
    sizes = ModelConfig(
        image_size=16, patch_size=8, encoder=tower, decoder=tower, text=tower, context_length=16, projection_dim=16
    )
    folder = tmp_path_factory.mktemp("a model") / "export"
    processor = QLIPProcessor.for_size(16, context_length=16)
    save_model(QLIPModel(sizes.build_config()), folder=folder, processor=processor, step=0)
    return folder
