"""The LoRA layer: y = x Wᵀ + b + scaling · dropout(x) Aᵀ Bᵀ, with W frozen and packed.

One autograd function serves 4, 8 and 16 bits, and one layer or several that see one x. It saves x
and the small h = dropout(x) Aᵀ before the product with W. So a recomputed layer that ends in that
product does not compute it again. Backward unpacks W again, so no unpacked weight outlives its
product. The trained term is a `LowRank`.

Shapes: N tokens, D in, K out, R rank.

Source: LoRA (arXiv:2106.09685), section 4.1; QLoRA (arXiv:2305.14314), equation 5; rsLoRA
(arXiv:2312.03732) for scaling = alpha / √rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.layers import kernels
from qlora_kit.layers.draws import Draws, draws_now
from qlora_kit.layers.frozen import FrozenLinear
from qlora_kit.layers.handover import Handover
from qlora_kit.layers.kernels import split
from qlora_kit.layers.low_rank import LowRank, SplitLowRank
from qlora_kit.layers.save_first import save_first
from qlora_kit.layers.weight import FrozenWeight
from qlora_kit.layers.windows import Window


class LoRALinear(nn.Module):
    """A frozen linear layer with a trained low-rank term.

    A (R, D) starts Kaiming-uniform and B (K, R) at zero, so a fresh layer computes the same as the
    frozen layer. Both are fp32, or wider with a wider input. Their product is cast once, when it is
    added to the frozen product.

    Args:
        frozen: the layer that this layer wraps.
        rank: R.
        scaling: factor of the low-rank term.
        dropout: probability that an input of A is zeroed in training.
        generator: draws A; None takes torch's global generator.
        number: number among the layers with LoRA, from which dropout draws its masks.

    Attributes:
        partners: other layers that will be called with the same x after this layer, and that
            `can_share` its term. The first call computes the products of all; the others are
            handed to their layers. A layer that is called with anything else computes alone.
    """

    def __init__(
        self,
        frozen: FrozenLinear,
        *,
        rank: int,
        scaling: float,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
        number: int = 0,
    ) -> None:
        super().__init__()
        self.frozen = frozen
        self.number = number
        self.rank = rank
        self.scaling = scaling
        self.dropout = dropout
        # A tuple keeps them from being children, which would give their parameters second names.
        self.partners: tuple[LoRALinear, ...] = ()
        self._handover = Handover()
        device = frozen.weight.device
        # A is drawn on the CPU: the same seed gives the same A on every device.
        a = torch.empty(rank, frozen.in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(a.to(device))
        self.lora_B = nn.Parameter(torch.zeros(frozen.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., D) to (..., K) in the dtype of x; of a convolution (B, C, …) to (B, K, …)."""
        if self.frozen.window is not None:
            return self._of_windows(x, self.frozen.window)
        handed = self._handover.take(x, self.lora_A, self.lora_B)
        if handed is not None:
            return handed
        layers = (self, *self.partners)
        if any(layer.drops_out for layer in layers):
            layers = (self,)  # each layer has a mask of its own, so no product is common to them
        y, *others = _products(x, layers)
        for layer, other in zip(layers[1:], others, strict=True):
            layer._handover.put(other, x, layer.lora_A, layer.lora_B)
        return y

    def _of_windows(self, x: Tensor, window: Window) -> Tensor:
        # Torch's own graph: it keeps x and h, as the one for linear layers does.
        y: Tensor = self.frozen(x)
        kept = self.draw_kept(x)
        given = x if kept is None else x * kept / (1 - self.dropout)
        term = window.low_rank(given, self.lora_A, self.lora_B)
        return (y + self.scaling * term).to(y.dtype)

    @property
    def weight(self) -> FrozenWeight:
        """The frozen weight: T5 asks its layers for their weight's dtype, where it is a tensor."""
        return self.frozen.weight

    @property
    def multiplied(self) -> FrozenLinear:
        """The layer whose weight x is multiplied by."""
        return self.frozen

    def as_trained(self, term: LowRank) -> LowRank:
        """Return the term of a call as this kind of layer adds it to the product."""
        return term

    @property
    def drops_out(self) -> bool:
        """Whether the next call draws a mask."""
        return self.training and self.dropout > 0

    def draw_kept(self, x: Tensor) -> Tensor | None:
        """Draw the mask of the inputs of A that are kept: bool (N, D), or None without dropout.

        Of a convolution it has the shape of x (B, C, …): a number is dropped in every patch.

        Args:
            x: the input (..., D), or any tensor on its device that differs in the last size only.
        """
        if not self.drops_out:
            return None
        keep, draws = 1 - self.dropout, draws_now()
        if self.frozen.window is not None:
            return self._kept_of_windows(x, keep, draws)
        shape = torch.Size((*x.shape[:-1], self.frozen.in_features))
        if draws is not None and draws.covers(shape):
            return draws.kept(shape, self.number, keep, x.device)
        kept = torch.empty(shape, dtype=torch.bool, device=x.device)
        return kept.bernoulli_(keep).view(-1, shape[-1])

    def _kept_of_windows(self, x: Tensor, keep: float, draws: Draws | None) -> Tensor:
        shape = x.flatten(2).shape  # the channels stand in the place of tokens
        if draws is not None and draws.covers(shape):
            return draws.kept(shape, self.number, keep, x.device).view(x.shape)
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(keep)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """Return the matrix that the low-rank term adds to W: scaling · B A, (K, D), fp32."""
        return self.scaling * (self.lora_B @ self.lora_A)

    def extra_repr(self) -> str:
        """Show rank and scaling when the model is printed."""
        return f"rank={self.rank}, scaling={self.scaling:g}, dropout={self.dropout:g}"


