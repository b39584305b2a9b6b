"""UM3's processor: texts and pictures into one sequence of ids, and ids back into texts and pictures.

Both tokenizers travel with the model: the text tokenizer's files lie in its folder, the image tokenizer in
`image_tokenizer/`. Shapes: `b` pictures or sequences, `S` the side of a picture, `m` ids of one image.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, BatchFeature, PreTrainedTokenizerBase

from qlip.core.chats import without_markers
from qlip.core.errors import UserError
from qlip.models.baselines import read_config
from qlip.models.image_tokenizer import TOKENIZER_FOLDER, ImageTokenizer, copy_tokenizer, open_image_tokenizer
from qlip.models.language_model import open_text_tokenizer
from qlip.models.modality import Vocabulary, image_spans
from qlip.models.qlip.pictures import pictures_from
from qlip.models.qlip.processing import pillow_image_processor
from qlip.models.unified import UM3Config
from qlip.models.visual_tokens import bits_to_vocabulary, vocabulary_to_bits

Part = str | Image.Image
"""A piece of a sequence: text, or a picture (in calls also a path, bytes or an array of one)."""


class UM3Processor:
    """`processor([["a red star", picture], ...])` -> ids; `decode(ids)` -> texts and pictures."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_tokenizer: ImageTokenizer,
        config: UM3Config,
        *,
        source: str = "",
    ) -> None:
        """`source` is where the image tokenizer was read from.

        Raises `UserError`, with both fingerprints, for another image tokenizer than the model was made for.
        """
        if config.image_tokenizer != image_tokenizer.encoder_fingerprint:
            raise UserError(
                f"the model writes tokens of {config.image_tokenizer_name} {config.image_tokenizer[:12]}, but this is "
                f"{image_tokenizer.name} {image_tokenizer.encoder_fingerprint[:12]}: give the image tokenizer that it "
                "was trained with"
            )
        self.tokenizer, self.image_tokenizer, self._source = tokenizer, image_tokenizer, source
        self.vocabulary: Vocabulary = config.vocabulary
        self._image_processor = pillow_image_processor(image_tokenizer.image_size)

    def __call__(self, parts: Any, *, continue_image: bool = False) -> BatchFeature:
        """One part, one sequence of parts or several -> `input_ids` and `attention_mask` (b, s), padded on the left.

        A part is a text, whose markers are plain characters, or a picture: a PIL image, a path, bytes or an array. A
        sequence begins with BOS and has no end. `continue_image` ends it with the marker behind which an image begins.
        """
        if not isinstance(parts, list | tuple):
            parts = [parts]
        batch = parts if parts and isinstance(parts[0], list | tuple) else [parts]
        rows = [self.encode(row) + [self.vocabulary.image_begin] * continue_image for row in batch]
        return BatchFeature(dict(zip(("input_ids", "attention_mask"), self.padded(rows), strict=True)))

    def padded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Rows of ids -> ids and mask (b, s), padded on the left."""
        longest, pad = max(map(len, rows)), self.pad_id
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
        return ids, torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])

    @property
    def pad_id(self) -> int:
        """What fills rows up; the end marker where the tokenizer has no other."""
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)

    def encode(self, parts: Sequence[Any]) -> list[int]:
        """BOS and the ids of all parts."""
        ids = [] if self.tokenizer.bos_token_id is None else [int(self.tokenizer.bos_token_id)]
        for part in parts:
            if isinstance(part, str):
                ids += self.encode_text(part)
            else:
                image = self.image_ids(self.pixels([part]))[0].tolist()
                ids += [self.vocabulary.image_begin, *image, self.vocabulary.image_end]
        return ids

    def encode_text(self, text: str) -> list[int]:
        """Ids of a text alone, without BOS; markers of the tokenizer inside it are plain characters."""
        text = text.encode("utf-8", "replace").decode()  # half surrogates, of command lines and broken json
        plain = without_markers(text, [token for token in self.tokenizer.get_added_vocab() if token])
        return list(self.tokenizer(plain, add_special_tokens=False)["input_ids"])

    def pixels(self, pictures: Any) -> Tensor:
        """Pictures, as `QLIPProcessor` takes them -> (b, 3, S, S) uint8: bicubic to the short side, centre square."""
        whole = [one if isinstance(one, Image.Image) else _whole(one) for one in pictures_from(pictures)]
        prepared = self._image_processor(whole, do_rescale=False, do_normalize=False, return_tensors="np")
        return torch.from_numpy(np.asarray(prepared["pixel_values"]).round().astype(np.uint8))

    def image_ids(self, pixels: Tensor) -> Tensor:
        """(b, 3, S, S) uint8 -> (b, m) int64 of the vocabulary, without markers."""
        return self.bits_to_ids(self.image_tokenizer.encode(pixels.to(self.image_tokenizer.device)))

    def bits_to_ids(self, bits: Tensor) -> Tensor:
        """(b, n, L) bool -> (b, m) int64."""
        return bits_to_vocabulary(bits, self.vocabulary.division, offset=self.vocabulary.text_size)

    def ids_to_bits(self, ids: Tensor) -> Tensor:
        """(b, m) int64 -> (b, n, L) bool. Raises `ValueError` for ids that are no whole picture."""
        vocabulary = self.vocabulary
        if ids.ndim != 2 or ids.shape[1] != vocabulary.image_length:
            raise ValueError(f"ids of shape {tuple(ids.shape)}, not (b, {vocabulary.image_length}) of whole pictures")
        bounds = torch.tensor(vocabulary.place_bounds(), device=ids.device).repeat(vocabulary.num_tokens, 1)
        if ((ids < bounds[:, 0]) | (ids >= bounds[:, 1])).any():
            raise ValueError("an id stands where another sub-code of the picture belongs")
        return vocabulary_to_bits(ids, vocabulary.division, offset=vocabulary.text_size)

    def decode_image_tokens(self, ids: Tensor) -> list[Image.Image]:
        """(b, m) int64 of the vocabulary -> b pictures. Raises `ValueError` for ids that are no whole picture."""
        bits = self.ids_to_bits(ids).to(self.image_tokenizer.device)
        decoded = rearrange(self.image_tokenizer.decode(bits), "b c h w -> b h w c")
        return [Image.fromarray(picture) for picture in decoded.cpu().numpy()]

    def decode(self, ids: Sequence[int] | Tensor) -> list[Part]:
        """One sequence of ids -> its texts and pictures in order, without markers; cut off images are left out.

        An image whose sub-codes stand at wrong places is left out too; `generate` writes none.
        """
        ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        parts: list[Part] = []
        done = 0
        for first, behind in [*image_spans(ids, self.vocabulary), (len(ids) + 1, len(ids) + 1)]:
            text = [one for one in ids[done : first - 1] if one < self.vocabulary.text_size]
            words = self.tokenizer.decode(text, skip_special_tokens=True)
            if words:
                parts.append(words)
            if behind <= len(ids):
                with suppress(ValueError):
                    parts += self.decode_image_tokens(torch.tensor([ids[first:behind]]))
            done = behind
        return parts

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> UM3Processor:
        """The processor of a folder that `save_unified` wrote; options of transformers have no effect.

        Raises `UserError` for any other folder, and for broken files.
        """
        folder = Path(pretrained_model_name_or_path)
        try:
            config = UM3Config(**read_config(folder))
        except UserError:
            raise
        except Exception as error:  # `strict` and transformers raise what they like for broken fields
            raise UserError(f"{folder}/config.json is no UM3's ({type(error).__name__}): export it again") from None
        size = config.image_size if config.image_tokenizer_name != "QLIPModel" else 0
        images = open_image_tokenizer(folder / TOKENIZER_FOLDER, image_size=size)
        return cls(open_text_tokenizer(folder), images, config, source=str(folder / TOKENIZER_FOLDER))

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> list[str]:
        """Write the text tokenizer's files and a copy of the image tokenizer, beside a model that was saved there.

        Returns the paths of the text tokenizer's. Options of transformers have no effect. Raises `UserError` for a
        processor that does not know where its image tokenizer lies, and for a folder that has one already.
        """
        folder = Path(save_directory)
        if not self._source:
            raise UserError("this processor was not read from a folder: save its model with save_unified instead")
        if (folder / TOKENIZER_FOLDER).exists():
            raise UserError(f"{folder / TOKENIZER_FOLDER} is there already: choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        copy_tokenizer(self._source, folder)
        return list(self.tokenizer.save_pretrained(folder))


def _whole(array: np.ndarray) -> Image.Image:
    """A float picture (3, h, w) in [0, 1] or [0, 255] -> 8 bits."""
    values = array * 255 if array.max(initial=0) <= 1 else array
    return Image.fromarray(np.moveaxis(values.round().clip(0, 255).astype(np.uint8), 0, -1))


AutoProcessor.register(UM3Config, UM3Processor, exist_ok=True)
