"""Drawing image tokens: static KV cache, guidance in one doubled batch, and random numbers that belong to a picture.

Every picture has a seed, from which all uniform numbers that choose its tokens are drawn before the first step, on the
CPU. A choice is the inverse of the cumulative distribution at such a number, so a picture depends on its prompt and
seed, not on what it is drawn beside or on the device. Matrix products of other batch sizes round differently in the
last digit: in float32 that moves a choice only when its number falls that close to the border of two codes; in bfloat16
it is common, so compiled batches are filled up to one size, and pictures are the same at one batch size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import StaticCache

from qlip.core.errors import UserError
from qlip.models.text_to_image import TextToImageModel, causal_mask

GRAPHS = 256
"""How often steps may be compiled in one process before PyTorch gives up; its own limit of 8 is two samplers."""
OnTokens = Callable[[int, Tensor], None]
"""Tokens drawn so far, and all bits (b, n, L), False where not drawn yet: for progress and previews."""

LEAST_TEMPERATURE = 1e-3  # logits divided by less would not fit float32


@dataclass(kw_only=True, slots=True, frozen=True)
class SamplingConfig:
    """How the next token is drawn. Defaults are LlamaGen's for text-to-image."""

    guidance: float = 7.5
    """Classifier-free guidance s: logits are u + s (c - u), of the empty caption and of the prompt. 1 is none."""
    temperature: float = 1.0
    """Logits are divided by it; 0 always takes the most probable code."""
    top_k: int = 1000
    """Only so many most probable codes can be drawn; 0 is all. Of a bit there are two."""
    top_p: float = 1.0
    """Only the most probable codes that together reach this probability can be drawn."""

    def check(self) -> None:
        """Raise `UserError` for impossible numbers."""
        if not 0 <= self.guidance < math.inf:
            raise UserError(f"guidance is {self.guidance}: give 0 or more, and 1 for none")
        if self.temperature != 0 and not LEAST_TEMPERATURE <= self.temperature < math.inf:
            raise UserError(
                f"temperature is {self.temperature}: give 0 for the most probable, or {LEAST_TEMPERATURE} and more"
            )
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}: give a number of codes, and 0 for all")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}: give more than 0, at most 1, and 1 for all")


def limited_logits(logits: Tensor, config: SamplingConfig) -> Tensor:
    """Logits (..., V) divided by the temperature, those out of top-k and top-p at -inf; float32.

    Of equal logits at the border of top-k all stay; top-p always keeps the most probable code.
    """
    logits = logits.float() / (config.temperature or 1.0)
    if 0 < config.top_k < logits.shape[-1]:
        least = logits.topk(config.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if config.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1).roll(1, dims=-1)  # the probability of all before it
        before[..., 0] = 0
        out = torch.empty_like(before, dtype=torch.bool).scatter_(-1, order, before >= config.top_p)
        logits = logits.masked_fill(out, float("-inf"))
    return logits


def choose(logits: Tensor, uniforms: Tensor, config: SamplingConfig) -> Tensor:
    """Logits (m, ..., V) and numbers in [0, 1) (b, ...) -> the choices (b, ...) int64.

    m is 2 b, prompts first, when the config has guidance, else b.
    """
    if config.guidance != 1:
        conditional, unconditional = logits.float().chunk(2)
        logits = torch.lerp(unconditional, conditional, config.guidance)
    if config.temperature == 0:
        return logits.argmax(-1)
    logits = limited_logits(logits, config)
    exact = torch.float32 if logits.device.type == "mps" else torch.float64  # sums of thousands of small terms
    cumulative = logits.to(exact).softmax(-1).cumsum(-1)
    threshold = uniforms.to(exact)[..., None] * cumulative[..., -1:]
    return (cumulative <= threshold).sum(-1).clamp(max=logits.shape[-1] - 1)


