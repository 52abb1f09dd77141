"""The gated MLP over tiles of tokens: y = (act(x Wgᵀ) ∘ x Wuᵀ) Wdᵀ, keeping x and nothing else.

The largest tensors of a layer are as wide as its MLP. Here they exist for one tile of tokens at
a time, in forward, in backward and in evaluation. Backward is written by hand; it computes the
gate and the up projection again, which recomputing the layer would have done. As x is saved
first, recomputing stops before the MLP where nothing behind it asks for its output. Exact but
for the order in which floats are summed.

Takes a loaded model and serves each MLP whose formula is this one: found by its parts, then
held against its own forward. All others are left as they are.

Source: TiledMLP of Arctic Long Sequence Training (arXiv:2506.13996).

Shapes: N tokens, D hidden size, I width of the MLP.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_kit.lora.layer import LoRALinear, LowRank
from qlora_kit.model.linear import FrozenLinear
from qlora_kit.model.quantize import FrozenWeight
from qlora_kit.model.save_first import save_first

_Linear: TypeAlias = FrozenLinear | LoRALinear

_INNER = (("gate_proj", "up_proj"), ("gate_up_proj",))
_OUTER = "down_proj"
_PROBE_TOKENS = 3


# ---------------------------------------------------------------- which MLPs


class _Parts(NamedTuple):
    """What a gated MLP is made of: its linear layers, the outer one last, and act."""

    layers: tuple[_Linear, ...]
    act: Callable[[Tensor], Tensor]


def set_mlp_tiles(model: nn.Module, tile_tokens: int, dtype: torch.dtype) -> int:
    """Let the gated MLPs of a model work on so many tokens at a time, or as before if 0.

    Args:
        model: loaded; changed in place.
        tile_tokens: tokens of a tile.
        dtype: that the model computes in.

    Returns:
        How many MLPs work so now.
    """
    served = 0
    is_gated: dict[Any, bool] = {}
    for module in model.modules():
        parts = _parts_of(module)
        if parts is None:
            continue
        vars(module).pop("forward", None)
        if not tile_tokens:
            continue
        kind = (type(module), type(parts.act), *_numbers(module))
        if kind not in is_gated:
            is_gated[kind] = _computes_the_same(module, dtype)
        if is_gated[kind]:
            # By a proxy: a module that holds itself would outlive its last user.
            itself: Any = weakref.proxy(module)
            module.forward = partial(_forward, itself, tile_tokens)  # type: ignore[method-assign]
            served += 1
    return served


def _parts_of(module: nn.Module) -> _Parts | None:
    """Return the parts of what looks like a gated MLP, by their names as the hub has them."""
    children = dict(module.named_children())
    for names in ((*inner, _OUTER) for inner in _INNER):
        found = (children.get(name) for name in names)
        layers = tuple(child for child in found if isinstance(child, _Linear))
        rest = [child for name, child in children.items() if name not in names]
        if len(layers) == len(names) and len(rest) == 1:
            return _Parts(layers, rest[0])
    return None


def _numbers(module: nn.Module) -> list[tuple[str, Any]]:
    # Two modules of a class may still differ in a number, such as one of a sparse activation.
    plain = (bool, int, float, str)
    return sorted((k, v) for k, v in vars(module).items() if isinstance(v, plain))


@torch.no_grad()
def _computes_the_same(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a module's own forward and this file's agree on random tokens."""
    frozen = _frozen_of(_existing(_parts_of(module)).layers[0])
    x = torch.randn(
        1, _PROBE_TOKENS, frozen.in_features, generator=torch.Generator().manual_seed(0)
    )
    x = x.to(frozen.weight.device, dtype)
    was_training = module.training
    module.eval()  # two draws of dropout would differ
    try:
        own, found = module(x).float(), _forward(module, _PROBE_TOKENS - 1, x).float()
    finally:
        module.train(was_training)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    return bool((found - own).norm() <= tolerance * own.norm() + 1e-12)


def _existing(parts: _Parts | None) -> _Parts:
    assert parts is not None, "the module was found by its parts"
    return parts


def _frozen_of(layer: _Linear) -> FrozenLinear:
    return layer.frozen if isinstance(layer, LoRALinear) else layer


# ---------------------------------------------------------------- one tile


class _Projection(NamedTuple):
    """One linear layer, frozen or with LoRA, for the tokens of one tile."""

    weight: FrozenWeight
    bias: Tensor | None
    term: LowRank | None

    def product(self, x: Tensor, unpack: _Unpack) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = F.linear(x, unpack(self.weight, x.dtype), bias)
        if self.term is not None:
            self.term.add_to(y, self.term.inner(x))
        return y

    def input_gradient(self, grad_y: Tensor, unpack: _Unpack) -> Tensor:
        """Return the gradient of x (n, D) from that of y (n, K); x itself is not asked for."""
        grad_x = grad_y @ unpack(self.weight, grad_y.dtype)
        if self.term is not None:
            wide = grad_y.to(self.term.a.dtype)
            self.term.add_input_gradient(grad_x, self.term.inner_gradient(wide))
        return grad_x

    def parameter_gradients(self, x: Tensor, grad_y: Tensor) -> list[Tensor]:
        """Return the gradients of A and B, or none of a frozen layer."""
        if self.term is None:
            return []
        wide = grad_y.to(self.term.a.dtype)
        inner = self.term.inner_gradient(wide)
        return list(self.term.gradients(x, self.term.inner(x), wide, inner))


