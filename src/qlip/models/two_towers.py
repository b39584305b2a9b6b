"""CLIP and SigLIP of transformers as evaluations see them, from local folders.

Shapes: `b` pictures, `S` their side, `t` texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel, PreTrainedTokenizerBase, SiglipModel

from qlip.core.errors import UserError
from qlip.models.baselines import DOWNLOAD_AGAIN, PixelScale, identity_of, read_config, read_json, whole_model
from qlip.models.measured import Ability, Reconstructed, sha256_of_config, sha256_of_tokens
from qlip.models.qlip.loading import quiet_transformers
from qlip.models.qlip.modeling import unit_norm
from qlip.models.qlip.pretrained import one_line
from qlip.models.qlip.tokenizer import TOKENIZER_FILE, VOCABULARY_FILES, load_tokenizer, text_tokenizer
from qlip.models.qlip.weight_files import find_weight_files, read_headers


class MeasuredTwoTowers:
    """CLIP or SigLIP of transformers.

    `features` of CLIP: `cls` is the CLS state after its LayerNorm, `mean` the mean of the patch states of the last
    layer, which no norm follows. SigLIP has no CLS: there `cls` is what its attention pooling makes of the patches, and
    `mean` that of the patch states after the last LayerNorm.
    """

    bits_per_token: float | None = None
    num_bits = 0

    def __init__(
        self, model: CLIPModel | SiglipModel, *, scale: PixelScale, tokenize: Callable[[list[str]], dict[str, Tensor]]
    ) -> None:
        """`scale` is that of its pictures; `tokenize` makes what its `get_text_features` takes."""
        self.model, self.scale, self.tokenize = model, scale, tokenize
        self.name = type(model).__name__
        vision = model.config.vision_config
        self.image_size, self.patch_size = _side(vision.image_size), _side(vision.patch_size)
        self.abilities: frozenset[Ability] = frozenset(("match_text", "features"))
        self._first_patch = 1 if isinstance(model, CLIPModel) else 0
        parts = {"encoder": ("vision_model",), "text": ("text_model",)}
        self._identity = identity_of(model, source_family="transformers", parts=parts)
        self._identity |= {
            "config_sha256": sha256_of_config(model.config),
            "pixel_scale": [list(scale.mean), list(scale.std)],
            "tokens_sha256": sha256_of_tokens(tokenize),
        }

    def identity(self) -> dict[str, Any]:
        """Fingerprint of all weights, dtype, sizes, and the library that the model comes from."""
        return dict(self._identity)

    def to(self, device: torch.device) -> None:
        """Move it there."""
        self.model.to(device)

    def reconstruct(self, pictures: Tensor) -> Reconstructed:
        """Raises `UserError`: there is nothing to reconstruct with."""
        raise UserError(f"{self.name} has no decoder: measure reconstructions on a QLIP model or an autoencoder")

    def image_embeds(self, pictures: Tensor) -> Tensor:
        """What is compared with texts."""
        return unit_norm(self.model.get_image_features(self._pixel_values(pictures)).pooler_output)

    def text_embeds(self, texts: list[str]) -> Tensor:
        """What is compared with pictures."""
        ids = {name: tensor.to(self.model.device) for name, tensor in self.tokenize(texts).items()}
        return unit_norm(self.model.get_text_features(**ids).pooler_output)

    def features(self, pictures: Tensor) -> dict[str, Tensor]:
        """`cls` and `mean`, as the class says."""
        output = self.model.vision_model(self._pixel_values(pictures))
        patches = output.last_hidden_state[:, self._first_patch :]
        return {"cls": output.pooler_output.float(), "mean": patches.float().mean(1)}

    def _pixel_values(self, pictures: Tensor) -> Tensor:
        return self.scale.from_uint8(pictures, dtype=self.model.dtype)


def open_two_towers(folder: Path) -> MeasuredTwoTowers:
    """CLIP or SigLIP of transformers from a local folder, in the precision of its file.

    Raises `UserError` for weights that do not fit its config.json, and for a processor or tokenizer that is missing or
    belongs to another model.
    """
    model_class = SiglipModel if read_config(folder).get("model_type") == "siglip" else CLIPModel
    read_headers(find_weight_files(folder))  # damage is named before the library meets it
    with quiet_transformers():
        model = whole_model(
            folder,
            lambda: model_class.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are listed then, and refused here
            ),
        )
        tokenize = _tokenize_of(model, folder)
    vision = model.config.vision_config
    if vision.num_channels != 3 or not _side(vision.image_size) or not _side(vision.patch_size):
        raise UserError(f"{folder}: config.json is not that of square RGB pictures; take another model")
    if model_class is SiglipModel and not model.vision_model.use_head:
        raise UserError(f"{folder} is a SigLIP without its pooling head (vision_use_head); take a whole one")
    return MeasuredTwoTowers(model, scale=_pixel_scale(folder), tokenize=tokenize)


def _side(size: int | list[int] | tuple[int, ...]) -> int:
    """The side of a square, 0 for anything else."""
    sides = {size} if isinstance(size, int) else set(size)
    return sides.pop() if len(sides) == 1 else 0


def _pixel_scale(folder: Path) -> PixelScale:
    """Mean and std in the image processor's file, new or old. Raises `UserError` when they are not given there."""
    settings = (read_json(folder / "processor_config.json") or {}).get("image_processor")
    if settings is None:  # as transformers wrote them before version 5
        settings = read_json(folder / "preprocessor_config.json")
    remedy = "download preprocessor_config.json of this model into the folder"
    if not isinstance(settings, dict):
        raise UserError(f"{folder} does not say how it scales pictures; {remedy}")
    mean, std = _three_numbers(settings.get("image_mean")), _three_numbers(settings.get("image_std"))
    if mean is None or std is None or min(std) <= 0:
        raise UserError(f"{folder}: image_mean and image_std are no three numbers each; {remedy}")
    usual = {"do_normalize": (None, True), "do_rescale": (None, True), "rescale_factor": (None, 1 / 255)}
    for name, values in usual.items():
        if settings.get(name) not in values:
            raise UserError(f"{folder}: {name} of its image processor is {settings[name]!r:.50}; {remedy}")
    return PixelScale(mean=mean, std=std)


