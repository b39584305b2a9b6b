"""The stage-2 adversary's network: a StyleGAN2-type residual discriminator.

Shapes: `b` pictures, `c` channels, `h`, `w` pixels. Written from the description in StyleGAN2 (arXiv 1912.04958) and
ProGAN (arXiv 1710.10196: equalised learning rates, minibatch standard deviation); sizes as in BSQ-ViT
(arXiv 2406.07548). Everything runs in float32 (float64 if given), also under autocast.
"""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

BLUR_TAPS = (1.0, 3.0, 3.0, 1.0)
FINAL_SIZE = 4


def leaky_relu(x: Tensor) -> Tensor:
    """Leaky ReLU of slope 0.2 times sqrt(2), which keeps the variance of a unit normal near one."""
    return F.leaky_relu(x, 0.2) * 2**0.5


def blur(x: Tensor, *, padding: int, stride: int = 1) -> Tensor:
    """Low-pass filter [1, 3, 3, 1] / 8 in both directions with zero padding, before dropping every other pixel.

    (b, c, h, w) -> (b, c, (h + 2 padding - 4) // stride + 1, ...).
    """
    taps = torch.tensor(BLUR_TAPS, dtype=x.dtype, device=x.device) / sum(BLUR_TAPS)
    kernel = repeat(torch.outer(taps, taps), "i j -> c 1 i j", c=x.shape[1])
    return F.conv2d(x, kernel, padding=padding, stride=stride, groups=x.shape[1])


def minibatch_stddev(x: Tensor, *, max_group_size: int = 4) -> Tensor:
    """Append one channel that tells how much the pictures of a group differ. (b, c, h, w) -> (b, c + 1, h, w).

    The channel is the standard deviation (divisor: group size) over the group, averaged over channels and pixels. The
    group size is the largest divisor of b up to `max_group_size`, so any b works; for a b without such a divisor but 1
    the channel is constant. Picture i is in group i mod (b / group size). Groups never span ranks.
    """
    group_size = max(size for size in range(1, max_group_size + 1) if len(x) % size == 0)
    grouped = rearrange(x, "(g m) c h w -> g m c h w", g=group_size)
    deviation = (grouped.var(dim=0, correction=0) + 1e-8).sqrt().mean(dim=(1, 2, 3))  # (m,)
    channel = repeat(deviation, "m -> (g m) 1 h w", g=group_size, h=x.shape[2], w=x.shape[3])
    return torch.cat([x, channel], dim=1)


class EqualisedConv(nn.Module):
    """Convolution whose weights have unit variance and are multiplied by fan_in^-1/2 at run time (ProGAN 4.1).

    With Adam, every layer then learns at the same relative speed, whatever its fan-in.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.scale = (in_channels * kernel_size**2) ** -0.5
        self.stride = stride
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        """(b, in, h, w) -> (b, out, h', w')."""
        return F.conv2d(x, self.weight * self.scale, self.bias, stride=self.stride, padding=self.padding)


class EqualisedLinear(nn.Module):
    """Linear layer with the same rule as `EqualisedConv`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))
        self.scale = in_features**-0.5

    def forward(self, x: Tensor) -> Tensor:
        """(b, in) -> (b, out)."""
        return F.linear(x, self.weight * self.scale, self.bias)


class ResidualBlock(nn.Module):
    """Halves the picture: ``(conv path + skip path) / sqrt(2)``.

    Conv path: 3x3, then blur and 3x3 with stride 2, each followed by the activation. Skip path: blur and 1x1 with
    stride 2, no bias; the blur itself takes the stride, which gives the same numbers at a quarter of the work.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = EqualisedConv(in_channels, in_channels, 3, padding=1)
        self.conv2 = EqualisedConv(in_channels, out_channels, 3, stride=2)
        self.skip = EqualisedConv(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in, h, w) -> (b, out, h/2, w/2)."""
        residual = leaky_relu(self.conv1(x))
        residual = leaky_relu(self.conv2(blur(residual, padding=2)))  # (b, out, h/2, w/2)
        return (residual + self.skip(blur(x, padding=1, stride=2))) * 0.5**0.5


class Discriminator(nn.Module):
    """Picture -> one logit, positive for real. 28,864,129 parameters at 256 pixels and default widths.

    1x1 convolution from RGB, residual blocks at `image_size` .. 8, minibatch standard deviation at 4x4, 3x3
    convolution, two linear layers. At resolution r a layer has ``min(channel_base / r, max_channels)`` channels.
    """

    def __init__(self, image_size: int = 256, *, channel_base: int = 32768, max_channels: int = 512) -> None:
        """`image_size` in pixels. Raises `ValueError` unless it is a power of two of at least 8."""
        super().__init__()
        if image_size < 8 or image_size & (image_size - 1):
            raise ValueError(
                f"discriminator image_size {image_size} is not a power of two of at least 8; "
                "give the discriminator a random power-of-two crop (qlip.losses.adversarial.same_crop)"
            )

        def channels(resolution: int) -> int:
            return min(channel_base // resolution, max_channels)

        self.image_size = image_size
        self.from_rgb = EqualisedConv(3, channels(image_size), 1)
        blocks = []
        resolution = image_size
        while resolution > FINAL_SIZE:
            blocks.append(ResidualBlock(channels(resolution), channels(resolution // 2)))
            resolution //= 2
        self.blocks = nn.Sequential(*blocks)
        width = channels(FINAL_SIZE)
        self.final_conv = EqualisedConv(width + 1, width, 3, padding=1)
        self.hidden = EqualisedLinear(width * FINAL_SIZE**2, width)
        self.logit = EqualisedLinear(width, 1)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Every tensor, by these rules.

        | tensor | rule |
        |---|---|
        | every weight | standard normal (the run-time scale makes it fan_in^-1/2) |
        | every bias | 0 |
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter)

    def forward(self, pictures: Tensor) -> Tensor:
        """(b, 3, S, S) pictures -> (b,) logits. Any pixel scale; R1's gamma of 10 belongs to pictures in [-1, 1].

        Raises `ValueError` for pictures of another size.
        """
        size = self.image_size
        if tuple(pictures.shape[-2:]) != (size, size):
            raise ValueError(
                f"pictures are {tuple(pictures.shape[-2:])}, this discriminator takes ({size}, {size}); "
                "crop them (qlip.losses.adversarial.same_crop)"
            )
        with torch.autocast(device_type=pictures.device.type, enabled=False):  # R1 and its gradient need float32
            x = pictures.float() if pictures.dtype in (torch.bfloat16, torch.float16) else pictures
            x = self.blocks(leaky_relu(self.from_rgb(x)))  # (b, c, 4, 4)
            x = leaky_relu(self.final_conv(minibatch_stddev(x)))
            x = leaky_relu(self.hidden(rearrange(x, "b c h w -> b (c h w)")))
            return rearrange(self.logit(x), "b 1 -> b")
