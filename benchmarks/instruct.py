"""What instruction tuning saves: logits where answers are, chats of similar length together. Ratios in one run.

.venv/bin/python benchmarks/instruct.py                # two minutes on one core; writes results/instruct_cpu.json
.venv/bin/python benchmarks/instruct.py --device cuda  # QLIP-B-16-256, a language model of Qwen2.5-0.5B's shape

step     forward and backward of `tasks/instruct.py` against transformers' own loss on the same weights and chats:
         captions (a picture, a short answer) and texts (no picture, most of 2,048 tokens are answers). Weights are
         random; speed does not depend on them. Variants take turns; a ratio is the median over rounds. `held` are the
         bytes that autograd keeps for the backward pass; on a GPU `peak` is the allocator's.
padding  share of padded positions of 50,000 lengths (log-normal, median 120 words), 8 ranks of 16 chats, sorted by
         length inside megabatches against a plain permutation, and how much longer than the mean a rank's own is.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.table import Table
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from qlip.apps.demo import machine
from qlip.core.log import console
from qlip.data.conversation_order import ConversationOrder
from qlip.engine.interfaces import Batch
from qlip.engine.parallel import autocast, set_activation_checkpointing
from qlip.engine.run_folder import versions
from qlip.models.language_model import TinyLanguageModel, tiny_language_model
from qlip.models.llava import build_llava, build_processor
from qlip.models.qlip.configuration import QLIPVisionConfig
from qlip.models.qlip.towers import QLIPVisionModel
from qlip.tasks.instruct import IGNORED, InstructConfig, InstructTask

RESULTS = Path(os.environ.get("OUT", Path(__file__).parent / "results"))
CLOCK = {"cpu": time.process_time, "cuda": time.perf_counter}
SIZES: dict[str, dict[str, Any]] = {
    "cpu": {
        "tower": {"image_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
        "language_model": {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2, "vocab_size": 32_000},
        "length": 512,
        "chats": {"captions": 8, "texts": 2},
    },
    "cuda": {
        "tower": {},
        "language_model": {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "vocab_size": 151_936,
        },
        "length": 2048,
        "chats": {"captions": 32, "texts": 4},
    },
}


def build(size: dict[str, Any], device: str) -> LlavaForConditionalGeneration:
    """Random weights."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4} if device == "cpu" else {}
    encoder = QLIPVisionModel(QLIPVisionConfig(**(heads | size["tower"])))
    words = {"num_attention_heads": 4, "num_key_value_heads": 4} | size["language_model"]
    language_model = Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, **words))
    _, tokenizer = tiny_language_model(["a"], TinyLanguageModel())
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    vision = encoder.config
    processor = build_processor(tokenizer, image_size=vision.image_size, patch_size=vision.patch_size)
    return build_llava(encoder, language_model, processor).to(device).train()


def chats_of(kind: str, model: LlavaForConditionalGeneration, size: dict[str, Any], device: str) -> Batch:
    """`captions`: a picture, four tokens, an answer of 24. `texts`: three quarters of all tokens are answers."""
    num, vocabulary = size["chats"][kind], model.config.text_config.vocab_size
    tokens = model.config.image_seq_length + 28 if kind == "captions" else size["length"]
    ids = torch.randint(300, vocabulary, (num, tokens), device=device)
    labels = ids.clone()
    pictures = {}
    if kind == "captions":
        ids[:, : model.config.image_seq_length] = model.config.image_token_id
        labels[:, : model.config.image_seq_length + 4] = IGNORED
        side = model.config.vision_config.image_size
        pictures["pixel_values"] = torch.randn(num, 3, side, side, device=device)
    else:
        labels[:, ::4] = IGNORED
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **pictures}


def ours(task: InstructTask, batch: Batch) -> torch.Tensor:
    """The task's loss."""
    return task.loss(task.phases(0)[0], batch, 0)["token_loss"]


def theirs(task: InstructTask, batch: Batch) -> torch.Tensor:
    """transformers' loss."""
    return task.model(**batch, use_cache=False).loss


