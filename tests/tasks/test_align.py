"""Stage 1: the terms of Eq 3 by hand, units and gradients, SigLIP, the running balance, and the baselines."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from align_passes import gradients, one_pass
from tiny_qlip import scene_batch, tiny_model, trainer_of
from torch import nn

from qlip.core.errors import UserError
from qlip.core.pixels import CLIP_STD
from qlip.engine.interfaces import OptimizerConfig
from qlip.engine.optim import parameter_groups
from qlip.losses.reconstruction import pixel_mse
from qlip.tasks.align import TABLE_8_RATES, AlignConfig, AlignTask


def test_the_defaults_are_table_8s():
    config = AlignConfig()
    weights = (config.pixel_weight, config.contrastive_weight, config.quantizer_weight, config.commitment_weight)
    assert weights == (1e3, 1.0, 1.0, 1.0)
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.lr, optimizer.betas) == ("lamb", 5e-4, (0.9, 0.95))
    assert (optimizer.weight_decay, optimizer.clip_norm, optimizer.warmup_steps) == (0.05, 5.0, 2000)


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def test_terms_sum_to_equation_3():
    model, batch = tiny_model(), scene_batch(5)
    a_r, a_a, a_q, a_z = 30.0, 2.0, 3.0, 0.5
    config = AlignConfig(pixel_weight=a_r, contrastive_weight=a_a, quantizer_weight=a_q, commitment_weight=a_z)
    task = AlignTask(model, config)
    (phase,) = task.phases(0)
    terms = task.loss(phase, batch, 0)
    total = sum(float(value.detach()) for name, value in terms.items() if name.endswith("_loss"))

    with torch.no_grad():
        output = model(batch["pixel_values"], batch["input_ids"], batch["attention_mask"])
    images, texts = output.image_embeds.double().numpy(), output.text_embeds.double().numpy()
    logits = math.exp(2.6592) * images @ texts.T
    contrastive = -(np.trace(log_softmax(logits)) + np.trace(log_softmax(logits.T))) / (2 * 5)
    std = np.array(CLIP_STD)[:, None, None]
    residual = (output.reconstructions - batch["pixel_values"]).double().numpy() * std  # on [0, 1]
    vision = output.vision_model_output
    committed = ((vision.last_hidden_state - vision.pre_quant).double().numpy() ** 2).mean()
    # L_BSQ with group size 1, tau and gamma 1: entropy of one token's soft bits minus that of the mean soft bits.
    p = 1 / (1 + np.exp(-4 * unit(vision.latents.double().numpy()) / math.sqrt(28)))
    sample = binary_entropy(p).mean((0, 1)).sum()
    codebook = binary_entropy(p.mean((0, 1))).sum()
    quantizer = sample - codebook
    expected = a_r * (residual**2).mean() + a_q * quantizer + a_a * contrastive + a_z * committed
    assert total == pytest.approx(expected, rel=1e-5)
    assert float(terms["contrastive"].detach()) == pytest.approx(contrastive, rel=1e-5)
    assert float(terms["logit_scale"].detach()) == pytest.approx(1 / 0.07, rel=1e-3)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def binary_entropy(p: np.ndarray) -> np.ndarray:
    return -(p * np.log(p) + (1 - p) * np.log(1 - p))


def test_pixels_are_compared_on_the_unit_scale():
    """A squared error in CLIP-normalised units is 13.88 times the one on [0, 1]."""
    real = torch.rand(2, 3, 4, 4)
    fake = real + 0.1 * torch.ones(2, 3, 4, 4)  # the same normalised error in every channel
    ratio = float((fake - real).square().mean() / pixel_mse(fake, real))
    assert ratio == pytest.approx(1 / np.mean(np.square(CLIP_STD)), rel=1e-4)
    std = torch.tensor(CLIP_STD)[:, None, None]
    normalised = real + 0.1 / std.expand(2, 3, 4, 4)  # the same [0, 1] error in every channel
    assert float(pixel_mse(normalised, real)) == pytest.approx(0.01, rel=1e-4)
    assert float((normalised - real).square().mean()) == pytest.approx(0.1388, rel=1e-3)


def test_commitment_reaches_the_encoder_only():
    model = tiny_model()
    task = AlignTask(model, AlignConfig())
    terms = task.loss(task.phases(0)[0], scene_batch(), 0)
    terms["commitment_loss"].backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved
    assert all(name.startswith(("vision_model.embeddings.", "vision_model.encoder.")) for name in moved)


def test_every_parameter_gets_a_gradient():
    model = tiny_model()
    task = AlignTask(model, AlignConfig())
    terms = task.loss(task.phases(0)[0], scene_batch(), 0)
    sum(value for name, value in terms.items() if name.endswith("_loss")).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("shape", [(), (1,)], ids=["scalar", "as in the engine"])
@pytest.mark.parametrize(("value", "kept"), [(9.0, math.log(100)), (4.0, 4.0), (-1.0, 0.0)])
def test_temperature_is_clamped_after_the_step(value, kept, shape):
    model = tiny_model()
    model.logit_scale = torch.nn.Parameter(model.logit_scale.detach().reshape(shape))
    task = AlignTask(model, AlignConfig())
    with torch.no_grad():
        model.logit_scale.fill_(value)
    task.after_step(task.phases(0)[0], {})
    assert float(model.logit_scale.detach()) == pytest.approx(kept)


def test_the_trainer_clamps_the_temperature_too(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.logit_scale.fill_(20.0)
    trainer = trainer_of(AlignTask(model, AlignConfig()), tmp_path)
    trainer.train_step([scene_batch()])
    assert float(model.logit_scale.detach().exp()) == pytest.approx(100)


def test_one_batch_of_eight_can_be_learned(tmp_path):
    optimizer = OptimizerConfig(lr=3e-3, warmup_steps=5)
    task = AlignTask(tiny_model(), AlignConfig(pixel_weight=20.0, commitment_weight=0.1, optimizer=optimizer))
    trainer, batch = trainer_of(task, tmp_path, steps=80), scene_batch()
    figures = [trainer.train_step([batch]) for _ in range(80)]
    assert float(figures[-1]["contrastive"]) < 0.5
    assert float(figures[-1]["mse"]) < float(figures[0]["mse"]) / 3


def test_siglip_brings_its_bias_and_starts_a_fresh_temperature_at_ln_10():
    model = tiny_model()
    task = AlignTask(model, AlignConfig(contrastive="siglip"))
    bias = task.modules()["logit_bias"]
    assert task.phases(0)[0].modules == ("model", "logit_bias")
    assert (model.logit_scale.exp().item(), bias().tolist()) == (pytest.approx(10), [-10.0])
    batch = scene_batch(5)
    terms = task.loss(task.phases(0)[0], batch, 0)
    with torch.no_grad():
        output = model(batch["pixel_values"], batch["input_ids"])
    logits = 10 * output.image_embeds @ output.text_embeds.T - 10
    expected = -torch.nn.functional.logsigmoid((2 * torch.eye(5) - 1) * logits).sum() / 5
    assert terms["contrastive"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert not any("bias" in name and "logit" in name for name in model.state_dict())
    started = tiny_model()
    AlignTask(started, AlignConfig(contrastive="siglip", init="a folder"))
    assert started.logit_scale.exp().item() == pytest.approx(1 / 0.07, rel=1e-3)


def test_the_running_balance_weighs_pixels_by_the_steps_before():
    task = AlignTask(tiny_model(), AlignConfig(balance="running", balance_momentum=0.5, pixel_weight=20.0))
    (phase,) = task.phases(0)
    assert phase.modules == ("model",) and "balance" in task.modules()
    first = one_pass(task, scene_batch(), 0)
    assert first["pixel_weight"].item() == 20
    assert first["pixel_loss"].item() == pytest.approx(20 * first["mse"].item())
    task.after_step(phase, {name: value.detach() for name, value in first.items()})
    expected = (first["contrastive"] / first["mse"]).item()
    second = task.loss(phase, scene_batch(4), 1)
    assert second["pixel_weight"].item() == pytest.approx(expected)
    assert second["pixel_loss"].item() == pytest.approx(expected * second["mse"].item())
    third = task.parts(phase, scene_batch(6), 1).terms  # nothing moved in between
    assert torch.equal(third["pixel_weight"], second["pixel_weight"])


def refuse_to_run(module: nn.Module) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("this must not run")

    module.register_forward_pre_hook(refuse)


def trained(task: AlignTask) -> set[str]:
    """Names of the parameters that the optimizer would get, whose rates must all be found."""
    named = [(f"model.{name}", p) for name, p in task.model.named_parameters() if p.requires_grad]
    groups = parameter_groups(named, task.phases(0)[0].optimizer)
    assert sum(len(group["params"]) for group in groups) == len(named)
    return {name for name, _ in named}


@pytest.mark.parametrize("quantizer", ["bsq", "none"])
def test_without_contrast_no_text_is_read_and_no_parameter_for_it_trained(quantizer):
    model = tiny_model(quantizer=quantizer)
    rates = {name: rate for name, rate in TABLE_8_RATES.items() if quantizer == "bsq" or "quant_embed" not in name}
    config = AlignConfig(contrastive_weight=0.0, optimizer=OptimizerConfig(part_lrs=rates), probe_every=1)
    task = AlignTask(model, config)
    refuse_to_run(model.text_model)
    terms = one_pass(task, {"pixel_values": scene_batch()["pixel_values"]})
    assert not terms.keys() & {"contrastive_loss", "contrastive", "logit_scale", "probe/contrastive", "probe/ratio"}
    assert terms.keys() >= {"pixel_loss", "mse", "probe/pixel"}
    only_texts_train = ("text_model.", "text_projection.", "visual_projection.", "vision_model.post_layernorm.")
    expected = {
        f"model.{name}"
        for name, _ in model.named_parameters()
        if not name.startswith(only_texts_train) and name != "logit_scale"
    }
    assert trained(task) == expected == gradients(task).keys()
    before = model.logit_scale.detach().clone().fill_(7.0)
    with torch.no_grad():
        model.logit_scale.copy_(before)
    task.after_step(task.phases(0)[0], terms)
    assert torch.equal(model.logit_scale.detach(), before)


def test_without_pixels_nothing_is_decoded_and_decoder_and_bottleneck_rest():
    model = tiny_model()
    task = AlignTask(model, AlignConfig(pixel_weight=0.0, probe_every=1))
    refuse_to_run(model.vision_decoder)
    terms = one_pass(task, scene_batch())
    assert terms.keys() == {"contrastive_loss", "contrastive", "logit_scale", "probe/contrastive"}
    resting = ("vision_decoder.", "vision_model.quant_embed.", "vision_model.quant_embed_post.")
    expected = {f"model.{name}" for name, _ in model.named_parameters() if not name.startswith(resting)}
    assert trained(task) == expected == gradients(task).keys()


def test_a_mistyped_rate_is_refused_although_parts_are_frozen():
    rates = TABLE_8_RATES | {"model.text_modle": 1e-5}
    task = AlignTask(tiny_model(), AlignConfig(contrastive_weight=0.0, optimizer=OptimizerConfig(part_lrs=rates)))
    with pytest.raises(UserError, match=r"model\.text_modle"):
        trained(task)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contrastive_weight": 0.0, "pixel_weight": 0.0}, "both 0"),
        ({"balance": "running", "pixel_weight": 0.0}, "running needs both losses"),
        ({"balance": "running", "balance_momentum": 1.0}, "give a number from 0 to below 1"),
        ({"probe_every": -1}, "task.probe_every is -1"),
        ({"contrastive_chunk": -1}, "task.contrastive_chunk is -1"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        AlignTask(tiny_model(), AlignConfig(**changes))


def test_the_decoder_is_left_out_on_request():
    model, batch = tiny_model().eval(), scene_batch(3)
    with torch.no_grad():
        whole, without = (model(batch["pixel_values"], batch["input_ids"], reconstruct=r) for r in (True, False))
    assert without.reconstructions is None and whole.reconstructions.shape == batch["pixel_values"].shape
    assert torch.equal(without.bits, whole.bits)
    assert torch.equal(without.logits_per_image, whole.logits_per_image)
