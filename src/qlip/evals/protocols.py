"""Protocols as data: everything that moves a figure, under a name with a version.

A protocol never changes once figures have been made with it: another filter, crop, prompt set or count is another
name. `qlip eval protocols` prints them all; docs/evaluation.md says what each is for. Conventions: PAPER.md section 6's
sources (BSQ-ViT, EVA-CLIP, DINO) and, where they quarrel, one protocol for each side.
"""

from __future__ import annotations

from rich.table import Table

from qlip.core.errors import UserError, nearest_name
from qlip.core.log import console
from qlip.evals.protocol_settings import (
    SHORT_ANSWER,
    CaptionSettings,
    KnnSettings,
    LinearProbeSettings,
    Preparation,
    Protocol,
    QuestionSettings,
    ReconstructionSettings,
    RetrievalSettings,
    SceneCaptionSettings,
    ScenePromptSettings,
    StorySettings,
    TextToImageSettings,
    ZeroShotSettings,
)
from qlip.evals.protocol_settings import (
    Position as Position,
)

IMAGENET_VAL, IMAGENET_CLASSES = 50_000, 1000


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
COCO_CAPTIONS = 30_000
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
    Protocol(
        name="coco30k-gfid-v1",
        summary="Pictures of 30,000 captions of COCO val2014: gFID against all of val2014 at 256, CLIP ViT-B/32.",
        settings=TextToImageSettings(num_captions=COCO_CAPTIONS, prefix="A photo depicts ", clip="ViT-B/32"),
        preparation=Preparation(size=256, filter="lanczos"),
        count=COCO_CAPTIONS,
    ),
    Protocol(
        name="images-t2i-offline-v1",
        summary="Pictures of any captions, in the model of --clip alone: Frechet distance and cosine with captions.",
        settings=TextToImageSettings(metrics=("fd_clip", "clip_cosine", "clipscore")),
    ),
    Protocol(
        name="scenes-geneval-v1",
        summary="GenEval's six categories on prompts for scenes, read back by classical vision, chance beside them.",
        settings=ScenePromptSettings(),
    ),
    Protocol(
        name="scenes-questions-v1",
        summary="Every question about every scene, exact match by kind, beside the majority answer of the kind.",
        settings=QuestionSettings(scorer="kinds"),
    ),
    Protocol(
        name="pope-v1",
        summary="POPE's yes or no questions: accuracy, F1, share of yes by category, beside always saying yes.",
        settings=QuestionSettings(scorer="yes_no", suffix=SHORT_ANSWER),
    ),
    Protocol(
        name="vqa-match-v1",
        summary="Any question file: VQAv2's agreement with ten people, or exact match with one answer.",
        settings=QuestionSettings(scorer="match", suffix=SHORT_ANSWER),
    ),
    Protocol(
        name="vqa-answers-v1",
        summary="The same questions answered and written for a benchmark's own scorer or server, not scored.",
        settings=QuestionSettings(scorer="none", suffix=SHORT_ANSWER),
    ),
    Protocol(
        name="coco-captions-v1",
        summary="COCO Karpathy test, a sampled caption each (Table 9): BLEU-4, METEOR, CIDEr x 100. Needs Java.",
        settings=CaptionSettings(),
        count=5000,
        split="test",
    ),
    Protocol(
        name="coco-captions-greedy-v1",
        summary="The same with the most probable token at every place.",
        settings=CaptionSettings(temperature=0.0),
        count=5000,
        split="test",
    ),
    Protocol(
        name="scenes-captions-v1",
        summary="Greedy captions of scenes, read back: shares of objects, colours and counts that are right.",
        settings=SceneCaptionSettings(),
    ),
    Protocol(
        name="scenes-stories-v1",
        summary="Stories of scenes: perplexity, bits per byte, and the last colour of the hero continued greedily.",
        settings=StorySettings(),
    ),
)
PROTOCOLS = {protocol.name: protocol for protocol in ALL}
SCENES = ("scenes-reconstruction-v1", "scenes-zeroshot-v1")
SCENES_GENERATED = ("scenes-geneval-v1",)
SCENES_ASKED = ("scenes-questions-v1",)
SCENES_UNIFIED = ("scenes-captions-v1", "scenes-stories-v1", "scenes-geneval-v1")


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
