"""The output head: how a model turns its last hidden state into logits.

The loss computes logits chunk by chunk, and so must know the formula:
logits = cap · tanh((h Wᵀ + b) · scale / cap). `model.head` reads its numbers from a model.

A head in 8 or 4 bits is held in slices of the vocabulary and unpacked one slice at a time: the
whole head unpacked would take as much memory as quantising it saves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qlora_kit.layers.frozen import FrozenLinear, frozen_product
from qlora_kit.layers.head_terms import HeadTerm, LowRankTerm
from qlora_kit.layers.quantize import Quantization
from qlora_kit.layers.weight import FrozenWeight, GatheredWeight, PlainWeight

_SLICE_ROWS = 8192


class SlicedWeight(FrozenWeight):
    """A weight (V, D) cut into slices of rows, each quantised by itself.

    Args:
        weight: (V, D), on any device.
        quantization: the bits and format of each slice.
        device: the device that holds the slices.
    """

    def __init__(self, weight: Tensor, quantization: Quantization, device: torch.device) -> None:
        super().__init__((weight.shape[0], weight.shape[1]))
        self.bits = quantization.bits
        slices = (quantization.freeze(weight[rows].to(device)) for rows in _rows(len(weight)))
        self.slices = nn.ModuleList(slices)

    def __len__(self) -> int:
        return self.shape[0]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the whole weight (V, D); `unpacked_slices` needs the memory of one slice only."""
        return torch.cat([part for _, part in self.unpacked_slices(dtype)])

    def unpacked_slices(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Yield each slice of the weight (n, D) after the rows that it covers."""
        for rows, part in zip(_rows(len(self)), self.parts, strict=True):
            yield rows, part.unpacked(dtype)

    @property
    def parts(self) -> list[FrozenWeight]:
        """The slices, in the order of their rows."""
        return [part for part in self.slices if isinstance(part, FrozenWeight)]


class SlicedLinear(FrozenLinear):
    """A head whose weight is a `SlicedWeight`; its logits are computed slice by slice too."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., D) to (..., V) in the dtype of x; differentiable in x."""
        y = torch.cat(self.products(x), dim=-1)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def products(self, x: Tensor) -> list[Tensor]:
        """Return x (..., D) times each slice of the weight; a graph keeps no unpacked slice."""
        assert isinstance(self.weight, SlicedWeight)
        return [frozen_product(x, part) for part in self.weight.parts]


def quantize_head(
    head: FrozenLinear, quantization: Quantization, device: torch.device
) -> SlicedLinear:
    """Return the head in fewer bits, approximately the same; `head` itself is not changed."""
    sliced = SlicedLinear(head.in_features, head.out_features, bias=head.bias is not None)
    sliced.bias = head.bias
    stored = head.weight
    values = stored.values if isinstance(stored, PlainWeight) else stored.dequantize(torch.float32)
    sliced.weight = SlicedWeight(values, quantization, device)
    return sliced


def _rows(count: int) -> Iterator[slice]:
    for start in range(0, count, _SLICE_ROWS):
        yield slice(start, min(start + _SLICE_ROWS, count))


@dataclass(frozen=True)
class Head:
    """The formula of the logits: softcap · tanh((h Wᵀ + b) · scale / softcap).

    Attributes:
        linear: W (V, D) and b (V,) or None.
        scale: factor of the logits.
        softcap: bound of the logits; None leaves the bound and tanh out.
        term: what is trained of the head, which its products h Wᵀ get; None of a frozen head.
    """

    linear: FrozenLinear
    scale: float = 1.0
    softcap: float | None = None
    term: HeadTerm | None = None

    @property
    def trained(self) -> tuple[Tensor, ...]:
        """The parameters that a loss gives gradients to; none where no graph is recorded."""
        return self.term.parameters if self.term and torch.is_grad_enabled() else ()

    def rows(self, rows: slice) -> Head:
        """Return the head of a chunk: of some of the tokens of a call."""
        return self if self.term is None else replace(self, term=self.term.rows(rows))

    def keeping(self, kept: Tensor | None) -> Head:
        """Return the head of a call whose low-rank term keeps these inputs, bool (N, D)."""
        if kept is None:
            return self
        assert isinstance(self.term, LowRankTerm), "nothing else has dropout"
        return replace(self, term=self.term.keeping(kept))

    def weight(self, dtype: torch.dtype) -> Tensor | SlicedWeight:
        """Return W (V, D) for hidden states of `dtype`, never upcast as a whole.

        A head stored in 16 bits stays in 16 bits even where the layers compute in fp32:
        `fill_logits` and `back_project` cast one slice of the vocabulary at a time.
        """
        stored = self.linear.weight
        if isinstance(stored, SlicedWeight):
            return stored
        if isinstance(stored, PlainWeight | GatheredWeight):
            return stored.values
        return stored.unpacked(dtype)

    def fill_products(self, hidden: Tensor, weight: Tensor | SlicedWeight, out: Tensor) -> None:
        """Write h Wᵀ into `out` (n, V), without bias, scale and cap; computed in the dtype of h.

        Args:
            hidden: (n, D), in the compute dtype.
            weight: the result of the method `weight`.
            out: (n, V), fp32 or in the compute dtype; overwritten.
        """
        for columns, part in _slices(weight, hidden.dtype):
            if part.dtype == out.dtype:
                torch.mm(hidden, part.T, out=out[:, columns])
            else:
                out[:, columns] = hidden @ part.T
        if self.term is not None:
            self.term.add_to(out, hidden)

    def fill_logits(
        self,
        hidden: Tensor,
        weight: Tensor | SlicedWeight,
        out: Tensor,
        capped: Tensor | None = None,
    ) -> None:
        """Write the logits of hidden states (n, D) into `out` (n, V), fp32.

        Args:
            hidden: (n, D), in the compute dtype.
            weight: the result of the method `weight`.
            out: (n, V), fp32; overwritten.
            capped: (n, V), fp32; receives tanh(…), which the gradient of a softcap needs.
        """
        self.fill_products(hidden, weight, out)
        if self.linear.bias is not None:
            out += self.linear.bias
        if self.scale != 1.0:
            out *= self.scale
        if self.softcap is not None:
            capped = torch.empty_like(out) if capped is None else capped
            torch.div(out, self.softcap, out=capped).tanh_()
            torch.mul(capped, self.softcap, out=out)

    def back_project(
        self, grad: Tensor, weight: Tensor | SlicedWeight, dtype: torch.dtype
    ) -> Tensor:
        """Return `grad` (n, V) times W, (n, D), computed in `dtype`."""
        products = (grad[:, c].to(dtype) @ part for c, part in _slices(weight, dtype))
        total = next(products)
        for product in products:
            total += product
        return total

    def fill_gradients(
        self,
        hidden: Tensor,
        grad: Tensor,
        weight: Tensor | SlicedWeight,
        factor: Tensor | float,
        out: Tensor | None,
        trained: Sequence[Tensor] = (),
    ) -> None:
        """Turn the gradient `grad` · `factor` of h Wᵀ into that of h, and of what is trained.

        Args:
            hidden: (n, D), in the compute dtype.
            grad: (n, V); overwritten if something is trained.
            weight: the result of the method `weight`.
            factor: (n, 1), fp32, or a number.
            out: (n, D), is overwritten by the gradient of h; None if nobody wants it.
            trained: fp32, gets the gradient of each trained parameter added.
        """
        share = None
        if self.term is not None:
            wide = torch.as_tensor(factor, dtype=torch.float32, device=grad.device)
            share = self.term.backward(hidden, grad, wide.reshape(-1, 1), trained)
        if out is None:
            return
        product = self.back_project(grad, weight, hidden.dtype)
        if share is None:
            torch.mul(product, factor, out=out)
        else:
            out.copy_((product * factor).to(share.dtype).add_(share))

    def logits(self, hidden: Tensor) -> Tensor:
        """Return fp32 logits (n, V) of hidden states (n, D), differentiable in `hidden`.

        They are differentiable in what is trained of the head, too. The same formula as
        `fill_logits`, for a caller with a loss of its own.
        """

        def frozen() -> Tensor:
            return self._frozen_products(hidden).float()

        logits = frozen() if self.term is None else self.term.products(hidden, frozen)
        if self.linear.bias is not None:
            logits = logits + self.linear.bias.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def _frozen_products(self, hidden: Tensor) -> Tensor:
        if isinstance(self.linear, SlicedLinear):
            parts = self.linear.products(hidden)
        else:
            weight = self.weight(hidden.dtype)
            parts = [hidden @ part.T for _, part in _slices(weight, hidden.dtype)]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def _slices(weight: Tensor | SlicedWeight, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield W as a whole if it is in `dtype`, or else slices of the vocabulary in `dtype`."""
    if isinstance(weight, SlicedWeight):
        yield from weight.unpacked_slices(dtype)
    elif weight.dtype == dtype:
        yield slice(None), weight
    else:
        for rows in _rows(len(weight)):
            yield rows, weight[rows].to(dtype)
