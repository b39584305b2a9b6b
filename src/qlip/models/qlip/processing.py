"""QLIPProcessor: pictures and texts into model inputs, pixels back into pictures; all of it offline.

Image side: `core/images.py`, then CLIP's processor with the Pillow back end (torchvision's differs by up to 1/255,
enough to flip bits). Text side: CLIP's byte-pair encoding (`tokenizer.py`).
"""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.utils import cached_file

from qlip.core import pixels
from qlip.core.errors import UserError
from qlip.models.qlip.official import is_official
from qlip.models.qlip.pictures import has_unit_pixels, pictures_from
from qlip.models.qlip.tokenizer import PLAIN_TEXTS, PlainTextProcessingKwargs, clip_tokenizer, load_tokenizer
from qlip.models.qlip.weight_files import HUB_OPTIONS, refuse_what_is_no_source

CLIP_IMAGE_PROCESSORS = (
    "CLIPImageProcessor",
    "CLIPImageProcessorFast",
    "CLIPImageProcessorPil",
    "CLIPFeatureExtractor",
)
DEFAULT_SIZES = {True: 224, False: 256}  # of a config.json that gives none: in the released layout, in ours
CLIP_CONTEXT_LENGTH = 77
LARGEST_SIDE = 65_536
MEANINGLESS_HERE = ("trust_remote_code", "code_revision", "_from_auto", "_from_pipeline", "_commit_hash")


class QLIPProcessor(ProcessorMixin):
    """`processor(images=..., text=..., return_tensors="pt")` and `postprocess(pixels)`.

    Output keys: `pixel_values` (b, 3, S, S) CLIP-normalised; `input_ids` and `attention_mask` (t, length).
    """

    valid_processor_kwargs = PlainTextProcessingKwargs

    def __init__(self, image_processor=None, tokenizer=None, **kwargs):
        if isinstance(image_processor, BaseImageProcessor) and not isinstance(image_processor, CLIPImageProcessorPil):
            image_processor = image_processor_from(image_processor.to_dict())
        super().__init__(image_processor, tokenizer, **kwargs)

    def __call__(self, images: Any = None, text: str | list[str] | None = None, **kwargs: Any) -> BatchFeature:
        """Pictures and texts -> a batch.

        A picture is a PIL image of any mode, a path, the bytes of a file, or an array or tensor (`pictures.py`);
        lists mix them freely. All but float arrays enter as `open_image` reads them. Texts are padded to the longest,
        cut to the context, and markers inside them are plain characters. CLIP's options for images (`size`,
        `crop_size`, `do_resize`, `do_rescale`, ...) and for texts (`padding`, `max_length`, ...) hold for this call.

        Raises `ImageRejected`, a `ValueError` of one line, for a picture that is broken or over the limits, and for
        an address: nothing is downloaded.
        """
        if images is not None:
            images = pictures_from(images, layout=kwargs.pop("input_data_format", None))
            options = {"do_rescale": self.image_processor.do_rescale, **kwargs, **kwargs.get("images_kwargs", {})}
            if options["do_rescale"] and has_unit_pixels(images):
                warnings.warn("float pixels of at most 1 are divided by 255; pass do_rescale=False", stacklevel=2)
        if text is not None:
            text = list(text) if isinstance(text, tuple) else text
            if text == []:
                raise ValueError("text is an empty list; give at least one text, or no text at all")
            given = kwargs.get("text_kwargs", {})
            kwargs = {name: value for name, value in PLAIN_TEXTS.items() if name not in given} | kwargs
        return super().__call__(images=images, text=text, **kwargs)

    @classmethod
    def for_size(cls, image_size: int, *, context_length: int = CLIP_CONTEXT_LENGTH) -> QLIPProcessor:
        """The processor of a model with this picture side and longest text."""
        return cls(pillow_image_processor(image_size), clip_tokenizer(context_length=context_length))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> QLIPProcessor:
        """The processor of a folder or hub id, always with the Pillow back end.

        Pictures: processor_config.json, else preprocessor_config.json, else CLIP's preprocessing at the size in
        config.json of a QLIP model, ours or released. Texts: as `load_tokenizer`. Options: those of transformers for
        the hub (`revision`, `subfolder`, `cache_dir`, `local_files_only`, `token`, ...); CLIP's image options, which
        replace what the files say; `image_processor` and `tokenizer` to bring one's own.

        Raises `UserError`, a `ValueError`, for files that are broken and for folders of something else, `OSError`
        when the hub has no such model.
        """
        source = pretrained_model_name_or_path
        refuse_what_is_no_source(source)
        hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        options = {
            name: kwargs.pop(name) for name in CLIPImageProcessorPil.valid_kwargs.__annotations__ & kwargs.keys()
        }
        image_processor, tokenizer = kwargs.pop("image_processor", None), kwargs.pop("tokenizer", None)
        for name in sorted(kwargs.keys() - set(MEANINGLESS_HERE)):
            warnings.warn(f"{name} has no effect on QLIPProcessor.from_pretrained", stacklevel=2)
        config = _read_json(source, "config.json", hub) or {}
        if image_processor is None:
            settings = _image_settings(source, hub)
            if settings is None:
                image_size = _image_size(config, source)
                settings = pillow_image_processor(image_size).to_dict()
            image_processor = image_processor_from({**settings, **options}, source=source)
        if tokenizer is None:
            tokenizer = load_tokenizer(source, context_length=_context_length(config, source), hub=hub)
        return cls(image_processor, tokenizer)

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Write processor_config.json, the tokenizer's files, and preprocessor_config.json for older tools.

        Returns the paths of the two config files.
        """
        written = super().save_pretrained(save_directory)
        written += self.image_processor.save_pretrained(save_directory)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return written

    def postprocess(self, pixel_values: Tensor) -> list[Image.Image]:
        """Normalised pixels, as `QLIPModel.decode` returns them -> pictures, clamped and rounded.

        (b, 3, h, w) or one picture (3, h, w), of any float type, on any device. Raises `ValueError` for other shapes.
        """
        values = torch.as_tensor(pixel_values).detach()
        if values.ndim not in (3, 4) or values.shape[-3] != 3:
            raise ValueError(f"pixels must be (b, 3, h, w) or (3, h, w), got {tuple(values.shape)}")
        values = values if values.ndim == 4 else values[None]
        mean, std = tuple(self.image_processor.image_mean), tuple(self.image_processor.image_std)
        if (mean, std) != (pixels.CLIP_MEAN, pixels.CLIP_STD):  # the files of the model said so
            per_channel = [torch.tensor(each, device=values.device)[:, None, None] for each in (std, mean)]
            values = pixels.normalise(values.float() * per_channel[0] + per_channel[1])
        pictures = pixels.to_uint8(values).permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(picture) for picture in pictures]


def pillow_image_processor(image_size: int) -> CLIPImageProcessorPil:
    """CLIP's preprocessing at this size: shortest edge bicubic, centre crop, CLIP mean and std."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
    )