class _Unpack:
    """Unpacks weights: once a pass where many tiles will ask, else for a moment.

    One tile asks for the gate's and the up projection's weight twice in backward, as plain
    layers do. To keep all three is more memory than one or two tiles save.
    """

    def __init__(self, tiles: int) -> None:
        self._kept: dict[FrozenWeight, Tensor] | None = {} if tiles > 2 else None

    def __call__(self, weight: FrozenWeight, dtype: torch.dtype) -> Tensor:
        if self._kept is None:
            return weight.dequantize(dtype)
        if weight not in self._kept:
            self._kept[weight] = weight.dequantize(dtype)
        return self._kept[weight]


def _split(inner: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return gate and up, computed by two layers or by a fused one."""
    gate, up = inner if len(inner) == 2 else inner[0].chunk(2, dim=-1)
    return gate, up


def _tile_output(
    x: Tensor, act: Callable[[Tensor], Tensor], layers: list[_Projection], unpack: _Unpack
) -> Tensor:
    *inner, outer = layers
    gate, up = _split([layer.product(x, unpack) for layer in inner])
    product = up.mul_(act(gate))
    del gate, up
    return outer.product(product, unpack)


def _tile_gradients(
    x: Tensor,
    grad_y: Tensor,
    act: Callable[[Tensor], Tensor],
    layers: list[_Projection],
    unpack: _Unpack,
) -> tuple[Tensor, list[Tensor]]:
    """Return the gradients of x and of all A and B, from that of y; of one tile.

    At most five tensors as wide as the MLP are there at a time, or three and one weight.
    """
    *inner, outer = layers
    grad_product = outer.input_gradient(grad_y, unpack)
    gate, up = _split([layer.product(x, unpack) for layer in inner])
    gate.requires_grad_()
    with torch.enable_grad():
        activated = act(gate)
    values = activated.detach()
    of_outer = outer.parameter_gradients(values * up, grad_y) if outer.term else []
    grad_activated = up.mul(grad_product)  # not in place: a fused gate shares its memory
    del up
    (grad_gate,) = torch.autograd.grad(activated, gate, grad_activated)
    grad_up = grad_product.mul_(values)
    del gate, activated, values, grad_activated, grad_product

    grads = [grad_gate, grad_up] if len(inner) == 2 else [torch.cat([grad_gate, grad_up], -1)]
    del grad_gate, grad_up
    parameters = [
        each
        for layer, grad in zip(inner, grads, strict=True)
        for each in layer.parameter_gradients(x, grad)
    ]
    grad_x = inner[0].input_gradient(grads[0], unpack)
    if len(inner) == 2:
        grad_x += inner[1].input_gradient(grads[1], unpack)
    return grad_x, parameters + of_outer


# ---------------------------------------------------------------- all tiles


class _Call(NamedTuple):
    """One call of an MLP. Holds no activation: a graph would keep it past recomputation."""

    parts: _Parts
    tile_tokens: int

    def tiles(self, tokens: int) -> list[slice]:
        """Return tiles of nearly equal size."""
        size = math.ceil(tokens / math.ceil(tokens / self.tile_tokens))
        return [slice(start, start + size) for start in range(0, tokens, size)]

    def projections(self, masks: tuple[Tensor | None, ...], rows: slice) -> list[_Projection]:
        return list(self._projections(masks, rows))

    def _projections(self, masks: tuple[Tensor | None, ...], rows: slice) -> Iterator[_Projection]:
        for layer, kept in zip(self.parts.layers, masks, strict=True):
            frozen = _frozen_of(layer)
            term = layer.low_rank(kept).rows(rows) if isinstance(layer, LoRALinear) else None
            yield _Projection(frozen.weight, frozen.bias, term)


def _forward(module: nn.Module, tile_tokens: int, x: Tensor) -> Tensor:
    """Map x (..., D) to (..., D), in place of the module's own forward."""
    call = _Call(_existing(_parts_of(module)), tile_tokens)
    rows = x.reshape(-1, x.shape[-1])
    trained = [layer for layer in call.parts.layers if isinstance(layer, LoRALinear)]
    # All at once and in the order of the layers: the draws are those of the module's own.
    masks = tuple(
        layer.draw_kept(len(rows), rows.device) if isinstance(layer, LoRALinear) else None
        for layer in call.parts.layers
    )
    parameters = [each for layer in trained for each in (layer.lora_A, layer.lora_B)]
    saved = save_first(rows, *masks, *parameters)
    y: Tensor = _GatedMLP.apply(rows, call, masks, *saved, *parameters)
    return y.view(*x.shape[:-1], -1)


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
        y = x.new_empty(len(x), _frozen_of(call.parts.layers[-1]).out_features)
        tiles = call.tiles(len(x))
        unpack = _Unpack(len(tiles))
        for rows in tiles:
            layers = call.projections(masks, rows)
            y[rows] = _tile_output(x[rows], call.parts.act, layers, unpack)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y,) = grads
        call: _Call = ctx.call
        x, *rest = ctx.node.saved_tensors
        masks = tuple(rest[: len(call.parts.layers)])
        grad_x = torch.empty_like(x)
        parameters: list[Tensor] = []
        tiles = call.tiles(len(x))
        unpack = _Unpack(len(tiles))
        for rows in tiles:
            layers = call.projections(masks, rows)
            grad_x[rows], more = _tile_gradients(
                x[rows], grad_y[rows], call.parts.act, layers, unpack
            )
            pairs = zip(parameters, more, strict=True) if parameters else ()
            parameters = [total.add_(part) for total, part in pairs] or more
        return (grad_x, None, None, None, None, *parameters)
