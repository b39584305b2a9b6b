"""A recipe's task without memory, measured: its parts, its variants, the memory and FLOPs of its steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from qlip.apps.check_files import meta_model, stage2_task
from qlip.engine.interfaces import JointTask, Task
from qlip.engine.planner import CONTRASTIVE_FLOPS, Contrast, Fixed, MemoryPlan, Moments, Spread, amortised_flops
from qlip.engine.step_cost import BatchShapes, DryRun, StepCost
from qlip.models.qlip.modeling import QLIPModel
from qlip.nn.blocks import BlockStack
from qlip.quantizers.bsq import BinarySphericalQuantizer
from qlip.recipes.run import RunConfig
from qlip.tasks.align import AlignConfig, AlignTask
from qlip.tasks.reconstruct import ReconstructConfig, ReconstructTask

SIZES = (8, 16)
"""Batch sizes that are measured; at least two of the discriminator's groups of four."""
USUAL_STEP = 1
"""A step on which nothing rare is due."""
PART_OF = {  # the longest prefix of a parameter's name decides
    "vision_model": "vision encoder",
    "vision_model.quant": "bottleneck",
    "vision_decoder": "decoder",
    "text_model": "text tower",
    "": "projections, temperature",
}


@dataclass(kw_only=True, slots=True)
class Part:
    """A line of the table of parts."""

    name: str
    """What it is."""
    parameters: int
    """How many."""
    trained: int
    """Those that an optimizer moves."""
    flops: float
    """Of its forward pass for one image, or one text."""


@dataclass(kw_only=True, slots=True)
class Variant:
    """One way of training, whose memory is known for every batch size."""

    name: str
    """What is on or off."""
    run: DryRun
    """Its task."""
    plan: MemoryPlan
    """Its memory."""
    flops: dict[str, float]
    """Of one step per sample, by dtype; of several micro-batches what each of them computes with gradient."""
    forward_flops: dict[str, float]
    """Of the first forward pass alone."""


def variants_of(config: RunConfig) -> list[tuple[str, RunConfig, bool]]:
    """The recipe, and what it is compared with: name, config, whether perceptual distances are computed."""
    if isinstance(config.task, ReconstructConfig):
        distance = "LPIPS" if config.task.perceptual == "lpips" else "encoder distance"
        name = f"{distance} + GAN" if config.task.gan_weight else distance
        bare = replace(config, task=replace(config.task, gan_weight=0.0, lecam_weight=0.0, adaptive_gan_weight=False))
        return [(f"with {name}", config, True), (f"without {name}", bare, False)]
    recomputed = config.trainer.activation_checkpointing
    other = replace(config, trainer=replace(config.trainer, activation_checkpointing=not recomputed))
    names = ("activations kept", "activations recomputed")
    return [(names[recomputed], config, True), (names[not recomputed], other, True)]


def measure(name: str, config: RunConfig, *, perceptual: bool, num_gpus: int) -> Variant:
    """Build the task without memory and measure its steps.

    Quantizers of vector-quantize-pytorch look at values, which there are none of: BSQ of their width takes their place.
    """
    model, _ = meta_model(config)
    if model.config.vision_config.quantizer not in ("bsq", "none"):
        model.vision_model.quantizer = BinarySphericalQuantizer(model.config.vision_config.latent_dim)
    beside = nn.Module()
    with torch.device("meta"):
        task: Task
        if isinstance(config.task, AlignConfig):
            task = AlignTask(model, replace(config.task, probe_every=0))
        else:
            task, beside = stage2_task(model, config.task, perceptual=perceptual)
    run = DryRun(
        task,
        others=[beside],
        bf16=config.trainer.precision != "fp32",
        activation_checkpointing=config.trainer.activation_checkpointing,
    )
    shapes = batch_shapes(model)
    rare = _rare_step(config)
    measured = [run.cost(shapes, batch_size=size, step=USUAL_STEP if rare is None else rare[0]) for size in SIZES]
    per_sample = _per_sample(measured[0].flops)
    if rare is not None and rare[1] > 1:
        usual = run.cost(shapes, batch_size=SIZES[0], step=rare[0] + 1)
        per_sample = amortised_flops(_per_sample(usual.flops), per_sample, every=rare[1])
    return Variant(
        name=name,
        run=run,
        plan=_plan(config, run, model, measured, num_gpus=num_gpus),
        flops=per_sample,
        forward_flops=_per_sample(measured[0].forward_flops),
    )


def _per_sample(flops: dict[str, float]) -> dict[str, float]:
    return {name: value / SIZES[0] for name, value in flops.items()}


