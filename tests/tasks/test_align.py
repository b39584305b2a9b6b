"""Stage 1: the terms of Eq 3 recomputed by hand, their units and gradients, and that a batch can be learned."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny_qlip import scene_batch, tiny_model, trainer_of

from qlip.core.pixels import CLIP_STD
from qlip.engine.interfaces import OptimizerConfig
from qlip.losses.reconstruction import pixel_mse
from qlip.tasks.align import AlignConfig, AlignTask


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
    config = AlignConfig(pixel_weight=0.0, contrastive_weight=0.0, quantizer_weight=0.0)
    task = AlignTask(model, config)
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


@pytest.mark.parametrize(("value", "kept"), [(9.0, math.log(100)), (4.0, 4.0), (-1.0, 0.0)])
def test_temperature_is_clamped_after_the_step(value, kept):
    model = tiny_model()
    task = AlignTask(model, AlignConfig())
    with torch.no_grad():
        model.logit_scale.fill_(value)
    task.after_step(task.phases(0)[0])
    assert float(model.logit_scale.detach()) == pytest.approx(kept)


def test_the_trainer_clamps_the_temperature_too(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.logit_scale.fill_(20.0)
    trainer = trainer_of(AlignTask(model, AlignConfig()), tmp_path)
    trainer.train_step(scene_batch())
    assert float(model.logit_scale.detach().exp()) == pytest.approx(100)


def test_one_batch_of_eight_can_be_learned(tmp_path):
    optimizer = OptimizerConfig(lr=3e-3, warmup_steps=5)
    task = AlignTask(tiny_model(), AlignConfig(pixel_weight=20.0, commitment_weight=0.1, optimizer=optimizer))
    trainer, batch = trainer_of(task, tmp_path, steps=80), scene_batch()
    figures = [trainer.train_step(batch) for _ in range(80)]
    assert float(figures[-1]["contrastive"]) < 0.5
    assert float(figures[-1]["mse"]) < float(figures[0]["mse"]) / 3
