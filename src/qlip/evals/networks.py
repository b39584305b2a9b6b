"""The networks of rFID and LPIPS, from weight files that the user has fetched; nothing is downloaded here.

Files are known by the names that torch-fidelity and torchvision give them in torch's hub cache.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qlip.core.errors import UserError
from qlip.core.precision import float32_region
from qlip.losses.perceptual import TRUNKS, LpipsDistance, LpipsNet, read_weights

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
NETWORK = "inception-v3-compat"
NUM_FEATURES = 2048
CPU_BATCH = 10  # pictures; a hundred at once take 2.6 GB there and a quarter longer


class InceptionFeatures:
    """FID's network: Inception-v3 of 2015 in torch-fidelity's port, which resizes as TensorFlow 1 did."""

    def __init__(self, weights: Path, *, metric: str, device: torch.device) -> None:
        """`metric` is what it is wanted for, which the remedies name.

        Raises `UserError` without the package, without the file, and for one that holds anything but the weights.
        """
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError:
            remedy = f"pip install 'qlip[eval]', or leave the metric out with --leave-out {metric}"
            raise UserError(f"Inception needs torch-fidelity: {remedy}") from None
        remedy = f"fetch {INCEPTION_URL} and put it there, or leave the metric out with --leave-out {metric}"
        checked = io.BytesIO()
        torch.save(read_weights(weights, what="Inception weights", remedy=remedy), checked)
        checked.seek(0)
        try:
            # the package unpickles without limits: it gets what was read safely, never the user's file
            with torch.random.fork_rng(devices=[]):  # it draws random weights first; a training goes on undisturbed
                network = FeatureExtractorInceptionV3(NETWORK, [str(NUM_FEATURES)], checked)
        except RuntimeError as error:  # other names or shapes
            reason = " ".join(str(error).split())[:80]
            raise UserError(f"{weights} holds no Inception weights ({reason}): {remedy}") from None
        self.network = network.to(device)
        self._sha256 = sha256_of_file(weights)

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        """(b, 3, h, w) uint8 on the device -> (b, 2048) float32, the pooled features, also under autocast."""
        on_cpu = pictures.device.type == "cpu"
        with float32_region(pictures.device.type):
            parts = [self.network(part)[0] for part in (pictures.split(CPU_BATCH) if on_cpu else [pictures])]
        return torch.cat(parts)

    def card(self) -> dict[str, Any]:
        """Name and hash."""
        return {
            "feature_network": f"{NETWORK} pool {NUM_FEATURES} (torch-fidelity)",
            "feature_weights_sha256": self._sha256,
        }


class Networks:
    """Finds weight files by their names in a folder, else in torch's hub cache."""

    def __init__(self, folder: Path | None) -> None:
        """`folder` None looks in the cache alone."""
        self.folder = folder

    def inception(self, device: torch.device, *, metric: Literal["rfid", "gfid"] = "rfid") -> InceptionFeatures:
        """The network of rFID and gFID. Raises `UserError` that says what to fetch when its weights are not there."""
        weights = self._find(INCEPTION_URL, what="Inception weights", metric=metric)
        return InceptionFeatures(weights, metric=metric, device=device)

    def lpips(self, net: LpipsNet, device: torch.device) -> LpipsDistance:
        """LPIPS over AlexNet or VGG-16. Raises `UserError` as `inception` does."""
        return LpipsDistance(self._lpips_file(net), net=net).to(device)

    def lpips_card(self, net: LpipsNet) -> dict[str, Any]:
        """Name and hash of what `lpips` gives."""
        return {
            f"lpips_{net}_network": f"lpips {net} version 0.1 (lpips package)",
            f"lpips_{net}_weights_sha256": sha256_of_file(self._lpips_file(net)),
        }

    def _lpips_file(self, net: LpipsNet) -> Path:
        what, url = TRUNKS[net]
        return self._find(url, what=what, metric=f"lpips_{net}")

    def _find(self, url: str, *, what: str, metric: str) -> Path:
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        name = url.rsplit("/", 1)[1]
        folders = [folder for folder in (self.folder, cache) if folder is not None]
        for folder in folders:
            if (folder / name).is_file():
                return folder / name
        where = " or ".join(map(str, folders))
        remedy = f"fetch {url} and put it there, or leave the metric out with --leave-out {metric}"
        raise UserError(f"no {what} ({name}) in {where}: {remedy}")


def sha256_of_file(path: Path) -> str:
    """Of the whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
