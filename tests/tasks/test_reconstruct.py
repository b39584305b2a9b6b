"""Stage 2: what trains and what must not move by a bit, the terms of both phases, and that a batch improves."""

from __future__ import annotations

import pytest
import torch
from tiny_qlip import changed, copy_of, scene_batch, tiny_model, trainer_of
from tiny_reconstruct import PlainSteps, tiny_config, tiny_task
from torch import Tensor

from qlip.core.errors import UserError
from qlip.core.pixels import to_unit
from qlip.engine.interfaces import OptimizerConfig
from qlip.models.qlip.modeling import QLIPModel
from qlip.tasks import reconstruct
from qlip.tasks.reconstruct import ReconstructConfig, ReconstructTask

BOTTLENECK = ("vision_model.quant_embed.", "vision_model.quant_embed_post.")
TRAINED = (*BOTTLENECK, "vision_decoder.")


@torch.no_grad()
def zero_shot_path(model: QLIPModel) -> dict[str, Tensor]:
    """Everything that stage 2 must leave alone, for one batch."""
    batch = scene_batch()
    output = model(batch["pixel_values"], batch["input_ids"], batch["attention_mask"], output_hidden_states=True)
    states = {f"state {i}": state for i, state in enumerate(output.vision_model_output.hidden_states)}
    return states | {
        "pre_quant": output.vision_model_output.pre_quant,
        "pooled": output.vision_model_output.pooler_output,
        "image_embeds": output.image_embeds,
        "text_embeds": output.text_embeds,
        "logits": output.logits_per_image,
    }


def test_the_defaults_are_table_8s_and_bsq_vits():
    config = ReconstructConfig()
    weights = (config.pixel_weight, config.quantizer_weight, config.perceptual_weight, config.gan_weight)
    assert weights == (1.0, 1.0, 0.1, 0.1)
    assert (config.r1_gamma, config.r1_every, config.gan_start_step) == (10.0, 16, 0)
    assert (config.gan_loss, config.gan_warmup_steps, config.lecam_weight) == ("nonsaturating", 0, 0)
    assert not config.adaptive_gan_weight and not config.add_quantizer
    assert config.optimizer.part_lrs == {"model.vision_decoder": 1e-4}
    for optimizer in (config.optimizer, config.discriminator_optimizer):
        assert (optimizer.name, optimizer.betas, optimizer.weight_decay) == ("adamw", (0.9, 0.95), 0.05)
        assert optimizer.clip_norm == 1


def test_only_bottleneck_and_decoder_move_and_the_zero_shot_path_does_not_move_by_a_bit(tmp_path):
    """Bits do change, and only by the bottleneck: with its old weights they are the old ones."""
    task, batch = tiny_task(optimizer=OptimizerConfig(lr=1e-2, warmup_steps=1)), scene_batch()
    before, path = copy_of(task.model.state_dict()), zero_shot_path(task.model)
    bits = task.model.encode(batch["pixel_values"])
    trainer = trainer_of(task, tmp_path)
    for _ in range(6):
        trainer.train_step([batch])
    model = trainer.whole_model()
    after = model.state_dict()
    assert changed(before, after) == {name for name in before if name.startswith(TRAINED)}
    assert len(path) == 7 and not changed(path, zero_shot_path(model))
    assert not torch.equal(model.encode(batch["pixel_values"]), bits)
    old = {name: before[name] if name.startswith(BOTTLENECK) else tensor for name, tensor in after.items()}
    model.load_state_dict(old)
    assert torch.equal(model.encode(batch["pixel_values"]), bits)


def test_a_quantizer_that_is_added_in_stage_2_trains_and_the_encoder_stays(tmp_path):
    """Table 3c, recipe 2: stage 1 had none, so the bottleneck is fresh and everything else stage 1's."""
    stage1, model = tiny_model(quantizer="none"), tiny_model(quantizer="bsq")
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in stage1.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    missing = model.load_state_dict(stage1.state_dict(), strict=False)
    assert not missing.unexpected_keys and all(name.startswith(BOTTLENECK) for name in missing.missing_keys)
    path = zero_shot_path(stage1)
    task, batch = ReconstructTask(model, tiny_config(add_quantizer="bsq")), scene_batch()
    assert not changed(path, zero_shot_path(model))
    before = copy_of(model.state_dict())
    steps = PlainSteps(task)
    figures = [steps.take([batch]) for _ in range(30)]
    assert changed(before, model.state_dict()) == {name for name in before if name.startswith(TRAINED)}
    assert not changed(path, zero_shot_path(model))
    assert figures[-1]["mse"] < 0.7 * figures[0]["mse"]
    assert {"quantizer_loss", "bits_alive"} <= figures[0].keys()


