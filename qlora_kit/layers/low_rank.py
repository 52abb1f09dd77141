"""The trained term of LoRA layers that see one x: y += scaling · dropout(x) Aᵀ Bᵀ for each of them.

The term of several layers multiplies x, and adds to the gradient of x, once for all of them. It
knows no frozen weight. Where tensor cores multiply, a `SplitLowRank` stands in for a `LowRank`.

Shapes: N tokens, D in, K out (of each layer its own), R rank, M layers.

Source: LoRA (arXiv:2106.09685), section 4.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from qlora_kit.layers.kernels import split


class Gradients(NamedTuple):
    """The gradients of a term.

    Attributes:
        inner: that of x Aᵀ, as the other methods of the term take it.
        a: that of the A of each layer, (R, D); None where A is frozen.
        b: that of the B of each layer, (K, R).
    """

    inner: Tensor
    a: Sequence[Tensor | None]
    b: Sequence[Tensor]


@dataclass(frozen=True)
class LowRank:
    """The trained term of one call: scaling · h Bᵀ with h = dropout(x) Aᵀ, for M layers.

    Attributes:
        a: A of each layer, (R, D), fp32 or wider.
        b: B of each layer, (K, R), in the dtype of `a`.
        kept: mask of the inputs of A that dropout kept, bool (N, D), which only a single layer can
            have: each has masks of its own. None without dropout.
        scaling: factor of the term.
        keep_probability: probability that dropout keeps an input of A; 1 without dropout.
    """

    a: tuple[Tensor, ...]
    b: tuple[Tensor, ...]
    kept: Tensor | None = None
    scaling: float = 1.0
    keep_probability: float = 1.0

    @property
    def factors(self) -> tuple[float, float]:
        """The scaling, and the probability that dropout keeps an input of A."""
        return self.scaling, self.keep_probability

    def rows(self, rows: slice) -> LowRank:
        """Return the term of some rows of x."""
        return self if self.kept is None else replace(self, kept=self.kept[rows])

    def inner(self, x: Tensor) -> Tensor:
        """Return h (N, M R) of x (N, D), as the other methods take it."""
        a = self._stacked_a()
        h = _masked(x, self.kept).to(a.dtype) @ a.T
        return h if self.keep_probability == 1 else h.div_(self.keep_probability)

    def add_to(self, y: Tensor, h: Tensor, layer: int = 0) -> None:
        """Add the term of a layer to its y (N, K) in place."""
        _add_product(y, self._of_layer(h, layer), self.b[layer].T, self.scaling)

    def inner_gradient(self, grads_y: Sequence[Tensor]) -> Tensor:
        """Return the gradient of x Aᵀ (N, M R), given that of the y (N, K) of each layer."""
        grad_inner = self._empty_inner(grads_y[0])
        for layer, grad_y in enumerate(grads_y):
            self._fill_inner(grad_inner, layer, grad_y.to(self.b[layer].dtype))
        return self._scaled(grad_inner)

    def gradients(
        self,
        x: Tensor | None,
        h: Tensor,
        grads_y: Sequence[Tensor],
        grad_inner: Tensor | None = None,
    ) -> Gradients:
        """Return all gradients but that of x.

        Args:
            x: (N, D), the input of the call; None where A is frozen.
            h: the result of `inner` for that input.
            grads_y: gradient of the y (N, K) of each layer.
            grad_inner: the result of `inner_gradient`, if it is there already.
        """
        inner = self._empty_inner(grads_y[0]) if grad_inner is None else grad_inner
        grads_b = []
        for layer, grad_y in enumerate(grads_y):
            # One wide copy of a gradient at a time.
            wide = grad_y.to(h.dtype)
            if grad_inner is None:
                self._fill_inner(inner, layer, wide)
            grads_b.append((wide.T @ self._of_layer(h, layer)).mul_(self.scaling))
        if grad_inner is None:
            inner = self._scaled(inner)
        if x is None:
            return Gradients(inner, [None] * len(self.b), grads_b)
        grad_a = inner.T @ _masked(x, self.kept).to(inner.dtype)
        return Gradients(inner, grad_a.chunk(len(self.a)), grads_b)

    def add_input_gradient(self, grad_x: Tensor, grad_inner: Tensor) -> None:
        """Add the term's share of the gradient of x to `grad_x` (N, D), in place."""
        if self.kept is None:
            _add_product(grad_x, grad_inner, self._stacked_a(), 1.0)
        else:
            grad_x += _masked(grad_inner @ self._stacked_a(), self.kept)

    def _stacked_a(self) -> Tensor:
        return self.a[0] if len(self.a) == 1 else torch.cat(self.a)

    def _of_layer(self, inner: Tensor, layer: int) -> Tensor:
        rank = self.b[layer].shape[1]
        return inner[:, layer * rank : (layer + 1) * rank]

    def _empty_inner(self, like: Tensor) -> Tensor:
        b = self.b[0]
        return like.new_empty((len(like), len(self.b) * b.shape[1]), dtype=b.dtype)

    def _fill_inner(self, grad_inner: Tensor, layer: int, grad_y: Tensor) -> None:
        torch.mm(grad_y, self.b[layer], out=self._of_layer(grad_inner, layer))

    def _scaled(self, grad_inner: Tensor) -> Tensor:
        grad_inner.mul_(self.scaling)
        return grad_inner if self.keep_probability == 1 else grad_inner.div_(self.keep_probability)


