"""What is trained of an output head: a low-rank term, the whole weight, or some of its rows.

A term adds its share to the products h Wᵀ of a chunk of tokens, and takes its gradients from the
gradient of these products, in the same pass. So neither logits nor their gradient exist for more
than a chunk. Bias, scale and softcap of the logits are the head's business (`layers.head`).

A module that stands in the place of a model's head is a `TrainedHead`: it says which frozen layer
multiplies, and which term is added. `model.head.head_of` asks it.

Shapes: n tokens of a chunk, D hidden size, V vocabulary, R rank, k rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from qlora_kit.layers.frozen import FrozenLinear

# Columns of the vocabulary that are cast to fp32 at one time.
_SLICE_COLUMNS = 8192


class HeadTerm(Protocol):
    """The trained part of a head.

    Attributes:
        parameters: the trained tensors, in the order of their gradients.
    """

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The trained tensors, in the order of their gradients."""

    def rows(self, rows: slice) -> HeadTerm:
        """Return the term of a chunk: of some of the tokens of a call."""

    def add_to(self, products: Tensor, hidden: Tensor) -> None:
        """Add the term to the frozen products h Wᵀ (n, V), in place; no graph is recorded."""

    def products(self, hidden: Tensor, frozen: Callable[[], Tensor]) -> Tensor:
        """Return the products (n, V) with the term, differentiable in hidden and parameters.

        Args:
            hidden: (n, D).
            frozen: returns the frozen products h Wᵀ (n, V), fp32.
        """

    def backward(
        self, hidden: Tensor, grad: Tensor, factor: Tensor, into: Sequence[Tensor]
    ) -> Tensor | None:
        """Add the gradients of the parameters to `into`; return the share of the hidden states'.

        The gradient of the products is `grad` · `factor`.

        Args:
            hidden: (n, D).
            grad: (n, V). Columns in which the frozen weight has no part are set to zero.
            factor: (n, 1), fp32.
            into: a tensor in fp32 for each parameter; nothing if nobody wants them.

        Returns:
            What is to be added to the gradient of `hidden`, (n, D), in fp32; None if nothing.
        """


@runtime_checkable
class TrainedHead(Protocol):
    """A module in the place of a head, of which something is trained."""

    def head_parts(self) -> tuple[FrozenLinear, HeadTerm]:
        """Return the frozen layer that multiplies the hidden states, and the trained term."""


# ---------------------------------------------------------------- low rank


@dataclass(frozen=True)
class LowRankTerm:
    """LoRA on a head: scaling · dropout(h) Aᵀ Bᵀ, computed in fp32.

    Attributes:
        a: A (R, D).
        b: B (V, R).
        scaling: factor of the term.
        keep_probability: probability that dropout keeps an input of A.
        kept: mask of the inputs that dropout kept, bool (N, D); None without dropout.

    Source: LoRA (arXiv:2106.09685), section 4.1.
    """

    a: Tensor
    b: Tensor
    scaling: float
    keep_probability: float = 1.0
    kept: Tensor | None = None

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """A and B."""
        return self.a, self.b

    def rows(self, rows: slice) -> Self:
        """See `HeadTerm`."""
        return self if self.kept is None else replace(self, kept=self.kept[rows])

    def keeping(self, kept: Tensor | None) -> Self:
        """Return the term of a call in which dropout keeps these inputs, bool (N, D)."""
        return replace(self, kept=kept)

    def add_to(self, products: Tensor, hidden: Tensor) -> None:
        """See `HeadTerm`."""
        inner = self._inputs(hidden) @ self.a.T * self.scaling
        for columns in _columns(products):
            part, b = products[:, columns], self.b[columns].T
            if part.dtype == inner.dtype:
                _add_product(part, inner, b)
            else:
                part += inner @ b

    def products(self, hidden: Tensor, frozen: Callable[[], Tensor]) -> Tensor:
        """See `HeadTerm`."""
        inner = self._inputs(hidden) @ self.a.T * self.scaling
        return frozen() + inner @ self.b.T

    def backward(
        self, hidden: Tensor, grad: Tensor, factor: Tensor, into: Sequence[Tensor]
    ) -> Tensor:
        """See `HeadTerm`."""
        x, scaled = self._inputs(hidden), factor * self.scaling
        inner = (x @ self.a.T).mul_(scaled)
        grad_inner = torch.zeros_like(inner)
        for columns in _columns(grad):
            part = grad[:, columns].to(inner.dtype)
            _add_product(grad_inner, part, self.b[columns])
            if into:
                _add_product(into[1][columns], part.T, inner)
        grad_inner.mul_(scaled)
        if into:
            _add_product(into[0], grad_inner.T, x)
        grad_x = grad_inner @ self.a
        return grad_x if self.kept is None else self._masked(grad_x)

    def _inputs(self, hidden: Tensor) -> Tensor:
        x = hidden.to(self.a.dtype)
        return x if self.kept is None else self._masked(x)

    def _masked(self, x: Tensor) -> Tensor:
        assert self.kept is not None
        return x * self.kept / self.keep_probability


