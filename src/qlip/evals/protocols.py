"""Protocols as data: everything that moves a figure, under a name with a version.

A protocol never changes once figures have been made with it: another filter, crop, prompt set or count is another
name. `qlip eval protocols` prints them all; docs/evaluation.md says what each is for. Conventions: PAPER.md section 6's
sources (BSQ-ViT, EVA-CLIP, DINO) and, where they quarrel, one protocol for each side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rich.table import Table

from qlip.core.config import to_json
from qlip.core.errors import UserError, nearest_name
from qlip.core.log import console

Position = Literal["cls", "mean", "cls+mean"]
Kind = Literal["reconstruction", "zero_shot", "retrieval", "linear_probe", "knn"]


@dataclass(kw_only=True, slots=True, frozen=True)
class Preparation:
    """How a picture becomes the square of 8-bit pixels that every model is given."""

    size: int = 0
    """Side S in pixels; 0 is the model's own."""
    filter: str = "bicubic"
    """Of `data/transforms.FILTERS`; all of them are Pillow's, so antialiased."""
    crop: Literal["centre", "squash"] = "centre"
    """Shortest side to S and the centre square, or both sides to S."""


@dataclass(kw_only=True, slots=True, frozen=True)
class ReconstructionSettings:
    """Encode, decode, compare."""

    metrics: tuple[str, ...] = ("psnr", "ssim", "lpips_alex", "rfid")
    """Of psnr, ssim, lpips_alex, lpips_vgg, rfid; and encoder_distance, fd_encoder in the model's own encoder."""
    rounding: Literal["round", "truncate"] = "round"
    """How reconstructions become 8-bit pixels."""
    mean_picture: bool = False
    """Also score the mean picture of the data, as a baseline. Holds all originals: for small data."""


@dataclass(kw_only=True, slots=True, frozen=True)
class ZeroShotSettings:
    """Class prompts -> accuracy."""

    class_names: Literal["data", "imagenet", "scenes"] = "data"
    """The data's own names (or `--labels`), open_clip's 1,000 ImageNet names, or colours and shapes of scenes."""
    templates: Literal["openai80", "simple7", "scenes"] = "simple7"
    """open_clip's 80 ImageNet templates, its 7 simple ones, or those of `evals/scene_zero_shot.py`."""


@dataclass(kw_only=True, slots=True, frozen=True)
class RetrievalSettings:
    """Image to text and text to image among all pictures of the data."""

    captions_per_image: int = 5
    """The first so many captions of a picture are used."""
    ranks: tuple[int, ...] = (1, 5, 10)
    """K of R@K."""


@dataclass(kw_only=True, slots=True, frozen=True)
class LinearProbeSettings:
    """A linear classifier on frozen features (Table 11)."""

    positions: tuple[Position, ...] = ("cls", "mean", "cls+mean")
    """Pooled CLS, mean of the patch states before the quantizer, both side by side (Table 10)."""
    label: Literal["class", "shape"] = "class"
    """The data's classes, or the shape of the only object of a scene."""
    epochs: int = 10
    """Passes over the training pictures."""
    warmup_epochs: int = 1
    """Linear warm-up, then cosine to zero."""
    batch_size: int = 1024
    """Pictures per step."""
    lr: float = 0.2
    """Peak rate of AdamW with betas (0.9, 0.999), without decay."""
    batch_norm: bool = True
    """Normalise features by batch statistics, without an affine map, before the classifier."""
    train_views: int = 10
    """Random crops with flips of each training picture that are embedded and cached, one after the other for the
    epochs; 0 takes the evaluation's centre crop. Epoch e trains on view e modulo their number."""
    max_train_samples: int = 0
    """Train on the first so many pictures; 0 takes all."""
    seed: int = 0
    """Of crops, order and start."""