def can_share(layers: Sequence[LoRALinear]) -> bool:
    """Whether layers that see one x can compute their terms together."""
    kinds = {(type(each), each.lora_A.shape, each.lora_A.dtype, each.scaling) for each in layers}
    is_trained = all(each.lora_A.requires_grad for each in layers)
    are_linear = all(each.frozen.window is None for each in layers)
    return len(kinds) == 1 and is_trained and are_linear and len(layers) <= split.MOST_LAYERS


def term_of(layers: Sequence[LoRALinear], x: Tensor, kept: Tensor | None = None) -> LowRank:
    """Return the trained term of a call; to be called where no graph is recorded.

    Args:
        layers: one layer, or some that can share it, see `can_share`.
        x: the input, or any tensor on its device and in its dtype.
        kept: the mask of `draw_kept` for that call; only of a single layer.
    """
    first = layers[0]
    a, b = tuple(each.lora_A for each in layers), tuple(each.lora_B for each in layers)
    keep = 1.0 if kept is None else 1 - first.dropout
    return first.as_trained(as_served(LowRank(a, b, kept, first.scaling, keep), x))


def as_served(term: LowRank, x: Tensor) -> LowRank:
    """Return a term as it is multiplied on the device of x and in its dtype."""
    is_split = x.dtype == torch.bfloat16 and term.a[0].dtype == torch.float32
    return SplitLowRank.of(term) if is_split and kernels.serves("lora", x) else term


def _products(x: Tensor, layers: Sequence[LoRALinear]) -> list[Tensor]:
    """Return the y (..., K) of each layer for one x (..., D)."""
    rows = x.reshape(-1, x.shape[-1])
    with torch.no_grad():
        term = term_of(layers, x, layers[0].draw_kept(x))
    parameters = [*(each.lora_A for each in layers), *(each.lora_B for each in layers)]
    found = products_with_term(rows, [each.multiplied for each in layers], term, parameters)
    return [y.view(*x.shape[:-1], -1) for y in found]


def products_with_term(
    x: Tensor, frozen: Sequence[FrozenLinear], term: LowRank, parameters: Sequence[Tensor]
) -> Sequence[Tensor]:
    """Return the y (N, K) of each frozen layer for one x (N, D), with its share of the term.

    Args:
        x: the input of all layers.
        frozen: the layers.
        term: their trained term.
        parameters: what the term is made of: A of each layer, then B of each.
    """
    with torch.no_grad():
        h = term.inner(x)
    # What a graph holds of several layers must not hold x itself, see `Handover`.
    held = x if len(frozen) == 1 else x.detach()
    saved = save_first(parameters[0], held, term.kept, h, *term.a, *term.b)
    found: Sequence[Tensor] = _LoRAProducts.apply(x, frozen, term, h, *saved, *parameters)
    return found


class _LoRAProducts(torch.autograd.Function):
    # With d for dropout, p for the share it keeps and s for the scaling, for each layer:
    #   h = d(x) Aᵀ / p           y = x Wᵀ + b + s h Bᵀ
    #   g = s dy B / p            dA = gᵀ d(x)              dB = s dyᵀ h
    # and with the sum over the layers:
    #   dx = Σ dy W + d(Σ g A)
    # x Aᵀ, dA and the sum over g A are one product each, of the A of all layers on top of another.

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        frozen: Sequence[FrozenLinear],
        term: LowRank,
        h: Tensor,
        token: Tensor,
        node: Any,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        # The context holds no activation: a graph would keep that past recomputation.
        ctx.weights, ctx.node = [each.weight for each in frozen], node
        ctx.kind, ctx.factors, ctx.count_of_a = type(term), term.factors, len(term.a)
        found = []
        for number, layer in enumerate(frozen):
            y = layer.weight.product(x, layer.bias)
            term.add_to(y, h, number)
            found.append(y)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads_y: Tensor) -> tuple[Tensor | None, ...]:
        x, kept, h, *matrices = ctx.node.saved_tensors
        a, b = matrices[: ctx.count_of_a], matrices[ctx.count_of_a :]
        term: LowRank = ctx.kind(tuple(a), tuple(b), kept, *ctx.factors)
        grads = term.gradients(x, h, grads_y)
        grad_x: Tensor | None = None
        if ctx.needs_input_grad[0]:
            for weight, grad_y in zip(ctx.weights, grads_y, strict=True):
                grad_x = weight.product_back(grad_y, onto=grad_x)
            assert grad_x is not None
            term.add_input_gradient(grad_x, grads.inner)
        return (grad_x, *(None,) * 5, *grads.a, *grads.b)