# ---------------------------------------------------------------- the whole weight


@dataclass(frozen=True)
class WholeTerm:
    """A head that is trained whole: it has a gradient, and no frozen product beside it.

    The layer that multiplies is the trained weight itself, see `whole_head`, cast to the dtype of
    the hidden states slice by slice, as a frozen head is. The gradient is summed in fp32.

    Attributes:
        weight: W (V, D).
        bias: b (V,), or None.
    """

    weight: Tensor
    bias: Tensor | None = None

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """W, and b if there is one."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def rows(self, rows: slice) -> Self:
        """See `HeadTerm`."""
        return self

    def add_to(self, products: Tensor, hidden: Tensor) -> None:
        """See `HeadTerm`; the products are those of the trained weight already."""

    def products(self, hidden: Tensor, frozen: Callable[[], Tensor]) -> Tensor:
        """See `HeadTerm`: the same numbers, with a graph that leads to the parameters."""
        found = (hidden @ self.weight.to(hidden.dtype).T).float()
        # The head adds the values of b behind this; here they only get their gradient.
        return found if self.bias is None else found + (self.bias - self.bias.detach())

    def backward(
        self, hidden: Tensor, grad: Tensor, factor: Tensor, into: Sequence[Tensor]
    ) -> None:
        """See `HeadTerm`; the product with W is that of the head."""
        if not into:
            return
        scaled = (hidden * factor).to(hidden.dtype)
        for columns in _columns(grad):
            part = grad[:, columns]
            own = into[0][columns]
            if hidden.dtype == own.dtype:
                _add_product(own, part.to(own.dtype).T, scaled)
            else:
                own += part.to(hidden.dtype).T @ scaled
            if self.bias is not None:
                into[1][columns] += (part * factor).sum(0)


def whole_head(weight: Tensor, bias: Tensor | None) -> tuple[FrozenLinear, WholeTerm]:
    """Return the parts of a head that is trained whole, see `TrainedHead`.

    The layer that multiplies has the very memory of the parameters, and so their values.

    Args:
        weight: (V, D), a parameter.
        bias: (V,), a parameter; None of a head without.
    """
    values = FrozenLinear.holding(weight.detach(), None if bias is None else bias.detach())
    return values, WholeTerm(weight, bias)


# ---------------------------------------------------------------- some rows


@dataclass(frozen=True)
class RowsTerm:
    """Rows of a head that are trained in the place of the frozen ones, such as those of new tokens.

    Computed in the dtype of the values.

    Attributes:
        ids: the rows, (k,), int64, each once, on the device of the head.
        values: what stands in their places, (k, D).
    """

    ids: Tensor
    values: Tensor

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The values."""
        return (self.values,)

    def rows(self, rows: slice) -> Self:
        """See `HeadTerm`."""
        return self

    def add_to(self, products: Tensor, hidden: Tensor) -> None:
        """See `HeadTerm`: the products of the rows replace the frozen ones."""
        products.index_copy_(1, self.ids, self._of_rows(hidden).to(products.dtype))

    def products(self, hidden: Tensor, frozen: Callable[[], Tensor]) -> Tensor:
        """See `HeadTerm`."""
        found = self._of_rows(hidden)
        return frozen().to(found.dtype).index_copy(1, self.ids, found)

    def backward(
        self, hidden: Tensor, grad: Tensor, factor: Tensor, into: Sequence[Tensor]
    ) -> Tensor:
        """See `HeadTerm`: the columns of the rows are set to zero."""
        own = grad.index_select(1, self.ids).to(self.values.dtype).mul_(factor)
        grad.index_fill_(1, self.ids, 0)
        if into:
            _add_product(into[0], own.T, hidden.to(own.dtype))
        return own @ self.values

    def _of_rows(self, hidden: Tensor) -> Tensor:
        return hidden.to(self.values.dtype) @ self.values.T


def _columns(products: Tensor) -> Iterator[slice]:
    """Yield slices of the vocabulary: a cast to fp32 of all of it would take the most memory."""
    vocabulary = products.shape[1]
    for start in range(0, vocabulary, _SLICE_COLUMNS):
        yield slice(start, min(start + _SLICE_COLUMNS, vocabulary))


def _add_product(onto: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left · right to a tensor in place."""
    # Not `addmm_`, whose work torch's counter of operations does not know.
    torch.addmm(onto, left, right, out=onto)
