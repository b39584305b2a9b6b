"""The loop that trains any task: phases, guards, optimizers, checkpoints, figures.

Starting it again in the same run folder resumes from the newest complete checkpoint, with the same data order; on a
CPU the final weights equal those of an uninterrupted run bit for bit.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from qlip.core.distributed import gather_objects, rank, whole
from qlip.core.log import console, progress
from qlip.engine.checkpoint import CheckpointWriter, TrainingState, checkpoint_folders, load_checkpoint
from qlip.engine.guards import FiniteGuard, RollBack, StepPlace
from qlip.engine.interfaces import Batch, Evaluator, Loader, Phase, Task, Tracker
from qlip.engine.optim import build_optimizer, schedule_factor, set_learning_rates
from qlip.engine.parallel import (
    ParallelKind,
    autocast,
    averaged_module,
    compile_blocks,
    exchange_gradients,
    exponential_average,
    make_scalars_vectors,
    pick_device,
    pick_parallel,
    set_activation_checkpointing,
    settle,
    shard,
    update_average,
)
from qlip.engine.reporter import Reporter, mean_figures, summary, unmoved_random_state
from qlip.engine.steps import accumulate_gradients, only_training, total_loss


@dataclass(kw_only=True, slots=True)
class TrainerConfig:
    """How long, how precise, how often, on how many processes."""

    steps: int = 120_000
    """Optimizer steps in all."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl; figures are means over them. A checkpoint ends a line early."""
    save_every: int = 1000
    """Steps between checkpoints; one is always written at the end."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep."""
    async_save: bool = False
    """Write checkpoints in the background; the step then only waits for a copy of the state to the CPU."""
    eval_every: int = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    images_every: int = 0
    """Steps between pictures of a fixed batch and its reconstructions; 0 is off."""
    tracker: Literal["tensorboard", "trackio", "wandb", "none"] = "tensorboard"
    """Where figures and pictures go besides metrics.jsonl. Nothing is uploaded unless
    WANDB_MODE=online or TRACKIO_SPACE_ID says so."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto` is bf16 autocast where the hardware has it; weights, quantizer and losses stay float32."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, ..."""
    parallel: ParallelKind = "auto"
    """Under torchrun: `ddp` copies the weights to every rank, `fsdp` spreads them; `auto` is `ddp`."""
    compile: bool = False
    """Compile every transformer block; a minute at the start, faster steps on a GPU."""
    ema_decay: float = 0.0
    """Decay of an exponential average of the weights, exported instead of them; 0 is off."""
    activation_checkpointing: bool = False
    """Recompute block activations in the backward pass: less memory, about a third more time."""
    nonfinite: Literal["skip", "stop"] = "skip"
    """What to do with a step whose loss or gradient is NaN or infinite on any rank; it is recorded either way."""
    max_skipped_steps: int = 10
    """More such steps in a row go back to the newest checkpoint once, then the run stops."""
    seed: int = 0
    """Seed of initialisation and data order."""


