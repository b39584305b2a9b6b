"""Inception features are torch-fidelity's, bit for bit; weight files are found, named, checked, and never executed."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch_fidelity import feature_extractor_inceptionv3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from qlip.core.errors import UserError
from qlip.core.pixels import from_uint8
from qlip.evals import networks
from qlip.evals.networks import InceptionFeatures, Networks
from qlip.losses.perceptual import LpipsDistance
from qlip.metrics.frechet import FeatureStatistics, frechet_distance

CPU = torch.device("cpu")
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
FILES = {"rfid": INCEPTION_FILE, "lpips_alex": "alexnet-owt-7be5be79.pth", "lpips_vgg": "vgg16-397923af.pth"}
ALEX_SHAPES = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3), 10: (256, 256, 3, 3)}


def random_inception() -> dict[str, torch.Tensor]:
    """A state dict of the right names and shapes; He-scaled, so that pictures are told apart in the last layer."""
    extractor = feature_extractor_inceptionv3.FeatureExtractorInceptionV3
    with (
        torch.device("meta"),
        mock.patch.object(feature_extractor_inceptionv3, "load_state_dict_from_url"),
        mock.patch.object(extractor, "load_state_dict"),
    ):
        state = extractor("shapes", ["2048"]).state_dict()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        if tensor.ndim > 1:
            state[name] = torch.randn(tensor.shape, generator=generator) * (2 / tensor[0].numel()) ** 0.5
        else:
            ones = name.endswith(("running_var", "bn.weight"))
            state[name] = torch.full(tensor.shape, 1 if ones else 0, dtype=tensor.dtype)
    return state


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Random weights under the names of the true files."""
    path = tmp_path_factory.mktemp("weights")
    generator = torch.Generator().manual_seed(1)
    alex = {}
    for index, shape in ALEX_SHAPES.items():
        alex[f"features.{index}.weight"] = torch.randn(shape, generator=generator) * 0.05
        alex[f"features.{index}.bias"] = torch.randn(shape[0], generator=generator) * 0.1
    torch.save(random_inception(), path / INCEPTION_FILE)
    torch.save(alex, path / FILES["lpips_alex"])
    return path


@pytest.fixture(scope="module")
def inception(folder) -> InceptionFeatures:
    return Networks(folder).inception(CPU)


@pytest.fixture
def empty_cache(tmp_path, monkeypatch) -> Path:
    """Torch's hub folder, without any file; a download would fail for want of a network."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def random_pictures(count: int, *, height: int = 40, width: int = 48, seed: int = 0) -> torch.Tensor:
    """Coarse colour patches, uint8 (count, 3, height, width)."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.interpolate(coarse, (height, width)) * 255).to(torch.uint8)


def test_features_are_those_of_torch_fidelity_bit_for_bit(folder, inception):
    pictures = random_pictures(2)
    direct = feature_extractor_inceptionv3.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], str(folder / INCEPTION_FILE)
    )
    with torch.autocast("cpu", torch.bfloat16):  # the caller's, which must not matter
        features = inception(pictures)
    assert features.shape == (2, 2048) and features.dtype == torch.float32 and not features.requires_grad
    assert torch.equal(features, direct(pictures)[0])
    assert features.std(0).mean() > 1e-3  # they tell pictures apart, so equality says something


def test_many_pictures_on_a_cpu_go_in_small_batches(inception, monkeypatch):
    seen = []

    def first_pixels(part: torch.Tensor) -> tuple[torch.Tensor]:
        seen.append(len(part))
        return (part.flatten(1)[:, :2].float(),)

    monkeypatch.setattr(networks, "CPU_BATCH", 2)
    monkeypatch.setattr(inception, "network", first_pixels)
    pictures = random_pictures(5)
    assert torch.equal(inception(pictures), first_pixels(pictures)[0])
    assert seen == [2, 2, 1, 5]


def test_rfid_equals_torch_fidelitys_on_the_same_features(inception):
    """Six pictures; 64 of their features, for the package's own rounding grows with the width (5e-6 at 2048)."""
    x = random_pictures(6, height=32, width=32)
    features = inception(torch.cat([x, x.float().mul(0.8).add(20).to(torch.uint8)]))
    spread = features.std(0).topk(64).indices
    sides = [side[:, spread].double() for side in features.split(6)]
    sums = [FeatureStatistics(64) for _ in sides]
    for statistics, side in zip(sums, sides, strict=True):
        statistics.update(side)
    outside = fid_statistics_to_metric(*map(fid_features_to_statistics, sides), verbose=False)
    assert frechet_distance(*sums) == pytest.approx(outside["frechet_inception_distance"], rel=1e-6)


