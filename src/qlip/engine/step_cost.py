"""What one training step holds in memory and computes, read off its own operations, on tensors that take no memory.

The task's real code runs on fake tensors (shapes and dtypes only): forward, backward, every phase. Whatever an
operation returns is counted while it is alive, and the FLOPs of matrix products, convolutions and attention by dtype.
Fake tensors of a GPU have no backward pass on a machine without one, so they lie on the "CPU", and `gpu_numerics` puts
right what differs from a GPU. The same code measures real modules on a CPU, which is how it is tested.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from qlip.engine.interfaces import Batch, Task
from qlip.engine.parallel import make_scalars_vectors, set_activation_checkpointing
from qlip.engine.steps import accumulate_gradients, only_training

ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
BatchShapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Key of the batch -> shape of one sample and dtype."""


@dataclass(kw_only=True, slots=True)
class StepCost:
    """One step on one batch. Bytes are without weights, buffers and the batch, which are there before it."""

    held: list[int] = field(default_factory=list)
    """Bytes alive after every operation: activations, temporaries, gradients."""
    gradients: list[int] = field(default_factory=list)
    """Of these, the gradients of parameters."""
    flops: dict[str, float] = field(default_factory=dict)
    """Multiplications and additions by dtype of the operands (`bfloat16`, `float32`)."""
    forward_flops: dict[str, float] = field(default_factory=dict)
    """The part of it before the first backward pass."""
    saved: dict[str, int] = field(default_factory=dict)
    """Phase -> bytes that its graphs keep for the backward pass, when they keep most."""
    waiting: int = 0
    """Bytes that the first phase leaves for the next."""


def attention_flops(name: str, args: tuple[Any, ...]) -> float:
    """FLOPs of the attention that fake CPU tensors take, which PyTorch's own table lacks; causal masks save nothing."""
    if name == ATTENTION:
        return sdpa_flop_count(*(x.shape for x in args[:3]))
    if name == f"{ATTENTION}_backward":
        return sdpa_backward_flop_count(*(x.shape for x in args[:4]))
    return 0.0


class Meter(TorchDispatchMode):
    """Counts storages while they are alive, and FLOPs; `known` storages were there before and do not count."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.cost = StepCost()
        self.phase = ""
        self.alive = 0
        self.gradient_bytes = 0
        self._known = {id(x.untyped_storage()): x.untyped_storage() for x in known}
        self._counted: dict[int, weakref.ref] = {}
        self._saved: set[int] = set()
        self._saved_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, then look at what it returned."""
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not tensors:  # questions about a fake tensor, such as its device, whose number varies
            return result
        for tensor in tensors:
            self._count(tensor)
        self.cost.held.append(self.alive)
        self.cost.gradients.append(self.gradient_bytes)
        packet = func._overloadpacket
        flops = attention_flops(packet.__name__, args)
        if packet in flop_registry:
            flops = flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        if flops:
            dtype = str(next(x.dtype for x in args if isinstance(x, Tensor))).removeprefix("torch.")
            self.cost.flops[dtype] = self.cost.flops.get(dtype, 0.0) + flops
        return result

    def _count(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._known or key in self._counted:
            return
        self.alive += size

        def freed(_: object) -> None:
            self.alive -= size
            self._counted.pop(key, None)
            if key in self._saved:
                self._saved.remove(key)
                self._saved_bytes -= size

        self._counted[key] = weakref.ref(storage, freed)

    def enter(self, phase: str) -> None:
        """Count what graphs keep from here on for this phase."""
        self.phase = phase
        self._saved.clear()
        self._saved_bytes = 0

    def keep(self, x: Tensor) -> Tensor:
        """Note that a graph of the phase keeps a tensor; each storage counts once, while it is alive."""
        storage = x.untyped_storage()
        key = id(storage)
        if key not in self._known and key not in self._saved:
            self._saved.add(key)
            self._saved_bytes += storage.nbytes()
            self.cost.saved[self.phase] = max(self.cost.saved.get(self.phase, 0), self._saved_bytes)
        return x

    def before_backward(self, _last: bool) -> None:
        """Remember what the first forward pass took."""
        self.cost.forward_flops = self.cost.forward_flops or dict(self.cost.flops)


@contextmanager
def gpu_numerics(*, bf16: bool) -> Iterator[None]:
    """Where CPU autocast, or our code on a CPU, computes in another dtype than on a GPU: as on a GPU.

    LayerNorm returns float32 under a GPU's autocast; attention stays bf16, which `nn/attention.py` widens on a CPU. A
    single random number, such as where a crop lies, has no value on fake tensors: it is 0.
    """
    functional: Any = F
    library: Any = torch
    layer_norm, attention, randint = F.layer_norm, F.scaled_dot_product_attention, torch.randint

    def float32_norm(x: Tensor, *args: Any, **options: Any) -> Tensor:
        return layer_norm(x.float() if torch.is_autocast_enabled("cpu") else x, *args, **options)

    def bf16_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), **options)

    def no_choice(high: int, *args: Any, **options: Any) -> Any:
        return 0 if args == ((),) else randint(high, *args, **options)

    functional.layer_norm = float32_norm  # patched, since torch function modes do not reach what is recomputed
    functional.scaled_dot_product_attention = bf16_attention if bf16 else attention
    library.randint = no_choice
    try:
        yield
    finally:
        functional.layer_norm, functional.scaled_dot_product_attention = layer_norm, attention
        library.randint = randint


