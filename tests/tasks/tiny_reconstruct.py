"""A stage-2 task of a few thousand parameters, and one step of it written out."""

from __future__ import annotations

import torch
from tiny_qlip import tiny_model
from torch import Tensor

from qlip.engine.interfaces import Batch, OptimizerConfig
from qlip.tasks.reconstruct import ReconstructConfig, ReconstructTask


def tiny_config(**changes) -> ReconstructConfig:
    fast = {"warmup_steps": 1, "clip_norm": 1.0}
    settings = {
        "optimizer": OptimizerConfig(lr=1e-3, **fast),
        "discriminator_optimizer": OptimizerConfig(lr=1e-3, **fast),
        "discriminator_channel_base": 128,
        "discriminator_max_channels": 16,
    }
    return ReconstructConfig(**(settings | changes))


def tiny_task(image_size: int = 16, **changes) -> ReconstructTask:
    return ReconstructTask(tiny_model(image_size), tiny_config(**changes))


class PlainSteps:
    """The contract of a step in fifteen lines, without the engine: phases in turn, each on all micro-batches."""

    def __init__(self, task: ReconstructTask) -> None:
        self.task = task
        self.step = 0
        self.trained = {
            phase.name: [p for name in phase.modules for p in task.modules()[name].parameters() if p.requires_grad]
            for phase in task.phases(0)
        }
        self.optimizers = {name: torch.optim.AdamW(trained, lr=1e-3) for name, trained in self.trained.items()}

    def take(self, batches: list[Batch], *, skip: str = "") -> dict[str, Tensor]:
        """One step; like a trainer whose guard refuses it, it ends before the optimizer of the phase `skip`."""
        self.step += 1
        figures: dict[str, Tensor] = {}
        for phase in self.task.phases(self.step - 1):
            for name, parameters in self.trained.items():
                for parameter in parameters:
                    parameter.requires_grad_(name == phase.name)
            found = []
            for batch in batches:
                found.append(self.task.loss(phase, batch, self.step - 1))
                (sum(v for name, v in found[-1].items() if name.endswith("_loss")) / len(batches)).backward()
            terms = {name: torch.stack([t[name].detach() for t in found]).mean(0) for name in found[0]}
            if phase.name != skip:
                self.optimizers[phase.name].step()
                self.task.after_step(phase, terms)
            self.optimizers[phase.name].zero_grad()
            if phase.name == skip:
                break
            figures |= terms
        for parameter in (p for parameters in self.trained.values() for p in parameters):
            parameter.requires_grad_(True)
        return figures
