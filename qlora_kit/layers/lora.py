"""The LoRA layer: y = x Wᵀ + b + scaling · dropout(x) Aᵀ Bᵀ, with W frozen and packed.

One autograd function serves 4, 8 and 16 bits. It saves x and the small h = dropout(x) Aᵀ before the
product with W. So a recomputed layer that ends in that product does not compute it again. Backward
unpacks W again, so no unpacked weight outlives its product.

The trained term is a `LowRank`. Where tensor cores multiply, a `SplitLowRank` stands in for it.

Shapes: N tokens, D in, K out, R rank.

Source: LoRA (arXiv:2106.09685), section 4.1; QLoRA (arXiv:2305.14314), equation 5; rsLoRA
(arXiv:2312.03732) for scaling = alpha / √rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.layers import kernels
from qlora_kit.layers.draws import draws_now
from qlora_kit.layers.frozen import FrozenLinear
from qlora_kit.layers.kernels import split
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

    @property
    def factors(self) -> tuple[float, float]:
        """The scaling, and the probability that dropout keeps an input of A."""
        return self.scaling, self.keep_probability

    def rows(self, rows: slice) -> LowRank:
        """Return the term of some rows of x."""
        return self if self.kept is None else replace(self, kept=self.kept[rows])

    def inner(self, x: Tensor) -> Tensor:
        """Return h (N, R) of x (N, D), as `add_to` and `gradients` take it."""
        h = _masked(x, self.kept).to(self.a.dtype) @ self.a.T
        return h if self.keep_probability == 1 else h.div_(self.keep_probability)

    def add_to(self, y: Tensor, h: Tensor) -> None:
        """Add the term to y (N, K) in place."""
        _add_product(y, h, self.b.T, self.scaling)

    def as_multiplied(self, grad_y: Tensor) -> Tensor:
        """Return the gradient of y (N, K) in the dtype in which the other methods take it."""
        return grad_y.to(self.a.dtype)

    def inner_gradient(self, grad_y: Tensor) -> Tensor:
        """Return the gradient of x Aᵀ (N, R), given that of y (N, K) from `as_multiplied`."""
        grad_inner = (grad_y @ self.b).mul_(self.scaling)
        return grad_inner if self.keep_probability == 1 else grad_inner.div_(self.keep_probability)

    def gradients(
        self, x: Tensor, h: Tensor, grad_y: Tensor, grad_inner: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of A (R, D) and B (K, R).

        Args:
            x: (N, D), the input of the call.
            h: the result of `inner` for x.
            grad_y: gradient of y (N, K), the result of `as_multiplied`.
            grad_inner: the result of `inner_gradient` for `grad_y`.
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


@dataclass(frozen=True)
class SplitLowRank(LowRank):
    """The trained term for bf16 inputs, computed on tensor cores within 1e-5 of fp32.

    A, B, h and the gradient of x Aᵀ are split into two bf16 parts each (`kernels.split`). x and the
    gradient of y are never copied to fp32. h and the gradient of x Aᵀ carry all factors already.

    Launches of a recomputed linear layer for its term, without dropout: the plain term takes 4 in
    forward, 2 in recomputation and 9 in backward, and this one 4, 3 and 7. One of forward and one
    of recomputation split A and B; backward finds them split. Layers that keep their activations
    hold the parts too, 6 R (D + K) bytes each; else they live for one layer at a time.

    Attributes:
        a: A as a right factor, (3 R, D), bf16.
        b: B as a right factor, (K, 3 R), bf16.
    """

    @classmethod
    def of(cls, a: Tensor, b: Tensor, kept: Tensor | None, *factors: float) -> SplitLowRank:
        """Return the term of A (R, D) and B (K, R), both fp32; see `LowRank` for the others."""
        return cls(*split.as_right_factors(a, b), kept, *factors)

    @property
    def _rank(self) -> int:
        return self.b.shape[1] // 3

    def inner(self, x: Tensor) -> Tensor:
        """Return scaling · h as a left factor, (N, 3 R), bf16."""
        products = split.wide_product(_masked(x, self.kept), self.a[self._rank :].T)
        return split.as_left_factor(products, self.scaling / self.keep_probability)

    def add_to(self, y: Tensor, h: Tensor) -> None:
        """See `LowRank`."""
        torch.addmm(y, h, self.b.T, out=y)

    def as_multiplied(self, grad_y: Tensor) -> Tensor:
        """Return the gradient of y as it is."""
        return grad_y

    def inner_gradient(self, grad_y: Tensor) -> Tensor:
        """Return the gradient of x Aᵀ as a left factor, (N, 3 R), bf16."""
        products = split.wide_product(grad_y, self.b[:, self._rank :])
        return split.as_left_factor(products, self.scaling / self.keep_probability)

    def gradients(
        self, x: Tensor, h: Tensor, grad_y: Tensor, grad_inner: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `LowRank`."""
        both = 2 * self._rank
        grad_a = split.product_over_tokens(grad_inner[:, :both], _masked(x, self.kept), halves=0)
        grad_b = split.product_over_tokens(grad_y, h[:, :both], halves=1)
        return grad_a, grad_b

    def add_input_gradient(self, grad_x: Tensor, grad_inner: Tensor) -> None:
        """See `LowRank`."""
        if self.kept is None:
            torch.addmm(grad_x, grad_inner, self.a, out=grad_x)
        else:
            whole = torch.addmm(grad_x, grad_inner, self.a)
            torch.where(self.kept, whole, grad_x, out=grad_x)


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
        with torch.no_grad():
            term = self.low_rank(x, self.draw_kept(x))
            h = term.inner(rows)
        a, b = self.lora_A, self.lora_B
        parts = (term.a, term.b) if isinstance(term, SplitLowRank) else ()
        saved = save_first(rows, a, b, term.kept, h, *parts)
        y: Tensor = _LoRAProduct.apply(
            rows, a, b, h, parts, self.frozen.bias, self.frozen.weight, term.factors, *saved
        )
        return y.view(*x.shape[:-1], -1)

    @property
    def weight(self) -> FrozenWeight:
        """The frozen weight: T5 asks its layers for their weight's dtype, where it is a tensor."""
        return self.frozen.weight

    def low_rank(self, x: Tensor, kept: Tensor | None) -> LowRank:
        """Return the trained term of a call; to be called where no graph is recorded.

        Args:
            x: the input, or any tensor on its device and in its dtype.
            kept: the mask of `draw_kept` for that call.
        """
        factors = self.scaling, 1.0 if kept is None else 1 - self.dropout
        is_split = x.dtype == torch.bfloat16 and self.lora_A.dtype == torch.float32
        if is_split and kernels.serves("lora", x):
            return SplitLowRank.of(self.lora_A, self.lora_B, kept, *factors)
        return LowRank(self.lora_A, self.lora_B, kept, *factors)

    def draw_kept(self, x: Tensor) -> Tensor | None:
        """Draw the mask of the inputs of A that are kept: bool (N, D), or None without dropout.

        Args:
            x: the input (..., D), or any tensor on its device that differs in the last size only.
        """
        if not self.training or self.dropout == 0:
            return None
        keep, draws = 1 - self.dropout, draws_now()
        shape = torch.Size((*x.shape[:-1], self.frozen.in_features))
        if draws is not None and draws.covers(shape):
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
        parts: tuple[Tensor, ...],
        bias: Tensor | None,
        weight: FrozenWeight,
        factors: tuple[float, float],
        token: Tensor,
        node: Any,
    ) -> Tensor:
        ctx.weight, ctx.factors, ctx.node = weight, factors, node
        y = weight.product(x, bias)
        _term(a, b, None, parts, factors).add_to(y, h)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y,) = grads
        x, a, b, kept, h, *parts = ctx.node.saved_tensors
        term = _term(a, b, kept, parts, ctx.factors)
        multiplied = term.as_multiplied(grad_y)
        grad_inner = term.inner_gradient(multiplied)
        grad_a, grad_b = term.gradients(x, h, multiplied, grad_inner)
        del multiplied
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.weight.product_back(grad_y)
            term.add_input_gradient(grad_x, grad_inner)
        return (grad_x, grad_a, grad_b, *(None,) * 7)


def _term(
    a: Tensor,
    b: Tensor,
    kept: Tensor | None,
    parts: Sequence[Tensor],
    factors: tuple[float, float],
) -> LowRank:
    """Return the term of a call; `parts` are A and B as right factors where it is split."""
    if not parts:
        return LowRank(a, b, kept, *factors)
    a_parts, b_parts = parts
    return SplitLowRank(a_parts, b_parts, kept, *factors)


def _masked(x: Tensor, kept: Tensor | None) -> Tensor:
    # This is exact in any dtype. The small products are divided by the probability instead of x.
    return x if kept is None else x * kept


def _add_product(y: Tensor, left: Tensor, right: Tensor, factor: float) -> None:
    """Add factor · left right to y in place, computed in the wider dtype and rounded once."""
    if y.dtype == left.dtype:
        y.addmm_(left, right, alpha=factor)
    else:
        y.add_(left @ right, alpha=factor)
