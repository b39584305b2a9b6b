"""Stage 2's adversary on two ranks with every other sample each equals one process with the joined batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qlip.core import distributed
from qlip.engine.interfaces import Batch
from qlip.engine.parallel import ParallelKind, exchange_gradients, make_scalars_vectors, settle, shard
from qlip.losses.adversarial import LecamPenalty, discriminator_loss, generator_loss, r1_penalty
from qlip.losses.discriminator import Discriminator
from qlip.models.qlip.modeling import QLIPModel
from qlip.recipes.model import ModelConfig, TowerSize
from qlip.tasks.reconstruct import ReconstructConfig, ReconstructTask
from ranks import on_ranks

NUM_RANKS, JOINED = 2, 16
LOSSES = ("nonsaturating", "hinge", "generator", "hinge generator", "r1", "lecam")
KINDS: tuple[ParallelKind, ...] = ("none", "ddp", "fsdp")
TOWER = TowerSize(hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24)


def own_rows() -> slice:
    """Samples of this rank: i with i mod ranks = rank. Groups of the minibatch standard deviation are strided too."""
    return slice(distributed.rank(), None, distributed.world_size())


def averaged(x: Tensor) -> Tensor:
    return distributed.mean_over_ranks(distributed.whole(x).detach())


class Adversary(nn.Module):
    """A decoder of one 3x3 convolution against a discriminator of 8 pixels, float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.decoder = nn.Conv2d(3, 3, 3, padding=1)
        self.discriminator = Discriminator(8, channel_base=64, max_channels=8)
        self.lecam = LecamPenalty()
        self.double()
        self.lecam.update(real_logit=torch.tensor(0.3), fake_logit=torch.tensor(-0.2))

    def loss(self, name: str, real: Tensor) -> Tensor:
        fake = self.decoder(real)
        if name == "r1":
            return r1_penalty(self.discriminator, real)
        real_logits, fake_logits = self.discriminator(real), self.discriminator(fake)
        if name == "lecam":
            return self.lecam(real_logits, fake_logits)
        kind = "hinge" if "hinge" in name else "nonsaturating"
        if "generator" in name:
            return generator_loss(fake_logits, kind=kind)
        return discriminator_loss(real_logits, fake_logits, kind=kind)


def losses_and_gradients() -> dict[str, Tensor]:
    """Every loss and its gradient in decoder and discriminator, averaged over ranks as an engine averages them."""
    adversary = Adversary()
    real = torch.randn(JOINED, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)[own_rows()]
    found = {}
    for name in LOSSES:
        adversary.zero_grad()
        loss = adversary.loss(name, real)
        loss.backward()
        found[name] = averaged(loss)
        for key, parameter in adversary.named_parameters():
            if parameter.grad is not None:
                found[f"{name} {key}"] = averaged(parameter.grad)
    return found


def tiny_task() -> ReconstructTask:
    torch.manual_seed(0)
    sizes = {"encoder": TOWER, "decoder": TOWER, "text": TOWER, "context_length": 16, "projection_dim": 16}
    model = QLIPModel(ModelConfig(image_size=16, patch_size=8, initializer_range=0.1, **sizes).build_config())
    config = ReconstructConfig(
        gan_loss="hinge",
        gan_weight=0.5,
        gan_warmup_steps=4,
        adaptive_gan_weight=True,
        lecam_weight=0.3,
        discriminator_channel_base=64,
        discriminator_max_channels=8,
    )
    return ReconstructTask(model, config)


def own_batch() -> Batch:
    pixels = torch.randn(JOINED, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    return {"pixel_values": pixels[own_rows()]}


def whole_task(kind: ParallelKind) -> dict[str, Tensor]:
    """Terms and gradients of both phases of step 0 with all options on, then LeCAM's averages and step 1's terms."""
    task = tiny_task()
    modules = nn.ModuleDict(task.modules()).train()
    make_scalars_vectors(modules)
    for module in modules.values():
        shard(module, kind, torch.device("cpu"))
    found = {}
    for step in (0, 1):
        for phase in task.phases(step):
            task.discriminator.requires_grad_(phase.name == "discriminator")
            terms = task.loss(phase, own_batch(), step)
            exchange_gradients(modules, kind, last=True)
            sum(value for name, value in terms.items() if name.endswith("_loss")).backward()
            settle(modules)
            found |= {f"{step} {name}": averaged(value) for name, value in terms.items()}
            for name, parameter in modules.named_parameters():
                if parameter.grad is not None:
                    found[f"{step} {name}"] = averaged(parameter.grad)
            modules.zero_grad()
            task.after_step(phase, {name: value.detach() for name, value in terms.items()})
    return found | dict(task.lecam.named_buffers())


def all_cases() -> dict[str, dict[str, Tensor]]:
    """Everything in one start of the processes."""
    return {"losses": losses_and_gradients(), **{kind: whole_task(kind) for kind in KINDS}}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, dict[str, Tensor]]]:
    """What both processes found."""
    return on_ranks(all_cases, num_ranks=NUM_RANKS, folder=tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    """The task in one process, on the joined batch."""
    return whole_task("none")


def test_losses_and_gradients_equal_those_of_the_joined_batch(ranks):
    expected = losses_and_gradients()
    assert {name.split(" conv")[0] for name in expected} >= set(LOSSES)
    for found in (rank["losses"] for rank in ranks):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_both_phases_with_all_options_equal_those_of_the_joined_batch(ranks, alone, kind):
    assert {"0 adaptive_weight", "0 r1_loss", "1 lecam_loss", "0 model.vision_decoder.conv_out.weight"} <= alone.keys()
    assert float(alone["1 lecam"]) > 0
    for rank in ranks:
        assert rank[kind].keys() == alone.keys()
        for name, value in alone.items():
            scale = float(value.abs().max())
            torch.testing.assert_close(rank[kind][name], value, rtol=1e-4, atol=1e-5 * scale, msg=name)
