"""`qlip check`: the paper's parameter totals, FLOPs in closed form, variants of training, and what is printed."""

from __future__ import annotations

import pytest
from check_options import options

from qlip.apps.check import check, print_report
from qlip.apps.check_files import lpips_without_weights, meta_model
from qlip.apps.check_measure import measure, parts_of, variants_of
from qlip.core.errors import UserError
from qlip.engine.step_cost import DryRun
from qlip.recipes import find_recipe
from qlip.tasks.align import AlignConfig, AlignTask

PARAMETERS = {  # PAPER 2.7: encoder, bottleneck, decoder, text tower, projections with temperature
    "qlip_b_16_256": (85_915_392, 1_224_988, 88_471_808, 63_165_952, 655_873),
    "qlip_b_8_256": (86_062_848, 1_224_988, 87_881_408, 63_165_952, 655_873),
    "qlip_l_14_392": (303_858_624, 2_157_596, 307_657_518, 123_060_480, 1_377_025),
}


@pytest.mark.parametrize("recipe", PARAMETERS)
def test_the_papers_parameters(recipe):
    config = find_recipe(recipe)
    model, problems = meta_model(config)
    assert problems == [] and {p.device.type for p in model.parameters()} == {"meta"}
    parts = parts_of(DryRun(AlignTask(model, AlignConfig()), bf16=True))
    assert tuple(part.parameters for part in parts) == PARAMETERS[recipe]
    assert all(part.trained == part.parameters for part in parts)


def test_forward_flops_of_b_16_are_the_closed_form():
    model, _ = meta_model(find_recipe("qlip_b_16_256"))
    found = {part.name: part.flops for part in parts_of(DryRun(AlignTask(model, AlignConfig()), bf16=True))}
    width, ffn, layers, tokens = 768, 2048, 12, 256

    def blocks(count: int) -> int:
        return layers * (2 * count * (4 * width**2 + 3 * width * ffn) + 4 * count**2 * width)

    patches = 2 * tokens * 3 * 16**2 * width
    assert found["vision encoder"] == blocks(tokens + 1) + patches
    assert found["decoder"] == blocks(tokens) + 2 * tokens * (width * ffn + ffn * 3 * 16**2)
    assert found["bottleneck"] == 2 * tokens * (2 * width**2 + 2 * width * 28)


def test_lpips_needs_no_file_to_be_counted():
    network = lpips_without_weights()
    assert sum(p.numel() for p in network.parameters()) == 14_714_688 + 64 + 128 + 256 + 512 + 512
    assert {p.untyped_storage().nbytes() for name, p in network.named_parameters() if "slice" in name} == {4}


def test_stage_2_has_its_discriminator_and_lpips_and_two_variants():
    words = ("--task.perceptual", "lpips", "--model.image-size", "32", "--data.global-batch-size", "32")
    report = check(options("scenes_tiny_stage2", *words, "--task.discriminator-max-channels", "4"))
    parts = {part.name: part for part in report.parts}
    assert list(parts)[-2:] == ["discriminator", "LPIPS"]
    assert parts["LPIPS"].trained == parts["vision encoder"].trained == parts["text tower"].trained == 0
    assert parts["discriminator"].trained == parts["discriminator"].parameters > 0
    full, bare = report.variants
    assert (full.name, bare.name) == ("with LPIPS + GAN", "without LPIPS + GAN")
    assert full.plan.fixed.replicated == parts["LPIPS"].parameters and bare.plan.fixed.replicated == 0
    assert full.plan.bytes_per_sample(8) > 2 * bare.plan.bytes_per_sample(8) > 0
    assert 0 < full.plan.largest_batch(2e9) < bare.plan.largest_batch(2e9)
    crops = 2 * 3 * 32**2 * 4
    assert full.plan.parts(8)["waiting micro-batches"] == 3 * 8 * crops
    assert bare.plan.parts(8)["waiting micro-batches"] == 0


