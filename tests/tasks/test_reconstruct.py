"""Stage 2: what trains and what must not move by a bit, the two phases, lazy R1, crops, and that a batch improves."""

from __future__ import annotations

import pytest
import torch
from tiny_qlip import changed, copy_of, scene_batch, tiny_model, trainer_of

from qlip.core.errors import UserError
from qlip.core.pixels import to_unit
from qlip.engine.interfaces import OptimizerConfig
from qlip.engine.trainer import only_training
from qlip.losses.adversarial import r1_penalty
from qlip.tasks import reconstruct
from qlip.tasks.reconstruct import ReconstructConfig, ReconstructTask

TRAINED = ("vision_model.quant_embed.", "vision_model.quant_embed_post.", "vision_decoder.")


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


def test_the_defaults_are_table_8s_and_bsq_vits():
    config = ReconstructConfig()
    weights = (config.pixel_weight, config.quantizer_weight, config.perceptual_weight, config.gan_weight)
    assert weights == (1.0, 1.0, 0.1, 0.1)
    assert (config.r1_gamma, config.r1_every, config.gan_start_step) == (10.0, 16, 0)
    assert config.optimizer.part_lrs == {"model.vision_decoder": 1e-4}


def test_only_bottleneck_and_decoder_move_and_embeddings_do_not_move_by_a_bit(tmp_path):
    task, batch = tiny_task(), scene_batch()
    inputs = (batch["pixel_values"], batch["input_ids"], batch["attention_mask"])
    before = copy_of(task.model.state_dict())
    with torch.no_grad():
        first = task.model(*inputs)
    trainer = trainer_of(task, tmp_path)
    for _ in range(4):
        trainer.train_step(batch)
    with torch.no_grad():
        last = task.model(*inputs)
    moved = changed(before, task.model.state_dict())
    assert moved == {name for name in before if name.startswith(TRAINED)}
    assert torch.equal(first.image_embeds, last.image_embeds)
    assert torch.equal(first.text_embeds, last.text_embeds)
    assert torch.equal(first.logits_per_image, last.logits_per_image)
    assert not torch.equal(first.reconstructions, last.reconstructions)


def test_no_tensor_of_the_zero_shot_path_has_a_gradient():
    task = tiny_task()
    terms = task.loss(task.phases(0)[0], scene_batch(), 0)
    sum(value for name, value in terms.items() if name.endswith("_loss")).backward()
    for name, parameter in task.model.named_parameters():
        assert (parameter.grad is not None) == name.startswith(TRAINED), name


def test_each_phase_moves_its_own_network_only(tmp_path, monkeypatch):
    task, batch = tiny_task(), scene_batch()
    trainer = trainer_of(task, tmp_path)
    moves = []
    whole = trainer._optimize

    def optimize(phase, batch):
        before = copy_of(trainer.modules.state_dict())
        figures = whole(phase, batch)
        moves.append((phase.name, {name.split(".")[0] for name in changed(before, trainer.modules.state_dict())}))
        return figures

    monkeypatch.setattr(trainer, "_optimize", optimize)
    trainer.train_step(batch)
    trainer.train_step(batch)
    assert moves == [("decoder", {"model"}), ("discriminator", {"discriminator"})] * 2


def test_the_generator_term_reaches_the_decoder_but_not_the_discriminators_weights(tmp_path):
    task = tiny_task()
    trainer = trainer_of(task, tmp_path)
    decoder, discriminator = task.phases(0)
    with only_training(decoder, trainer.modules):
        terms = task.loss(decoder, scene_batch(), 0)
    terms["generator_loss"].backward()
    assert all(p.grad is None for p in task.discriminator.parameters())
    assert task.model.vision_decoder.conv_out.weight.grad.abs().max() > 0
    task.model.zero_grad()
    with only_training(discriminator, trainer.modules):
        terms = task.loss(discriminator, scene_batch(), 0)
    sum(value for name, value in terms.items() if name.endswith("_loss")).backward()
    assert all(p.grad is not None for p in task.discriminator.parameters())
    assert all(p.grad is None for p in task.model.parameters())


def test_terms_are_the_configs_weights_times_what_is_logged():
    task = tiny_task(pixel_weight=2.0, perceptual_weight=3.0, quantizer_weight=0.0, gan_weight=0.5)
    batch = scene_batch()
    terms = {name: value.detach() for name, value in task.loss(task.phases(0)[0], batch, 0).items()}
    assert float(terms["pixel_loss"]) == pytest.approx(2 * float(terms["mse"]))
    assert float(terms["perceptual_loss"]) == pytest.approx(3 * float(terms["encoder"]))
    assert float(terms["quantizer_loss"]) == 0
    with torch.no_grad():
        fake = task.model(batch["pixel_values"]).reconstructions
        logits = task.discriminator(2 * to_unit(fake) - 1)
        softplus = torch.log1p(torch.exp(-logits)).mean()
    assert float(terms["generator_loss"]) == pytest.approx(0.5 * float(softplus), rel=1e-4)


