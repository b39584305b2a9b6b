"""The loop on a linear task: phases, schedule, random state, figures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_training import CountingLoader, LinearTask, no_tracker
from torch import nn

from qlip.core.log import read_metrics
from qlip.engine.interfaces import OptimizerConfig, Phase
from qlip.engine.reporter import mean_figures, summary
from qlip.engine.steps import only_training
from qlip.engine.trainer import Trainer, TrainerConfig, train


def config(**changes) -> TrainerConfig:
    return TrainerConfig(
        **({"steps": 10, "log_every": 1, "save_every": 4, "device": "cpu", "precision": "fp32"} | changes)
    )


class NoisyTask(LinearTask):
    """Draws from PyTorch's random state in every step."""

    def loss(self, phase, batch, step):
        noise = torch.randn(4, 3, 1, 1)
        return super().loss(phase, batch | {"pixel_values": batch["pixel_values"] + noise}, step)


class DrawingEvaluator:
    """Draws from PyTorch's random state, as the start of every data loader does."""

    def run(self, model, device):
        assert not model.training
        return {"draw": float(torch.rand(3).sum())}

    def card(self):
        return {"protocol": "none"}


class DrawingLoader(CountingLoader):
    """Draws from PyTorch's random state when it starts, as torchdata's does."""

    def __iter__(self):
        torch.rand(1)
        return super().__iter__()


def run(task: LinearTask, folder: Path, **changes) -> dict[str, torch.Tensor]:
    """Train; the weights handed to `export`."""
    exported = {}
    folder.mkdir(exist_ok=True)
    torch.manual_seed(5)
    train(
        task,
        DrawingLoader(),
        config(**changes),
        folder=folder,
        title="t",
        batch_size=4,
        evaluators={"draws": DrawingEvaluator()},
        tracker=no_tracker,
        export=lambda model: exported.update({k: v.clone() for k, v in model.state_dict().items()}),
    )
    return exported


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(folder / "metrics.jsonl") if "eval" not in line]


def test_evaluations_and_resumes_leave_the_random_state_alone(tmp_path, monkeypatch):
    straight = run(NoisyTask(), tmp_path / "straight")
    evaluated = run(NoisyTask(), tmp_path / "evaluated", eval_every=2, log_every=3)
    whole = Trainer.train_step

    def train_step(self, batches):
        if self.step == 6:
            raise InterruptedError
        return whole(self, batches)

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(Trainer, "train_step", train_step)
        run(NoisyTask(), tmp_path / "stopped", eval_every=2, log_every=3)
    resumed = run(NoisyTask(), tmp_path / "stopped", eval_every=2, log_every=3)
    assert torch.equal(evaluated["weight"], straight["weight"])
    assert torch.equal(resumed["weight"], straight["weight"])
    lines = read_metrics(tmp_path / "stopped" / "metrics.jsonl")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "evaluated")
    assert [line["step"] for line in lines if "eval" in line] == [2, 4, 6, 8, 10]


def test_steps_are_adamw_by_hand(tmp_path):
    task = LinearTask(optimizer=OptimizerConfig(lr=0.1, warmup_steps=2, clip_norm=0.01))
    twin = LinearTask().model
    trainer = Trainer(task, CountingLoader(), config(), tmp_path)
    optimizer = torch.optim.AdamW(
        [{"params": [twin.weight], "weight_decay": 0.05}, {"params": [twin.bias], "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-6,
    )
    rates = [0.05, 0.1, 0.1, 0.1 * 0.5 * (1 + torch.tensor(torch.pi / 8).cos().item())]
    for batch, rate in zip(CountingLoader(), rates, strict=False):
        figures = trainer.train_step([batch])
        loss = twin(batch["pixel_values"].flatten(1)).square().mean()
        loss.backward()
        torch.testing.assert_close(figures["loss"], loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.01)
        torch.testing.assert_close(figures["grad_norm"], norm)  # before clipping
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    assert trainer.step == 4
    torch.testing.assert_close(task.model.weight, twin.weight)
    torch.testing.assert_close(task.model.bias, twin.bias)


def test_clip_norm_zero_turns_clipping_off(tmp_path):
    weights = []
    for clip_norm in (0.0, 1e9):
        task = LinearTask(optimizer=OptimizerConfig(name="lamb", lr=0.1, clip_norm=clip_norm))
        trainer = Trainer(task, CountingLoader(), config(), tmp_path)
        trainer.train_step([next(iter(CountingLoader()))])
        weights.append(task.model.weight.detach().clone())
    assert torch.equal(*weights)


def test_a_phase_turns_the_other_modules_gradients_off_and_on_again():
    modules = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})
    modules["b"].bias.requires_grad_(False)
    phase = Phase(name="p", modules=("a",), optimizer=OptimizerConfig())
    with pytest.raises(InterruptedError), only_training(phase, modules):
        assert all(p.requires_grad for p in modules["a"].parameters())
        assert not any(p.requires_grad for p in modules["b"].parameters())
        raise InterruptedError
    assert modules["b"].weight.requires_grad and not modules["b"].bias.requires_grad


def test_ema_is_exported_instead_of_the_weights(tmp_path):
    plain = run(LinearTask(), tmp_path / "plain")
    averaged = run(LinearTask(), tmp_path / "averaged", ema_decay=0.5)
    assert averaged.keys() == plain.keys()
    assert not torch.equal(averaged["weight"], plain["weight"])


def test_a_line_holds_the_mean_since_the_line_before(tmp_path):
    run(LinearTask(), tmp_path / "each")
    run(LinearTask(), tmp_path / "third", log_every=3)
    each = dict(losses(tmp_path / "each"))
    third = losses(tmp_path / "third")
    ends = [3, 4, 6, 8, 9, 10]  # every third step, and every checkpoint (4, 8, 10)
    starts = [1, 4, 5, 7, 9, 10]
    means = [sum(each[k] for k in range(i, j + 1)) / (j - i + 1) for i, j in zip(starts, ends, strict=True)]
    assert [step for step, _ in third] == ends
    assert [loss for _, loss in third] == pytest.approx(means)


def test_lazy_figures_are_averaged_over_the_steps_that_have_them():
    window = [{"a_loss": torch.tensor(1.0)}, {"a_loss": torch.tensor(3.0), "r1": torch.tensor(8.0)}]
    assert mean_figures(window) == {"a_loss": 2.0, "r1": 8.0}
    assert summary({"decoder/a_loss": 2.0, "r1": 8.0}) == "a 2"
