"""Two ranks, replicated or sharded, train to the weights of one process with the joined batch; so do checkpoints.

Both stages, with AdamW and LAMB, EMA, micro-batches, activation checkpointing, discriminator with R1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlip.core import distributed
from qlip.engine.checkpoint import checkpoint_folders
from qlip.engine.interfaces import Batch, OptimizerConfig
from qlip.engine.trainer import Trainer, TrainerConfig
from qlip.models.qlip.modeling import QLIPModel
from qlip.recipes.model import ModelConfig, TowerSize
from qlip.tasks.align import AlignConfig, AlignTask
from qlip.tasks.reconstruct import ReconstructConfig, ReconstructTask
from ranks import on_ranks

SAMPLES = 16  # of a step over all ranks
STEPS = 3
RATES = {"lr": 1e-2, "warmup_steps": 1, "eps": 1e-3}  # a large eps: updates then are as smooth as gradients
TOWER = TowerSize(hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24)


class JoinedBatches:
    """Rank r has samples r, r + ranks, ... of every step's joined batch, in micro-batches; a position is a number."""

    def __init__(self, *, micro_batches: int) -> None:
        self.micro_batches = micro_batches
        self.step = 0

    def next_step(self) -> list[Batch]:
        generator = torch.Generator().manual_seed(self.step)
        self.step += 1
        pixels = torch.randn(SAMPLES, 3, 16, 16, generator=generator)
        ids = torch.randint(1, 1000, (SAMPLES, 8), generator=generator)
        ids[:, -1] = 49407
        own = torch.arange(distributed.rank(), SAMPLES, distributed.world_size())
        return [
            {
                "pixel_values": pixels[rows],
                "input_ids": ids[rows],
                "attention_mask": torch.ones_like(ids[rows]),
                "key": [str(int(row)) for row in rows],
            }
            for rows in own.split(len(own) // self.micro_batches)
        ]

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def resume(self, states: list[dict[str, Any]]) -> None:
        self.step = states[0]["step"]


def trainer(case: dict[str, Any], folder: Path) -> Trainer:
    torch.manual_seed(0)
    sizes = {"encoder": TOWER, "decoder": TOWER, "text": TOWER, "context_length": 16, "projection_dim": 16}
    model = QLIPModel(ModelConfig(image_size=16, patch_size=8, initializer_range=0.1, **sizes).build_config())
    optimizer = OptimizerConfig(name=case.get("optimizer", "adamw"), **RATES)
    if case["task"] == "align":
        task: Any = AlignTask(model, AlignConfig(optimizer=optimizer, **case.get("options", {})))
    else:
        config = ReconstructConfig(
            optimizer=optimizer,
            discriminator_optimizer=optimizer,
            discriminator_channel_base=64,
            discriminator_max_channels=8,
            r1_every=2,
            **case.get("options", {}),
        )
        task = ReconstructTask(model, config)
    config = TrainerConfig(
        steps=10,
        device="cpu",
        precision="fp32",
        parallel=case["parallel"],
        ema_decay=0.5,
        activation_checkpointing=case.get("activation_checkpointing", False),
        async_save=case.get("async_save", False),
    )
    return Trainer(task, JoinedBatches(micro_batches=case.get("micro_batches", 1)), config, folder)


def tensors_of(trained: Trainer) -> dict[str, Tensor]:
    """Weights of every module, the whole averaged model, in full."""
    found = {name: distributed.whole(tensor).detach().clone() for name, tensor in trained.modules.state_dict().items()}
    return found | {f"whole.{name}": tensor.clone() for name, tensor in trained.whole_model().state_dict().items()}


def run_steps(case: dict[str, Any], folder: str, save: bool = False) -> dict[str, Tensor]:
    """Train `STEPS` steps, from a checkpoint if there is one."""
    trained = trainer(case, Path(folder))
    trained.resume()
    losses = []
    for _ in range(STEPS):
        figures = trained.train_step(trained.loader.next_step())
        losses += [
            value
            for name, value in sorted(figures.items())
            if name.endswith(("loss", "grad_norm")) and not name.endswith("_loss")
        ]
    if save:
        trained.save()
        trained.writer.finish()
    means = [distributed.mean_over_ranks(value.float().mean()) for value in losses]
    return tensors_of(trained) | {"losses": torch.stack(means)}


ALIGN = {"task": "align", "options": {"pixel_weight": 20.0}}
STAGE_2 = {"task": "reconstruct"}
CASES = {
    "stage 1, ddp": ALIGN | {"parallel": "ddp"},
    "stage 1, fsdp": ALIGN | {"parallel": "fsdp"},
    "stage 1, fsdp, lamb": ALIGN | {"parallel": "fsdp", "optimizer": "lamb"},
    "stage 1, ddp, micro-batches": ALIGN | {"parallel": "ddp", "micro_batches": 2},
    "stage 1, fsdp, micro-batches, checkpointing": ALIGN
    | {"parallel": "fsdp", "micro_batches": 4, "activation_checkpointing": True},
    "stage 1, ddp, siglip": {
        "task": "align",
        "parallel": "ddp",
        "options": {"contrastive": "siglip", "contrastive_chunk": 3, "balance": "running"},
    },
    "stage 2, ddp": STAGE_2 | {"parallel": "ddp"},
    "stage 2, fsdp": STAGE_2 | {"parallel": "fsdp"},
    "stage 2, fsdp, hinge": STAGE_2
    | {
        "parallel": "fsdp",
        "options": {"gan_loss": "hinge", "lecam_weight": 0.1, "adaptive_gan_weight": True},
        "activation_checkpointing": True,
    },
}


SAVED = CASES["stage 2, fsdp"] | {"async_save": True}


def all_cases(folder: str) -> dict[str, dict[str, Tensor]]:
    """Every case; and one that is saved in the background while sharded, and resumed replicated."""
    found = {name: run_steps(case, folder + "/none") for name, case in CASES.items()}
    run_steps(SAVED, folder + "/saved", save=True)
    distributed.wait_for_all()
    return found | {"resumed": run_steps(SAVED | {"parallel": "ddp"}, folder + "/saved")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two_ranks(folder) -> dict[str, dict[str, Tensor]]:
    """All of it in one pair of processes; both have the same in the end."""
    first, second = on_ranks(all_cases, str(folder), num_ranks=2, folder=folder)
    for name, tensors in first.items():
        assert all(torch.equal(tensor, second[name][key]) for key, tensor in tensors.items())
    return first


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=5e-4, atol=5e-5, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_end_with_the_weights_of_one_process_with_the_joined_batch(tmp_path, two_ranks, name):
    alone = run_steps(CASES[name] | {"parallel": "auto", "micro_batches": 1}, str(tmp_path))
    assert_close(two_ranks[name], alone)
    start = trainer(CASES[name] | {"parallel": "auto"}, tmp_path)
    moved = [not torch.equal(alone[key], tensor) for key, tensor in start.modules.state_dict().items()]
    assert sum(moved) > 20  # something was trained


def test_a_checkpoint_moves_between_numbers_of_ranks_and_kinds(tmp_path, two_ranks, folder):
    """Saved by two sharded ranks, resumed by two replicated ones and by one process: as by one process throughout."""
    one = SAVED | {"parallel": "auto"}
    assert [path.name for path in checkpoint_folders(folder / "saved")] == ["step_00000003"]
    run_steps(one, str(tmp_path), save=True)
    straight = run_steps(one, str(tmp_path))
    assert_close(two_ranks["resumed"], straight)
    assert_close(run_steps(one, str(folder / "saved")), straight)
