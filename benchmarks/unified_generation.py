"""What UM3's modalities cost and save: tokens per second of generation, a loss over two vocabularies, in one run.

.venv/bin/python benchmarks/unified_generation.py  # half a minute; writes results/unified_generation_cpu.json
.venv/bin/python benchmarks/unified_generation.py --device cuda  # Llama-3.2-1B's shape, 2 x 14 bits a patch, bf16

generation  pictures drawn behind short prompts with transformers' `generate`. `plain` is a Qwen3 with the same weights,
            which draws from all ids; `modality` keeps to the sub-code of each place; `seeded` draws by numbers of each
            row with top-p 0.95, as `qlip generate` does; `guided` runs a second pass on the empty prompt. `x plain` is
            the median over rounds of the ratio of rates at the same batch size.
loss        forward and backward pass of packed rows, three quarters of whose targets are text: one softmax for each
            modality (Eq 6, a product with the rows of that modality alone), one over all ids, and transformers' own,
            for which all logits are there at once. `held` are the bytes that autograd keeps for the backward pass
            besides the weights; on a GPU `peak` is the allocator's. Ratios are transformers' loss to ours.

Weights are random; speed does not depend on them. Variants take turns, after one call each that is not counted. On a
CPU one thread works and seconds are those of the processor, which a busy machine does not stretch.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from instruct import measured
from qlip.apps.demo import machine
from qlip.core.log import console
from qlip.core.precision import cast_parameters
from qlip.engine.run_folder import versions
from qlip.models.modality import SeededChoice
from qlip.models.sampling import SamplingConfig
from qlip.models.unified import IGNORED, UM3Config, UM3ForCausalLM

RESULTS = Path(os.environ.get("OUT", Path(__file__).parent / "results"))
CLOCK = {"cpu": time.process_time, "cuda": time.perf_counter}
SIZES: dict[str, dict[str, Any]] = {
    "cpu": {
        "model": {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4,
                  "num_key_value_heads": 2, "head_dim": 32, "text_vocab_size": 8000, "grid": [4, 4]},
        "division": [12, 12],
        "batches": (1, 8),
        "rows": (2, 512),
    },
    "cuda": {
        "model": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
                  "num_key_value_heads": 8, "head_dim": 64, "text_vocab_size": 128_256, "grid": [16, 16]},
        "division": [14, 14],
        "batches": (1, 16, 64),
        "rows": (2, 4096),
    },
}  # fmt: skip
PROMPT = 16
TEXT_SHARE = 0.75


def build(device: str) -> UM3ForCausalLM:
    """Random weights, in float32."""
    torch.manual_seed(0)
    size = SIZES[device]
    division, text_size = size["division"], size["model"]["text_vocab_size"]
    config = UM3Config(
        **size["model"],
        vocab_size=text_size + sum(1 << bits for bits in division),
        visual_division=division,
        num_bits=sum(division),
        image_begin_id=text_size - 2,
        image_end_id=text_size - 1,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=None,  # of the plain model: rows go on to the end
        pad_token_id=None,
    )
    return UM3ForCausalLM(config).to(device)


def plain_twin(model: UM3ForCausalLM) -> Qwen3ForCausalLM:
    """transformers' own class around the same tensors."""
    fields = {name: value for name, value in model.config.to_dict().items() if name in Qwen3Config().to_dict()}
    with torch.device("meta"):
        twin = Qwen3ForCausalLM(Qwen3Config(**(fields | {"model_type": "qwen3"})))
    twin.model, twin.lm_head = model.model, model.lm_head
    return twin.eval()


# --- generation -----------------------------------------------------------------------------------------------------


def draw(kind: str, model: UM3ForCausalLM, twin: Qwen3ForCausalLM, prompts: Tensor) -> Tensor:
    """Prompts (b, s) -> what is written behind them (b, m)."""
    count, rows = model.vocabulary.image_length, len(prompts)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": count, "pad_token_id": 0}
    if kind == "plain":
        return twin.generate(prompts, do_sample=True, top_k=0, **options)[:, -count:]
    if kind == "modality":
        return model.generate(prompts, do_sample=True, top_k=0, **options)[:, -count:]
    config = SamplingConfig(guidance=1.0, temperature=1.0, top_k=0, top_p=0.95)
    choice = SeededChoice(list(range(rows)), start=prompts.shape[1], count=count, config=config)
    if kind == "guided":
        options |= {"guidance_scale": 3.0, "negative_prompt_ids": prompts[:, [0, -1]]}
    return model.generate(prompts, do_sample=False, logits_processor=[choice], **options)[:, -count:]


