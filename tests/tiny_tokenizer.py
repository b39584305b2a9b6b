"""An image tokenizer of a few thousand parameters."""

from __future__ import annotations

from pathlib import Path

import torch

from qlip.models.qlip.loading import save_model
from qlip.models.qlip.modeling import QLIPModel
from qlip.models.qlip.processing import QLIPProcessor
from qlip.recipes.model import ModelConfig, TowerSize


def save_tiny_tokenizer(folder: Path, *, seed: int = 0, quantizer: str = "bsq") -> Path:
    """A QLIP of 16 px: 2 x 2 tokens of 28 bits, texts of 16 slots and width 16."""
    tower = TowerSize(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24)
    sizes = ModelConfig(
        image_size=16,
        patch_size=8,
        quantizer=quantizer,
        encoder=tower,
        decoder=tower,
        text=tower,
        context_length=16,
        projection_dim=16,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = QLIPModel(sizes.build_config())
    save_model(model, folder=folder, processor=QLIPProcessor.for_size(16, context_length=16), step=0)
    return folder
