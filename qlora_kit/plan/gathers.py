"""The memory and the traffic of a divided base in a plan, which has no other process to ask.

Stands in for FSDP2 (`parallel.sharded`): it takes and gives back the same memory at the same
moments. Before a layer computes, all parts of its weights come in one buffer, and are copied out of
it. In forward the buffer stays until the next layer has its own; in backward the buffer of the
layer that comes next is there already. `tests/parallel/test_sharded.py` compares the two.

Takes a simulated model whose weights were cut; puts hooks on its layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.layers.purpose import GATHERED, purpose
from qlora_kit.layers.shards import Shards
from qlora_kit.layers.weight import FrozenWeight
from qlora_kit.parallel.sharded import stacks_of
from qlora_kit.private_torch import tree_flatten, tree_leaves, tree_unflatten


@dataclass(frozen=True, eq=False)
class PlannedShards(Shards):
    """Processes that are only planned; their parts come at once, and have no values.

    Attributes:
        received: the bytes that this process has received, those of layers and others apart.
    """

    received: Counter[str] = field(default_factory=Counter)

    def gathered(self, part: Tensor, rows: int, device: torch.device | None = None) -> Tensor:
        """Return a tensor of the size of the whole; see `Shards`."""
        whole = part.new_empty(self.count * self.part_rows(rows), *part.shape[1:], device=device)
        whole[: len(part)].copy_(part)
        self.receive("others", whole.nbytes)
        return whole[:rows]

    def receive(self, what: str, whole_bytes: int) -> None:
        """Count what this process receives of so many bytes: all but its own part."""
        self.received[what] += whole_bytes - whole_bytes // self.count


class Gathers:
    """The layers of a simulated model, which gather their weights.

    Args:
        model: a simulated model that was filled in parts; hooks are put on its layers.
        shards: the processes that hold it together.
    """

    def __init__(self, model: nn.Module, shards: PlannedShards) -> None:
        self._shards = shards
        self._layers: list[_Layer] = []
        for stack, layers in stacks_of(model).items():
            order = _Order()
            for module in layers:
                weights = [m for m in module.modules() if isinstance(m, FrozenWeight) and m.rows]
                if weights:
                    layer = _Layer(weights, shards)
                    self._layers.append(layer)
                    _Hooks(layer, order).put_on(module)
            stack.register_forward_hook(order.end_of_forward)

    def begin(self) -> None:
        """Count what is received from here on."""
        self._shards.received.clear()

    def end_of_backward(self) -> int:
        """Free what a backward leaves: the first layer, whose input takes no gradient.

        Returns:
            The bytes that this process has received since `begin`.
        """
        for layer in self._layers:
            layer.free()
        return self._shards.received.total()


@dataclass(eq=False)
class _Layer:
    """A layer whose weights are gathered together."""

    weights: list[FrozenWeight]
    shards: PlannedShards
    buffer: Tensor | None = None
    parts: list[dict[str, Tensor]] = field(default_factory=list)
    in_backward: bool = False

    def ask(self) -> None:
        """Begin to receive the parts of all processes, unless that has begun or is done."""
        if self.buffer is None and not self.parts:
            size = sum(part.nbytes for weight in self.weights for part in _parts(weight).values())
            # The parts of every process are padded to one size.
            padded = self.shards.count * size
            self.shards.receive("layers", padded)
            with purpose(GATHERED):
                device = self.weights[0].device
                self.buffer = torch.empty(padded, dtype=torch.uint8, device=device)

    def take(self) -> Tensor | None:
        """Copy the weights out of the buffer; return it."""
        buffer, self.buffer = self.buffer, None
        if buffer is not None:
            with purpose(GATHERED):
                whole = list(self._copied(buffer))
            pairs = zip(self.weights, whole, strict=True)
            self.parts = [weight.replace(tensors) for weight, tensors in pairs]
        return buffer

    def free(self) -> None:
        """Give the gathered weights up."""
        for weight, parts in zip(self.weights, self.parts, strict=bool(self.parts)):
            weight.replace(parts)
        self.parts, self.in_backward = [], False

    def _copied(self, buffer: Tensor) -> Iterator[dict[str, Tensor]]:
        begin = 0
        for weight in self.weights:
            tensors = {}
            for name, part in _parts(weight).items():
                whole = part.new_empty(self.shards.count * len(part), *part.shape[1:])
                of_it = buffer[begin : begin + whole.nbytes]
                whole.view(-1).view(torch.uint8).copy_(of_it)
                tensors[name], begin = whole[: weight.rows[name]], begin + whole.nbytes
            yield tensors


def _parts(weight: FrozenWeight) -> dict[str, Tensor]:
    return {name: getattr(weight, name) for name in weight.rows}


@dataclass(eq=False)
class _Order:
    """The layers of a stack, in the order of their forwards."""

    called: list[_Layer] = field(default_factory=list)
    buffer: Tensor | None = None

    def end_of_forward(self, *_: Any) -> None:
        """Free the buffer of the last layer."""
        self.buffer = None

    def before(self, layer: _Layer) -> _Layer | None:
        """Return the layer that was called before this one, and forget this one."""
        while self.called.pop() is not layer:
            pass
        return self.called[-1] if self.called else None


@dataclass(eq=False)
class _Hooks:
    """The hooks of a layer."""

    layer: _Layer
    order: _Order

    def put_on(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(self.before_forward, prepend=True, with_kwargs=True)
        module.register_forward_hook(self.after_forward)

    def before_forward(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if self.layer.in_backward:
            return args, kwargs  # recomputation: the weights are here
        self.layer.ask()
        # Only now the buffer of the layer before is free.
        self.order.buffer = None
        self.order.buffer = self.layer.take()
        return _with_end(self.layer.free, args, kwargs)

    def after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.layer.in_backward:
            return
        self.layer.free()
        if torch.is_grad_enabled():
            self.order.called.append(self.layer)
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(self.before_backward)

    def before_backward(self, grad: Tensor) -> None:
        if not self.layer.in_backward:
            self.layer.in_backward = True
            self.layer.ask()
            self.layer.take()
            if (before := self.order.before(self.layer)) is not None:
                before.ask()


def _with_end(end: Callable[[], None], args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Call `end` in backward, when the gradients of all of these arguments are there."""
    leaves, kind = tree_flatten((args, kwargs))
    places = [i for i, each in enumerate(leaves) if isinstance(each, Tensor) and each.requires_grad]
    if places and torch.is_grad_enabled():
        for place, leaf in zip(places, _End.apply(end, *(leaves[i] for i in places)), strict=True):
            leaves[place] = leaf
    args, kwargs = tree_unflatten(leaves, kind)
    return args, kwargs


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, end: Callable[[], None], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.end = end
        return inputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        ctx.end()
        return (None, *grads)
