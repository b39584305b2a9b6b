"""The loop that trains any task: phases, guards, optimizers, checkpoints, figures.

Starting it again in the same run folder resumes from the newest complete checkpoint, with the same data order; on a
CPU the final weights equal those of an uninterrupted run bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torchdata.stateful_dataloader import StatefulDataLoader

from qlip.core.log import MetricsFile, TensorBoardTracker, console, progress
from qlip.engine.checkpoint import checkpoint_folders, load_checkpoint, save_checkpoint
from qlip.engine.guards import StepPlace, stop_unless_finite
from qlip.engine.interfaces import Batch, Evaluator, Phase, Task, Tracker
from qlip.engine.optim import build_optimizer, schedule_factor, set_learning_rates
from qlip.engine.parallel import (
    autocast,
    averaged_module,
    exponential_average,
    pick_device,
    set_activation_checkpointing,
    update_average,
)


@dataclass(kw_only=True, slots=True)
class TrainerConfig:
    """How long, how precise, how often."""

    steps: int = 120_000
    """Optimizer steps in all."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl; figures are means over them. A checkpoint ends a line early."""
    save_every: int = 1000
    """Steps between checkpoints; one is always written at the end."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep."""
    eval_every: int = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto` is bf16 autocast where the hardware has it; weights, quantizer and losses stay float32."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, ..."""
    ema_decay: float = 0.0
    """Decay of an exponential average of the weights, exported instead of them; 0 is off."""
    activation_checkpointing: bool = False
    """Recompute block activations in the backward pass: less memory, about a third more time."""
    seed: int = 0
    """Seed of initialisation and data order."""


class Trainer:
    """Holds what a run needs between steps: task, optimizers, averages, loader, position."""

    def __init__(self, task: Task, loader: StatefulDataLoader, config: TrainerConfig, folder: Path) -> None:
        self.task = task
        self.loader = loader
        self.config = config
        self.folder = folder
        self.device = pick_device(config.device)
        self.modules = nn.ModuleDict(task.modules()).to(self.device).train()
        set_activation_checkpointing(self.modules, enabled=config.activation_checkpointing)
        self.averages = nn.ModuleDict()
        if config.ema_decay:
            self.averages["model"] = exponential_average(self.modules["model"], config.ema_decay)
        self.optimizers = {
            phase.name: build_optimizer(self._trained_parameters(phase), phase.optimizer) for phase in task.phases(0)
        }
        self.step = 0

    def _trained_parameters(self, phase: Phase) -> list[tuple[str, nn.Parameter]]:
        return [
            (f"{name}.{parameter_name}", parameter)
            for name in phase.modules
            for parameter_name, parameter in self.modules[name].named_parameters()
            if parameter.requires_grad
        ]

    def resume(self) -> None:
        """Continue from the newest complete checkpoint of the run folder, if there is one."""
        found = checkpoint_folders(self.folder)
        if found:
            self.step, loader_state = load_checkpoint(
                found[-1], modules=self.modules, averages=self.averages, optimizers=self.optimizers
            )
            self.loader.load_state_dict(loader_state)
            console.print(f"resuming {self.folder} at step {self.step}")

    def save(self) -> None:
        """Write a checkpoint of the present step."""
        save_checkpoint(
            self.folder,
            step=self.step,
            modules=self.modules,
            averages=self.averages,
            optimizers=self.optimizers,
            loader_state=self.loader.state_dict(),
            keep=self.config.keep_checkpoints,
        )

    def train_step(self, batch: Batch) -> dict[str, Tensor]:
        """All phases of one step on one batch. Returns detached figures, prefixed by phase when there are several."""
        batch = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        phases = self.task.phases(self.step)
        figures: dict[str, Tensor] = {}
        for phase in phases:
            prefix = f"{phase.name}/" if len(phases) > 1 else ""
            with only_training(phase, self.modules):
                terms = self._optimize(phase, batch)
            figures |= {prefix + name: value for name, value in terms.items()}
        if self.config.ema_decay:
            update_average(self.averages["model"], self.modules["model"])
        self.step += 1
        return figures

    def _optimize(self, phase: Phase, batch: Batch) -> dict[str, Tensor]:
        optimizer, settings = self.optimizers[phase.name], phase.optimizer
        with autocast(self.device, self.config.precision):
            terms = self.task.loss(phase, batch, self.step)
        loss = torch.stack([value.float() for name, value in terms.items() if name.endswith("_loss")]).sum()
        place = StepPlace(step=self.step, phase=phase.name, folder=self.folder, device=self.device)
        stop_unless_finite(terms | {"loss": loss}, batch=batch, place=place)
        loss.backward()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        grad_norm = nn.utils.clip_grad_norm_(parameters, settings.clip_norm or float("inf"))
        stop_unless_finite({"grad_norm": grad_norm}, batch=batch, place=place)
        factor = schedule_factor(self.step, warmup_steps=settings.warmup_steps, total_steps=self.config.steps)
        set_learning_rates(optimizer, factor)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.task.after_step(phase)
        terms = {name: value.detach() for name, value in terms.items()}
        return terms | {"loss": loss.detach(), "grad_norm": grad_norm, "lr_factor": torch.tensor(factor)}


def unmoved_random_state() -> AbstractContextManager[None]:
    """What happens inside leaves PyTorch's CPU generator, which a checkpoint keeps, as it was."""
    return torch.random.fork_rng(devices=[])


@contextmanager
def only_training(phase: Phase, modules: nn.ModuleDict) -> Iterator[None]:
    """Turn off gradients of every module the phase does not train, so that none is computed or kept for it."""
    resting = [
        parameter
        for name, module in modules.items()
        if name not in phase.modules
        for parameter in module.parameters()
        if parameter.requires_grad
    ]
    for parameter in resting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in resting:
            parameter.requires_grad_(True)


def train(
    task: Task,
    loader: StatefulDataLoader,
    config: TrainerConfig,
    *,
    folder: Path,
    title: str,
    batch_size: int,
    evaluators: dict[str, Evaluator],
    export: Callable[[nn.Module], None],
) -> None:
    """Train to `config.steps`, evaluate, export. `export` gets the model (its average, with EMA) at the end."""
    trainer = Trainer(task, loader, config, folder)
    trainer.resume()
    metrics = MetricsFile(folder / "metrics.jsonl", resume_step=trainer.step)
    tracker: Tracker = TensorBoardTracker(folder / "tensorboard", resume_step=trainer.step)
    if trainer.step < config.steps:
        _loop(trainer, metrics, tracker, title=title, batch_size=batch_size, evaluators=evaluators)
    model = averaged_module(trainer.averages["model"]) if config.ema_decay else trainer.modules["model"]
    _evaluate(model, trainer, evaluators, metrics, tracker)
    export(model)
    metrics.close()
    tracker.close()


def _loop(
    trainer: Trainer,
    metrics: MetricsFile,
    tracker: Tracker,
    *,
    title: str,
    batch_size: int,
    evaluators: dict[str, Evaluator],
) -> None:
    config = trainer.config
    window: list[dict[str, Tensor]] = []
    window_started = time.monotonic()
    with progress(title, config.steps, start=trainer.step, units_per_step=batch_size) as bar:
        with unmoved_random_state():  # an iterator's start draws from it, on a resume once more than without
            batches = iter(trainer.loader)
        for batch in batches:
            window.append(trainer.train_step(batch))
            step = trainer.step
            saving = step % config.save_every == 0 or step == config.steps
            if step % config.log_every == 0 or saving:  # no mean spans a checkpoint: resuming writes the same lines
                figures = mean_figures(window)
                seconds = time.monotonic() - window_started
                figures["images_per_second"] = len(window) * batch_size / seconds
                metrics.log({"step": step, **figures})
                tracker.log(step, figures)
                bar.update(step, summary(figures))
                window, window_started = [], time.monotonic()
            if config.eval_every and step % config.eval_every == 0 and step < config.steps:
                _evaluate(trainer.modules["model"], trainer, evaluators, metrics, tracker)
            if saving:
                trainer.save()  # after the evaluation: a run stopped in the middle of one does it again
            if step == config.steps:
                return


def mean_figures(window: list[dict[str, Tensor]]) -> dict[str, float]:
    """Mean of each figure over the steps that have it (lazy terms are absent from most)."""
    names = {name for figures in window for name in figures}
    return {name: float(torch.stack([f[name] for f in window if name in f]).float().mean()) for name in sorted(names)}


def summary(figures: dict[str, float]) -> str:
    """`contrastive 2.31  pixel 3.9`: the weighted terms, for the progress line."""
    terms = {name.split("/")[-1]: value for name, value in figures.items() if name.endswith("_loss")}
    return "  ".join(f"{name.removesuffix('_loss')} {value:.3g}" for name, value in terms.items())


def _evaluate(
    model: nn.Module, trainer: Trainer, evaluators: dict[str, Evaluator], metrics: MetricsFile, tracker: Tracker
) -> None:
    model.eval()
    for name, evaluator in evaluators.items():
        with unmoved_random_state():
            figures = evaluator.run(model, trainer.device)
        metrics.log({"step": trainer.step, "eval": name, **figures, "card": evaluator.card()})
        tracker.log(trainer.step, {f"{name}/{key}": value for key, value in figures.items()})
    model.train()
