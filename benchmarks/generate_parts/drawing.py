"""One model of random weights, and three ways to draw from it: ours, transformers' `generate`, and without a cache.

A token of one sub-code makes ours an ordinary language model: `TransformersGenerate` has the same trunk and rotary
positions, and tables whose rows are ours with the part of their bits added.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from qlip.models.sampling import SamplingConfig, choose, uniform_numbers
from qlip.models.text_to_image import SIZES, TextToImageConfig, TextToImageModel, causal_mask
from qlip.models.visual_tokens import FlatHead

TINY = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 688}
ALL_SIZES = {"tiny": TINY, **SIZES}
CODE_BITS, TOP_K = 14, 1000


def build_model(size: str, *, side: int, device: str, dtype: torch.dtype, **head: Any) -> TextToImageModel:
    """A model of random weights whose logits have a standard deviation of about 2."""
    torch.manual_seed(0)
    config = TextToImageConfig(**ALL_SIZES[size], grid=[side, side], image_size=16 * side, **head)
    model = TextToImageModel(config).eval().requires_grad_(False)
    for name, part in model.head.named_modules():
        if name.endswith("output"):  # 0 in a fresh model
            nn.init.normal_(part.weight, std=config.hidden_size**-0.5)
    return model.to(device, dtype)


def one_code_model(size: str, *, side: int, device: str, dtype: torch.dtype) -> TextToImageModel:
    """With tokens of one sub-code, as a VQGAN's."""
    return build_model(
        size, side=side, device=device, dtype=dtype, head="flat", num_bits=CODE_BITS, division=[CODE_BITS]
    )


def random_captions(model: TextToImageModel, batch: int) -> tuple[Tensor, Tensor]:
    """Features (b, t, c) and mask (b, t), padded on the left: every other caption fills half of its slots."""
    config = model.config
    features = torch.randn(batch, config.caption_length, config.caption_width, generator=torch.Generator())
    mask = torch.ones(batch, config.caption_length, dtype=torch.bool)
    mask[1::2, : config.caption_length // 2] = False
    return features.to(model.device, model.dtype), mask.to(model.device)


class TransformersGenerate:
    """transformers' own sampling with the weights of a `one_code_model`; nothing is copied but the tables."""

    def __init__(self, model: TextToImageModel, caption: Tensor, mask: Tensor) -> None:
        head = model.head
        assert isinstance(head, FlatHead)
        assert head.positions_per_token == 1
        config = model.config.trunk_config()
        config.vocab_size, config.tie_word_embeddings = 1 << CODE_BITS, False
        with torch.device("meta"):
            causal = LlamaForCausalLM(config)
        batch, length = mask.shape
        prefix, self.mask = model.prefix(caption, mask)
        empty, _ = model.prefix(caption[:1], mask[:1], dropped=torch.ones_like(mask[:1, 0]))
        codes = torch.arange(1 << CODE_BITS, device=model.device)
        rows = torch.cat([head.tables.embed(codes, 0), prefix.flatten(0, 1), empty.flatten(0, 1)])
        output = head.tables.logits(torch.eye(config.hidden_size, device=model.device, dtype=model.dtype), 0).T
        causal.model.embed_tokens = nn.Embedding.from_pretrained(rows)
        causal.model.rotary_emb = model.trunk.rotary_emb
        weights = {f"model.{name}": tensor for name, tensor in model.trunk.state_dict().items()}
        weights |= {"lm_head.weight": output.contiguous(), "model.embed_tokens.weight": rows}
        causal.load_state_dict(weights, assign=True)
        self.causal = causal.eval()
        prompts = torch.arange(1 << CODE_BITS, len(rows), device=model.device)
        self.prompts, self.empty = prompts[:-length].view(batch, length), prompts[-length:].repeat(batch, 1)
        self.count = model.config.num_tokens

    def __call__(self, *, guidance: float, greedy: bool = False, static: bool = False) -> Tensor:
        """Tokens (b, n)."""
        drawing = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": TOP_K}
        guiding = {"guidance_scale": guidance, "negative_prompt_ids": self.empty} if guidance != 1 else {}
        tokens = self.causal.generate(
            self.prompts,
            attention_mask=self.mask.long(),
            position_ids=torch.arange(self.prompts.shape[1], device=self.mask.device).repeat(len(self.mask), 1),
            max_new_tokens=self.count,
            cache_implementation="static" if static else None,
            **drawing,
            **guiding,
        )
        return tokens[:, self.prompts.shape[1] :]


@torch.inference_mode()
def sample_uncached(
    model: TextToImageModel, caption: Tensor, mask: Tensor, *, seeds: list[int], config: SamplingConfig
) -> Tensor:
    """What `Sampler.sample` does, with nothing kept from one position to the next; bits (b, n, L)."""
    head, batch = model.head, len(seeds)
    prefix, seen = model.prefix(caption, mask)
    if config.guidance != 1:
        empty, all_slots = model.prefix(caption, mask, dropped=torch.ones_like(mask[:, 0]))
        prefix, seen = torch.cat([prefix, empty]), torch.cat([seen, all_slots])
    count = model.config.num_tokens * head.positions_per_token
    uniforms = uniform_numbers(seeds, count=count, width=head.piece_width).to(model.device)
    pieces = torch.zeros(batch, 0, head.piece_width, dtype=torch.int64, device=model.device)
    for position in range(count):
        inputs = prefix
        if position:
            inputs = torch.cat([prefix, head.embed(pieces).repeat(len(prefix) // batch, 1, 1)], dim=1)
        states = model.run_trunk(inputs, attention_mask=causal_mask(seen, length=inputs.shape[1]))
        place = position % head.positions_per_token
        piece = head.draw(
            states[:, -1], uniforms[:, position], lambda logits, numbers: choose(logits, numbers, config), place=place
        )
        pieces = torch.cat([pieces, piece[:, None]], dim=1)
    return head.bits(pieces)
