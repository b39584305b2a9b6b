"""One tiny QLIP for the tests of this room, and how equal two of them are."""

from __future__ import annotations

import torch

from qlip.models.qlip.configuration import QLIPConfig
from qlip.models.qlip.modeling import QLIPModel

TOWER = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 2, "num_hidden_layers": 2}
GRID = {"image_size": 32, "patch_size": 8}
TEXT = TOWER | {"vocab_size": 300, "max_position_embeddings": 20, "eos_token_id": 299}


def tiny_config(**vision: object) -> QLIPConfig:
    """32 px, 16 tokens of 28 bits; fields of the vision part can be changed."""
    return QLIPConfig(
        text_config=TEXT,
        vision_config=GRID | TOWER | {"hidden_size_post_q": 32, "initializer_range": 0.2} | vision,
        decoder_config=GRID | TOWER | {"initializer_range": 0.2},
        projection_dim=16,
    )


def tiny_model(*, seed: int = 0, **vision: object) -> QLIPModel:
    """In evaluation mode, the same for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return QLIPModel(tiny_config(**vision)).eval()


def pictures(num: int = 3, *, size: int = 32, seed: int = 1) -> torch.Tensor:
    """(num, 3, size, size) noise."""
    return torch.randn(num, 3, size, size, generator=torch.Generator().manual_seed(seed))


def texts() -> torch.Tensor:
    """(2, 6) ids, each with an end marker."""
    return torch.tensor([[1, 2, 299, 0, 0, 0], [5, 6, 7, 8, 9, 299]])


@torch.inference_mode()
def assert_same(first: QLIPModel, second: QLIPModel) -> None:
    """Every tensor, every bit and every pixel."""
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    before, after = (model(pictures(), texts()) for model in (first, second))
    for name in ("bits", "reconstructions", "image_embeds", "text_embeds", "logits_per_image"):
        assert torch.equal(before[name], after[name]), name