def test_a_model_without_quantizer_trains_its_decoder():
    task = ReconstructTask(tiny_model(quantizer="none"), tiny_config())
    before = copy_of(task.model.state_dict())
    figures = PlainSteps(task).take([scene_batch()])
    assert "quantizer_loss" not in figures and "generator_loss" in figures
    assert changed(before, task.model.state_dict()) == {n for n in before if n.startswith("vision_decoder.")}


def test_no_tensor_of_the_zero_shot_path_has_a_gradient():
    task = tiny_task()
    terms = task.loss(task.phases(0)[0], scene_batch(), 0)
    sum(value for name, value in terms.items() if name.endswith("_loss")).backward()
    for name, parameter in task.model.named_parameters():
        assert (parameter.grad is not None) == name.startswith(TRAINED), name


def test_each_phase_moves_its_own_network_only(tmp_path):
    task, batch = tiny_task(), scene_batch()
    trainer = trainer_of(task, tmp_path)
    moves = []
    whole = task.after_step

    def after_step(phase, terms):
        nonlocal before
        after = copy_of(trainer.modules.state_dict())
        moves.append((phase.name, {name.split(".")[0] for name in changed(before, after)}))
        before = after
        whole(phase, terms)

    task.after_step = after_step
    before = copy_of(trainer.modules.state_dict())
    trainer.train_step([batch])
    trainer.train_step([batch])
    assert moves == [("decoder", {"model"}), ("discriminator", {"discriminator"})] * 2


def test_terms_are_the_configs_weights_times_what_is_logged():
    task = tiny_task(pixel_weight=2.0, perceptual_weight=3.0, quantizer_weight=0.0, gan_weight=0.5)
    batch = scene_batch()
    terms = {name: value.detach() for name, value in task.loss(task.phases(0)[0], batch, 0).items()}
    assert float(terms["pixel_loss"]) == pytest.approx(2 * float(terms["mse"]))
    assert float(terms["perceptual_loss"]) == pytest.approx(3 * float(terms["encoder"]))
    assert float(terms["generator_loss"]) == pytest.approx(0.5 * float(terms["generator"]))
    assert float(terms["quantizer_loss"]) == 0
    with torch.no_grad():
        fake = task.model(batch["pixel_values"]).reconstructions
        logits = task.discriminator(2 * to_unit(fake) - 1)
        softplus = torch.log1p(torch.exp(-logits)).mean()
    assert float(terms["generator"]) == pytest.approx(float(softplus), rel=1e-4)


def test_gan_weight_zero_leaves_one_phase_and_no_discriminator(tmp_path):
    task = tiny_task(gan_weight=0.0)
    assert [phase.name for phase in task.phases(0)] == ["decoder"]
    assert task.modules().keys() == {"model"}
    figures = trainer_of(task, tmp_path).train_step([scene_batch()])
    assert "generator_loss" not in figures and "pixel_loss" in figures


def test_options_that_do_nothing_without_discriminator_are_named():
    with pytest.warns(UserWarning, match="lecam_weight, gan_warmup_steps has no effect with gan_weight 0"):
        tiny_task(gan_weight=0.0, lecam_weight=1e-3, gan_warmup_steps=5)


def test_the_perceptual_distance_of_one_batch_falls():
    steps, batch = PlainSteps(tiny_task()), scene_batch()
    figures = [steps.take([batch]) for _ in range(80)]
    assert float(figures[-1]["encoder"]) < 0.8 * float(figures[0]["encoder"])
    assert float(figures[-1]["mse"]) < float(figures[0]["mse"]) / 2


def test_lpips_without_its_weights_is_one_line():
    with pytest.raises(UserError, match=r"--task\.vgg-weights FILE") as refused:
        tiny_task(perceptual="lpips")
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="no VGG-16 weights at nowhere"):
        tiny_task(perceptual="lpips", vgg_weights="nowhere.pth")


def test_the_largest_power_of_two():
    sizes = [8, 9, 16, 48, 255, 256, 392]
    assert [reconstruct._largest_power_of_two(size) for size in sizes] == [8, 8, 16, 32, 128, 256, 256]