def measured(
    loss_of: Callable[[], torch.Tensor], device: str, *, uncounted: Iterable[torch.Tensor] = ()
) -> dict[str, float]:
    """Seconds of one forward and backward pass, megabytes kept in between but for `uncounted`, peak megabytes on a
    GPU."""
    held: dict[int, int] = {}
    left_out = {tensor.untyped_storage().data_ptr() for tensor in uncounted}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in left_out:
            held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = CLOCK[device]()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), autocast(torch.device(device), "auto"):
        loss = loss_of()
    loss.backward()
    if device == "cuda":
        torch.cuda.synchronize()
    found = {"seconds": CLOCK[device]() - started, "held_mb": sum(held.values()) / 1e6, "loss": loss.item()}
    return found | ({"peak_mb": torch.cuda.max_memory_allocated() / 1e6} if device == "cuda" else {})


def compare_steps(device: str, rounds: int) -> list[dict[str, Any]]:
    """A row for each kind of chats, with and without recomputed activations. Raises if the two losses differ."""
    size = SIZES[device]
    rows = []
    for recomputed in (False, True):
        model = build(size, device)
        set_activation_checkpointing(model, enabled=recomputed)
        task = InstructTask(model, InstructConfig())
        for kind in size["chats"]:
            batch = chats_of(kind, model, size, device)
            variants = {"ours": partial(ours, task, batch), "transformers": partial(theirs, task, batch)}
            turns: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
            for turn in range(rounds + 1):
                for name, loss_of in variants.items():
                    found = measured(loss_of, device)
                    model.zero_grad(set_to_none=True)
                    if turn:
                        turns[name].append(found)
            losses = [turns[name][0]["loss"] for name in variants]
            if abs(losses[0] - losses[1]) > 2e-3 * losses[1]:
                raise SystemExit(f"{kind}: losses {losses} differ")
            row: dict[str, Any] = {"chats": kind, "batch": len(batch["input_ids"]), "recomputed": recomputed}
            row["tokens"] = batch["input_ids"].shape[1]
            for figure in turns["ours"][0].keys() - {"loss"}:
                for name in variants:
                    row[f"{name}_{figure}"] = median(found[figure] for found in turns[name])
                pairs = zip(turns["transformers"], turns["ours"], strict=True)
                row[f"ratio_{figure}"] = median(their[figure] / our[figure] for their, our in pairs)
            rows.append(row)
    return rows


def padding(*, num: int = 50_000, batch_size: int = 16, num_ranks: int = 8) -> dict[str, float]:
    """Of one epoch, in words."""
    words = np.random.default_rng(0).lognormal(np.log(120), 0.8, num).astype(np.int32) + 1
    found = {}
    for grouped in (False, True):
        order = ConversationOrder(
            num_words=words,
            has_image=np.ones(num, dtype=bool),
            batch_size=batch_size,
            num_ranks=num_ranks,
            group_by_length=grouped,
            need_images=False,
            seed=0,
        )
        lengths = words[order.epoch(0)]  # (m, ranks, b)
        longest = lengths.max(2)
        name = "grouped" if grouped else "permuted"
        found[f"{name}_padded"] = 1 - lengths.sum() / (longest.sum() * batch_size)
        found[f"{name}_waiting"] = float((longest.max(1) / longest.mean(1)).mean() - 1)
    return {name: float(value) for name, value in found.items()}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    record: dict[str, Any] = {"machine": machine(), "versions": versions(), "device": options.device}
    if options.device == "cuda":
        record["card"] = torch.cuda.get_device_name()
    record |= {"steps": compare_steps(options.device, options.rounds), "padding": padding()}
    table = Table("chats", "batch", "recomputed", *(f"x {name}" for name in ("seconds", "held_mb", "peak_mb")))
    for row in record["steps"]:
        ratios = (row.get(f"ratio_{figure}") for figure in ("seconds", "held_mb", "peak_mb"))
        shown = ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        table.add_row(row["chats"], str(row["batch"]), str(row["recomputed"]), *shown)
    console.print(table)
    console.print({name: round(value, 3) for name, value in record["padding"].items()})
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"instruct_{options.device}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
