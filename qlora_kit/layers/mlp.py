"""The gated MLP over tiles of tokens: y = (act(x Wgᵀ) ∘ x Wuᵀ) Wdᵀ, keeping x and nothing else.

The largest tensors of a layer are as wide as its MLP. Here they exist for one tile of tokens at
a time, in forward, in backward and in evaluation. Backward is written by hand; it computes the
gate and the up projection again, which recomputation of the layer would have done. x is saved
first, so recomputation stops before the MLP unless a later operation saves the MLP's output. The
result is exact, except for the order in which floats are summed.

`TiledMLP` takes the place of a model's own MLP, and has the same layers under the same names.

Source: TiledMLP of Arctic Long Sequence Training (arXiv:2506.13996).

Shapes: N tokens, D hidden size, I width of the MLP.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from qlora_kit.layers.frozen import FrozenLinear
from qlora_kit.layers.kernels import serves
from qlora_kit.layers.kernels.gate import gated, gated_back, name_of
from qlora_kit.layers.lora import LoRALinear, can_share, term_of
from qlora_kit.layers.low_rank import LowRank
from qlora_kit.layers.save_first import save_first
from qlora_kit.layers.weight import FrozenWeight, HeldWeight

_Linear: TypeAlias = FrozenLinear | LoRALinear

_INNER = (("gate_proj", "up_proj"), ("gate_up_proj",))
_OUTER = "down_proj"
# With more tiles than these, the weights are unpacked once a pass and held. With fewer, each tile
# unpacks the weights of gate and up twice in backward, as plain layers do; one of them once where
# that takes no more memory, see `_hold_last`. To hold both would take 90 MB more in a 7B; to hold
# all three, more than one or two tiles save.
_TILES_THAT_UNPACK = 2


class Parts(NamedTuple):
    """The parts of a gated MLP.

    Attributes:
        layers: its linear layers: gate and up, or the two fused, and the down projection last.
        act: the activation.
    """

    layers: tuple[_Linear, ...]
    act: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, module: nn.Module) -> Parts | None:
        """Return the parts of a module whose children have the names and kinds of a gated MLP's.

        Returns:
            The parts; None if the module is no gated MLP, or LoRA in it computes otherwise.
        """
        children = dict(module.named_children())
        for names in ((*inner, _OUTER) for inner in _INNER):
            found = (children.get(name) for name in names)
            layers = tuple(child for child in found if isinstance(child, _Linear))
            rest = [child for name, child in children.items() if name not in names]
            are_sums = all(not isinstance(each, LoRALinear) or each.is_sum for each in layers)
            if len(layers) == len(names) and len(rest) == 1 and are_sums:
                return cls(layers, rest[0])
        return None

    @property
    def frozen(self) -> list[FrozenLinear]:
        """The frozen layers, without the LoRA layers around them."""
        return [each.frozen if isinstance(each, LoRALinear) else each for each in self.layers]


class TiledMLP(nn.Module):
    """A gated MLP that computes one tile of tokens at a time, in place of a model's own MLP.

    It shares its children with the module that it replaces. A module that is put in the place of a
    child, a LoRA layer for example, stands in both.

    Args:
        replaced: the model's own MLP.
        tile_tokens: tokens of a tile, at most.
    """

    def __init__(self, replaced: nn.Module, tile_tokens: int) -> None:
        super().__init__()
        self._modules = replaced._modules
        self.training = replaced.training
        self.tile_tokens = tile_tokens
        # A tuple keeps it from being a child, which would give every layer a second path.
        self._replaced = (replaced,)

    @property
    def replaced(self) -> nn.Module:
        """The model's own MLP."""
        return self._replaced[0]

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., D) to (..., D), in the dtype of x."""
        parts = Parts.of(self)
        if parts is None:
            # A layer was replaced by one of another kind, which multiplies in another way.
            y: Tensor = self.replaced(x)
            return y
        return _gated_mlp(x, _Call(parts, self.tile_tokens)).view(*x.shape[:-1], -1)

    def extra_repr(self) -> str:
        """Show the size of a tile when the model is printed."""
        return f"tile_tokens={self.tile_tokens}"


# ---------------------------------------------------------------- one tile


@dataclass
class _TileLayers:
    """Linear layers that see one x, all frozen or all with LoRA, for the tokens of one tile.

    In backward they see one gradient of each y. So the small inner products of x and of these are
    kept for the next call.
    """

    weights: list[FrozenWeight]
    biases: list[Tensor | None]
    term: LowRank | None
    trains_a: bool = True
    _h: Tensor | None = None
    _grad_inner: Tensor | None = None

    def of(self, rows: slice) -> _TileLayers:
        """Return the layers for some tokens."""
        term = None if self.term is None else self.term.rows(rows)
        return _TileLayers(list(self.weights), self.biases, term, self.trains_a)

    def products(self, x: Tensor) -> list[Tensor]:
        """Return the y (n, K) of each layer for x (n, D)."""
        found = []
        for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            y = weight.product(x, bias)
            if self.term is not None:
                self.term.add_to(y, self._inner(self.term, x), number)
            found.append(y)
        return found

    def input_gradient(self, grads_y: list[Tensor], onto: Tensor | None = None) -> Tensor:
        """Return the gradient of x (n, D), given that of each y (n, K); x itself is not needed.

        Args:
            grads_y: the gradients of y.
            onto: what is added to, in place.
        """
        grad_x = onto
        for weight, grad_y in zip(reversed(self.weights), reversed(grads_y), strict=True):
            grad_x = weight.product_back(grad_y, onto=grad_x)
        assert grad_x is not None
        if self.term is not None:
            self.term.add_input_gradient(grad_x, self._inner_gradient(self.term, grads_y))
        return grad_x

    def parameter_gradients(self, x: Tensor, grads_y: list[Tensor]) -> list[Tensor | None]:
        """Return the gradients of A and B of each layer; an empty list for frozen layers."""
        if self.term is None:
            return []
        given = x if self.trains_a else None
        grads = self.term.gradients(given, self._inner(self.term, x), grads_y, self._grad_inner)
        self._grad_inner = grads.inner
        return [each for pair in zip(grads.a, grads.b, strict=True) for each in pair]

    def _inner(self, term: LowRank, x: Tensor) -> Tensor:
        if self._h is None:
            self._h = term.inner(x)
        return self._h

    def _inner_gradient(self, term: LowRank, grads_y: list[Tensor]) -> Tensor:
        if self._grad_inner is None:
            self._grad_inner = term.inner_gradient(grads_y)
        return self._grad_inner


class _Tile(NamedTuple):
    """The layers of an MLP for the tokens of one tile.

    Attributes:
        inner: gate and up, together or each by itself, or the two fused.
        outer: the down projection.
        act: the activation.
    """

    inner: list[_TileLayers]
    outer: _TileLayers
    act: Callable[[Tensor], Tensor]

    def products(self, x: Tensor) -> list[Tensor]:
        """Return the outputs of gate and up, or of the two fused."""
        return [y for layers in self.inner for y in layers.products(x)]

    def output(self, x: Tensor) -> Tensor:
        """Return y (n, D) of x (n, D)."""
        gate, up = _split(self.products(x))
        name = _kernel_name(self.act, gate)
        product = gated(name, gate, up) if name else up.mul_(self.act(gate))
        del gate, up
        (y,) = self.outer.products(product)
        return y

    def gradients(self, x: Tensor, grad_y: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """Return the gradient of x and those of all A and B, given that of y.

        At most five tensors as wide as the MLP exist at a time, or three of them and one weight.
        With a kernel for the gate there are three at most.
        """
        if _kernel_name(self.act, x) is not None:
            self._hold_last()
        wide = [self.outer.input_gradient([grad_y]), *self.products(x)]
        grads, of_outer = _gate_gradients(self.act, wide, self.outer, grad_y)
        parameters: list[Tensor | None] = []
        grad_x: Tensor | None = None
        for layers in self.inner:
            own, grads = grads[: len(layers.weights)], grads[len(layers.weights) :]
            parameters += layers.parameter_gradients(x, own)
            grad_x = layers.input_gradient(own, onto=grad_x)
        assert grad_x is not None
        return grad_x, parameters + of_outer

    def _hold_last(self) -> None:
        """Unpack the weight that multiplies last in forward, and first in backward, only once.

        Between the two only the kernel of the gate computes. It makes no tensor, so no more memory
        is needed than for the first product. The plain gate makes wide tensors, and so does LoRA.
        """
        is_frozen = self.outer.term is None and all(each.term is None for each in self.inner)
        weights = self.inner[-1].weights
        if is_frozen and not isinstance(weights[-1], HeldWeight):
            weights[-1] = HeldWeight(weights[-1], uses=2)


def _split(inner: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the outputs of gate and up, which two layers or a fused layer computed."""
    gate, up = inner if len(inner) == 2 else inner[0].chunk(2, dim=-1)
    return gate, up


