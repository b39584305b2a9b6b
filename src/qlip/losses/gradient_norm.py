"""How hard a loss pulls at one linear layer, without a gradient with respect to its parameter.

    Y = X W^T + bias, hence dloss/dW = dY^T X with dY = dloss/dY

The sum runs over everything that went through the layer. Only gradients at activations are taken, so it also works
where the parameter is sharded over ranks and no tensor of the whole weight exists outside forward and backward.
Used for the adaptive weight of the adversary (VQGAN, arXiv 2012.09841) and to probe the balance of losses.
"""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor, nn

from qlip.core import distributed
from qlip.core.errors import UserError


class LayerGradient:
    """Records what passes a linear layer inside the `with` block, to measure losses at its weight afterwards.

        with LayerGradient(model.vision_decoder.conv_out) as layer_gradient:
            output = model(pictures)
        ratio = layer_gradient.norm(first_loss) / layer_gradient.norm(second_loss)

    Several calls of the layer inside the block add up, as they do in its weight's gradient.
    """

    def __init__(self, layer: nn.Linear) -> None:
        self._layer = layer
        self._passed: list[tuple[Tensor, Tensor]] = []  # inputs (..., in) and outputs (..., out)
        self._handle: torch.utils.hooks.RemovableHandle | None = None

    def __enter__(self) -> LayerGradient:
        self._handle = self._layer.register_forward_hook(self._record)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._unhook()

    def gradient(self, loss: Tensor) -> Tensor:
        """Gradient of a scalar at the layer's weight, averaged over ranks: (out, in), at least float32, detached.

        The graph is kept for the backward pass to come. All ranks must call it, with their own loss. It also ends the
        recording, because activation checkpointing runs the layer a second time while gradients are computed.
        Raises `UserError` when the layer was not called as a module, as inside a compiled block.
        """
        self._unhook()
        outputs = [y for _, y in self._passed]
        with torch.autocast(device_type=loss.device.type, enabled=False):  # sums over all tokens need float32
            upstream = torch.autograd.grad(loss.sum(), outputs, retain_graph=True, allow_unused=True) if outputs else ()
            parts = [
                _weight_gradient(x, dy)
                for (x, _), dy in zip(self._passed, upstream, strict=True)
                if dy is not None  # a call of the layer that this loss does not see
            ]
            if not parts:
                raise UserError(
                    "the gradient at a layer cannot be measured, because its forward was not seen: "
                    "turn off trainer.compile, or task.adaptive_gan_weight and task.probe_every"
                )
            return distributed.mean_over_ranks(torch.stack(parts).sum(0))

    def norm(self, loss: Tensor) -> Tensor:
        """Euclidean norm of `gradient(loss)`, the same on every rank. -> ()."""
        return self.gradient(loss).norm()

    def _record(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._passed.append((inputs[0].detach(), output))

    def _unhook(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def _weight_gradient(x: Tensor, upstream: Tensor) -> Tensor:
    """(..., in) and (..., out) -> (out, in)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return upstream.flatten(0, -2).to(dtype).T @ x.flatten(0, -2).to(dtype)
