"""LPIPS from files equals the package; the encoder distance equals its definition and never calls itself LPIPS."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

import lpips
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from qlip.core.errors import UserError
from qlip.core.pixels import normalise
from qlip.losses.perceptual import EncoderDistance, LpipsDistance

VGG_WIDTHS = {0: (64, 3), 2: (64, 64), 5: (128, 64), 7: (128, 128), 10: (256, 128), 12: (256, 256), 14: (256, 256)}
VGG_WIDTHS |= {17: (512, 256)} | dict.fromkeys((19, 21, 24, 26, 28), (512, 512))
VGG_SHAPES = {index: (*widths, 3, 3) for index, widths in VGG_WIDTHS.items()}
ALEX_SHAPES = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3), 10: (256, 256, 3, 3)}


def random_trunk(shapes: Mapping[int, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """A trunk with torchvision's names; He-scaled, so that all layers answer."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for index, shape in shapes.items():
        weight = torch.randn(shape, generator=generator)
        state[f"features.{index}.weight"] = weight * (2 / weight[0].numel()) ** 0.5
        state[f"features.{index}.bias"] = torch.randn(shape[0], generator=generator) * 0.1
    return state


def random_vgg() -> dict[str, torch.Tensor]:
    return random_trunk(VGG_SHAPES)


def random_alex() -> dict[str, torch.Tensor]:
    return random_trunk(ALEX_SHAPES)


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "vgg16.pth"
    torch.save(random_vgg() | {"classifier.0.weight": torch.zeros(2, 2)}, path)
    return path


@pytest.fixture(scope="module")
def alex_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "alexnet.pth"
    torch.save(random_alex() | {"classifier.1.weight": torch.zeros(2, 2)}, path)
    return path


@pytest.fixture(scope="module")
def distance(vgg_file) -> LpipsDistance:
    return LpipsDistance(vgg_file)


@pytest.fixture
def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    """Unit pixels in [0, 1], (2, 3, 32, 32) twice."""
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, 3, 32, 32, generator=generator), torch.rand(2, 3, 32, 32, generator=generator)


def package_distance(net_name: str, trunk: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The lpips package used directly: its own linear layers, our random trunk, [0, 1] pictures."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        empty = lpips.LPIPS(net=net_name, version="0.1", pnet_rand=True, pretrained=False, verbose=False)
    net = empty.to_empty(device="cpu")
    net.scaling_layer = lpips.ScalingLayer()
    linear = Path(lpips.__file__).parent / f"weights/v0.1/{net_name}.pth"
    net.load_state_dict(torch.load(linear, map_location="cpu", weights_only=True), strict=False)
    for name, tensor in trunk.items():
        _, index, kind = name.split(".")
        part = next(part for part in net.net.children() if index in dict(part.named_children()))
        getattr(part.get_submodule(index), kind).data.copy_(tensor)
    with torch.no_grad():
        return net.eval()(x, y, normalize=True).flatten()


@pytest.mark.parametrize(
    ("net", "trunk", "size"),
    [("vgg", random_vgg, 32), ("vgg", random_vgg, 16), ("alex", random_alex, 48), ("alex", random_alex, 31)],
)
def test_lpips_equals_the_package(net, trunk, size, vgg_file, alex_file):
    x, y = torch.rand(2, 2, 3, size, size, generator=torch.Generator().manual_seed(1))
    ours = LpipsDistance({"vgg": vgg_file, "alex": alex_file}[net], net=net)(normalise(x), normalise(y))
    assert ours.shape == (2,) and ours.dtype == torch.float32
    torch.testing.assert_close(ours, package_distance(net, trunk(), x, y), rtol=1e-6, atol=1e-6)
    assert (ours > 0.01).all()


def test_lpips_of_equal_pictures_is_zero(distance, pictures):
    x = normalise(pictures[0])
    assert (distance(x, x) == 0).all()


def test_lpips_stays_frozen_and_deterministic_in_training_mode(distance, pictures):
    x, y = map(normalise, pictures)
    parent = nn.ModuleList([distance]).train()
    assert not any(module.training for module in parent[0].modules())
    assert not any(parameter.requires_grad for parameter in distance.parameters())
    x.requires_grad_(True)
    y.requires_grad_(True)
    distance(x, y).sum().backward()
    assert all(picture.grad.isfinite().all() and picture.grad.abs().sum() > 0 for picture in (x, y))


def test_lpips_under_autocast_is_float32(distance, pictures):
    x, y = map(normalise, pictures)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        under_autocast = distance(x, y)
    assert under_autocast.dtype == torch.float32
    torch.testing.assert_close(under_autocast, distance(x, y))


def test_lpips_gradient_is_finite_where_features_vanish(tmp_path, pictures):
    silent = {name: t if name.endswith("weight") else t - 1e3 for name, t in random_vgg().items()}
    save_file(silent, tmp_path / "vgg16.safetensors")
    x, y = map(normalise, pictures)
    x.requires_grad_(True)
    LpipsDistance(tmp_path / "vgg16.safetensors")(x, y).sum().backward()
    assert x.grad.isfinite().all()


def test_lpips_building_leaves_the_random_state_alone(vgg_file):
    before = torch.get_rng_state()
    LpipsDistance(vgg_file)
    assert torch.equal(before, torch.get_rng_state())


def test_missing_files_are_one_line(tmp_path, vgg_file):
    with pytest.raises(UserError, match=r"no VGG-16 weights at .*nowhere\.pth: fetch https://.*vgg16") as caught:
        LpipsDistance(tmp_path / "nowhere.pth")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"no AlexNet weights at .*nowhere\.pth: fetch https://.*alexnet-owt"):
        LpipsDistance(tmp_path / "nowhere.pth", net="alex")
    with pytest.raises(UserError, match="no LPIPS linear weights at"):
        LpipsDistance(vgg_file, linear_weights=tmp_path / "nowhere.pth")


