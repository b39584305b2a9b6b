"""Perceptual distances for stage 2: LPIPS when its weights are given, else a distance of frozen encoder features.

Shapes: `b` pictures, `n` tokens, `d` width. Both compare unit-length feature vectors place by place, layer by layer;
only LPIPS (arXiv 1801.03924) weighs channels by human judgements, so the other is named `encoder`, never LPIPS.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol

import torch
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn

from qlip.core.errors import UserError
from qlip.core.pixels import to_unit

VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
ALEX_URL = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
LpipsNet = Literal["alex", "vgg"]
TRUNKS = {"alex": ("AlexNet weights", ALEX_URL), "vgg": ("VGG-16 weights", VGG_URL)}


class PerceptualDistance(Protocol):
    """What a task needs: a name for the logs and a differentiable distance."""

    name: str

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """CLIP-normalised pictures (b, 3, h, w) twice -> (b,) distances, zero for equal pictures."""


def read_weights(path: Path, *, what: str, remedy: str) -> dict[str, Tensor]:
    """A flat state dict on the CPU from a `.safetensors` or PyTorch file; pickled code is never run.

    Raises `UserError` naming `what` and ending with `remedy` when there is no such file or it is none of these.
    """
    if not path.is_file():
        raise UserError(f"no {what} at {path}: {remedy}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on damaged and hostile files the readers raise nearly every type
        raise UserError(f"{path} cannot be read as {what} ({type(error).__name__}): {remedy}") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} cannot be read as {what} (no flat state dict): {remedy}")
    return state


def take_weights(
    given: dict[str, Tensor], *, names: dict[str, str], like: dict[str, Tensor], what: str
) -> dict[str, Tensor]:
    """Pick the tensors of `like`, found in `given` under `names`, as float32. The rest of the file is not needed.

    Raises `UserError` when one is missing or has another shape.
    """
    for key, name in names.items():
        if name not in given or given[name].shape != like[key].shape:
            raise UserError(f"{what}: tensor {name} of shape {tuple(like[key].shape)} is missing: give another file")
    return {key: given[name].float() for key, name in names.items()}


class LpipsDistance(nn.Module):
    """LPIPS version 0.1, computed by the `lpips` package from weight files; nothing is downloaded.

    Frozen, always in evaluation mode and float32; gradients reach both pictures.
    """

    name = "lpips"

    def __init__(self, trunk_weights: Path, *, net: LpipsNet = "vgg", linear_weights: Path | None = None) -> None:
        """`trunk_weights` is torchvision's VGG-16 or AlexNet (IMAGENET1K_V1, .pth or .safetensors; without classifier).

        `linear_weights` are the layers on top; None takes those that the package bundles. Raises `UserError` when a
        file or the package is missing or a file holds something else.
        """
        super().__init__()
        try:
            import lpips
        except ImportError:
            raise UserError("LPIPS needs the lpips package: pip install 'qlip[eval]'") from None
        what, url = TRUNKS[net]
        linear_weights = linear_weights or Path(lpips.__file__).parent / "weights" / "v0.1" / f"{net}.pth"
        trunk = read_weights(trunk_weights, what=what, remedy=f"fetch {url} and put it there")
        linear = read_weights(linear_weights, what="LPIPS linear weights", remedy="leave out the option")
        with torch.device("meta"), warnings.catch_warnings():  # meta: no 500 MB of random numbers; old arguments warn
            warnings.simplefilter("ignore", UserWarning)
            network = lpips.LPIPS(net=net, version="0.1", pnet_rand=True, pretrained=False, verbose=False)
        wanted = network.state_dict()
        # net.slice3.10.weight is torchvision's features.10.weight
        trunk_names = {key: f"features.{key.split('.', 2)[2]}" for key in wanted if key.startswith("net.")}
        # the package holds each linear layer twice, under its own name and in a list; its file has lin0.model.1.weight
        linear_keys = [key for key in wanted if key.startswith("lin")]
        linear_names = {key: f"lin{next(filter(str.isdigit, key))}.model.1.weight" for key in linear_keys}
        state = take_weights(trunk, names=trunk_names, like=wanted, what=str(trunk_weights))
        state |= take_weights(linear, names=linear_names, like=wanted, what=str(linear_weights))
        state |= {key: wanted[key] for key in wanted if key.startswith("scaling_layer.")}
        network.load_state_dict(state, assign=True)
        self.net = network.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> LpipsDistance:
        """Stay in evaluation mode whatever the parent does: the linear layers have dropout in front."""
        return super().train(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """CLIP-normalised pictures (b, 3, h, w) twice, h and w at least 16 (VGG) or 31 (AlexNet) -> (b,) distances."""
        with torch.autocast(device_type=x.device.type, enabled=False):  # small differences of unit vectors: float32
            return rearrange(self.net(2 * to_unit(x) - 1, 2 * to_unit(y) - 1), "b 1 1 1 -> b")


def unit_tokens(states: Tensor) -> Tensor:
    """(b, n, d) -> the same vectors in float32 with L2 norm 1; zero vectors stay zero."""
    states = states.float()
    return states / (states.norm(dim=-1, keepdim=True) + 1e-10)


class EncoderDistance(nn.Module):
    """Distance of two pictures in a frozen vision encoder: the offline stand-in for LPIPS, without learned weights.

    ``mean over layers, mean over tokens, |f / |f| - g / |g||^2``, that is 2 (1 - cosine): between 0 and 4.
    """

    name = "encoder"

    def __init__(self, features: Callable[[Tensor], Sequence[Tensor]]) -> None:
        """`features` maps CLIP-normalised pictures (b, 3, h, w) to one (b, n, d) per layer, patch tokens without CLS.

        Its owner keeps the network frozen and in evaluation mode; gradients pass through to the pictures. Its dtype
        is the caller's (towers may run under autocast), the comparison is float32.
        """
        super().__init__()
        self.features = features

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """CLIP-normalised pictures (b, 3, h, w) twice -> (b,) distances."""
        layers_x, layers_y = self.features(x), self.features(y)
        with torch.autocast(device_type=x.device.type, enabled=False):
            distances = [
                (unit_tokens(f) - unit_tokens(g)).square().sum(-1).mean(-1)
                for f, g in zip(layers_x, layers_y, strict=True)
            ]
            return torch.stack(distances).mean(0)
