"""Tokens per second of our sampling against transformers' own `generate` on the same weights, and the three heads.

.venv/bin/python benchmarks/generate.py                # two minutes on one core; writes results/generate_cpu.json
.venv/bin/python benchmarks/generate.py --device cuda  # B and XL, bf16, 16 pictures at once

Weights are random; speed does not depend on them. For the comparison a token is one sub-code of 14 bits, so that a
plain `LlamaForCausalLM` with the same trunk, rotary positions and tables (each row with the part of its bits added) is
the same model: greedy tokens of both are equal, which is asserted in float32. Captions become rows of its table, the only form in which `generate` takes a
prompt together with `guidance_scale`, whose processor runs the model a second time on the empty caption. Its cache is
the default one, or with `static` a static one, with which it compiles its steps on a GPU. All draw with temperature 1
from the 1,000 most probable codes; half of the captions are shorter than their slots.

A rate is tokens of all pictures over the median seconds of whole calls, the caption's pass included. Variants take
turns, call by call, after one call each that is not counted (it compiles); `x generate` is the median over rounds of
the ratio to `generate`. On a CPU one thread works and seconds are those of the processor, which a busy machine does
not stretch. `uncached` runs the whole sequence anew for every token, and is called once.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from qlip.apps.demo import machine
from qlip.core.log import console
from qlip.engine.run_folder import versions
from qlip.models.sampling import Sampler, SamplingConfig, choose, uniform_numbers
from qlip.models.text_to_image import SIZES, TextToImageConfig, TextToImageModel, causal_mask
from qlip.models.visual_tokens import FlatHead

RESULTS = Path(os.environ.get("OUT", Path(__file__).parent / "results"))
TINY = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 688}
ALL_SIZES = {"tiny": TINY, **SIZES}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLOCK = {"cpu": time.process_time, "cuda": time.perf_counter}
CODE_BITS, TOP_K = 14, 1000
HEADS: dict[str, dict[str, Any]] = {
    "flat 2 x 14": {"head": "flat", "division": [14, 14]},
    "depth 2 x 14": {"head": "depth", "division": [14, 14]},
    "depth 4 x 7": {"head": "depth", "division": [7, 7, 7, 7]},
    "bitwise": {"head": "bitwise"},
}
SAME_LOGITS = 1e-3  # largest difference in float32 in units of the logits' standard deviation
BARELY_GUIDED = 1 + 1e-6  # takes the doubled batch, yet changes nothing


def build_model(size: str, *, side: int, device: str, dtype: torch.dtype, **head: Any) -> TextToImageModel:
    """A model of random weights whose logits have a standard deviation of about 2."""
    torch.manual_seed(0)
    config = TextToImageConfig(**ALL_SIZES[size], grid=[side, side], image_size=16 * side, **head)
    model = TextToImageModel(config).eval().requires_grad_(False)
    output = model.head.output if head["head"] == "bitwise" else model.head.tables.output
    nn.init.normal_(output.weight, std=2 * config.hidden_size**-0.5)
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


# --- rates --------------------------------------------------------------------------------------------------------


def seconds_of(run: Callable[[], object], device: str) -> float:
    """Of one call, waited for."""
    started = CLOCK[device]()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return CLOCK[device]() - started


def take_turns(title: str, runs: dict[str, Callable[[], object]], *, rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of every call; `uncached` is called once, without a call before it."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        names = [name for name in runs if name != "uncached" or number == 1]
        for name in names if number % 2 else reversed(names):
            taken = seconds_of(runs[name], device)
            if number:
                seconds[name].append(taken)
        if number:
            said = ", ".join(f"{name} {times[-1]:.3f} s" for name, times in seconds.items())
            console.print(f"{title}  round {number}: {said}")
    return seconds


def compare_sampling(size: str, options: argparse.Namespace, guidance: float, *, uncached: bool) -> dict[str, Any]:
    """Rates of all ways to draw from the same model."""
    torch.compiler.reset()  # every compiled variant counts towards one limit
    model = one_code_model(size, side=options.side, device=options.device, dtype=DTYPES[options.dtype])
    caption, mask = random_captions(model, options.batch)
    theirs = TransformersGenerate(model, caption, mask)
    config, seeds = SamplingConfig(guidance=guidance, top_k=TOP_K), list(range(options.batch))
    ours = Sampler(model, config)
    runs: dict[str, Callable[[], object]] = {
        "cached": lambda: ours.sample(caption, mask, seeds=seeds),
        "generate": lambda: theirs(guidance=guidance),
        "generate static": lambda: theirs(guidance=guidance, static=True),
    }
    if options.device == "cuda":
        plain = Sampler(model, config, compile=False)
        runs["cached, not compiled"] = lambda: plain.sample(caption, mask, seeds=seeds)
    if uncached:
        runs["uncached"] = lambda: sample_uncached(model, caption, mask, seeds=seeds, config=config)
    seconds = take_turns(f"{size} guidance {guidance:g}", runs, rounds=options.rounds, device=options.device)
    count = options.batch * model.config.num_tokens
    row: dict[str, Any] = {"size": size, "guidance": guidance, "batch": options.batch}
    row |= {"tokens_of_a_picture": model.config.num_tokens, "caption_slots": mask.shape[1], "dtype": options.dtype}
    row["tokens_per_s"] = {name: count / median(times) for name, times in seconds.items()}
    row["x_generate"] = {
        name: median(g / t for g, t in zip(seconds["generate"], times, strict=False)) for name, times in seconds.items()
    }
    ratios = [g / t for g, t in zip(seconds["generate"], seconds["cached"], strict=True)]
    row["cached_x_generate_range"] = [min(ratios), max(ratios)]
    return row


def compare_heads(size: str, options: argparse.Namespace, guidance: float) -> dict[str, Any]:
    """Tokens of 28 bits, patches of a picture, per second with each head."""
    runs, parameters = {}, {}
    torch.compiler.reset()
    for name, head in HEADS.items():
        model = build_model(size, side=options.side, device=options.device, dtype=DTYPES[options.dtype], **head)
        caption, mask = random_captions(model, options.batch)
        sampler = Sampler(model, SamplingConfig(guidance=guidance, top_k=TOP_K))
        parameters[name] = sum(parameter.numel() for parameter in model.head.parameters())
        runs[name] = lambda s=sampler, c=caption, m=mask: s.sample(c, m, seeds=list(range(options.batch)))
    seconds = take_turns(f"{size} heads", runs, rounds=options.rounds, device=options.device)
    count = options.batch * options.side**2
    return {
        "size": size,
        "guidance": guidance,
        "batch": options.batch,
        "tokens_per_s": {name: count / median(times) for name, times in seconds.items()},
        "head_parameters": parameters,
    }


# --- facts --------------------------------------------------------------------------------------------------------


def largest_difference(model: TextToImageModel, caption: Tensor, mask: Tensor, config: SamplingConfig) -> float:
    """Between logits of the steps and those of the whole sequence at once, over their standard deviation."""
    sampler, steps = Sampler(model, config, compile=False), []

    def keep(logits: Tensor, uniforms: Tensor) -> Tensor:
        steps.append(logits.float())
        return choose(logits, uniforms, config)

    sampler._choose = keep  # type: ignore[method-assign]
    bits = sampler.sample(caption, mask, seeds=list(range(len(mask))))
    cached = torch.stack(steps, dim=1)  # (2 b, n, V)
    whole = []
    with torch.inference_mode():
        for dropped in (torch.zeros_like(mask[:, 0]), torch.ones_like(mask[:, 0])):
            hidden = model(caption, mask, bits, dropped=dropped).hidden_states
            whole.append(model.head.tables.logits(hidden, 0).float())
    return float((cached - torch.cat(whole)).abs().max() / cached.std())


def check_facts(size: str, options: argparse.Namespace, guidance: float) -> dict[str, Any]:
    """What must hold whatever the speed, in float32; asserts what is exact."""
    torch.compiler.reset()
    model = one_code_model(size, side=options.side, device=options.device, dtype=torch.float32)
    batch = options.batch
    caption, mask = random_captions(model, batch)
    theirs = TransformersGenerate(model, caption, mask)
    seeds = list(range(batch))

    def ours(*, scale: float, first: int = 0, last: int = batch, compiled: bool | None = None, **other: Any) -> Tensor:
        sampler = samplers.setdefault(
            (scale, compiled, last - first, *other.values()),
            Sampler(model, SamplingConfig(guidance=scale, top_k=TOP_K, **other), compile=compiled),
        )
        return sampler.sample(caption[first:last], mask[first:last], seeds=seeds[first:last])

    samplers: dict[tuple[Any, ...], Sampler] = {}
    facts: dict[str, Any] = {"size": size, "pictures": batch, "tokens_of_a_picture": model.config.num_tokens}
    for scale in (1.0, guidance):
        codes = model.head.pieces(ours(scale=scale, temperature=0.0))[..., 0]
        equal = bool((codes == theirs(guidance=scale, greedy=True)).all())
        facts[f"greedy_tokens_are_those_of_generate_at_guidance_{scale:g}"] = equal
    config = SamplingConfig(guidance=guidance, top_k=TOP_K)
    facts["cached_logits_differ_by_at_most"] = largest_difference(model, caption, mask, config)
    whole = ours(scale=guidance)
    others = {
        "drawn_uncached": sample_uncached(model, caption, mask, seeds=seeds, config=config),
        "not_compiled": ours(scale=guidance, compiled=False),
        "drawn_alone": torch.cat([ours(scale=guidance, first=i, last=i + 1) for i in range(batch)]),
    }
    facts["pictures_that_differ"] = {name: differing(whole, bits) for name, bits in others.items()}
    facts["pictures_that_differ"]["guidance_1_by_doubled_batch"] = differing(ours(scale=1.0), ours(scale=BARELY_GUIDED))
    return facts


def differing(bits: Tensor, others: Tensor) -> int:
    """How many pictures of (b, n, L) are not the same in both."""
    return int((bits != others).flatten(1).any(1).sum())


def print_rows(rows: list[dict[str, Any]], heads: list[dict[str, Any]]) -> None:
    """A line for each way to draw, and for each head."""
    table = Table(title=f"batch {rows[0]['batch']}, {rows[0]['dtype']}", title_justify="left")
    for name in ("size", "guidance", "drawn", "tokens/s", "x generate"):
        table.add_column(name, justify="left" if name in ("size", "drawn") else "right", no_wrap=True)
    for row in rows + heads:
        for name, rate in row["tokens_per_s"].items():
            ratio = f"{row['x_generate'][name]:.2f}" if "x_generate" in row else ""
            table.add_row(row["size"], f"{row['guidance']:g}", name, f"{rate:.1f}", ratio)
    console.print(table)


def arguments() -> argparse.Namespace:
    """What was asked for, with the defaults of the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=ALL_SIZES, help="default: tiny b on a CPU, b xl on a GPU")
    parser.add_argument("--batch", type=int, help="pictures at once; default: 4 on a CPU, 16 on a GPU")
    parser.add_argument("--side", type=int, help="rows and columns of tokens; default: 8 on a CPU, 16 on a GPU")
    parser.add_argument("--guidance", type=float, default=7.5, help="measured beside 1, which is none")
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    options.size = options.size or (["b", "xl"] if on_gpu else ["tiny", "b"])
    options.batch = options.batch or (16 if on_gpu else 4)
    options.side = options.side or (16 if on_gpu else 8)
    options.dtype = options.dtype or ("bf16" if on_gpu else "fp32")
    return options


def main() -> None:
    """Check, measure, print, write."""
    options = arguments()
    if options.device == "cpu":
        torch.set_num_threads(1)
    smallest, scales = options.size[0], (1.0, options.guidance)
    facts = check_facts(smallest, options, options.guidance)
    console.print_json(data=facts)
    rows = [
        compare_sampling(size, options, scale, uncached=size == smallest and scale != 1)
        for size in options.size
        for scale in scales
    ]
    heads = [compare_heads(smallest, options, options.guidance)]
    print_rows(rows, heads)
    name = re.sub(r"\W+", "_", torch.cuda.get_device_name().removeprefix("NVIDIA ").lower()) if options.device == "cuda" else "cpu"
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["benchmarks/generate.py", *sys.argv[1:]]),
        "machine": machine() | ({"gpu": torch.cuda.get_device_name()} if options.device == "cuda" else {}),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "facts": facts,
        "sampling": rows,
        "heads": heads,
    }
    options.out.mkdir(exist_ok=True, parents=True)
    rounded = json.loads(json.dumps(result), parse_float=lambda digits: float(f"{float(digits):.4g}"))
    (options.out / f"generate_{name}.json").write_text(json.dumps(rounded, indent=1) + "\n")


if __name__ == "__main__":
    main()