def test_another_network_is_refused(tmp_path, vgg_file, alex_file):
    with pytest.raises(UserError, match=r"features\.0\.weight of shape \(64, 3, 3, 3\) is missing"):
        LpipsDistance(alex_file)
    with pytest.raises(UserError, match=r"features\.0\.weight of shape \(64, 3, 11, 11\) is missing"):
        LpipsDistance(vgg_file, net="alex")
    with pytest.raises(UserError, match=r"lin0\.model\.1\.weight of shape \(1, 64, 1, 1\) is missing"):
        LpipsDistance(vgg_file, linear_weights=alex_file)


class RunsCode:
    """Unpickled, it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_what_is_no_weight_file_is_one_line_and_never_runs(tmp_path):
    file, marker = tmp_path / "vgg16.pth", tmp_path / "marker"
    for content in (RunsCode(marker), [torch.zeros(2)], {"features.0.weight": 3}, b"<html>404</html>"):
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            torch.save(content, file)
        with pytest.raises(
            UserError, match=r"cannot be read as VGG-16 weights \(.*\): fetch https://.*vgg16"
        ) as caught:
            LpipsDistance(file)
        assert "\n" not in str(caught.value)
    assert not marker.exists()
    (tmp_path / "vgg16.safetensors").write_bytes(b"{}")
    with pytest.raises(UserError, match="cannot be read as VGG-16 weights"):
        LpipsDistance(tmp_path / "vgg16.safetensors")


def test_missing_package_names_the_extra(vgg_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(UserError, match=r"pip install 'qlip\[eval\]'"):
        LpipsDistance(vgg_file)


def two_layers(pixels: torch.Tensor) -> list[torch.Tensor]:
    """A stand-in encoder: (b, 3, h, w) -> two layers of (b, n, d), of different widths."""
    generator = torch.Generator().manual_seed(2)
    tokens = pixels.flatten(2).transpose(1, 2)[:, :5]
    return [(tokens @ torch.randn(3, width, generator=generator)).tanh() for width in (4, 6)]


def test_encoder_distance_equals_its_definition(pictures):
    x, y = pictures
    expected = torch.zeros(2)
    for f, g in zip(two_layers(x), two_layers(y), strict=True):
        for b in range(2):
            for n in range(5):
                difference = f[b, n] / f[b, n].norm() - g[b, n] / g[b, n].norm()
                expected[b] += difference.square().sum() / 5 / 2
    distance = EncoderDistance(two_layers)
    torch.testing.assert_close(distance(x, y), expected)
    assert (distance(x, x) == 0).all()


def test_encoder_distance_has_gradients_to_both_pictures(pictures):
    x, y = (picture.requires_grad_(True) for picture in pictures)
    EncoderDistance(two_layers)(x, y).sum().backward()
    assert x.grad.abs().sum() > 0 and y.grad.abs().sum() > 0
    zero = torch.zeros(1, 3, 4, 4, requires_grad=True)
    EncoderDistance(two_layers)(zero, zero).sum().backward()
    assert zero.grad.isfinite().all()


def test_encoder_distance_is_never_called_lpips():
    assert EncoderDistance(two_layers).name == "encoder"
    assert LpipsDistance.name == "lpips"


def test_encoder_distance_holds_no_copy_of_the_encoder():
    encoder = nn.Linear(3, 4)
    assert not list(EncoderDistance(lambda pixels: [encoder(pixels.flatten(2).mT)]).parameters())
