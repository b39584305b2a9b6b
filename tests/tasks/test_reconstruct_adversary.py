"""The adversary of stage 2: its losses, lazy R1, late start, LeCAM, adaptive weight, crops, and micro-batches."""

from __future__ import annotations

import pytest
import torch
from tiny_qlip import scene_batch, trainer_of
from tiny_reconstruct import PlainSteps, tiny_task
from torch.nn import functional as F

from qlip.core.pixels import to_unit
from qlip.engine.parallel import set_activation_checkpointing
from qlip.losses.adversarial import r1_penalty


def unit_range(pictures: torch.Tensor) -> torch.Tensor:
    """CLIP-normalised -> [-1, 1]."""
    return 2 * to_unit(pictures) - 1


def test_the_generator_term_reaches_the_decoder_and_the_discriminators_phase_does_not():
    task = tiny_task()
    decoder, discriminator = task.phases(0)
    task.discriminator.requires_grad_(False)
    task.loss(decoder, scene_batch(), 0)["generator_loss"].backward()
    assert task.model.vision_decoder.conv_out.weight.grad.abs().max() > 0
    task.discriminator.requires_grad_(True)
    task.model.zero_grad()
    terms = task.loss(discriminator, scene_batch(), 0)
    sum(value for name, value in terms.items() if name.endswith("_loss")).backward()
    assert all(p.grad is not None for p in task.discriminator.parameters())
    assert all(p.grad is None for p in task.model.parameters())


def test_hinge_terms_are_those_of_the_logits():
    task, batch = tiny_task(gan_loss="hinge"), scene_batch()
    decoder, discriminator = task.phases(1)
    found = task.loss(decoder, batch, 1) | task.loss(discriminator, batch, 1)
    with torch.no_grad():
        real = task.discriminator(unit_range(batch["pixel_values"]))
        fake = task.discriminator(unit_range(task.model(batch["pixel_values"]).reconstructions))
    torch.testing.assert_close(found["generator"].detach(), -fake.mean())
    torch.testing.assert_close(found["generator_loss"].detach(), -0.1 * fake.mean())
    expected = ((1 - real).clamp_min(0).mean() + (1 + fake).clamp_min(0).mean()) / 2
    torch.testing.assert_close(found["discriminator_loss"].detach(), expected)
    torch.testing.assert_close(found["real_logit"].detach(), real.mean())
    torch.testing.assert_close(found["fake_logit"].detach(), fake.mean())


def test_the_generator_term_waits_for_its_start_and_rises_while_the_discriminator_trains():
    task, batch = tiny_task(gan_start_step=2, gan_warmup_steps=2, gan_weight=0.5), scene_batch()
    steps = PlainSteps(task)
    figures = [steps.take([batch]) for _ in range(5)]
    assert all("discriminator_loss" in f for f in figures)
    assert ["generator_loss" in f for f in figures] == [False, False, True, True, True]
    ratios = [float(f["generator_loss"] / f["generator"]) for f in figures[2:]]
    assert ratios == pytest.approx([0.25, 0.5, 0.5])


def test_r1_comes_every_so_many_steps_multiplied_by_as_much():
    task, batch = tiny_task(r1_every=3, r1_gamma=4.0), scene_batch()
    steps = PlainSteps(task)
    for step in range(7):
        penalty = float(r1_penalty(task.discriminator, unit_range(batch["pixel_values"])).detach())
        figures = steps.take([batch])
        if step % 3 == 0:
            assert float(figures["r1"]) == pytest.approx(penalty, rel=1e-4)
            assert float(figures["r1_loss"]) == pytest.approx(4.0 / 2 * 3 * penalty, rel=1e-4)
        else:
            assert not {"r1", "r1_loss"} & figures.keys()
    assert "r1_loss" not in PlainSteps(tiny_task(r1_gamma=0.0)).take([batch])


