"""How long a recipe takes by the arithmetic that src/qlip/recipes/tokenizer.py states: FLOPs over 35 % of the peak."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import vgg16

from qlip.losses.discriminator import Discriminator
from qlip.models.qlip.modeling import QLIPModel
from qlip.recipes.model import ModelConfig
from qlip.recipes.run import RunConfig
from qlip.tasks.align import AlignConfig

BF16_RATE = 0.35 * 989e12  # H100, dense
TF32_RATE = 0.35 * 495e12


class ForwardFlops(NamedTuple):
    """Of one picture and one text of 77 tokens."""

    encoder: float
    decoder: float
    """With the bottleneck in front of it."""
    text: float


def flops_of(function: Callable[[], Any]) -> float:
    """Counted by PyTorch, two per multiply-add."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@cache
def forward_flops(image_size: int, patch_size: int, width: int) -> ForwardFlops:
    """Of B (width 768) and L (1024) towers."""
    from qlip.recipes.tokenizer import large_model

    config = ModelConfig() if width == 768 else large_model()
    config.image_size, config.patch_size = image_size, patch_size
    with torch.device("meta"), torch.no_grad():
        model = QLIPModel(config.build_config())
        pixels, ids = torch.empty(1, 3, image_size, image_size), torch.zeros(1, 77, dtype=torch.int64)
        encoder = flops_of(lambda: model.get_image_features(pixels))
        text = flops_of(lambda: model.get_text_features(ids))
        return ForwardFlops(encoder, flops_of(lambda: model(pixels)) - encoder, text)


@cache
def adversary_flops(image_size: int) -> float:
    """Per picture of stage 2, in LPIPS and discriminator, forward and backward, both phases.

    VGG sees both pictures and hands a gradient to one. The discriminator sees the fake one with a gradient to it, then
    both with gradients to its weights (three forwards' worth each); R1 on every 16th step about six.
    """
    with FakeTensorMode(), torch.no_grad():
        vgg = flops_of(lambda: vgg16().features(torch.empty(1, 3, image_size, image_size)))
        discriminator = flops_of(lambda: Discriminator(256)(torch.empty(1, 3, 256, 256)))
    return 3 * vgg + (2 + 6 + 6 / 16) * discriminator


def hours(config: RunConfig, *, gpus: int) -> float:
    """Of the whole run on H100s."""
    model, task, data = config.model, config.task, config.data
    flops = forward_flops(model.image_size, model.patch_size, model.encoder.hidden_size)
    passes = 3 + config.trainer.activation_checkpointing
    if isinstance(task, AlignConfig):
        forward = flops.encoder + bool(task.pixel_weight) * flops.decoder + bool(task.contrastive_weight) * flops.text
        seconds = forward * (passes + (data.global_batch_size > data.batch_size * gpus)) / BF16_RATE
    else:
        seconds = (flops.encoder + passes * flops.decoder) / BF16_RATE + adversary_flops(model.image_size) / TF32_RATE
    return seconds * data.global_batch_size * config.trainer.steps / gpus / 3600