class Trainer:
    """Holds what a run needs between steps: task, optimizers, averages, loader, position."""

    def __init__(self, task: Task, loader: Loader, config: TrainerConfig, folder: Path) -> None:
        self.task = task
        self.loader = loader
        self.config = config
        self.folder = folder
        self.device = pick_device(config.device)
        self.kind = pick_parallel(config.parallel)
        self.modules = nn.ModuleDict(task.modules()).train()
        self._blank = copy.deepcopy(self.modules["model"]).eval()  # an ordinary model, to be filled by `whole_model`
        averages = self._prepare_modules()
        optimizers = {
            phase.name: build_optimizer(self._trained_parameters(phase), phase.optimizer) for phase in task.phases(0)
        }
        self.state = TrainingState(modules=self.modules, averages=averages, optimizers=optimizers)
        self.writer = CheckpointWriter(folder, keep=config.keep_checkpoints, background=config.async_save)
        self.guard = FiniteGuard(config.nonfinite, max_skipped_steps=config.max_skipped_steps)
        self.step = 0

    def _prepare_modules(self) -> nn.ModuleDict:
        """Device, checkpointing, averages, compiling, sharding, in this order. Returns the averages."""
        self.modules.to(self.device)
        make_scalars_vectors(self.modules)
        set_activation_checkpointing(self.modules, enabled=self.config.activation_checkpointing)
        averages = nn.ModuleDict()
        if self.config.ema_decay:
            averages["model"] = exponential_average(self.modules["model"], self.config.ema_decay)
            shard(averaged_module(averages["model"]), self.kind, self.device)
        if self.config.compile:
            compile_blocks(self.modules)
        for module in self.modules.values():
            shard(module, self.kind, self.device)
        return averages

    def _trained_parameters(self, phase: Phase) -> list[tuple[str, nn.Parameter]]:
        return [
            (f"{name}.{parameter_name}", parameter)
            for name in phase.modules
            for parameter_name, parameter in self.modules[name].named_parameters()
            if parameter.requires_grad
        ]

    def resume(self) -> bool:
        """Continue from the newest complete checkpoint of the run folder; False when there is none."""
        found = gather_objects(checkpoint_folders(self.folder)[-1:])[0]  # rank 0's view: file systems may lag
        if found:
            self.modules.zero_grad(set_to_none=True)  # a step that led to a roll-back left its gradients behind
            self.step, states = load_checkpoint(found[0], self.state)
            self.loader.resume(states)
            console.print(f"resuming {self.folder} at step {self.step}")
        return bool(found)

    def save(self) -> None:
        """Write a checkpoint of the present step."""
        self.writer.save(self.step, self.state, loader=self.loader.state_dict())

    def train_step(self, batches: list[Batch]) -> dict[str, Tensor]:
        """All phases of one step on its micro-batches. Returns detached figures, prefixed by phase if there are two.

        A phase whose loss or gradient is not finite moves nothing and ends the step, which then has no figures.
        """
        phases = self.task.phases(self.step)
        figures: dict[str, Tensor] = {}
        for phase in phases:
            prefix = f"{phase.name}/" if len(phases) > 1 else ""
            terms = self._optimize(phase, batches)
            if terms is None:
                figures = {}
                break
            figures |= {prefix + name: value for name, value in terms.items()}
        else:
            self.guard.passed()
            if self.config.ema_decay:
                update_average(self.state.averages["model"], self.modules["model"])
        self.step += 1
        return figures

    def _optimize(self, phase: Phase, batches: list[Batch]) -> dict[str, Tensor] | None:
        """One phase; None when it was not finite on some rank."""
        optimizer, settings = self.state.optimizers[phase.name], phase.optimizer
        with only_training(phase, self.modules):
            terms = accumulate_gradients(
                self.task,
                phase,
                batches,
                self.step,
                device=self.device,
                precision=lambda: autocast(self.device, self.config.precision),
                before_backward=lambda last: exchange_gradients(self.modules, self.kind, last=last),
            )
            settle(self.modules)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        grad_norm = whole(nn.utils.clip_grad_norm_(parameters, settings.clip_norm or float("inf")))
        terms |= {"loss": total_loss(terms), "grad_norm": grad_norm}
        place = StepPlace(step=self.step, phase=phase.name, folder=self.folder, device=self.device)
        allowed = self.guard.allows(terms, batches=batches, modules=self.modules, place=place)
        factor = schedule_factor(
            self.step,
            warmup_steps=settings.warmup_steps,
            total_steps=self.config.steps,
            final_share=settings.final_lr_share,
        )
        if allowed:
            set_learning_rates(optimizer, factor)
            optimizer.step()
            self.task.after_step(phase, terms)
        optimizer.zero_grad(set_to_none=True)
        return terms | {"lr_factor": torch.tensor(factor)} if allowed else None

    def whole_model(self) -> nn.Module:
        """An ordinary copy of the model, of its average with EMA, on the device. All ranks must ask together."""
        source = averaged_module(self.state.averages["model"]) if self.config.ema_decay else self.modules["model"]
        filled = {name: whole(tensor).cpu() for name, tensor in source.state_dict().items()}
        shapes = {name: tensor.shape for name, tensor in self._blank.state_dict().items()}
        self._blank.load_state_dict({name: tensor.reshape(shapes[name]) for name, tensor in filled.items()})
        return self._blank.to(self.device)