@pytest.mark.parametrize("gan_loss", ["nonsaturating", "hinge"])
def test_lecam_penalises_by_the_averages_of_earlier_steps_over_all_micro_batches(gan_loss, monkeypatch):
    task = tiny_task(lecam_weight=0.25, gan_loss=gan_loss, r1_gamma=0.0)
    assert task.modules().keys() == {"model", "discriminator", "lecam"}
    batches = [{"pixel_values": part} for part in scene_batch(8)["pixel_values"].split(4)]
    task.lecam.update(real_logit=torch.tensor(0.5), fake_logit=torch.tensor(-0.5))
    seen, whole = [], task.discriminator.forward
    monkeypatch.setattr(task.discriminator, "forward", lambda x: seen.append(whole(x)) or seen[-1])
    steps, averages = PlainSteps(task), (0.5, -0.5)
    for _ in range(3):
        seen.clear()
        figures = steps.take(batches)
        logits = [pair.detach().double() for pair in seen[2:]]  # behind the generator's two: real, fake, real, fake
        real, fake = torch.cat(logits[::2]), torch.cat(logits[1::2])
        above, below = (real - averages[1]).clamp_min(0), (averages[0] - fake).clamp_min(0)
        penalty = float(above.square().mean() + below.square().mean())
        assert penalty > 0
        assert float(figures["lecam"]) == pytest.approx(penalty, rel=1e-5)
        assert float(figures["lecam_loss"]) == pytest.approx(0.25 * penalty, rel=1e-5)
        means = (float(real.mean()), float(fake.mean()))
        averages = tuple(0.99 * old + 0.01 * new for old, new in zip(averages, means, strict=True))
        assert (float(task.lecam.real_average), float(task.lecam.fake_average)) == pytest.approx(averages, abs=1e-6)
    steps.take(batches, skip="discriminator")
    assert (float(task.lecam.real_average), float(task.lecam.fake_average)) == pytest.approx(averages, abs=1e-6)


