"""Texts -> what a text-to-image model reads of them: ids or features of `t` slots, padded on the left.

| encoder   | ids                    | features                                     | trained    |
|-----------|------------------------|----------------------------------------------|------------|
| `t5`      | of the T5's tokenizer  | last states of a frozen T5 encoder (FLAN-T5) | no         |
| `qlip`    | CLIP's byte pairs      | last states of the tokenizer's text tower    | no         |
| `learned` | CLIP's byte pairs      | none: the model has a table of its own       | with it    |

Shapes: `b` texts, `t` slots, `c` width of features.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5EncoderModel

from qlip.core.errors import UserError
from qlip.models.qlip.loading import quiet_transformers
from qlip.models.qlip.modeling import QLIPModel
from qlip.models.qlip.pretrained import one_line
from qlip.models.qlip.tokenizer import PLAIN_TEXTS, clip_tokenizer
from qlip.models.text_to_image import TextToImageConfig

JOINERS = "\u200c\u200d"  # join or part letters and emoji; every other invisible character goes
LONGEST_PROMPT = 100_000  # characters; a tokenizer takes seconds for more


class CaptionEncoder:
    """A tokenizer and, but for `learned`, a frozen network."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        length: int,
        network: nn.Module | None,
        features: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> None:
        """`length` is t; `features` (b, t) ids and mask -> (b, t, c), computed by `network`."""
        self.tokenizer, self.length = tokenizer, length
        self.network, self._features = network, features
        if network is not None:
            network.requires_grad_(False).eval()

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        """b texts -> `input_ids` and `attention_mask` (b, t) int64, padded on the right, cut to t."""
        options = {**PLAIN_TEXTS, "padding": "max_length", "max_length": self.length}
        encoded = self.tokenizer(texts, return_tensors="pt", **options)
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}

    @torch.no_grad()
    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """What `tokenize` gives -> ids (b, t) or features (b, t, c), and mask (b, t) bool, moved to the right end."""
        mask = attention_mask.to(torch.bool)
        found = input_ids if self._features is None else self._features(input_ids, attention_mask)
        return _to_the_right(found, mask), _to_the_right(mask, mask)

    def to(self, device: torch.device) -> None:
        """Move the network there."""
        if self.network is not None:
            self.network.to(device)

    def num_cut(self, text: str) -> int:
        """How many of a text's tokens do not fit."""
        ids = self.tokenizer(text, add_special_tokens=True, split_special_tokens=True, verbose=False)["input_ids"]
        return max(0, len(ids) - self.length)

    def has_unknown(self, text: str) -> bool:
        """Whether characters of a text are unknown to the tokenizer, as most scripts are to T5's."""
        unknown = self.tokenizer.unk_token_id
        is_end = unknown == self.tokenizer.eos_token_id  # CLIP's, whose bytes cover every text
        return not is_end and unknown in self.tokenizer(text)["input_ids"]


def _to_the_right(x: Tensor, mask: Tensor) -> Tensor:
    """(b, t, ...) with the entries that `mask` marks at the left end -> the same at the right end, in order."""
    count = mask.sum(1, keepdim=True)
    index = (torch.arange(x.shape[1], device=x.device) + count) % x.shape[1]  # (b, t)
    return x[torch.arange(len(x), device=x.device)[:, None], index]


def open_caption_encoder(
    config: TextToImageConfig, *, tokenizer_model: QLIPModel | None, source: str = ""
) -> CaptionEncoder:
    """The encoder that a config names. `source` is a folder to read T5 from, if not the config's.

    `tokenizer_model` is the QLIP whose text tower `qlip` takes. Raises `UserError` for a model without one, a folder
    that holds no T5 encoder, and features of another width.
    """
    length = config.caption_length
    if config.caption_encoder == "learned":
        return CaptionEncoder(clip_tokenizer(context_length=length), length=length, network=None, features=None)
    if config.caption_encoder == "qlip":
        if tokenizer_model is None:
            raise UserError("caption encoder qlip needs a QLIP tokenizer: take t5 or learned with tokens of a VQ model")
        text_config = tokenizer_model.config.text_config
        _same_width(config, text_config.hidden_size, "the text tower")
        if length > text_config.max_position_embeddings:
            raise UserError(
                f"captions of {length} slots, but the text tower has {text_config.max_position_embeddings}: "
                f"set caption_length to {text_config.max_position_embeddings}"
            )
        tower = tokenizer_model.text_model

        def qlip_features(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return tower(input_ids, attention_mask).last_hidden_state

        tokenizer = clip_tokenizer(context_length=length)
        return CaptionEncoder(tokenizer, length=length, network=tower, features=qlip_features)
    return _open_t5(config, source or config.caption_source)


def _open_t5(config: TextToImageConfig, source: str) -> CaptionEncoder:
    if not source or not Path(source).is_dir():
        what = f"{source} is no folder" if source else "no folder of the T5 encoder is given"
        raise UserError(f"{what}: download google/flan-t5-xl and give its folder with --caption-encoder")
    try:
        with quiet_transformers():
            network, info = T5EncoderModel.from_pretrained(
                source, local_files_only=True, dtype="auto", output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the readers raise nearly every type on broken files
        raise UserError(f"cannot read a T5 encoder from {source}: {one_line(error)}; download it again") from None
    absent = [*info["missing_keys"], *info["mismatched_keys"]]  # left over may be what it likes: FLAN-T5 has a decoder
    if absent:
        raise UserError(f"{source} lacks {len(absent)} tensors of a T5 encoder: download it again")
    if network.dtype == torch.float16:
        network.float()  # T5 overflows in float16
    _same_width(config, network.config.d_model, source)

    def t5_features(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return network(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    return CaptionEncoder(tokenizer, length=config.caption_length, network=network, features=t5_features)


def _same_width(config: TextToImageConfig, width: int, what: str) -> None:
    if width != config.caption_width:
        raise UserError(f"{what} gives features of width {width}, the model takes {config.caption_width}: take another")


def cleaned_prompt(prompt: str) -> str:
    """A prompt without control characters and doubled spaces, composed as NFC.

    Raises `UserError` when nothing is left, or when it is longer than any caption.
    """
    if len(prompt) > LONGEST_PROMPT:
        raise UserError(f"the prompt has {len(prompt)} characters: give at most {LONGEST_PROMPT}")
    kept = "".join(
        " " if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn") and c not in JOINERS else c for c in prompt
    )
    text = " ".join(unicodedata.normalize("NFC", kept).split())
    if not text.strip(JOINERS + " "):
        raise UserError("the prompt is empty: say what the picture should show, in quotes")
    return text
