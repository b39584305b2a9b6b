"""The networks that look at generated pictures: Inception for gFID, a CLIP for everything that has to do with captions.

Shapes: `b` pictures, `S` their side, `e` width of embeddings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from qlip.core.errors import UserError
from qlip.data.transforms import prepared_pixels
from qlip.evals.networks import Networks
from qlip.evals.protocols import Protocol, TextToImageSettings
from qlip.models.measured import MeasuredModel
from qlip.models.opening import open_measured

FRECHET = ("gfid", "fd_clip")
COSINES = ("clip_cosine", "clipscore")
IN_CLIP = ("fd_clip", *COSINES)
VIT_B_32 = "openai/clip-vit-base-patch32"
NOT_CLEAN_FID = (
    "Inception-v3 of 2015 on rounded 8-bit pixels, resized to 299 in the network bilinearly as TensorFlow 1 did; "
    "clean-fid resizes with Pillow's bicubic filter in floating point: its figures differ"
)


class Judges:
    """The networks that look at pictures."""

    def __init__(
        self,
        wanted: tuple[str, ...],
        *,
        protocol: Protocol,
        networks: Networks,
        clip: Path | None,
        device: torch.device,
    ) -> None:
        """`wanted` are the metrics to be measured, `clip` the folder of the model that scores against captions.

        Raises `UserError` for weights that are not there, and a CLIP that is not what the protocol names.
        """
        self.wanted = wanted
        self.card: dict[str, Any] = {}
        self.inception = None
        if "gfid" in wanted:
            self.inception = networks.inception(device, metric="gfid")
            self.card |= {**self.inception.card(), "feature_note": NOT_CLEAN_FID}
        self.clip: MeasuredModel | None = None
        if set(IN_CLIP) & set(wanted):
            self.clip = _open_clip(clip, protocol)
            self.clip.to(device)
            identity = self.clip.identity()
            self.card |= {
                "clip_model": self.clip.name,
                "clip_fingerprint": identity["model_fingerprint"],
                "clip_tokens_sha256": identity.get("tokens_sha256", ""),
                "clip_pixels": f"{self.clip.image_size}, bicubic with Pillow",
            }

    def features(self, pictures: Tensor) -> dict[str, Tensor]:
        """Prepared pictures (b, 3, S, S) -> a row per Frechet distance."""
        rows = {}
        if self.inception is not None:
            rows["gfid"] = self.inception(pictures)
        if self.clip is not None and "fd_clip" in self.wanted:
            rows["fd_clip"] = self.clip.features(resized(pictures, size=self.clip.image_size))["cls"]
        return rows

    def embeds(self, pictures: Tensor) -> Tensor:
        """(b, 3, S, S) uint8 -> (b, e) of norm 1 in the CLIP."""
        assert self.clip is not None
        return self.clip.image_embeds(resized(pictures, size=self.clip.image_size))


def _open_clip(folder: Path | None, protocol: Protocol) -> MeasuredModel:
    settings = protocol.settings
    assert isinstance(settings, TextToImageSettings)
    what = f"CLIP {settings.clip} ({VIT_B_32})" if settings.clip != "any" else "a CLIP, SigLIP or QLIP model"
    names = " ".join(name for name in settings.metrics if name in IN_CLIP)
    remedy = f"give the folder of {what} with --clip FOLDER, or --leave-out {names}"
    if folder is None:
        raise UserError(f"{protocol.name} compares pictures with captions in a model of both: {remedy}")
    clip = open_measured(folder)
    if "match_text" not in clip.abilities:
        raise UserError(f"--clip {folder}: a {clip.name} scores no texts; {remedy}")
    if settings.clip == "ViT-B/32" and (clip.name, clip.image_size, clip.patch_size) != ("CLIPModel", 224, 32):
        size = f"{clip.name} of {clip.image_size} pixels in patches of {clip.patch_size}"
        raise UserError(f"--clip {folder} is a {size}, {protocol.name} takes {settings.clip}; {remedy}")
    return clip


def resized(pictures: Tensor, *, size: int, filter: str = "bicubic") -> Tensor:
    """(b, 3, S, S) uint8 -> (b, 3, size, size) uint8 with Pillow, as pictures of the data are; the same when S fits."""
    if pictures.shape[-2:] == (size, size):
        return pictures
    arrays = rearrange(pictures, "b c h w -> b h w c").cpu().numpy()
    prepared = [prepared_pixels(Image.fromarray(array), size=size, filter=filter) for array in arrays]
    return torch.stack(prepared).to(pictures.device)