def test_r1_counts_in_its_share():
    def float32_flops(*words: str) -> float:
        small = ("--task.discriminator-max-channels", "4")
        name, config, _ = variants_of(options("scenes_tiny_stage2", *small, *words).run)[0]
        return measure(name, config, perceptual=True, num_gpus=1).flops["float32"]

    without, always = float32_flops("--task.r1-gamma", "0"), float32_flops("--task.r1-every", "1")
    assert always > 1.2 * without
    assert float32_flops("--task.r1-every", "16") == pytest.approx(without + (always - without) / 16)


def test_accumulation_takes_a_second_forward_pass_and_more_gpus_less_time():
    alone = check(options("scenes_tiny"))
    kept, recomputed = alone.variants
    assert (kept.name, recomputed.name) == ("activations kept", "activations recomputed")
    assert kept.plan.bytes_per_sample(8) > recomputed.plan.bytes_per_sample(8)
    assert sum(kept.flops.values()) < sum(recomputed.flops.values())
    several = check(options("scenes_tiny", "--data.global-batch-size", "32", "--gpus", "2"))
    more = several.flops["bfloat16"] - alone.flops["bfloat16"]
    assert more == pytest.approx(kept.forward_flops["bfloat16"])
    pairs = 12 * 16 * 32  # width 16, 32 pairs; the few of the measured batch are in both
    more = several.flops["float32"] - kept.flops["float32"] - kept.forward_flops["float32"]
    assert more == pytest.approx(pairs)
    assert several.seconds / alone.seconds == pytest.approx(2 * sum(several.flops.values()) / sum(alone.flops.values()),
                                                            rel=0.1)  # fmt: skip


def test_the_report_reads_in_a_log_file(capsys):
    print_report(check(options("scenes_tiny", "--gpus", "8", "--vram", "1", "--trainer.compile")))
    out = capsys.readouterr().out
    tables = [line for line in out.splitlines() if line[:1] in "┏┃┡│├└"]
    assert len(tables) > 20 and max(map(len, tables)) <= 80
    for said in (
        "scenes_tiny: parts", "vision encoder", "model in all", "memory of one of 8 GPUs at batch 8, activations kept",
        "does NOT fit 1 GB", "activations recomputed", "a step: 64 pictures = 8 (GPUs, ddp) x 1 (micro-batches) x 8",
        "suggested: 0 (all at once)", "an estimate from 35% of 989 TFLOP/s", "trainer.compile is on",
        "not ready: no training data: add --data.train",
    ):  # fmt: skip
        assert said in out
    assert "ready: qlip train" not in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--gpus", "0"), "--gpus is 0: give more than 0"),
        (("--mfu", "-1"), "--mfu is -1.0: give more than 0"),
        (("--data.batch-size", "0"), "data.batch_size is 0: give at least 1"),
        (("--model.patch-size", "7"), "model: image_size 16 is not a multiple of patch_size 7; change the --model"),
        (("--model.quantizer", "fsq"), "model: "),
    ],
)
def test_impossible_options_are_one_line(words, said):
    with pytest.raises(UserError) as refused:
        check(options("scenes_tiny", *words))
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "words",
    [
        ("--model.quantizer", "none"),
        ("--model.quantizer", "lfq"),
        ("--model.quantizer", "vq", "--model.group-size", "4"),
        ("--task.contrastive", "siglip"),
        ("--task.contrastive-weight", "0"),
        ("--task.pixel-weight", "0"),
        ("--task.balance", "running"),
        ("--trainer.precision", "fp32"),
    ],
)
def test_other_kinds_of_training_can_be_measured(words):
    variant = measure("as it is", options("scenes_tiny", *words).run, perceptual=True, num_gpus=1)
    assert variant.plan.bytes_per_sample(8) > 0 and sum(variant.flops.values()) > 0
    assert (variant.plan.contrast.width == 0) == ("--task.contrastive-weight" in words)
    assert ("bfloat16" in variant.flops) == ("fp32" not in words)
