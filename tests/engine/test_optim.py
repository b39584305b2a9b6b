"""Which rate and which decay every parameter gets, and the schedule's closed form."""

from __future__ import annotations

import math

import pytest
import timm.optim
import torch
from torch import nn

from qlip.core.errors import UserError
from qlip.engine.interfaces import OptimizerConfig
from qlip.engine.optim import build_optimizer, parameter_groups, schedule_factor, set_learning_rates
from qlip.models.qlip.configuration import QLIPConfig
from qlip.models.qlip.modeling import QLIPModel
from qlip.tasks.align import AlignConfig
from qlip.tasks.reconstruct import ReconstructConfig, ReconstructTask


@pytest.fixture(scope="module")
def paper_model() -> QLIPModel:
    with torch.device("meta"):
        return QLIPModel(QLIPConfig())


def settings_by_name(named: list[tuple[str, nn.Parameter]], config: OptimizerConfig) -> dict[str, tuple[float, float]]:
    """Parameter name -> (peak rate, decay)."""
    names = {id(parameter): name for name, parameter in named}
    return {
        names[id(parameter)]: (group["peak_lr"], group["weight_decay"])
        for group in parameter_groups(named, config)
        for parameter in group["params"]
    }


def test_stage_1_rates_are_table_8s_for_every_parameter(paper_model):
    named = [(f"model.{name}", parameter) for name, parameter in paper_model.named_parameters()]
    rates = {name: rate for name, (rate, _) in settings_by_name(named, AlignConfig().optimizer).items()}
    assert len(rates) == len(named)

    def expected(name: str) -> float:
        if name.startswith("model.vision_model.quant_embed") or name == "model.logit_scale":
            return 5e-4
        if name.startswith(("model.text_model.", "model.text_projection.")):
            return 2e-5
        return 2e-3 if name.startswith("model.vision_decoder.") else 2e-4

    assert rates == {name: expected(name) for name, _ in named}
    for name in (
        "model.vision_model.quant_embed.c_fc.weight",
        "model.vision_model.quant_embed_post.c_fc.weight",
        "model.visual_projection.weight",
        "model.text_projection.weight",
        "model.logit_scale",
    ):
        assert name in rates


def test_stage_2_rates_are_table_8s():
    with torch.device("meta"):
        task = ReconstructTask(QLIPModel(QLIPConfig()), ReconstructConfig())
    decoder, discriminator = task.phases(0)
    named = [(f"model.{name}", p) for name, p in task.model.named_parameters() if p.requires_grad]
    for name, (rate, _) in settings_by_name(named, decoder.optimizer).items():
        assert rate == (1e-4 if name.startswith("model.vision_decoder.") else 5e-4)
    assert (decoder.optimizer.name, decoder.optimizer.clip_norm) == ("adamw", 1.0)
    assert (discriminator.optimizer.name, discriminator.optimizer.lr) == ("adamw", 1e-4)


def test_decay_spares_vectors_positions_cls_and_temperature_but_not_tokens(paper_model):
    named = list(paper_model.named_parameters())
    decays = {name: decay for name, (_, decay) in settings_by_name(named, OptimizerConfig()).items()}
    assert set(decays.values()) == {0.0, 0.05}
    spared = {name for name, decay in decays.items() if not decay}
    assert {name for name, parameter in named if parameter.ndim <= 1} < spared
    assert {name for name, parameter in named if parameter.ndim > 1} & spared == {
        "vision_model.embeddings.position_embedding.weight",
        "text_model.embeddings.position_embedding.weight",
        "vision_decoder.position_embeddings",
    }
    assert {"logit_scale", "vision_model.embeddings.class_embedding"} <= spared
    for name in (
        "text_model.embeddings.token_embedding.weight",
        "vision_model.embeddings.patch_embedding.weight",
        "vision_decoder.conv_out.weight",
    ):
        assert decays[name] == 0.05