def image_processor_from(settings: dict[str, Any], *, source: str | Path = "image processor") -> CLIPImageProcessorPil:
    """CLIP's preprocessing with the Pillow back end, from the settings of any back end or age.

    Raises `UserError` naming `source` for settings of another kind of preprocessing, or that do not make sense.
    """
    kind = settings.get("image_processor_type") or settings.get("feature_extractor_type") or CLIP_IMAGE_PROCESSORS[0]
    if kind not in CLIP_IMAGE_PROCESSORS:
        raise UserError(f"{source}: {kind} is another preprocessing than CLIP's; give a QLIP or CLIP model")
    settings = {name: value for name, value in settings.items() if name != "image_processor_type"}
    for name in ("image_mean", "image_std"):
        values = settings.get(name)
        if values is not None and not _three_numbers(values):
            raise UserError(f"{source}: {name} must be three numbers, got {values!r}; mend the file")
    if any(std <= 0 for std in settings.get("image_std") or ()):
        raise UserError(f"{source}: image_std must be above 0, got {settings['image_std']}; mend the file")
    for name in ("size", "crop_size"):
        given = settings.get(name)
        sides = given.values() if isinstance(given, dict) else [given]
        if any(isinstance(side, int) and not 1 <= side <= LARGEST_SIDE for side in sides):
            raise UserError(f"{source}: {name} must have sides from 1 to {LARGEST_SIDE}, got {given}; mend the file")
    try:
        return CLIPImageProcessorPil(**settings)
    except (TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{source}: broken settings for pictures: {reason}; mend the file") from error


def _three_numbers(values: Any) -> bool:
    if not isinstance(values, list | tuple) or len(values) != 3:
        return False
    return all(isinstance(value, int | float) and math.isfinite(value) for value in values)


def _read_json(source: str | Path, name: str, hub: dict[str, Any]) -> dict[str, Any] | None:
    """What a file of a folder or hub id holds, None when there is no such file."""
    path = cached_file(source, name, **hub, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return None
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{source}: {name} is not JSON: {error}; mend the file") from error
    if not isinstance(values, dict):
        raise UserError(f"{source}: {name} must hold an object, got {type(values).__name__}; mend the file")
    return values


def _image_settings(source: str | Path, hub: dict[str, Any]) -> dict[str, Any] | None:
    """Settings of the image processor in either of its files, None when there are none."""
    settings = (_read_json(source, "processor_config.json", hub) or {}).get("image_processor")
    if settings is None:  # as transformers wrote them before version 5
        settings = _read_json(source, "preprocessor_config.json", hub)
    if settings is not None and not isinstance(settings, dict):
        raise UserError(f"{source}: image_processor in processor_config.json must be an object; mend the file")
    return settings


def _image_size(config: dict[str, Any], source: str | Path) -> int:
    if not is_official(config) and config.get("model_type") != "qlip":
        raise UserError(
            f"{source} is not a model folder: no processor files, no config.json of a QLIP model; give another folder"
        )
    return _count(config, "vision_config", "image_size", DEFAULT_SIZES[is_official(config)], source)


def _context_length(config: dict[str, Any], source: str | Path) -> int:
    return _count(config, "text_config", "max_position_embeddings", CLIP_CONTEXT_LENGTH, source)


def _count(config: dict[str, Any], part: str, name: str, default: int, source: str | Path) -> int:
    section = config.get(part)
    value = (section if isinstance(section, dict) else {}).get(name)
    value = default if value is None else value
    if type(value) is not int or not 1 <= value <= 65_536:
        raise UserError(f"{source}: config.json: {part}.{name} must be from 1 to 65536, got {value!r}; mend the file")
    return value
