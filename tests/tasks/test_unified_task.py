"""UM3's training step by hand: terms per modality and task, of pictures and their ids, over ranks; a batch by heart."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_qlip import scene_batch, tiny_model, trainer_of
from torch import Tensor

from qlip.core import distributed
from qlip.core.pixels import to_uint8
from qlip.data.packing import IGNORED, TASKS, UNFILLED
from qlip.engine.interfaces import Batch, OptimizerConfig
from qlip.engine.trainer import Trainer, TrainerConfig
from qlip.models.image_tokenizer import QLIPTokenizer
from qlip.models.measured import MeasuredQLIP
from qlip.models.qlip.processing import QLIPProcessor
from qlip.models.visual_tokens import bits_to_vocabulary
from qlip.tasks.unified import UnifiedConfig, UnifiedTask
from ranks import on_ranks
from tiny_unified import tiny_um3

BOS, EOS, BEGIN, END, TEXT_SIZE = 1, 2, 38, 39, 40
IMAGE = [id for place in range(6) for id in (40 + (7 * place) % 16, 56 + (5 * place + 3) % 16)]
CAPTIONED = [BOS, BEGIN, *IMAGE, END, 5, 6, 7, EOS]
DRAWN = [BOS, 9, 8, BEGIN, *IMAGE, END, EOS]
LENGTH = 40


def packed(*documents: tuple[str, list[int]]) -> Batch:
    """One row of documents of named tasks and padding, as `data.packing` lays it out."""
    ids, labels, positions, tasks = [], [], [], []
    for task, document in documents:
        ids += document
        labels += [IGNORED, *document[1:]]
        positions += range(len(document))
        tasks += [TASKS.index(task)] * len(document)
    rest = LENGTH - len(ids)
    counts = [sum(len(document) / LENGTH if name == "text" else 1 for task, document in documents if task == name)
              for name in TASKS]  # fmt: skip
    return {
        "input_ids": torch.tensor([ids + [EOS] * rest]),
        "labels": torch.tensor([labels + [IGNORED] * rest]),
        "position_ids": torch.tensor([[*positions, *range(rest)]]),
        "task_ids": torch.tensor([tasks + [-1] * rest]),
        "sample_counts": torch.tensor(counts, dtype=torch.float32),
    }


def joined(*batches: Batch) -> Batch:
    """Rows of several as one batch."""
    rows = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0] if name != "sample_counts"}
    return rows | {"sample_counts": torch.stack([batch["sample_counts"] for batch in batches]).sum(0)}


def text(length: int, *, seed: int) -> tuple[str, list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return "text", [BOS, *torch.randint(3, 37, (length - 2,), generator=generator).tolist(), EOS]


FIRST = packed(("image_to_text", CAPTIONED), text(12, seed=1))
SECOND = packed(text(9, seed=2), ("text_to_image", DRAWN), text(6, seed=3))
TEXT_ONLY = packed(text(30, seed=4))


def task_of(*, z_loss: float = 0.0, **changes: object) -> UnifiedTask:
    settings = UnifiedConfig(optimizer=OptimizerConfig(lr=0.02, warmup_steps=1, eps=1e-3), z_loss=z_loss)
    return UnifiedTask(tiny_um3(**changes), settings)


def terms_of(task: UnifiedTask, batch: Batch) -> dict[str, float]:
    return {name: value.item() for name, value in task.loss(task.phases(0)[0], batch, 0).items()}


def by_hand(task: UnifiedTask, batch: Batch) -> list[tuple[str, str, float, float]]:
    """(task, modality, -ln p, ln of the normaliser) of every target, documents one by one."""
    found = []
    for ids, positions, kinds in zip(batch["input_ids"], batch["position_ids"], batch["task_ids"], strict=True):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        for start, end in pairwise(starts):
            if kinds[start] < 0:
                continue
            document = ids[start:end]
            states = task.model.model(input_ids=document[None], use_cache=False).last_hidden_state[0]
            logits = (states @ task.model.lm_head.weight.T).detach().double()
            for row, target in zip(logits, document[1:].tolist(), strict=False):
                within = row[:TEXT_SIZE] if target < TEXT_SIZE else row[TEXT_SIZE:]
                log_sum = within.exp().sum().log().item()
                modality = "text" if target < TEXT_SIZE else "visual"
                found.append((TASKS[kinds[start]], modality, log_sum - row[target].item(), log_sum))
    return found


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def test_terms_are_means_over_their_targets():
    task, batch = task_of(z_loss=0.25), joined(FIRST, SECOND)
    terms, targets = terms_of(task, batch), by_hand(task, batch)
    wanted = {
        "token_loss": mean([nll for _, _, nll, _ in targets]),
        "z_loss": 0.25 * mean([log_sum**2 for _, _, _, log_sum in targets]),
        "text_share": (27 / LENGTH) / (27 / LENGTH + 2),
    }
    for modality in ("text", "visual"):
        wanted[f"{modality}_nll"] = mean([nll for _, found, nll, _ in targets if found == modality])
    for name in TASKS:
        wanted[f"{name}_task_nll"] = mean([nll for found, _, nll, _ in targets if found == name])
    assert terms == pytest.approx(wanted, abs=2e-5)
    assert len(targets) == sum(len(document) - 1 for document in (CAPTIONED, DRAWN)) + 11 + 8 + 5


def test_terms_of_what_a_batch_has_not_are_absent():
    assert set(terms_of(task_of(), TEXT_ONLY)) == {"token_loss", "text_nll", "text_task_nll", "text_share"}
    assert terms_of(task_of(), TEXT_ONLY)["text_share"] == 1


def test_what_stands_in_padding_changes_nothing():
    """Neither loss nor gradients: it is a document of its own, of which nothing is learned."""
    task, found = task_of(), []
    other = FIRST | {"input_ids": FIRST["input_ids"].clone()}
    other["input_ids"][:, len(CAPTIONED) + 12 :] = 30
    for batch in (FIRST, other):
        task.model.zero_grad()
        loss = task.loss(task.phases(0)[0], batch, 0)["token_loss"]
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in task.model.parameters())])
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))


def test_joint_softmax_has_another_loss_and_the_same_parts():
    separate, joint = (terms_of(task_of(softmax=softmax), FIRST) for softmax in ("separate", "joint"))
    assert separate.keys() == joint.keys() and joint["token_loss"] > separate["token_loss"]
    assert joint["text_nll"] > separate["text_nll"] and joint["visual_nll"] > separate["visual_nll"]


def test_it_learns_a_batch_by_heart(tmp_path: Path):
    """From about a guess among 40 text or 32 visual ids to a tenth."""
    task, batch = task_of(initializer_range=0.05), joined(FIRST, SECOND)
    trainer = trainer_of(task, tmp_path, steps=60)
    losses = [float(trainer.train_step([batch])["token_loss"]) for _ in range(60)]
    assert losses[0] == pytest.approx(math.log(36), rel=0.1) and losses[-1] < losses[0] / 10


def test_one_phase_trains_the_model_with_table_9s_rates():
    task = task_of()
    (phase,) = task.phases(7)
    assert set(task.modules()) == {"model"} and phase.modules == ("model",)
    defaults = UnifiedConfig().optimizer
    assert (defaults.lr, defaults.betas, defaults.weight_decay) == (1e-4, (0.9, 0.95), 0.1)
    assert (defaults.clip_norm, defaults.warmup_steps, defaults.final_lr_share) == (1.0, 2000, 0.1)


# --- pictures that are encoded in the task --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> QLIPTokenizer:
    """2 x 2 tokens of 28 bits."""
    return QLIPTokenizer(MeasuredQLIP(tiny_model().eval(), QLIPProcessor.for_size(16, context_length=8)))


def picture_task(tokenizer: QLIPTokenizer | None) -> UnifiedTask:
    fields = {"visual_division": [7] * 4, "num_bits": 28, "grid": [2, 2], "vocab_size": 40 + 512}
    return UnifiedTask(tiny_um3(**fields), UnifiedConfig(), tokenizer=tokenizer)


def test_pictures_give_the_loss_of_their_ids(tokenizer):
    """They stand in the batch in the order of their places, row by row."""
    pixel_values = scene_batch(3)["pixel_values"]
    ids = bits_to_vocabulary(tokenizer.encode(to_uint8(pixel_values)), [7] * 4, offset=TEXT_SIZE).tolist()

    def batch_of(images: list[list[int]]) -> Batch:
        first = packed(("image_to_text", [BOS, BEGIN, *images[0], END, 5, EOS]), text(7, seed=1))
        second = packed(("text_to_image", [BOS, 6, BEGIN, *images[1], END, EOS]),
                        ("image_to_text", [BOS, BEGIN, *images[2][:14], *images[2][14:], END]))  # fmt: skip
        return joined(first, second)

    task = picture_task(tokenizer)
    open_places = batch_of([[UNFILLED] * 16] * 3) | {"pixel_values": pixel_values}
    assert terms_of(task, open_places) == terms_of(task, batch_of(ids))
    swapped = open_places | {"pixel_values": pixel_values.roll(1, 0)}
    assert terms_of(task, swapped)["visual_nll"] != terms_of(task, open_places)["visual_nll"]
    task.loss(task.phases(0)[0], open_places, 0)["token_loss"].backward()
    assert not any(parameter.grad is not None for parameter in tokenizer.measured.model.parameters())


def test_bits_of_pictures_do_not_change_under_autocast(tokenizer):
    batch = packed(("image_to_text", [BOS, BEGIN, *[UNFILLED] * 16, END, EOS]))
    batch["pixel_values"] = scene_batch(1)["pixel_values"]
    task = picture_task(tokenizer)
    plain = task._filled(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(plain, task._filled(batch), strict=True))


def test_pictures_without_a_tokenizer_are_a_programmers_mistake():
    with pytest.raises(AssertionError, match="pictures need a tokenizer"):
        terms_of(picture_task(None), FIRST | {"pixel_values": torch.zeros(1, 3, 16, 16)})


# --- several ranks --------------------------------------------------------------------------------------------------


class OneBatch:
    """Rank r has row r of two; one process has both."""

    def next_step(self) -> list[Batch]:
        rows = [FIRST, TEXT_ONLY]
        return [joined(*rows) if distributed.world_size() == 1 else rows[distributed.rank()]]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def resume(self, states: list[dict[str, Any]]) -> None:
        """Always the same."""


def two_steps(folder: str, parallel: str) -> dict[str, Tensor]:
    """Weights and figures; one rank has no visual target at all."""
    task = task_of(z_loss=1e-2, initializer_range=0.1)
    config = TrainerConfig(steps=10, device="cpu", precision="fp32", parallel=parallel, activation_checkpointing=True)
    trainer = Trainer(task, OneBatch(), config, Path(folder))
    for _ in range(2):
        figures = trainer.train_step(trainer.loader.next_step())
    found = {name: distributed.whole(tensor).detach().clone() for name, tensor in trainer.modules.state_dict().items()}
    return found | {
        name: distributed.mean_over_ranks(value.float()) for name, value in figures.items() if name != "grad_norm"
    }


def both_kinds(folder: str) -> dict[str, dict[str, Tensor]]:
    return {kind: two_steps(folder, kind) for kind in ("ddp", "fsdp")}


def test_two_ranks_train_to_the_weights_of_one_process(tmp_path):
    """Ranks have different numbers of targets; losses and figures are over all of them."""
    alone = two_steps(str(tmp_path / "one"), "auto")
    ranks = on_ranks(both_kinds, str(tmp_path / "two"), num_ranks=2, folder=tmp_path / "ranks")
    for kind in ("ddp", "fsdp"):
        for found in (rank[kind] for rank in ranks):
            assert found.keys() == alone.keys()
            for name, tensor in alone.items():
                torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    start = task_of(initializer_range=0.1).model.state_dict()
    assert all(not torch.equal(alone[f"model.{name}"], tensor) for name, tensor in start.items())