def step_cost(
    task: Task, modules: nn.ModuleDict, batches: list[Batch], step: int, *, others: Sequence[nn.Module] = (), bf16: bool
) -> StepCost:
    """The cost of all phases of `step` on its micro-batches; no weight moves, no gradient stays.

    `modules` are the task's, `others` networks that it uses beside them. Works on real and on fake modules alike.
    """
    owned = [x for module in (modules, *others) for x in (*module.parameters(), *module.buffers())]
    meter = Meter([*owned, *(x for batch in batches for x in batch.values() if isinstance(x, Tensor))])
    seen: set[int] = set()

    def gradient_came(parameter: Tensor) -> None:
        if id(parameter) not in seen:
            seen.add(id(parameter))
            meter.gradient_bytes += parameter.numel() * parameter.element_size()

    handles = [p.register_post_accumulate_grad_hook(gradient_came) for p in modules.parameters() if p.requires_grad]
    with meter:
        for number, phase in enumerate(task.phases(step)):
            meter.enter(phase.name)
            with only_training(phase, modules), saved_tensors_hooks(meter.keep, lambda x: x):
                accumulate_gradients(
                    task,
                    phase,
                    batches,
                    step,
                    device=torch.device("cpu"),
                    precision=lambda: torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16),
                    before_backward=meter.before_backward,
                )
            for parameter in modules.parameters():
                parameter.grad = None
            seen.clear()
            meter.gradient_bytes = 0
            if number == 0:
                meter.cost.waiting = meter.alive
    for handle in handles:
        handle.remove()
    return meter.cost


def without_memory(module: nn.Module) -> None:
    """Replace every parameter and buffer by a fake one; call it under a `FakeTensorMode`."""
    made: dict[int, Tensor] = {}
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(fake, requires_grad=tensor.requires_grad) if is_parameter else fake
                table[name] = made[id(tensor)]  # type: ignore[assignment]


class DryRun:
    """A task built on the meta device, made ready to be asked for its costs; the task is used up by it."""

    def __init__(
        self, task: Task, *, others: Sequence[nn.Module] = (), bf16: bool, activation_checkpointing: bool = False
    ) -> None:
        """`others` are networks that the task uses beside its modules, such as LPIPS."""
        self.task = task
        self.others = others
        self.bf16 = bf16
        self.modules = nn.ModuleDict(task.modules()).train()
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        make_scalars_vectors(self.modules)
        set_activation_checkpointing(self.modules, enabled=activation_checkpointing)
        with self._mode:
            for module in (self.modules, *others):
                without_memory(module)

    def cost(self, shapes: BatchShapes, *, batch_size: int, step: int, micro_batches: int = 1) -> StepCost:
        """The cost of one step on micro-batches of `batch_size` samples each."""
        with self._mode, gpu_numerics(bf16=self.bf16), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            batches: list[Batch] = [
                {name: torch.empty(batch_size, *shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
                for _ in range(micro_batches)
            ]
            return step_cost(self.task, self.modules, batches, step, others=self.others, bf16=self.bf16)

    def forward_flops(
        self, function: Callable[..., object], *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32
    ) -> float:
        """FLOPs of one call, without gradients, on tensors of these shapes."""
        with self._mode, torch.no_grad(), gpu_numerics(bf16=self.bf16), Meter([]) as meter:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):
                function(*(torch.empty(shape, dtype=dtype) for shape in shapes))
            return sum(meter.cost.flops.values())
