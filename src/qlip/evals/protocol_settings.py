"""What a protocol is and what it may choose for each kind of evaluation: data, every field said with its effect."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from qlip.core.config import to_json

Position = Literal["cls", "mean", "cls+mean"]


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


@dataclass(kw_only=True, slots=True, frozen=True)
class TextToImageSettings:
    """Pictures generated from captions, against real ones and against their captions (Table 12)."""

    metrics: tuple[str, ...] = ("gfid", "clip_cosine", "clipscore")
    """Of gfid, over Inception; and, in the CLIP of `--clip`, fd_clip, clip_cosine, clipscore."""
    num_captions: int = 0
    """Pictures of the data that are drawn, one caption of each; 0 takes all that have captions."""
    prefix: str = ""
    """Before each caption when it is compared with the picture; the generator is given the caption alone."""
    clip: Literal["any", "ViT-B/32"] = "any"
    """Which CLIP must be given: any model that scores texts, or CLIP of 224 pixels in patches of 32."""
    seed: int = 0
    """Of the draw and of the pictures."""


SHORT_ANSWER = "Answer the question using a single word or phrase."
"""LLaVA-1.5's prompt for short answers, on a line after the question (arXiv 2310.03744)."""


@dataclass(kw_only=True, slots=True, frozen=True)
class QuestionSettings:
    """Questions about pictures, answered greedily and scored by `evals/question_scores.py`."""

    scorer: Literal["kinds", "yes_no", "match", "none"]
    """Exact match by kind of question, POPE's yes and no, VQA's match with one answer or ten, or answers alone."""
    suffix: str = ""
    """Asked on a line after each question that does not end so already."""
    max_new_tokens: int = 16
    """Longer answers are cut."""


@dataclass(kw_only=True, slots=True, frozen=True)
class ScenePromptSettings:
    """GenEval's six categories in the language of scenes, judged by `evals/scenes.py`."""

    num_per_category: int = 50
    """Prompts of each category."""
    num_samples: int = 4
    """Pictures per prompt."""
    num_records: int = 1000
    """Scenes of the data, the first so many, that chance is worked out with."""
    seed: int = 0
    """Of prompts and pictures."""


@dataclass(kw_only=True, slots=True, frozen=True)
class CaptionSettings:
    """One caption of each picture, against those that people wrote, as COCO's caption evaluation does."""

    temperature: float = 1.0
    """Logits are divided by it; 0 is greedy. The default and `top_p` are the paper's (Table 9)."""
    top_p: float = 0.95
    """Only the most probable ids that together reach this probability can be drawn."""
    max_new_tokens: int = 64
    """Longer captions are cut."""
    seed: int = 0
    """Of what is drawn."""


@dataclass(kw_only=True, slots=True, frozen=True)
class SceneCaptionSettings:
    """One greedy caption of each scene, read back by `evals/scene_sentences.py`."""

    max_new_tokens: int = 128
    """Longer captions are cut."""


@dataclass(kw_only=True, slots=True, frozen=True)
class StorySettings:
    """Likelihood of the scenes' stories, and the colour that their last sentence says continued greedily."""

    max_new_tokens: int = 8
    """In which the colour must be said."""


Kind = Literal[
    "reconstruction",
    "zero_shot",
    "retrieval",
    "linear_probe",
    "knn",
    "text_to_image",
    "scene_prompts",
    "questions",
    "captions",
    "scene_captions",
    "stories",
]
Settings = (
    ReconstructionSettings
    | ZeroShotSettings
    | RetrievalSettings
    | LinearProbeSettings
    | KnnSettings
    | TextToImageSettings
    | ScenePromptSettings
    | QuestionSettings
    | CaptionSettings
    | SceneCaptionSettings
    | StorySettings
)
KINDS: dict[type, Kind] = {
    ReconstructionSettings: "reconstruction",
    ZeroShotSettings: "zero_shot",
    RetrievalSettings: "retrieval",
    LinearProbeSettings: "linear_probe",
    KnnSettings: "knn",
    TextToImageSettings: "text_to_image",
    ScenePromptSettings: "scene_prompts",
    QuestionSettings: "questions",
    CaptionSettings: "captions",
    SceneCaptionSettings: "scene_captions",
    StorySettings: "stories",
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
    preparation: Preparation = field(default_factory=Preparation)
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
