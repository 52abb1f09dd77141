"""The gate of an MLP, act(g) ∘ u, and its gradients, in one kernel each, written over the inputs.

Both activations are z times a sigmoid: SiLU(g) = g · σ(g), and GELU in the form with tanh is
g · σ(2t), where t = √(2/π) (g + 0.044715 g³), because (1 + tanh t) / 2 = σ(2t). So one formula
serves for both, and for both derivatives. Everything is computed in fp32 and rounded once.

Shapes: n tokens, I width of the MLP.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from qlora_kit.layers.kernels.dialect import constexpr, jit, tiles, tl
from qlora_kit.layers.kernels.op import define

_TILE = 1024


@jit
def _z_and_slope(g, act: constexpr):
    """Return z and dz/dg, where act(g) = g · σ(z)."""
    if act == "silu":
        return g, 1.0
    else:  # noqa: RET505  Triton compiles the one branch that is taken
        square = g * g
        twice: constexpr = 1.5957691216057308  # 2 √(2/π)
        return twice * g * (1 + 0.044715 * square), twice * (1 + 0.134145 * square)


@jit
def _sigmoids(z):
    """Return σ(z) and σ(−z) = 1 − σ(z), neither by a difference; no exponential overflows."""
    small = tl.exp(-tl.abs(z))
    high = 1 / (1 + small)
    low = small * high
    return tl.where(z < 0, low, high), tl.where(z < 0, high, low)


@jit
def _gate(gate, up, gate_row, up_row, width, act: constexpr, tile: constexpr):
    """Write act(gate) · up over a tile of one row of `up`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * tile + tl.arange(0, tile)
    inside = column < width
    up += row * up_row + column
    g = tl.load(gate + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up, mask=inside, other=0.0).to(tl.float32)
    z, _ = _z_and_slope(g, act)
    sigmoid, _ = _sigmoids(z)
    tl.store(up, (g * sigmoid * u).to(up.dtype.element_ty), mask=inside)


@jit
def _gate_back(
    gate,
    up,
    grad,
    gate_row,
    up_row,
    grad_row,
    width,
    act: constexpr,
    with_product: constexpr,
    tile: constexpr,
):
    """Write the gradients over a tile of one row of `gate` and `up`, the product over `grad`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * tile + tl.arange(0, tile)
    inside = column < width
    gate += row * gate_row + column
    up += row * up_row + column
    grad += row * grad_row + column
    g = tl.load(gate, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(grad, mask=inside, other=0.0).to(tl.float32)
    z, slope = _z_and_slope(g, act)
    sigmoid, rest = _sigmoids(z)
    activated = g * sigmoid
    derivative = sigmoid + activated * rest * slope
    tl.store(gate, (d * u * derivative).to(gate.dtype.element_ty), mask=inside)
    tl.store(up, (d * activated).to(up.dtype.element_ty), mask=inside)
    if with_product:
        tl.store(grad, (activated * u).to(grad.dtype.element_ty), mask=inside)


def _run_forward(activation: str, gate: Tensor, up: Tensor) -> None:
    rows, width = gate.shape
    grid = (rows, tiles(width, _TILE))
    _gate[grid](gate, up, gate.stride(0), up.stride(0), width, activation, _TILE)


def _run_backward(activation: str, gate: Tensor, up: Tensor, grad: Tensor, product: bool) -> None:
    rows, width = gate.shape
    grid = (rows, tiles(width, _TILE))
    _gate_back[grid](
        gate, up, grad, gate.stride(0), up.stride(0), grad.stride(0), width,
        activation, product, _TILE,
    )  # fmt: skip


def _nothing(*_: Any) -> None:
    """Make no tensor: the results lie in the arguments."""


_gated = define("gated(str act, Tensor gate, Tensor(a!) up) -> ()", _run_forward, _nothing)
_gated_back = define(
    "gated_back(str act, Tensor(a!) gate, Tensor(b!) up, Tensor(c!) grad, bool product) -> ()",
    _run_backward,
    _nothing,
)

# transformers has classes of its own for the same functions. This floor does not import it.
_CLASSES = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_tanh"}


def name_of(activation: Any) -> str | None:
    """Return the name that the kernels have for an activation, or None if they do not have it."""
    if isinstance(activation, nn.GELU):
        return "gelu_tanh" if activation.approximate == "tanh" else None
    return _CLASSES.get(type(activation).__name__)


def gated(activation: str, gate: Tensor, up: Tensor) -> Tensor:
    """Return act(gate) ∘ up, written over `up`.

    Args:
        activation: a name by `name_of`.
        gate: (n, I), each row contiguous.
        up: likewise, in the same dtype. The two may be the halves of one tensor.
    """
    _gated(activation, gate, up)
    return up


def gated_back(
    activation: str, gate: Tensor, up: Tensor, grad: Tensor, *, with_product: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of gate and up, and act(gate) ∘ up if asked for, over the arguments.

    Args:
        activation: a name by `name_of`.
        gate: (n, I), each row contiguous; overwritten by its gradient.
        up: likewise.
        grad: the gradient of act(gate) ∘ up, likewise; overwritten by act(gate) ∘ up.
        with_product: whether to return the product. If not, `grad` stays as it is.
    """
    _gated_back(activation, gate, up, grad, with_product)
    return gate, up, grad if with_product else None
