"""One vocabulary for text and images: where a sequence stands in an image, and which ids may come next.

    0 ... V_t - 1            text, with the two markers of images
    V_t ... V_t + V_v - 1    visual: sub-code j of a token has 2^l_j ids of its own (`visual_tokens.bits_to_vocabulary`)

An image is ``BEGIN v_1 ... v_m END``, m the same for all: tokens of a picture times sub-codes of a token. So whoever
generates knows the modality of every next token. Shapes: `b` sequences, `s` their length, `V` = V_t + V_v.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor

from qlip.core.errors import UserError
from qlip.models.sampling import SamplingConfig, choose, uniform_numbers

NO_IMAGE, UNKNOWN = -1, -2


@dataclass(kw_only=True, slots=True, frozen=True)
class Vocabulary:
    """Which ids are text, which are sub-codes of which place."""

    text_size: int
    """V_t."""
    division: tuple[int, ...]
    """Bits of each sub-code, in order."""
    num_tokens: int
    """Tokens of a picture."""
    image_begin: int
    """BEGIN, below V_t."""
    image_end: int
    """END, below V_t."""

    @property
    def visual_size(self) -> int:
        """V_v."""
        return sum(1 << size for size in self.division)

    @property
    def size(self) -> int:
        """V."""
        return self.text_size + self.visual_size

    @property
    def image_length(self) -> int:
        """m, ids between the markers."""
        return self.num_tokens * len(self.division)

    def place_bounds(self) -> list[tuple[int, int]]:
        """First id of every sub-code, and the one behind its last."""
        bounds, start = [], self.text_size
        for size in self.division:
            bounds.append((start, start + (1 << size)))
            start += 1 << size
        return bounds


def ids_since_begin(ids: Tensor, vocabulary: Vocabulary) -> Tensor:
    """(b, s) ids -> (b, s) int64: how many ids of its image stand behind BEGIN up to here, at most m.

    At m only END may follow. `NO_IMAGE` where none is open; `UNKNOWN` for visual ids with nothing before them, whose
    beginning was not given (a step with cached keys).
    """
    places = torch.arange(ids.shape[-1], device=ids.device).expand_as(ids)
    visual, begin = ids >= vocabulary.text_size, ids == vocabulary.image_begin
    none = torch.full_like(places, -1)
    last_begin = torch.where(begin, places, none).cummax(-1).values
    last_text = torch.where(~visual & ~begin, places, none).cummax(-1).values
    count = (places - last_begin).clamp(max=vocabulary.image_length)
    count = torch.where(last_begin > last_text, count, NO_IMAGE)
    return torch.where((last_begin < 0) & (last_text < 0), UNKNOWN, count)


def hide_other_modality(logits: Tensor, counts: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Logits (b, s, V), those of the other modality at -inf by `ids_since_begin` (b, s); all stay where unknown."""
    expects_visual = (counts >= 0) & (counts < vocabulary.image_length)
    expects_text = (counts == NO_IMAGE) | (counts == vocabulary.image_length)
    text, visual = logits.split([vocabulary.text_size, vocabulary.visual_size], dim=-1)
    text = text.masked_fill(expects_visual[..., None], float("-inf"))
    return torch.cat([text, visual.masked_fill(expects_text[..., None], float("-inf"))], dim=-1)


class ModalityLogitsProcessor(LogitsProcessor):
    """Keeps every next id inside its modality and its sub-code, and closes images after exactly m ids.

    It looks at the ids alone, so prompts may end inside an image, and rows of a batch may stand at different places.
    """

    def __init__(self, vocabulary: Vocabulary, *, images: bool = True) -> None:
        """`images` says whether the model may begin an image by itself."""
        self.vocabulary, self.images = vocabulary, images

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(b, s) ids so far, (b, V) logits -> the logits with all that may not follow at -inf."""
        vocabulary = self.vocabulary
        count = ids_since_begin(input_ids, vocabulary)[:, -1:]
        place = count.squeeze(1) % len(vocabulary.division)
        bounds = torch.tensor(vocabulary.place_bounds(), device=scores.device)[place]
        ids = torch.arange(scores.shape[-1], device=scores.device)[None]
        in_place = (ids >= bounds[:, :1]) & (ids < bounds[:, 1:])
        text = (ids < vocabulary.text_size) & (ids != vocabulary.image_end)
        if not self.images:
            text = text & (ids != vocabulary.image_begin)
        full = count == vocabulary.image_length
        allowed = torch.where(count >= 0, torch.where(full, ids == vocabulary.image_end, in_place), text)
        return scores.masked_fill(~allowed, float("-inf"))


class SeededChoice(LogitsProcessor):
    """Draws by inverse cumulative distribution from numbers that belong to each row, for `generate(do_sample=False)`.

    What is drawn depends on a row's own prompt and seed, not on the rows beside it (`models/sampling.py`). It must be
    the last processor.
    """

    def __init__(self, seeds: list[int], *, start: int, count: int, config: SamplingConfig) -> None:
        """`start` is the length of the prompt, `count` the most ids that will be drawn."""
        config.check()
        self.start, self.config = start, config
        self.uniforms = uniform_numbers(seeds, count=count, width=1).squeeze(-1)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(b, s) ids so far, (b, V) logits -> 0 at the choice of each row, -inf elsewhere."""
        uniforms = self.uniforms[:, input_ids.shape[1] - self.start].to(scores.device)
        possible = scores.isfinite().any(0).nonzero().squeeze(1)  # of a vocabulary mostly one modality's
        if not len(possible):
            raise UserError("the model's logits are not finite: take --precision fp32, or other weights")
        chosen = possible[choose(scores[:, possible], uniforms, self.config)]
        return torch.full_like(scores, float("-inf")).scatter_(-1, chosen[:, None], 0.0)


def image_spans(ids: list[int], vocabulary: Vocabulary) -> list[tuple[int, int]]:
    """Where whole images lie in a sequence: first visual id and the place behind the last, for each.

    An image that was cut off, by the end or by text, is none.
    """
    spans: list[tuple[int, int]] = []
    begin: int | None = None
    for place, one in enumerate([*ids, vocabulary.image_end]):
        if one == vocabulary.image_begin:
            begin = place
        elif one < vocabulary.text_size:
            if begin is not None and place - begin - 1 == vocabulary.image_length:
                spans.append((begin + 1, place))
            begin = None
    return spans