def test_gan_weight_zero_leaves_one_phase_and_no_discriminator(tmp_path):
    task = tiny_task(gan_weight=0.0)
    assert [phase.name for phase in task.phases(0)] == ["decoder"]
    assert task.modules().keys() == {"model"}
    figures = trainer_of(task, tmp_path).train_step(scene_batch())
    assert "generator_loss" not in figures and "pixel_loss" in figures


def test_the_generator_term_waits_for_its_start_while_the_discriminator_trains(tmp_path):
    trainer = trainer_of(tiny_task(gan_start_step=2), tmp_path)
    figures = [trainer.train_step(scene_batch()) for _ in range(3)]
    assert ["decoder/generator_loss" in f for f in figures] == [False, False, True]
    assert all("discriminator/discriminator_loss" in f for f in figures)


def test_r1_comes_every_so_many_steps_multiplied_by_as_much(tmp_path):
    task, batch = tiny_task(r1_every=3, r1_gamma=4.0), scene_batch()
    trainer = trainer_of(task, tmp_path)
    real = 2 * to_unit(batch["pixel_values"]) - 1
    for step in range(7):
        penalty = float(r1_penalty(task.discriminator, real).detach())
        figures = trainer.train_step(batch)
        if step % 3 == 0:
            assert float(figures["discriminator/r1_loss"]) == pytest.approx(4.0 / 2 * 3 * penalty, rel=1e-4)
        else:
            assert "discriminator/r1_loss" not in figures


def test_r1_gamma_zero_leaves_it_out(tmp_path):
    assert "discriminator/r1_loss" not in trainer_of(tiny_task(r1_gamma=0.0), tmp_path).train_step(scene_batch())


def test_pictures_of_48_pixels_are_cut_alike_in_both_phases(monkeypatch):
    """The discriminator takes 32; its phase sees the windows of the decoder's phase, and every step draws anew."""
    task, batch = tiny_task(48), scene_batch(4, image_size=48)
    assert task.discriminator.image_size == 32
    seen = []
    monkeypatch.setattr(task.discriminator, "forward", lambda x: seen.append(x.detach()) or x.flatten(1).mean(1))
    decoder, discriminator = task.phases(1)
    real = 2 * to_unit(batch["pixel_values"]) - 1
    windows = []
    for _ in range(4):
        task.loss(decoder, batch, 1)
        task.loss(discriminator, batch, 1)
        generated, real_crop, fake_crop = seen[-3:]
        assert torch.equal(generated, fake_crop)
        fake = 2 * to_unit(task.model(batch["pixel_values"]).reconstructions.detach()) - 1
        windows += [
            (top, left)
            for top in range(17)
            for left in range(17)
            if torch.equal(real[..., top : top + 32, left : left + 32], real_crop)
            and torch.equal(fake[..., top : top + 32, left : left + 32], fake_crop)
        ]
    assert len(windows) == 4 and len(set(windows)) > 1


def test_powers_of_two_are_not_cut():
    task, batch = tiny_task(), scene_batch(2)
    real, fake = task._crops(batch["pixel_values"], batch["pixel_values"] * 2)
    assert torch.equal(real, 2 * to_unit(batch["pixel_values"]) - 1)
    assert torch.equal(fake, 2 * to_unit(batch["pixel_values"] * 2) - 1)


def test_the_perceptual_distance_of_one_batch_falls(tmp_path):
    trainer, batch = trainer_of(tiny_task(optimizer=OptimizerConfig(lr=3e-3, warmup_steps=1)), tmp_path), scene_batch()
    figures = [trainer.train_step(batch) for _ in range(60)]
    assert float(figures[-1]["decoder/encoder"]) < 0.7 * float(figures[0]["decoder/encoder"])
    assert float(figures[-1]["decoder/mse"]) < float(figures[0]["decoder/mse"]) / 2


def test_lpips_without_its_weights_is_one_line():
    with pytest.raises(UserError, match=r"--task\.vgg-weights FILE") as refused:
        tiny_task(perceptual="lpips")
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="no VGG-16 weights at nowhere"):
        tiny_task(perceptual="lpips", vgg_weights="nowhere.pth")


def test_the_largest_power_of_two():
    sizes = [8, 9, 16, 48, 255, 256, 392]
    assert [reconstruct._largest_power_of_two(size) for size in sizes] == [8, 8, 16, 32, 128, 256, 256]