@dataclass(frozen=True)
class SplitLowRank(LowRank):
    """The trained term for bf16 inputs, computed on tensor cores within 1e-5 of fp32.

    A, B, h and the gradient of x Aᵀ are split into two bf16 parts each (`kernels.split`). x and the
    gradients of y are never copied to fp32. h and the gradient of x Aᵀ carry all factors already.

    Launches of M layers for their term, up to 2,048 tokens and without dropout: 3 + M in forward
    and in recomputation, and 5 + 2 M in backward. One of forward and one of recomputation split A
    and B; backward finds them split. Layers that keep their activations hold the parts too,
    4 R (D + K) bytes each; else they live for one layer at a time.

    Attributes:
        a: the parts of all A, (2 M R, D), bf16, as a tuple of one.
        b: the parts of the B of each layer, (K, 2 R), bf16.
    """

    @classmethod
    def of(cls, term: LowRank) -> SplitLowRank:
        """Return a term in fp32 as a split one."""
        a, b = split.split_matrices(term.a, term.b)
        return cls((a,), b, term.kept, *term.factors)

    def inner(self, x: Tensor) -> Tensor:
        """Return scaling · h in parts, (M, N, 2 R)."""
        products = split.wide_product(_masked(x, self.kept), self.a[0].T)
        return split.split_products(products, len(self.b), self._factor)

    def add_to(self, y: Tensor, h: Tensor, layer: int = 0) -> None:
        """See `LowRank`."""
        split.add_product(y, h[layer], self.b[layer].T)

    def inner_gradient(self, grads_y: Sequence[Tensor]) -> Tensor:
        """Return the gradient of x Aᵀ in parts, (N, 2 M R)."""
        shape = (len(self.b), len(grads_y[0]), self.b[0].shape[1])
        products = grads_y[0].new_empty(shape, dtype=torch.float32)
        for grad_y, b, out in zip(grads_y, self.b, products, strict=True):
            split.wide_product(grad_y, b, out=out)
        return split.split_gradients(products, self._factor)

    def gradients(
        self,
        x: Tensor | None,
        h: Tensor,
        grads_y: Sequence[Tensor],
        grad_inner: Tensor | None = None,
    ) -> Gradients:
        """See `LowRank`."""
        inner = self.inner_gradient(grads_y) if grad_inner is None else grad_inner
        if x is None:
            return Gradients(inner, [None] * len(self.b), split.gradients_of_b(grads_y, h))
        grad_a = split.gradient_of_a(inner, _masked(x, self.kept))
        return Gradients(inner, grad_a.chunk(len(self.b)), split.gradients_of_b(grads_y, h))

    def add_input_gradient(self, grad_x: Tensor, grad_inner: Tensor) -> None:
        """See `LowRank`."""
        split.add_product(grad_x, grad_inner, self.a[0], self.kept)

    @property
    def _factor(self) -> float:
        return self.scaling / self.keep_probability


def _masked(x: Tensor, kept: Tensor | None) -> Tensor:
    # This is exact in any dtype. The small products are divided by the probability instead of x.
    return x if kept is None else x * kept


def _add_product(y: Tensor, left: Tensor, right: Tensor, factor: float) -> None:
    """Add factor · left right to y in place, computed in the wider dtype and rounded once."""
    if y.dtype == left.dtype:
        # Not `addmm_`, whose work torch's counter of operations does not know.
        torch.addmm(y, left, right, alpha=factor, out=y)
    else:
        y.add_(left @ right, alpha=factor)
