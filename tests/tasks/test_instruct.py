"""Instruction tuning: the loss is transformers' own on the supervised tokens, alone and on two ranks, sharded too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration, Qwen3Config, Qwen3ForCausalLM

from qlip.core import distributed
from qlip.engine.interfaces import Batch, OptimizerConfig
from qlip.engine.parallel import block_stacks
from qlip.engine.trainer import Trainer, TrainerConfig
from qlip.models.language_model import TinyLanguageModel, tiny_language_model
from qlip.models.llava import build_llava, build_processor
from qlip.models.lora import LoraSettings, add_lora, merge_lora
from qlip.tasks.instruct import IGNORED, InstructConfig, InstructTask
from ranks import on_ranks
from tiny_assistants import TEXTS, tiny_encoder, tiny_llava

RATES = {"name": "adamw", "lr": 1e-2, "warmup_steps": 1, "eps": 1e-3, "weight_decay": 0.0}
NUM = 4  # chats of a step over all ranks


def chats(*, pictures: bool = True) -> Batch:
    """Four chats of different lengths, padded on the right; the second answers most."""
    generator = torch.Generator().manual_seed(1)
    _, processor = tiny_llava()
    ids = torch.randint(5, 250, (NUM, 12), generator=generator)
    labels = torch.full_like(ids, IGNORED)
    mask = torch.ones_like(ids)
    for row, (first, end) in enumerate([(6, 8), (5, 12), (7, 9), (6, 7)]):
        labels[row, first:end] = ids[row, first:end]
        ids[row, end:], mask[row, end:] = processor.tokenizer.pad_token_id, 0
    batch: Batch = {"attention_mask": mask, "labels": labels, "key": list("abcd"), "sample_index": torch.arange(NUM)}
    if pictures:
        ids[:, :4] = processor.image_token_id
        batch["pixel_values"] = torch.randn(NUM, 3, 16, 16, generator=generator)
    return batch | {"input_ids": ids}


def rows(batch: Batch, chosen: list[int]) -> Batch:
    """Some chats of a batch."""
    return {k: v[chosen] if isinstance(v, torch.Tensor) else [v[row] for row in chosen] for k, v in batch.items()}


def task_of(model: LlavaForConditionalGeneration, **choices: Any) -> InstructTask:
    """With a fast rate."""
    return InstructTask(model, InstructConfig(optimizer=OptimizerConfig(**RATES), **choices))


@pytest.mark.parametrize("pictures", [True, False], ids=["pictures", "texts"])
def test_the_loss_is_that_of_transformers(pictures):
    model, _ = tiny_llava()
    batch = chats(pictures=pictures)
    task = task_of(model)
    terms = task.loss(task.phases(0)[0], batch, 0)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels", "pixel_values") if name in batch}
    theirs = model(**inputs)
    torch.testing.assert_close(terms["token_loss"], theirs.loss)
    learned = batch["labels"][:, 1:] != IGNORED
    right = theirs.logits[:, :-1].argmax(-1) == batch["labels"][:, 1:]
    torch.testing.assert_close(terms["token_accuracy"], right[learned].float().mean())


@pytest.mark.parametrize("trains", ["projector", "projector_and_language_model"])
def test_what_trains(trains, tmp_path):
    model, _ = tiny_llava()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = Trainer(task_of(model, trains=trains), None, TrainerConfig(device="cpu"), tmp_path)  # type: ignore[arg-type]
    trainer.train_step([chats()])
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    projector = {name for name in before if "multi_modal_projector" in name}
    assert projector <= moved
    assert not any("vision_tower" in name for name in moved)
    assert (moved == projector) == (trains == "projector")


def test_a_batch_is_learned_by_heart(tmp_path):
    model, _ = tiny_llava()
    trainer = Trainer(task_of(model), None, TrainerConfig(device="cpu", steps=60), tmp_path)  # type: ignore[arg-type]
    for _ in range(60):
        terms = trainer.train_step([chats()])
    assert terms["token_accuracy"] == 1
    assert terms["token_loss"] < 0.1


def train_ranks(kinds: list[str], folder: str) -> list[dict[str, torch.Tensor]]:
    """A rank has every other chat; the weights after two steps of each kind of parallelism."""
    found = []
    own = list(range(distributed.rank(), NUM, distributed.world_size()))
    for kind in kinds:
        model, _ = tiny_llava()
        config = TrainerConfig(device="cpu", parallel=kind, activation_checkpointing=True)  # type: ignore[arg-type]
        trainer = Trainer(task_of(model), None, config, Path(folder))  # type: ignore[arg-type]
        trainer.train_step([rows(chats(), own)])
        trainer.train_step([rows(chats(pictures=False), own)])  # tower and projector rest
        found.append({name: tensor.detach().clone() for name, tensor in trainer.whole_model().state_dict().items()})
    return found


def test_two_ranks_train_as_one(tmp_path):
    (alone,) = train_ranks(["none"], str(tmp_path))
    kinds = ["ddp", "fsdp"]
    for of_rank in on_ranks(train_ranks, kinds, str(tmp_path), num_ranks=2, folder=tmp_path / "ranks"):
        for kind, weights in zip(kinds, of_rank, strict=True):
            assert weights.keys() == alone.keys()
            for name, tensor in alone.items():
                torch.testing.assert_close(weights[name], tensor, atol=1e-5, rtol=1e-4, msg=f"{kind} {name}")


def test_blocks_of_any_language_model_are_found():
    """Those that are checkpointed, compiled and sharded one by one."""
    _, tokenizer = tiny_language_model(TEXTS, TinyLanguageModel())
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen3Config(vocab_size=len(tokenizer), num_key_value_heads=1, head_dim=8, **sizes)
    processor = build_processor(tokenizer, image_size=16, patch_size=8)
    model = build_llava(tiny_encoder(), Qwen3ForCausalLM(config), processor)
    assert [len(stack.layers) for stack in block_stacks(model)] == [3, 2]


def test_lora_starts_as_the_model_and_merges_into_it(tmp_path):
    batch = chats()
    model, _ = tiny_llava()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    before = model(**inputs).logits
    names = set(model.state_dict())
    add_lora(model, LoraSettings(rank=2, alpha=4, dropout=0.0))
    torch.testing.assert_close(model(**inputs).logits, before)
    task = task_of(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "multi_modal_projector" in name for name in trained)
    trainer = Trainer(task, None, TrainerConfig(device="cpu"), tmp_path)  # type: ignore[arg-type]
    for _ in range(2):
        trainer.train_step([batch])
    tuned = trainer.whole_model()
    assert isinstance(tuned, LlavaForConditionalGeneration)
    expected = tuned(**inputs).logits
    assert not torch.allclose(expected, before, atol=1e-3)
    merged = merge_lora(tuned)
    assert set(merged.state_dict()) == names
    torch.testing.assert_close(merged(**inputs).logits, expected)