def test_lecams_averages_come_back_with_a_checkpoint(tmp_path):
    first, batch = trainer_of(tiny_task(lecam_weight=1.0), tmp_path), scene_batch()
    first.train_step([batch])
    state = first.modules.state_dict()
    assert float(state["lecam.started"]) == 1 and float(state["lecam.real_average"]) != 0
    second = tiny_task(lecam_weight=1.0)
    for name, module in second.modules().items():
        module.load_state_dict({k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")})
    for task in (first.task, second):
        task.loss(task.phases(1)[0], batch, 1)
    lecam = [task.loss(task.phases(1)[1], batch, 1)["lecam"].detach() for task in (first.task, second)]
    assert lecam[0] > 0 and torch.equal(*lecam)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_adaptive_weight_is_the_ratio_of_autograds_gradients_at_the_last_layer(checkpointing):
    task, batch = tiny_task(adaptive_gan_weight=True, perceptual_weight=0.3), scene_batch()
    if checkpointing:
        set_activation_checkpointing(task.model, enabled=True)
    weight = task.model.vision_decoder.conv_out.weight
    terms = task.loss(task.phases(0)[0], batch, 0)
    assert not task.model.vision_decoder.conv_out._forward_hooks
    real = batch["pixel_values"]
    fake = task.model(real).reconstructions
    reference = F.mse_loss(to_unit(fake), to_unit(real)) + 0.3 * task.perceptual(fake, real).mean()
    generator = F.softplus(-task.discriminator(unit_range(fake))).mean()
    norms = [torch.autograd.grad(term, weight, retain_graph=True)[0].norm() for term in (reference, generator)]
    expected = float(norms[0] / (norms[1] + 1e-4))
    assert float(terms["adaptive_weight"]) == pytest.approx(expected, rel=1e-5)
    assert float(terms["generator_loss"].detach()) == pytest.approx(
        0.1 * expected * float(generator.detach()), rel=1e-5
    )
    terms["generator_loss"].backward(retain_graph=True)
    pull = weight.grad.norm() / 0.1  # at a_g = 1 as hard as the reference, but for the 1e-4 in the denominator
    torch.testing.assert_close(pull, norms[0] * norms[1] / (norms[1] + 1e-4), rtol=1e-4, atol=0)


def test_the_adaptive_weight_has_a_limit_and_waits_for_the_start():
    task, batch = tiny_task(adaptive_gan_weight=True, adaptive_gan_max=1e-3, gan_start_step=1), scene_batch()
    decoder = task.phases(0)[0]
    assert "adaptive_weight" not in task.loss(decoder, batch, 0)
    assert float(task.loss(decoder, batch, 1)["adaptive_weight"]) == pytest.approx(1e-3)


def test_training_with_every_option_on_improves_a_batch():
    options = {"adaptive_gan_weight": True, "lecam_weight": 1e-2, "gan_loss": "hinge", "gan_warmup_steps": 10}
    steps, batch = PlainSteps(tiny_task(**options)), scene_batch()
    figures = [steps.take([batch]) for _ in range(40)]
    assert all(value.isfinite() for f in figures for value in f.values())
    assert figures[-1]["mse"] < 0.7 * figures[0]["mse"]


def test_the_discriminator_sees_the_micro_batches_in_the_decoders_order(monkeypatch):
    task = tiny_task(r1_gamma=0.0)
    pictures = scene_batch(12)["pixel_values"].split(4)
    seen = []
    whole = task.discriminator.forward
    monkeypatch.setattr(task.discriminator, "forward", lambda x: seen.append(x.detach().clone()) or whole(x))
    PlainSteps(task).take([{"pixel_values": part} for part in pictures])
    generated, judged = seen[:3], seen[3:]
    assert len(judged) == 6
    for index, part in enumerate(pictures):
        assert torch.equal(judged[2 * index], unit_range(part))
        assert torch.equal(judged[2 * index + 1], generated[index])


def test_what_a_skipped_step_leaves_is_dropped():
    task = tiny_task()
    first, second = (scene_batch(8)["pixel_values"][rows] for rows in (slice(4), slice(4, 8)))
    steps = PlainSteps(task)
    steps.take([{"pixel_values": first * float("nan")}] * 2, skip="decoder")
    figures = steps.take([{"pixel_values": second}, {"pixel_values": first}])
    assert all(value.isfinite() for value in figures.values())
    assert not task._crops


def test_micro_batches_give_the_mean_of_their_gradients():
    """Groups of the minibatch standard deviation do not span micro-batches, so the parts are what they are alone."""
    task = tiny_task(lecam_weight=0.1)
    task.lecam.update(real_logit=torch.tensor(0.5), fake_logit=torch.tensor(0.1))
    parts = scene_batch(8)["pixel_values"].split(4)
    gradients = []
    for group in ([parts[0]], [parts[1]], parts):
        task.discriminator.zero_grad()
        for index in (0, 1):
            for part in group:
                terms = task.loss(task.phases(0)[index], {"pixel_values": part}, 0)
                if index:
                    loss = sum(value for name, value in terms.items() if name.endswith("_loss"))
                    (loss / len(group)).backward(inputs=list(task.discriminator.parameters()))
        gradients.append([p.grad.clone() for p in task.discriminator.parameters()])
    for one, other, both in zip(*gradients, strict=True):
        torch.testing.assert_close((one + other) / 2, both, rtol=1e-4, atol=1e-6)


def test_pictures_of_48_pixels_are_cut_alike_in_both_phases(monkeypatch):
    """The discriminator takes 32; its phase sees the windows of the decoder's phase, and every step draws anew."""
    task, batch = tiny_task(48), scene_batch(4, image_size=48)
    assert task.discriminator.image_size == 32
    seen = []
    monkeypatch.setattr(task.discriminator, "forward", lambda x: seen.append(x.detach()) or x.flatten(1).mean(1))
    decoder, discriminator = task.phases(1)
    real = unit_range(batch["pixel_values"])
    windows = []
    for _ in range(4):
        task.loss(decoder, batch, 1)
        task.loss(discriminator, batch, 1)
        generated, real_crop, fake_crop = seen[-3:]
        assert torch.equal(generated, fake_crop)
        fake = unit_range(task.model(batch["pixel_values"]).reconstructions.detach())
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
    real, fake = task._cut(batch["pixel_values"], batch["pixel_values"] * 2)
    assert torch.equal(real, unit_range(batch["pixel_values"]))
    assert torch.equal(fake, unit_range(batch["pixel_values"] * 2))