def uniform_numbers(seeds: list[int], *, count: int, width: int) -> Tensor:
    """(b, count, width) float32 in [0, 1): those of each seed alone, equal on every machine."""
    numbers = [torch.rand(count, width, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(numbers)


class Sampler:
    """Draws the bits of pictures; keeps its compiled step and its cache from one batch to the next."""

    def __init__(self, model: TextToImageModel, config: SamplingConfig, *, compile: bool | None = None) -> None:
        """`compile` runs steps as one CUDA graph; None does so on a GPU. The first batch then waits for it.

        Raises `UserError` for an impossible config.
        """
        config.check()
        self.model, self.config = model, config
        compiled = model.device.type == "cuda" if compile is None else compile
        if compiled:  # a graph for each place of a token and each sampler of the process, which all count together
            torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
        self._compiled, self._most_rows = compiled, 0
        self._advance = torch.compile(self._step, mode="reduce-overhead", fullgraph=True) if compiled else self._step
        self._cache: StaticCache | None = None
        self._cache_size = (0, 0)

    @torch.inference_mode()
    def sample(
        self, caption: Tensor, caption_mask: Tensor, *, seeds: list[int], on_tokens: OnTokens | None = None
    ) -> Tensor:
        """Captions (b, t, c) or (b, t), as the model takes them, and b seeds -> bits (b, n, L) bool.

        `on_tokens` is called after every token.
        """
        model, head = self.model, self.model.head
        assert not model.training, "sampling needs evaluation mode"
        num_asked = len(seeds)
        if self._compiled:  # every other size would be compiled anew, and products of other sizes round differently
            self._most_rows = max(self._most_rows, num_asked)
            missing = self._most_rows - num_asked
            caption, caption_mask = (
                torch.cat([x, x[-1:].expand(missing, *x.shape[1:])]) for x in (caption, caption_mask)
            )
            seeds = seeds + seeds[-1:] * missing
        per_token, num_tokens = head.positions_per_token, model.config.num_tokens
        count = num_tokens * per_token
        uniforms = uniform_numbers(seeds, count=count, width=head.piece_width).to(model.device)
        pieces = torch.zeros(len(seeds), count, head.piece_width, dtype=torch.int64, device=model.device)
        hidden, mask, cache = self._prefill(caption, caption_mask, num_keys=model.config.caption_length + count)
        start = torch.tensor(model.config.caption_length, device=model.device)
        for position in range(count):
            place, is_last = position % per_token, position + 1 == count
            piece, hidden = self._advance(
                hidden, uniforms[:, position], mask, start + position, cache, place=place, is_last=is_last
            )
            pieces[:, position] = piece
            if self._compiled:
                hidden = hidden.clone()  # a CUDA graph writes its next outputs over its last ones
            if on_tokens is not None and place + 1 == per_token:
                on_tokens((position + 1) // per_token, head.bits(pieces[:num_asked]))
        return head.bits(pieces[:num_asked])

    def _prefill(self, caption: Tensor, caption_mask: Tensor, *, num_keys: int) -> tuple[Tensor, Tensor, StaticCache]:
        """The state behind the captions (m, d), which keys may be looked at (m, keys), and the filled cache."""
        model = self.model
        prefix, mask = model.prefix(caption, caption_mask)
        if self.config.guidance != 1:
            empty, all_slots = model.prefix(caption, caption_mask, dropped=torch.ones_like(caption_mask[:, 0]) > 0)
            prefix, mask = torch.cat([prefix, empty]), torch.cat([mask, all_slots])
        cache = self._empty_cache(len(prefix), num_keys)
        length = prefix.shape[1]
        states = model.run_trunk(
            prefix, attention_mask=causal_mask(mask, length=length, num_keys=num_keys), cache=cache
        )
        real = torch.nn.functional.pad(mask, (0, num_keys - length), value=True)
        return states[:, -1].clone(), real, cache

    def _empty_cache(self, rows: int, num_keys: int) -> StaticCache:
        if self._cache is None or self._cache_size != (rows, num_keys):
            self._cache = StaticCache(config=self.model.trunk.config, max_cache_len=num_keys)
            self._cache_size = (rows, num_keys)
        self._cache.reset()
        return self._cache

    def _step(
        self,
        hidden: Tensor,
        uniforms: Tensor,
        real: Tensor,
        position: Tensor,
        cache: StaticCache,
        *,
        place: int,
        is_last: bool,
    ) -> tuple[Tensor, Tensor]:
        """States (m, d) before `position` -> the piece drawn there (b, w), and the states behind it."""
        head = self.model.head
        piece = head.draw(hidden, uniforms, self._choose, place=place)
        if is_last:
            return piece, hidden
        embedded = head.embed(piece[:, None], place=place)  # (b, 1, d)
        embedded = embedded.repeat(len(hidden) // len(embedded), 1, 1)
        past = torch.arange(real.shape[1], device=real.device) <= position
        mask = (real & past)[:, None, None]
        states = self.model.run_trunk(embedded, attention_mask=mask, start=position, cache=cache)
        return piece, states[:, 0]

    def _choose(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        return choose(logits, uniforms, self.config)