@dataclass(kw_only=True, slots=True, frozen=True)
class KnnSettings:
    """Weighted nearest neighbours among the training pictures, by cosine (DINO, arXiv 2104.14294, and before it
    arXiv 1805.01978)."""

    positions: tuple[Position, ...] = ("cls", "mean")
    """As for the linear probe."""
    label: Literal["class", "shape"] = "class"
    """As for the linear probe."""
    neighbours: int = 20
    """k."""
    temperature: float = 0.07
    """A neighbour's vote weighs exp(cosine / temperature)."""
    max_train_samples: int = 0
    """Look among the first so many pictures; 0 takes all."""


IMAGENET_VAL, IMAGENET_CLASSES = 50_000, 1000
Settings = ReconstructionSettings | ZeroShotSettings | RetrievalSettings | LinearProbeSettings | KnnSettings
KINDS: dict[type, Kind] = {
    ReconstructionSettings: "reconstruction",
    ZeroShotSettings: "zero_shot",
    RetrievalSettings: "retrieval",
    LinearProbeSettings: "linear_probe",
    KnnSettings: "knn",
}


@dataclass(kw_only=True, slots=True, frozen=True)
class Protocol:
    """What a figure means."""

    name: str
    """Ends in a version."""
    summary: str
    """One sentence."""
    settings: Settings
    """Of the kind of evaluation."""
    preparation: Preparation = Preparation()
    """Of every picture."""
    count: int = 0
    """Pictures of the full data set; a result on fewer is marked as incomplete. 0 takes any number."""
    num_classes: int = 0
    """Classes that the data must have; 0 takes any number."""
    split: str = ""
    """Split that Karpathy's json must be read with; empty takes any."""

    @property
    def kind(self) -> Kind:
        """Which evaluation it is."""
        return KINDS[type(self.settings)]

    def card(self) -> dict[str, Any]:
        """What a result says of it."""
        return {
            "protocol": self.name,
            "preparation": to_json(self.preparation),
            "protocol_settings": to_json(self.settings),
        }


def _reconstruction(size: int, filter: str, *, count: int = IMAGENET_VAL) -> Protocol:
    data, side = ("imagenet", f"-{size}") if count else ("images", "")
    return Protocol(
        name=f"{data}-recon{side}-{filter}-v1",
        summary=f"rFID, PSNR, SSIM, LPIPS of {'ImageNet val' if count else 'any pictures'}, {filter} resize"
        + (f" to {size}." if size else " to the model's side."),
        settings=ReconstructionSettings(),
        preparation=Preparation(size=size, filter=filter),
        count=count,
    )


