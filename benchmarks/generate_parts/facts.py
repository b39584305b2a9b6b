"""What the speed of drawing must not change, in float32.

Greedy tokens of `generate` are the most probable ones for our model too, logits of cached steps are those of the whole
sequence (both asserted); and it is counted how many pictures are not bit for bit the same when drawn without a cache,
without compiling, alone, or with guidance 1 in a doubled batch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from generate_parts.drawing import TOP_K, TransformersGenerate, one_code_model, random_captions, sample_uncached
from qlip.models.sampling import Sampler, SamplingConfig, choose
from qlip.models.text_to_image import TextToImageModel

SAME_LOGITS = 1e-3  # in standard deviations of the logits
BARELY_GUIDED = 1 + 1e-6  # takes the doubled batch, yet changes nothing


@torch.inference_mode()
def whole_logits(model: TextToImageModel, caption: Tensor, mask: Tensor, bits: Tensor) -> Tensor:
    """(2 b, n, V) of the whole sequence at once: with the captions, then with the empty one."""
    none = torch.zeros_like(mask[:, 0])
    states = [model(caption, mask, bits, dropped=dropped).hidden_states for dropped in (none, ~none)]
    return model.head.tables.logits(torch.cat(states), 0)


def check_steps(model: TextToImageModel, caption: Tensor, mask: Tensor, config: SamplingConfig) -> float:
    """Largest difference of cached and whole logits, over their standard deviation."""
    sampler, steps = Sampler(model, config, compile=False), []

    def keep(logits: Tensor, uniforms: Tensor) -> Tensor:
        steps.append(logits)
        return choose(logits, uniforms, config)

    sampler._choose = keep
    bits = sampler.sample(caption, mask, seeds=list(range(len(mask))))
    whole = whole_logits(model, caption, mask, bits)
    difference = float((torch.stack(steps, dim=1) - whole).abs().max() / whole.std())
    assert difference < SAME_LOGITS, difference
    return difference


def check_greedy(model: TextToImageModel, caption: Tensor, mask: Tensor, codes: Tensor, *, guidance: float) -> float:
    """By how much greedy codes (b, n) of `generate` miss our largest logit, over the standard deviation."""
    prompt, empty = whole_logits(model, caption, mask, model.head.bits(codes[..., None])).chunk(2)
    logits = torch.lerp(empty, prompt, guidance)
    missed = logits.amax(-1) - logits.gather(-1, codes[..., None])[..., 0]
    shortfall = float(missed.max() / logits.std())
    assert shortfall < SAME_LOGITS, shortfall
    return shortfall


def check_facts(size: str, *, batch: int, side: int, guidance: float, device: str) -> dict[str, Any]:
    """All of it as numbers, most of which should be 0."""
    model = one_code_model(size, side=side, device=device, dtype=torch.float32)
    caption, mask = random_captions(model, batch)
    theirs = TransformersGenerate(model, caption, mask)
    config = SamplingConfig(guidance=guidance, top_k=TOP_K)
    sampler, whole = Sampler(model, config), list(range(batch))

    def draw(sampler: Sampler, first: int = 0, last: int = batch) -> Tensor:
        return sampler.sample(caption[first:last], mask[first:last], seeds=whole[first:last])

    def differing(bits: Tensor, others: Tensor) -> int:
        return int((bits != others).flatten(1).any(1).sum())

    facts: dict[str, Any] = {"size": size, "dtype": "fp32", "pictures": batch, "tokens_of_a_picture": side**2}
    pictures = facts["pictures_that_differ"] = {}
    for scale in (1.0, guidance):
        codes, name = theirs(guidance=scale, greedy=True), f"at_guidance_{scale:g}"
        facts[f"greedy_shortfall_{name}"] = check_greedy(model, caption, mask, codes, guidance=scale)
        greedy = draw(Sampler(model, replace(config, guidance=scale, temperature=0.0)))
        pictures[f"greedy_by_generate_{name}"] = differing(greedy, model.head.bits(codes[..., None]))
    facts["cached_logits_differ_by"] = check_steps(model, caption, mask, config)
    bits = draw(sampler)
    uncached = sample_uncached(model, caption, mask, seeds=whole, config=config)
    pictures["drawn_uncached"] = differing(bits, uncached)
    pictures["drawn_not_compiled"] = differing(bits, draw(Sampler(model, config, compile=False)))
    pictures["drawn_alone"] = differing(bits, torch.cat([draw(sampler, one, one + 1) for one in whole]))
    single, doubled = (draw(Sampler(model, replace(config, guidance=scale))) for scale in (1.0, BARELY_GUIDED))
    pictures["guidance_1_in_doubled_batch"] = differing(single, doubled)
    return facts