def test_cls_and_temperature_of_more_dimensions_are_spared_too():
    config = OptimizerConfig(weight_decay=0.1)
    named = [(name, nn.Parameter(torch.zeros(1, 1, 2))) for name in ("a.class_embedding", "logit_scale", "a.weight")]
    decays = [decay for _, decay in settings_by_name(named, config).values()]
    assert sorted(decays) == [0.0, 0.0, 0.1]


def test_the_longest_prefix_wins_whatever_the_order():
    named = [(name, nn.Parameter(torch.zeros(2, 2))) for name in ("a.b.c", "a.b", "a.x", "z")]
    for prefixes in ({"a": 1.0, "a.b": 2.0, "a.b.c": 3.0}, {"a.b.c": 3.0, "a.b": 2.0, "a": 1.0}):
        found = settings_by_name(named, OptimizerConfig(lr=9.0, part_lrs=prefixes))
        assert {name: rate for name, (rate, _) in found.items()} == {"a.b.c": 3.0, "a.b": 2.0, "a.x": 1.0, "z": 9.0}


def test_unknown_prefix_and_unknown_optimizer_are_refused_by_name():
    named = [("model.weight", nn.Parameter(torch.zeros(2)))]
    with pytest.raises(UserError, match=r"'model\.wieght'"):
        build_optimizer(named, OptimizerConfig(part_lrs={"model.wieght": 1.0}))
    with pytest.raises(UserError, match=r"'adam' is unknown: did you mean 'adamw'"):
        build_optimizer(named, OptimizerConfig(name="adam"))


def test_schedule_is_linear_then_cosine():
    factors = [schedule_factor(step, warmup_steps=4, total_steps=20) for step in range(21)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4:] == pytest.approx([0.5 * (1 + math.cos(math.pi * k / 16)) for k in range(17)])
    assert factors[20] == 0 == schedule_factor(99, warmup_steps=4, total_steps=20)
    assert schedule_factor(0, warmup_steps=0, total_steps=10) == 1
    assert schedule_factor(5, warmup_steps=10, total_steps=10) == pytest.approx(0.6)


def test_every_group_follows_the_schedule_from_its_own_peak():
    named = [("a.weight", nn.Parameter(torch.zeros(2, 2))), ("b.weight", nn.Parameter(torch.zeros(2, 2)))]
    optimizer = build_optimizer(named, OptimizerConfig(lr=0.4, part_lrs={"b": 0.2}))
    for factor in (0.5, 0.25):
        set_learning_rates(optimizer, factor)
        assert sorted(group["lr"] for group in optimizer.param_groups) == pytest.approx([0.2 * factor, 0.4 * factor])


def test_lamb_is_timms_and_clips_the_global_norm_to_one():
    parameter, twin = (nn.Parameter(torch.full((3, 2), 0.5)) for _ in range(2))
    config = OptimizerConfig(name="lamb", lr=0.1)
    optimizer = build_optimizer([("a.weight", parameter)], config)
    assert isinstance(optimizer, timm.optim.Lamb)
    assert optimizer.defaults["max_grad_norm"] == 1.0
    assert not optimizer.defaults["trust_clip"] and not optimizer.defaults["always_adapt"]
    parameter.grad = torch.randn(3, 2) * 40
    # By hand, first step: bias correction makes Adam's direction g / (|g| + eps), clipping does not change it.
    gradient = parameter.grad / parameter.grad.norm()
    update = gradient / (gradient.abs() + 1e-6) + 0.05 * twin.detach()
    expected = twin.detach() - 0.1 * twin.detach().norm() / update.norm() * update
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), expected)


def test_adamw_has_the_configs_betas_eps_and_decay():
    optimizer = build_optimizer([("a.weight", nn.Parameter(torch.zeros(2, 2)))], OptimizerConfig())
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (group["betas"], group["eps"], group["weight_decay"], group["lr"]) == ((0.9, 0.95), 1e-6, 0.05, 5e-4)
