"""CLIP's symmetric InfoNCE (QLIP Eq 2) over the features of all ranks.

Shapes: `b` pairs on this rank, `B` pairs on all ranks, `e` projection width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qlip.core.distributed import gather_with_grad, rank


def clip_loss(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor) -> Tensor:
    """``-1/(2B) sum_i [log softmax_j(s v_i.w_j)_i + log softmax_j(s v_j.w_i)_i]``, s = exp(logit_scale). Scalar.

    image_embeds and text_embeds (b, e) have norm 1; pair i is row i of both. Each rank scores its own rows against
    the pairs of every rank (gathered with gradient), so the mean over ranks is the loss of the joined batch.
    The normaliser 1/(2B) is open_clip's; the paper prints the bare sum.
    """
    with torch.autocast(device_type=image_embeds.device.type, enabled=False):  # logits up to 100: float32
        image_embeds, text_embeds = image_embeds.float(), text_embeds.float()
        all_images, all_texts = gather_with_grad(image_embeds), gather_with_grad(text_embeds)
        scale = logit_scale.float().exp()
        labels = torch.arange(len(image_embeds), device=image_embeds.device) + rank() * len(image_embeds)
        image_to_text = F.cross_entropy(scale * image_embeds @ all_texts.T, labels)
        text_to_image = F.cross_entropy(scale * text_embeds @ all_images.T, labels)
        return (image_to_text + text_to_image) / 2