def train(
    task: Task,
    loader: Loader,
    config: TrainerConfig,
    *,
    folder: Path,
    title: str,
    batch_size: int,
    micro_batches: int = 1,
    evaluators: dict[str, Evaluator],
    tracker: Callable[[int], Tracker],
    pictures: Callable[[nn.Module, int], Tensor] | None = None,
    export: Callable[[nn.Module], None],
) -> None:
    """Train to `config.steps`, evaluate, export. `export` gets the model (its average, with EMA) on rank 0 at the end.

    `batch_size` counts the samples of a step over all ranks, of which this rank reads `micro_batches` batches from
    the loader. `tracker` is opened with the step that is resumed; `pictures` makes a grid from the model and the step.
    """
    trainer = Trainer(task, loader, config, folder)

    def open_reporter(*, evaluate_again: bool = False) -> Reporter:
        return Reporter(
            folder,
            trainer.step,
            evaluators=evaluators,
            tracker=tracker(trainer.step),
            pictures=pictures,
            evaluate_again=evaluate_again,
        )

    trainer.resume()
    while True:
        reporter = open_reporter()
        try:
            _loop(trainer, reporter, title=title, batch_size=batch_size, micro_batches=micro_batches)
            break
        except RollBack as reason:
            trainer.writer.finish()
            found = gather_objects(checkpoint_folders(folder)[-1:])[0]
            trainer.guard.roll_back(int(found[0].name.removeprefix("step_")) if found else None, str(reason))
            trainer.resume()
        finally:
            reporter.close()
    model = trainer.whole_model()
    reporter = open_reporter(evaluate_again=True)
    reporter.evaluate(trainer.step, model, trainer.device)
    reporter.close()
    if rank() == 0:
        export(model)


def _loop(trainer: Trainer, reporter: Reporter, *, title: str, batch_size: int, micro_batches: int) -> None:
    config = trainer.config
    if trainer.step >= config.steps:
        return
    window: list[dict[str, Tensor]] = []
    started = time.monotonic()
    with progress(title, config.steps, start=trainer.step, units_per_step=batch_size) as bar:
        with unmoved_random_state():  # an iterator's start draws from it, on a resume once more than without
            stream = iter(trainer.loader)
        while batches := list(islice(stream, micro_batches)):
            window.append(trainer.train_step(batches))
            trainer.writer.poll()
            step = trainer.step
            saving = step % config.save_every == 0 or step == config.steps
            if step % config.log_every == 0 or saving:  # no mean spans a checkpoint: resuming writes the same lines
                figures = mean_figures(window)
                if not all(window):
                    figures["skipped_steps"] = float(sum(not found for found in window))
                figures["images_per_second"] = len(window) * batch_size / (time.monotonic() - started)
                reporter.log(step, figures)
                bar.update(step, summary(figures))
                window, started = [], time.monotonic()
            evaluating = config.eval_every and step % config.eval_every == 0 and step < config.steps
            painting = config.images_every and (step % config.images_every == 0 or step == config.steps)
            if evaluating or painting:
                model = trainer.whole_model()
                if evaluating:
                    reporter.evaluate(step, model, trainer.device)
                if painting:
                    reporter.picture(step, model)
                model.cpu()  # until it is needed again
            if saving and (trainer.guard.in_a_row == 0 or step == config.steps):  # a roll-back needs a sound one
                trainer.save()  # after the evaluation: a run stopped in the middle of one does it again
            if step == config.steps:
                trainer.writer.finish()
                return