def _kernel_name(act: Callable[[Tensor], Tensor], x: Tensor) -> str | None:
    """Return the name of an activation if a kernel serves for it, on the device of x."""
    return name_of(act) if serves("gate", x) else None


def _gate_gradients(
    act: Callable[[Tensor], Tensor], wide: list[Tensor], outer: _TileLayers, grad_y: Tensor
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return the gradients of the inner layers' outputs, and those of the outer layer's A and B.

    Args:
        act: the activation.
        wide: the gradient of act(gate) ∘ up, and the outputs of the inner layers. The list is
            emptied, so that each tensor can be freed as soon as it is spent.
        outer: the down projection.
        grad_y: the gradient of its output.
    """
    grad_product, *outputs = wide
    wide.clear()
    gate, up = _split(outputs)
    if name := _kernel_name(act, gate):
        # It writes the gradients over the outputs.
        with_product = outer.term is not None
        *_, product = gated_back(name, gate, up, grad_product, with_product=with_product)
        return outputs, [] if product is None else outer.parameter_gradients(product, [grad_y])

    fused = len(outputs) == 1
    del outputs
    gate.requires_grad_()
    with torch.enable_grad():
        activated = act(gate)
    values = activated.detach()
    of_outer = outer.parameter_gradients(values * up, [grad_y]) if outer.term else []
    grad_activated = up.mul(grad_product)  # not in place: a fused gate shares its memory
    del up
    (grad_gate,) = torch.autograd.grad(activated, gate, grad_activated)
    grad_up = grad_product.mul_(values)
    del gate, activated, values, grad_activated, grad_product
    return [torch.cat([grad_gate, grad_up], -1)] if fused else [grad_gate, grad_up], of_outer


# ---------------------------------------------------------------- all tiles


class _Call(NamedTuple):
    """One call of an MLP. It holds no activation: a graph would keep that past recomputation."""

    parts: Parts
    tile_tokens: int

    def tiles(self, x: Tensor, masks: tuple[Tensor | None, ...]) -> Iterator[tuple[slice, _Tile]]:
        """Yield the rows of x of each tile, with its layers. All tiles are of nearly equal size."""
        tokens = len(x)
        count = math.ceil(tokens / self.tile_tokens)
        groups = list(self._groups(x, masks, is_held=count > _TILES_THAT_UNPACK))
        size = math.ceil(tokens / count)
        for start in range(0, tokens, size):
            rows = slice(start, start + size)
            *inner, outer = (group.of(rows) for group in groups)
            yield rows, _Tile(inner, outer, self.parts.act)

    def _groups(
        self, x: Tensor, masks: tuple[Tensor | None, ...], *, is_held: bool
    ) -> Iterator[_TileLayers]:
        """Yield the layers that see one x together, of all tokens, the down projection last."""
        for layers, kept in self._together(masks):
            frozen = [each.multiplied if isinstance(each, LoRALinear) else each for each in layers]
            weights = [HeldWeight(each.weight) if is_held else each.weight for each in frozen]
            trained = [each for each in layers if isinstance(each, LoRALinear)]
            term = term_of(trained, x, kept) if trained else None
            trains_a = all(each.trains_a for each in trained)
            yield _TileLayers(weights, [each.bias for each in frozen], term, trains_a)

    def _together(
        self, masks: tuple[Tensor | None, ...]
    ) -> Iterator[tuple[tuple[_Linear, ...], Tensor | None]]:
        """Yield the layers that compute together, with the mask of a single layer."""
        layers = self.parts.layers
        *inner, outer = layers
        trained = [each for each in inner if isinstance(each, LoRALinear)]
        is_shared = len(trained) == len(inner) and can_share(trained)
        if (is_shared or not trained) and all(kept is None for kept in masks[:-1]):
            yield tuple(inner), None
            yield (outer,), masks[-1]
        else:
            yield from (((each,), kept) for each, kept in zip(layers, masks, strict=True))


def _gated_mlp(x: Tensor, call: _Call) -> Tensor:
    """Map x (..., D) to (N, D), differentiable in x and in every A and B."""
    rows = x.reshape(-1, x.shape[-1])
    trained = [layer for layer in call.parts.layers if isinstance(layer, LoRALinear)]
    # All masks are drawn at once, in the order of the layers: the model's own MLP draws the same.
    masks = tuple(
        layer.draw_kept(x) if isinstance(layer, LoRALinear) else None for layer in call.parts.layers
    )
    parameters = [each for layer in trained for each in layer.matrices()]
    saved = save_first(rows, rows, *masks, *parameters)
    y: Tensor = _GatedMLP.apply(rows, call, masks, *saved, *parameters)
    return y


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        call: _Call,
        masks: tuple[Tensor | None, ...],
        token: Tensor,
        node: Any,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.call, ctx.node = call, node
        y = _Whole(len(x))
        for rows, tile in call.tiles(x, masks):
            y.put(rows, tile.output(x[rows]))
        return y.tensor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y,) = grads
        call: _Call = ctx.call
        x, *rest = ctx.node.saved_tensors
        masks = tuple(rest[: len(call.parts.layers)])
        grad_x = _Whole(len(x))
        parameters: list[Tensor | None] = []
        for rows, tile in call.tiles(x, masks):
            part, more = tile.gradients(x[rows], grad_y[rows])
            grad_x.put(rows, part)
            del part  # not to be held while the next tile computes
            pairs = zip(parameters, more, strict=True) if parameters else ()
            parameters = [_added(total, each) for total, each in pairs] or more
        return (grad_x.tensor, None, None, None, None, *parameters)


def _added(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    return None if total is None or part is None else total.add_(part)


class _Whole:
    """A result (N, D) that is put together of tiles; a tile of all tokens is not copied.

    Args:
        tokens: N.
    """

    tensor: Tensor

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens

    def put(self, rows: slice, part: Tensor) -> None:
        """Take the result of a tile for its rows; the first tile begins with the first row."""
        if len(part) == self._tokens:
            self.tensor = part
            return
        if rows.start == 0:
            self.tensor = part.new_empty(self._tokens, part.shape[1])
        self.tensor[rows] = part