@torch.inference_mode()
def compare_generation(device: str, rounds: int) -> list[dict[str, Any]]:
    """A row for each batch size and kind. Raises if a picture is not one."""
    model = build(device).eval()
    if device == "cuda":
        cast_parameters(model, torch.bfloat16)
    twin, kinds, found = plain_twin(model), ("plain", "modality", "seeded", "guided"), []
    bounds = torch.tensor(model.vocabulary.place_bounds(), device=device).repeat(model.vocabulary.num_tokens, 1)
    for batch in SIZES[device]["batches"]:
        prompts = torch.randint(1, model.vocabulary.text_size - 2, (batch, PROMPT), device=device)
        prompts[:, -1] = model.vocabulary.image_begin
        rates: dict[str, list[float]] = {kind: [] for kind in kinds}
        for turn in range(rounds + 1):
            for kind in kinds:
                started = CLOCK[device]()
                written = draw(kind, model, twin, prompts)
                if device == "cuda":
                    torch.cuda.synchronize()
                seconds = CLOCK[device]() - started
                if kind != "plain" and ((written < bounds[:, 0]) | (written >= bounds[:, 1])).any():
                    raise SystemExit(f"{kind}: what was drawn is no picture")
                if turn:
                    rates[kind].append(written.numel() / seconds)
        for kind in kinds:
            ratio = median(ours / plain for ours, plain in zip(rates[kind], rates["plain"], strict=True))
            found.append({"batch": batch, "kind": kind, "tokens_per_second": median(rates[kind]), "x_plain": ratio})
    return found


# --- the loss -------------------------------------------------------------------------------------------------------


def packed_rows(model: UM3ForCausalLM, device: str) -> dict[str, Tensor]:
    """Text, then pictures: ids, labels and positions (b, s) of documents of one picture's length."""
    rows, length = SIZES[device]["rows"]
    ids = torch.randint(1, model.vocabulary.text_size - 2, (rows, length), device=device)
    start = int(length * TEXT_SHARE)
    visual = torch.randint(model.vocabulary.text_size, model.vocabulary.size, (rows, length - start), device=device)
    ids[:, start:] = visual
    positions = torch.arange(length, device=device).remainder(model.vocabulary.image_length + 2).expand(rows, -1)
    return {"input_ids": ids, "labels": ids.masked_fill(positions == 0, IGNORED), "position_ids": positions}


def whole_logits_loss(model: UM3ForCausalLM, batch: dict[str, Tensor]) -> Tensor:
    """As transformers has it: float32 logits of all positions."""
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    logits = model.lm_head(model.model(**inputs, use_cache=False).last_hidden_state).float()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED)


def own_loss(model: UM3ForCausalLM, batch: dict[str, Tensor], *, softmax: str) -> Tensor:
    """The model's."""
    model.config.softmax = softmax
    return model(**batch).loss


def compare_losses(device: str, rounds: int) -> list[dict[str, Any]]:
    """A row for each softmax. Raises if the joint one is not transformers' loss."""
    model = build(device).train()
    batch = packed_rows(model, device)
    variants = {
        "transformers": partial(whole_logits_loss, model, batch),
        "joint": partial(own_loss, model, batch, softmax="joint"),
        "separate": partial(own_loss, model, batch, softmax="separate"),
    }
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, loss_of in variants.items():
            found = measured(loss_of, device, uncounted=model.parameters())
            model.zero_grad(set_to_none=True)
            if turn:
                turns[name].append(found)
    losses = {name: found[0]["loss"] for name, found in turns.items()}
    if abs(losses["joint"] - losses["transformers"]) > 2e-3 * losses["joint"]:
        raise SystemExit(f"losses {losses} differ")
    rows = []
    for name, found in turns.items():
        row: dict[str, Any] = {"softmax": name, "tokens": batch["input_ids"].numel()}
        for figure in found[0].keys() - {"loss"}:
            row[figure] = median(one[figure] for one in found)
            pairs = zip(turns["transformers"], found, strict=True)
            row[f"ratio_{figure}"] = median(theirs[figure] / ours[figure] for theirs, ours in pairs)
        rows.append(row)
    return rows


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    record: dict[str, Any] = {"machine": machine(), "versions": versions(), "device": options.device}
    if options.device == "cuda":
        record["card"] = torch.cuda.get_device_name()
    record["generation"] = compare_generation(options.device, options.rounds)
    record["loss"] = compare_losses(options.device, options.rounds)
    table = Table("batch", "drawing", "tokens/s", "x plain")
    for row in record["generation"]:
        table.add_row(str(row["batch"]), row["kind"], f"{row['tokens_per_second']:.0f}", f"{row['x_plain']:.2f}")
    console.print(table)
    table = Table("softmax", *(f"x {name}" for name in ("seconds", "held_mb", "peak_mb")))
    for row in record["loss"]:
        ratios = (row.get(f"ratio_{figure}") for figure in ("seconds", "held_mb", "peak_mb"))
        table.add_row(row["softmax"], *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios))
    console.print(table)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"unified_generation_{options.device}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