def _rare_step(config: RunConfig) -> tuple[int, int] | None:
    """Of an adversary: a step with R1 on which the decoder feels it, and how many steps there are to one of these."""
    task = config.task
    if not isinstance(task, ReconstructConfig) or not task.gan_weight:
        return None
    every = task.r1_every if task.r1_gamma else 1
    return -(-task.gan_start_step // every) * every, every


def batch_shapes(model: QLIPModel) -> BatchShapes:
    """Of one sample: a picture and a text of full length."""
    side, length = model.config.vision_config.image_size, model.config.text_config.max_position_embeddings
    text = ((length,), torch.int64)
    return {"pixel_values": ((3, side, side), torch.float32), "input_ids": text, "attention_mask": text}


def _plan(config: RunConfig, run: DryRun, model: QLIPModel, measured: list[StepCost], *, num_gpus: int) -> MemoryPlan:
    blocks = [block for part in run.modules.modules() if isinstance(part, BlockStack) for block in part.layers]
    in_blocks = [count(block) for block in blocks]
    fixed = Fixed(
        weights=count(run.modules),
        trained=count(run.modules, trained=True),
        averaged=count(model) if config.trainer.ema_decay else 0,
        replicated=sum(count(module) for module in run.others),
        largest_block=max(in_blocks),
        outside_blocks=count(run.modules) - sum(in_blocks),
    )
    contrast = Contrast()
    if isinstance(config.task, AlignConfig) and config.task.contrastive_weight:
        contrast = Contrast(width=model.config.projection_dim, chunk=config.task.contrastive_chunk)
    parallel: Literal["none", "ddp", "fsdp"] = "none"
    if num_gpus > 1:
        parallel = "fsdp" if config.trainer.parallel == "fsdp" else "ddp"
    shapes = batch_shapes(model).values()
    return MemoryPlan(
        moments=Moments(measured[0], measured[1], sizes=SIZES),
        fixed=fixed,
        spread=Spread(num_gpus=num_gpus, parallel=parallel, global_batch=config.data.global_batch_size),
        contrast=contrast,
        sample_bytes=sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes),
    )


def count(module: nn.Module, *, trained: bool = False) -> int:
    """Parameters of a module, or those of them that train."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def training_flops(variant: Variant, config: RunConfig) -> dict[str, float]:
    """FLOPs of an optimizer step per sample as the recipe spreads it."""
    plan, batch_size = variant.plan, config.data.batch_size
    flops = dict(variant.flops)
    if isinstance(variant.run.task, JointTask) and plan.spread.micro_batches(batch_size) > 1:
        for name, value in variant.forward_flops.items():  # the first of the two passes
            flops[name] = flops.get(name, 0.0) + value
    pairs = CONTRASTIVE_FLOPS * plan.contrast.width * plan.spread.all_samples(batch_size)
    if pairs:
        flops["float32"] = flops.get("float32", 0.0) + pairs
    return flops


def parts_of(run: DryRun) -> list[Part]:
    """Parameters and forward FLOPs by part of the network, and of what only training needs."""
    model = run.modules["model"]
    assert isinstance(model, QLIPModel)
    flops = _part_flops(run, model)
    parts = {name: Part(name=name, parameters=0, trained=0, flops=flops.get(name, 0.0)) for name in PART_OF.values()}
    for name, parameter in model.named_parameters():
        part = parts[PART_OF[max((prefix for prefix in PART_OF if name.startswith(prefix)), key=len)]]
        part.parameters += parameter.numel()
        part.trained += parameter.numel() if parameter.requires_grad else 0
    found = [part for part in parts.values() if part.parameters]
    side = model.config.vision_config.image_size
    if isinstance(run.task, ReconstructTask) and run.task.discriminator is not None:
        discriminator = run.task.discriminator
        crop = (1, 3, discriminator.image_size, discriminator.image_size)
        found.append(_part("discriminator", discriminator, run.forward_flops(discriminator, crop)))
    for network in run.others:
        if count(network):
            found.append(_part("LPIPS", network, run.forward_flops(network, (1, 3, side, side), (1, 3, side, side))))
    return found


def _part(name: str, network: nn.Module, flops: float) -> Part:
    return Part(name=name, parameters=count(network), trained=count(network, trained=True), flops=flops)


def _part_flops(run: DryRun, model: QLIPModel) -> dict[str, float]:
    """Of one picture, or one text of full length, by part; projections are nothing beside them."""
    vision, decoder, text = model.config.vision_config, model.config.decoder_config, model.config.text_config
    tokens = vision.grid_size**2
    flops = {"vision encoder": run.forward_flops(model.vision_model, (1, 3, vision.image_size, vision.image_size))}
    if vision.quantizer != "none":
        down = run.forward_flops(model.vision_model.quant_embed, (1, tokens, vision.hidden_size))
        up = run.forward_flops(model.vision_model.quant_embed_post, (1, tokens, vision.latent_dim))
        flops["bottleneck"] = down + up
        flops["vision encoder"] -= down + up
    flops["decoder"] = run.forward_flops(model.vision_decoder, (1, tokens, decoder.hidden_size))
    ids = (1, text.max_position_embeddings)
    flops["text tower"] = run.forward_flops(model.text_model, ids, dtype=torch.int64)
    return flops