def _three_numbers(values: Any) -> tuple[float, float, float] | None:
    """None for anything else, or not finite."""
    match values:
        case [int() | float() as red, int() | float() as green, int() | float() as blue]:
            return (red, green, blue) if all(map(math.isfinite, values)) else None
    return None


def _tokenize_of(model: CLIPModel | SiglipModel, folder: Path) -> Callable[[list[str]], dict[str, Tensor]]:
    """Texts -> what `get_text_features` takes, by the folder's own tokenizer; longer ones are cut."""
    text = model.config.text_config
    length = text.max_position_embeddings
    whole_vocabulary = all((folder / name).is_file() for name in VOCABULARY_FILES)
    sentence_pieces = any(folder.glob("*.model"))
    if not (folder / TOKENIZER_FILE).is_file() and not whole_vocabulary and not sentence_pieces:
        raise UserError(f"{folder} has no {TOKENIZER_FILE}; download the tokenizer's files of this model into it")
    try:
        if isinstance(model, CLIPModel):
            tokenizer = load_tokenizer(folder, context_length=length, hub={"local_files_only": True})
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except ImportError:
        raise UserError(f"{folder}: its tokenizer needs sentencepiece: pip install 'qlip[baselines]'") from None
    except Exception as error:  # the readers raise nearly every type on broken files
        raise UserError(f"{folder}: broken tokenizer files ({one_line(error)[:200]}); {DOWNLOAD_AGAIN}") from error
    if len(tokenizer) > text.vocab_size:
        raise UserError(
            f"{folder}: its tokenizer has {len(tokenizer)} tokens, its model {text.vocab_size}: they do not belong "
            "together; download both again"
        )
    tokenizer.model_max_length = min(tokenizer.model_max_length, length)
    return text_tokenizer(tokenizer) if isinstance(model, CLIPModel) else partial(_as_siglip_was_trained, tokenizer)


def _as_siglip_was_trained(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> dict[str, Tensor]:
    """Lower case, and always full length: SigLIP pools the last position, padding or not, and masks nothing."""
    encoded = tokenizer(
        [text.lower() for text in texts],
        padding="max_length",
        padding_side="right",
        truncation=True,
        split_special_tokens=True,
        return_tensors="pt",
    )
    return {"input_ids": encoded["input_ids"]}
