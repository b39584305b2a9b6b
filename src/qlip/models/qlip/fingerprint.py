"""Fingerprints: which encoder made these bits, which model gave these figures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from qlip.models.qlip.modeling import QLIPModel


def _digest(config: dict, tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, separators=(",", ":")).encode())
    for name, tensor in sorted(tensors):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name}/{tensor.dtype}/{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def encoder_fingerprint(model: QLIPModel) -> str:
    """sha256 over everything that can change a bit: encoder and down-MLP, not the upper MLP, decoder or text."""
    vision = model.vision_model
    config = {k: v for k, v in vision.config.to_diff_dict().items() if k not in ("transformers_version", "dtype")}
    tensors = [
        (name, tensor)
        for name, tensor in vision.state_dict().items()
        if not name.startswith(("quant_embed_post.", "post_layernorm."))
    ]
    return _digest(config, tensors)


def model_fingerprint(model: nn.Module) -> str:
    """sha256 over all weights in the order of their names; of QLIP and of models that it is compared with."""
    return _digest({}, model.state_dict().items())
