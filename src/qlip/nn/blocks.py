"""The pre-norm transformer block of all three towers: EVA-02's (sub-LN, SwiGLU, rotary) and CLIP's text block.

Shapes: `b` images, `n` tokens, `d` width, `I` feed-forward width. After EVA-02 (arXiv 2303.11331), with Magneto's
sub-LN (arXiv 2210.06423) between the heads and the output projection, and inside the feed-forward part.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qlip.nn.attention import Attention, Rotary


def quick_gelu(x: Tensor) -> Tensor:
    """``x sigmoid(1.702 x)``, the activation of OpenAI's CLIP."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
}


class SwiGLU(nn.Module):
    """``W_3 LN(SiLU(W_1 x) * W_2 x)``; the LayerNorm only with `norm_eps`."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, norm_eps: float | None) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden_size, intermediate_size)
        self.w2 = nn.Linear(hidden_size, intermediate_size)
        self.ffn_ln = nn.Identity() if norm_eps is None else nn.LayerNorm(intermediate_size, eps=norm_eps)
        self.w3 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, d) -> (b, n, d)."""
        return self.w3(self.ffn_ln(self._gated(x)))

    def _gated(self, x: Tensor) -> Tensor:
        """(b, n, d) -> (b, n, I), the widest tensors of the model: two of them without gradients, not three."""
        gate, value = F.silu(self.w1(x)), self.w2(x)
        return gate * value if torch.is_grad_enabled() else gate.mul_(value)


class Mlp(nn.Module):
    """``fc2(LN(act(fc1 x)))``; the LayerNorm only with `norm_eps`."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, norm_eps: float | None, hidden_act: str) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[hidden_act]
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.ffn_ln = nn.Identity() if norm_eps is None else nn.LayerNorm(intermediate_size, eps=norm_eps)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, d) -> (b, n, d)."""
        return self.fc2(self.ffn_ln(self.activation(self.fc1(x))))


class Block(nn.Module):
    """Pre-norm block: ``x += attention(LN1 x)``, ``x += mlp(LN2 x)``."""

    def __init__(self, attention: Attention, mlp: SwiGLU | Mlp, *, hidden_size: int, norm_eps: float) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(hidden_size, eps=norm_eps)
        self.self_attn = attention
        self.layer_norm2 = nn.LayerNorm(hidden_size, eps=norm_eps)
        self.mlp = mlp
        self.keep_eager = False  # a trainer that compiles blocks leaves this one out: something hooks into it

    def forward(self, x: Tensor, rotary: Rotary | None = None, attention: str = "sdpa") -> Tensor:
        """(b, n, d) -> (b, n, d)."""
        x = x + self.self_attn(self.layer_norm1(x), rotary, implementation=attention)
        return x + self.mlp(self.layer_norm2(x))


class BlockStack(nn.Module):
    """Blocks applied in order, optionally keeping every state or trading memory for a second forward."""

    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)
        self.gradient_checkpointing = False  # transformers sets both by these names
        self._gradient_checkpointing_func: Callable = partial(checkpoint, use_reentrant=False)

    def forward(
        self, x: Tensor, rotary: Rotary | None = None, *, attention: str = "sdpa", keep_states: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """(b, n, d) -> last state and, if asked, all L + 1 states starting with the input."""
        states = [x] if keep_states else []
        for block in self.layers:
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(block.__call__, x, rotary, attention)
            else:
                x = block(x, rotary, attention)
            if keep_states:
                states.append(x)
        return x, tuple(states) if keep_states else None