SCENES_TRAIN = 10_000
ALL = (
    *(_reconstruction(size, filter) for size in (256, 392) for filter in ("bilinear", "bicubic", "lanczos", "adm")),
    *(_reconstruction(0, filter, count=0) for filter in ("bilinear", "bicubic", "lanczos", "adm")),
    Protocol(
        name="imagenet-zeroshot-openai80-v1",
        summary="ImageNet val top-1 and top-5, open_clip's 1,000 names and OpenAI's 80 templates.",
        settings=ZeroShotSettings(class_names="imagenet", templates="openai80"),
        count=IMAGENET_VAL,
        num_classes=IMAGENET_CLASSES,
    ),
    Protocol(
        name="imagenet-zeroshot-simple7-v1",
        summary="The same with open_clip's 7 simple templates: ten times faster to embed.",
        settings=ZeroShotSettings(class_names="imagenet", templates="simple7"),
        count=IMAGENET_VAL,
        num_classes=IMAGENET_CLASSES,
    ),
    Protocol(
        name="images-zeroshot-v1",
        summary="Top-1 and top-5 over the data's own class names (or --labels FILE), 7 simple templates.",
        settings=ZeroShotSettings(),
    ),
    Protocol(
        name="coco-retrieval-5k-v1",
        summary="COCO Karpathy test, 5,000 pictures with five captions each: R@1, 5, 10 both ways.",
        settings=RetrievalSettings(),
        count=5000,
        split="test",
    ),
    Protocol(
        name="flickr30k-retrieval-1k-v1",
        summary="Flickr30k Karpathy test, 1,000 pictures with five captions each: R@1, 5, 10 both ways.",
        settings=RetrievalSettings(),
        count=1000,
        split="test",
    ),
    Protocol(
        name="images-retrieval-v1",
        summary="Any captioned pictures, their first caption: R@1, 5, 10 both ways.",
        settings=RetrievalSettings(captions_per_image=1),
    ),
    Protocol(
        name="imagenet-linear-table11-v1",
        summary="Table 11: linear classifier on frozen features, 10 epochs of random crops and flips.",
        settings=LinearProbeSettings(),
        count=IMAGENET_VAL,
        num_classes=IMAGENET_CLASSES,
    ),
    Protocol(
        name="imagenet-linear-table11-bsqvit-v1",
        summary="Table 11 as it is for BSQ-ViT: peak rate 1.0, 20 epochs.",
        settings=LinearProbeSettings(lr=1.0, epochs=20, train_views=20),
        count=IMAGENET_VAL,
        num_classes=IMAGENET_CLASSES,
    ),
    Protocol(
        name="imagenet-linear-centre-v1",
        summary="The same on one centre crop per training picture: a tenth of the encoding.",
        settings=LinearProbeSettings(train_views=0),
        count=IMAGENET_VAL,
        num_classes=IMAGENET_CLASSES,
    ),
    Protocol(
        name="images-linear-v1",
        summary="Linear classifier on centre crops of any class folders, at the model's side.",
        settings=LinearProbeSettings(train_views=0),
    ),
    Protocol(
        name="imagenet-knn20-v1",
        summary="Weighted 20 nearest neighbours by cosine among the training pictures.",
        settings=KnnSettings(),
        count=IMAGENET_VAL,
        num_classes=IMAGENET_CLASSES,
    ),
    Protocol(
        name="images-knn20-v1",
        summary="The same on any class folders, at the model's side.",
        settings=KnnSettings(),
    ),
    Protocol(
        name="images-recon-offline-v1",
        summary="PSNR, SSIM and distances in the model's own encoder: needs no weights from outside.",
        settings=ReconstructionSettings(metrics=("psnr", "ssim", "encoder_distance", "fd_encoder")),
    ),
    Protocol(
        name="scenes-reconstruction-v1",
        summary="PSNR, SSIM and distances in the model's own encoder on scenes, beside their mean picture.",
        settings=ReconstructionSettings(metrics=("psnr", "ssim", "encoder_distance", "fd_encoder"), mean_picture=True),
    ),
    Protocol(
        name="scenes-zeroshot-v1",
        summary="Colour and shape of scenes with one object, pairs never trained on apart.",
        settings=ZeroShotSettings(class_names="scenes", templates="scenes"),
    ),
    Protocol(
        name="scenes-linear-v1",
        summary="The shape of the only object of a scene, linear classifier on centre crops.",
        settings=LinearProbeSettings(
            label="shape", max_train_samples=SCENES_TRAIN, train_views=0, batch_size=256, lr=0.02
        ),
    ),
    Protocol(
        name="scenes-knn20-v1",
        summary="The shape of the only object of a scene, 20 nearest neighbours.",
        settings=KnnSettings(positions=("cls", "mean", "cls+mean"), label="shape", max_train_samples=SCENES_TRAIN),
    ),
)
PROTOCOLS = {protocol.name: protocol for protocol in ALL}
SCENES = ("scenes-reconstruction-v1", "scenes-zeroshot-v1")


def find_protocol(name: str) -> Protocol:
    """The protocol of that name. Raises `UserError` naming the nearest one when there is none."""
    if name not in PROTOCOLS:
        raise UserError(
            f"protocol {name!r} is unknown: {nearest_name(name, PROTOCOLS)}; `qlip eval protocols` has them all"
        )
    return PROTOCOLS[name]


def print_protocols() -> None:
    """Name, kind and sentence of every protocol."""
    table = Table(box=None, pad_edge=False)
    for column in ("protocol", "kind", "measures"):
        table.add_column(column, no_wrap=column != "measures")
    for protocol in ALL:
        table.add_row(protocol.name, protocol.kind.replace("_", " "), protocol.summary)
    console.print(table)
