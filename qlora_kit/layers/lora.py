"""The LoRA layer: y = x Wᵀ + b + scaling · dropout(x) Aᵀ Bᵀ, with W frozen and packed.

One autograd function serves 4, 8 and 16 bits. It saves x and the small h = dropout(x) Aᵀ before the
product with W. So a recomputed layer that ends in that product does not compute it again. Backward
unpacks W again, so no unpacked weight outlives its product.

Shapes: N tokens, D in, K out, R rank.

Source: LoRA (arXiv:2106.09685), section 4.1; QLoRA (arXiv:2305.14314), equation 5; rsLoRA
(arXiv:2312.03732) for scaling = alpha / √rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.layers.draws import draws_now
from qlora_kit.layers.frozen import FrozenLinear
from qlora_kit.layers.save_first import save_first
from qlora_kit.layers.weight import FrozenWeight


@dataclass(frozen=True)
class LowRank:
    """The trained term of one call, scaling · h Bᵀ with h = dropout(x) Aᵀ, and its gradients.

    Attributes:
        a: (R, D), fp32 or wider.
        b: (K, R), in the dtype of `a`.
        kept: mask of the inputs of A that dropout kept, bool (N, D); None without dropout.
        scaling: factor of the term.
        keep_probability: probability that dropout keeps an input of A; 1 without dropout.
    """

    a: Tensor
    b: Tensor
    kept: Tensor | None
    scaling: float
    keep_probability: float

    def rows(self, rows: slice) -> LowRank:
        """Return the term of some rows of x."""
        return self if self.kept is None else replace(self, kept=self.kept[rows])

    def inner(self, x: Tensor) -> Tensor:
        """Return h (N, R) of x (N, D)."""
        return _masked(x, self.kept).to(self.a.dtype) @ self.a.T / self.keep_probability

    def add_to(self, y: Tensor, h: Tensor) -> None:
        """Add the term to y (N, K) in place."""
        _add_product(y, h, self.b.T, self.scaling)

    def inner_gradient(self, grad_y: Tensor) -> Tensor:
        """Return the gradient of x Aᵀ (N, R), given the gradient of y (N, K) in the dtype of A."""
        return (grad_y @ self.b).mul_(self.scaling).div_(self.keep_probability)

    def gradients(
        self, x: Tensor, h: Tensor, grad_y: Tensor, grad_inner: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of A (R, D) and B (K, R).

        Args:
            x: (N, D), the input of the call.
            h: (N, R), the result of `inner` for x.
            grad_y: gradient of y (N, K), in the dtype of A.
            grad_inner: (N, R), the result of `inner_gradient` for `grad_y`.
        """
        grad_a = grad_inner.T @ _masked(x, self.kept).to(self.a.dtype)
        grad_b = (grad_y.T @ h).mul_(self.scaling)
        return grad_a, grad_b

    def add_input_gradient(self, grad_x: Tensor, grad_inner: Tensor) -> None:
        """Add the term's share of the gradient of x to `grad_x` (N, D), in place."""
        if self.kept is None:
            _add_product(grad_x, grad_inner, self.a, 1.0)
        else:
            grad_x += _masked(grad_inner @ self.a, self.kept)


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
        device = frozen.weight.device
        # A is drawn on the CPU: the same seed gives the same A on every device.
        a = torch.empty(rank, frozen.in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(a.to(device))
        self.lora_B = nn.Parameter(torch.zeros(frozen.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., D) to (..., K) in the dtype of x."""
        rows = x.reshape(-1, x.shape[-1])
        term = self.low_rank(self.draw_kept(x))
        with torch.no_grad():
            h = term.inner(rows)
        saved = save_first(rows, term.a, term.b, term.kept, h)
        y: Tensor = _LoRAProduct.apply(
            rows,
            term.a,
            term.b,
            h,
            self.frozen.bias,
            self.frozen.weight,
            (term.scaling, term.keep_probability),
            *saved,
        )
        return y.view(*x.shape[:-1], -1)

    @property
    def weight(self) -> FrozenWeight:
        """The frozen weight: T5 asks its layers for their weight's dtype, where it is a tensor."""
        return self.frozen.weight

    def low_rank(self, kept: Tensor | None) -> LowRank:
        """Return the trained term of a call, given the mask of `draw_kept` for that call."""
        keep_probability = 1.0 if kept is None else 1 - self.dropout
        return LowRank(self.lora_A, self.lora_B, kept, self.scaling, keep_probability)

    def draw_kept(self, x: Tensor) -> Tensor | None:
        """Draw the mask of the inputs of A that are kept: bool (N, D), or None without dropout.

        Args:
            x: the input (..., D), or any tensor on its device that differs in the last size only.
        """
        if not self.training or self.dropout == 0:
            return None
        keep, draws = 1 - self.dropout, draws_now()
        shape = torch.Size((*x.shape[:-1], self.frozen.in_features))
        if draws is not None and len(shape) == 3 and shape[0] == len(draws.samples):
            return draws.kept(shape, self.number, keep, x.device)
        kept = torch.empty(shape, dtype=torch.bool, device=x.device)
        return kept.bernoulli_(keep).view(-1, shape[-1])

    @torch.no_grad()
    def delta(self) -> Tensor:
        """Return the matrix that the low-rank term adds to W: scaling · B A, (K, D), fp32."""
        return self.scaling * (self.lora_B @ self.lora_A)

    def extra_repr(self) -> str:
        """Show rank and scaling when the model is printed."""
        return f"rank={self.rank}, scaling={self.scaling:g}, dropout={self.dropout:g}"


class _LoRAProduct(torch.autograd.Function):
    # With d for dropout, p for the share it keeps and s for the scaling:
    #   h = d(x) Aᵀ / p           y = x Wᵀ + b + s h Bᵀ
    #   g = s dy B / p            dx = dy W + d(g A)
    #   dA = gᵀ d(x)              dB = s dyᵀ h

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        h: Tensor,
        bias: Tensor | None,
        weight: FrozenWeight,
        factors: tuple[float, float],
        token: Tensor,
        node: Any,
    ) -> Tensor:
        ctx.weight, ctx.factors, ctx.node = weight, factors, node
        y = weight.product(x, bias)
        LowRank(a, b, None, *factors).add_to(y, h)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y,) = grads
        x, a, b, kept, h = ctx.node.saved_tensors
        term = LowRank(a, b, kept, *ctx.factors)
        grad_y_wide = grad_y.to(a.dtype)
        grad_inner = term.inner_gradient(grad_y_wide)
        grad_a, grad_b = term.gradients(x, h, grad_y_wide, grad_inner)
        del grad_y_wide
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.weight.product_back(grad_y)
            term.add_input_gradient(grad_x, grad_inner)
        return (grad_x, grad_a, grad_b, *(None for _ in range(6)))


def _masked(x: Tensor, kept: Tensor | None) -> Tensor:
    # This is exact in any dtype. The small products are divided by the probability instead of x.
    return x if kept is None else x * kept


def _add_product(y: Tensor, left: Tensor, right: Tensor, factor: float) -> None:
    """Add factor · left right to y in place, computed in the wider dtype and rounded once."""
    if y.dtype == left.dtype:
        y.addmm_(left, right, alpha=factor)
    else:
        y.add_(left @ right, alpha=factor)