def test_card_names_network_and_hash(folder, inception):
    sha256 = hashlib.sha256((folder / INCEPTION_FILE).read_bytes()).hexdigest()
    assert inception.card() == {
        "feature_network": "inception-v3-compat pool 2048 (torch-fidelity)",
        "feature_weights_sha256": sha256,
    }
    sha256 = hashlib.sha256((folder / FILES["lpips_alex"]).read_bytes()).hexdigest()
    assert Networks(folder).lpips_card("alex") == {
        "lpips_alex_network": "lpips alex version 0.1 (lpips package)",
        "lpips_alex_weights_sha256": sha256,
    }


def test_building_leaves_the_random_state_alone(folder):
    before = torch.get_rng_state()
    Networks(folder).inception(CPU)
    assert torch.equal(before, torch.get_rng_state())


def test_lpips_is_that_of_the_file(folder):
    x, y = (from_uint8(random_pictures(2, seed=seed)) for seed in (2, 3))
    ours = Networks(folder).lpips("alex", CPU)(x, y)
    assert torch.equal(ours, LpipsDistance(folder / FILES["lpips_alex"], net="alex")(x, y))
    assert (ours > 0).all()


@pytest.mark.parametrize("metric", FILES)
def test_missing_file_is_one_line_that_says_what_to_do(metric, tmp_path, empty_cache):
    wanted = Networks(tmp_path / "mine")
    with pytest.raises(UserError) as caught:
        wanted.inception(CPU) if metric == "rfid" else wanted.lpips(metric.removeprefix("lpips_"), CPU)
    said = str(caught.value)
    assert "\n" not in said
    assert f"({FILES[metric]}) in {tmp_path / 'mine'} or {empty_cache}: fetch https://" in said
    assert said.endswith(f"/{FILES[metric]} and put it there, or leave the metric out with --leave-out {metric}")


def test_hub_cache_is_looked_in_after_the_folder(folder, tmp_path, empty_cache):
    with pytest.raises(UserError, match=f"in {empty_cache}: fetch"):
        Networks(None).lpips_card("alex")
    empty_cache.mkdir(parents=True)
    (empty_cache / FILES["lpips_alex"]).write_bytes(b"of the cache")
    cached = Networks(None).lpips_card("alex")
    assert cached["lpips_alex_weights_sha256"] == hashlib.sha256(b"of the cache").hexdigest()
    assert Networks(tmp_path).lpips_card("alex") == cached
    assert Networks(folder).lpips_card("alex") != cached


class MakesFolder:
    """Unpickled, it makes a folder: what a hostile weight file would do, and worse."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_in_a_weight_file_never_runs(zipped, tmp_path):
    marker = tmp_path / "marker"
    torch.save({"a": MakesFolder(marker)}, tmp_path / INCEPTION_FILE, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"cannot be read as Inception weights \(UnpicklingError\): fetch https://"):
        Networks(tmp_path).inception(CPU)
    assert not marker.exists()
    torch.load(tmp_path / INCEPTION_FILE, weights_only=False)  # the trap is live
    assert marker.exists()


def test_package_is_never_given_the_users_file(folder):
    with mock.patch.object(torch, "load", wraps=torch.load) as load:
        Networks(folder).inception(CPU)
    opened = {bool(call.kwargs["weights_only"]): call.args[0] for call in load.call_args_list}
    assert opened[True] == folder / INCEPTION_FILE
    assert not isinstance(opened[False], str | Path)


@pytest.mark.parametrize(
    "content",
    [b"", b"<html>404</html>", [torch.zeros(2)], {"epoch": 3}, {}, {"Conv2d_1a_3x3.conv.weight": torch.zeros(2)}],
    ids=["empty", "page", "list", "numbers", "nothing", "other-shapes"],
)
def test_what_is_no_inception_is_refused_in_one_line(content, tmp_path):
    if isinstance(content, bytes):
        (tmp_path / INCEPTION_FILE).write_bytes(content)
    else:
        torch.save(content, tmp_path / INCEPTION_FILE)
    with pytest.raises(UserError, match=r"(Inception weights).*: fetch https://") as caught:
        Networks(tmp_path).inception(CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("package", ["torch_fidelity", "lpips"])
def test_missing_package_names_the_extra(package, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(UserError, match=r"pip install 'qlip\[eval\]'"):
        Networks(folder).inception(CPU) if package == "torch_fidelity" else Networks(folder).lpips("alex", CPU)
