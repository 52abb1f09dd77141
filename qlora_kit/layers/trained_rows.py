"""Rows of an embedding and of a head that are trained, such as those of new tokens.

All other rows stay frozen where they are, as they are. A trained row takes the place of the frozen
one: in the embedding it is looked up in its stead, in the head its product is taken. Rows of a tied
pair are one parameter for both.

Shapes: k trained rows, D hidden size, V vocabulary.

Source: PEFT's trainable tokens; starting at the mean of the known rows: Hewitt, "Initializing New
Word Embeddings for Pretrained Language Models" (2021).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.layers.frozen import FrozenLinear
from qlora_kit.layers.head import SlicedWeight
from qlora_kit.layers.head_terms import HeadTerm, RowsTerm
from qlora_kit.layers.trained import embedding_scale, with_weight
from qlora_kit.layers.weight import FrozenWeight, PlainWeight

# Of a table that is summed in fp64: what a block takes is small beside a table.
_BLOCK_ROWS = 1024


class RowsEmbedding(nn.Module):
    """A frozen table of which some rows are trained, fp32.

    Args:
        replaced: the frozen table, on any device; it returns rows in the compute dtype.
        ids: numbers of the trained rows, each once.
        rows: their first values (k, D).
        device: the device of the layers.
    """

    def __init__(
        self, replaced: nn.Module, ids: Sequence[int], rows: Tensor, device: torch.device
    ) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows.to(device, torch.float32))
        order = sorted(range(len(ids)), key=lambda place: ids[place])
        self.ids = tuple(ids)
        # Not buffers: they are no part of the model's state.
        self._sorted = torch.tensor([ids[place] for place in order], device=device)
        self._places = torch.tensor(order, device=device)
        self._scale = embedding_scale(replaced, device)
        self._replaced = (replaced,)

    @property
    def replaced(self) -> nn.Module:
        """The frozen table."""
        return self._replaced[0]

    @property
    def weight(self) -> Tensor:
        """The frozen table's own rows: models ask their embedding for dtype and device."""
        stored: Any = self.replaced.weight
        table: Tensor = stored
        return table

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids (...) to rows (..., D) in the compute dtype."""
        frozen: Tensor = self.replaced(ids)
        ids = ids.to(frozen.device)
        found = torch.searchsorted(self._sorted, ids).clamp_(max=len(self.ids) - 1)
        is_trained = self._sorted[found] == ids
        rows = self.rows if self._scale is None else self.rows * self._scale
        out: Tensor = _Replaced.apply(frozen, rows, self._places[found], is_trained)
        return out

    def merged(self, dtype: torch.dtype) -> nn.Module:
        """Return a frozen table with the trained rows in their places, in `dtype`."""
        return with_weight(self.replaced, with_rows(self.weight, self.ids, self.rows, dtype), dtype)


class _Replaced(torch.autograd.Function):
    """Puts trained rows in the place of looked-up ones; keeps numbers only, no rows."""

    @staticmethod
    def forward(
        ctx: Any, frozen: Tensor, rows: Tensor, places: Tensor, is_trained: Tensor
    ) -> Tensor:
        ctx.save_for_backward(places, is_trained)
        ctx.count = len(rows)
        return torch.where(is_trained.unsqueeze(-1), rows[places].to(frozen.dtype), frozen)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        places, is_trained = ctx.saved_tensors
        # A product with zeros and ones has the same bits on every run, unlike adding at places.
        numbers = torch.arange(ctx.count, device=places.device)
        chosen = (places.flatten()[:, None] == numbers) & is_trained.flatten()[:, None]
        grad = grads[0].flatten(0, -2).float()
        return None, chosen.to(grad.dtype).T @ grad, None, None


class RowsHead(nn.Module):
    """A frozen head of which some rows are trained, fp32; in any bits.

    Args:
        replaced: the frozen head.
        ids: numbers of the trained rows, each once.
        rows: their first values (k, D); or the parameter of a tied table, which then is its owner.
        device: the device of the layers.
    """

    def __init__(
        self, replaced: FrozenLinear, ids: Sequence[int], rows: Tensor, device: torch.device
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = replaced.in_features, replaced.out_features
        self.ids = tuple(ids)
        self._numbers = torch.tensor(self.ids, device=device)
        self.tied = (rows,) if isinstance(rows, nn.Parameter) else ()
        if not self.tied:
            self.rows = nn.Parameter(rows.to(device, torch.float32))
        self._replaced = (replaced,)

    @property
    def replaced(self) -> FrozenLinear:
        """The frozen head."""
        return self._replaced[0]

    @property
    def values(self) -> Tensor:
        """The trained rows (k, D)."""
        return self.tied[0] if self.tied else self.rows

    def head_parts(self) -> tuple[FrozenLinear, HeadTerm]:
        """See `TrainedHead`."""
        return self.replaced, RowsTerm(self._numbers, self.values)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., D) to (..., V) in the dtype of x; for inference, a loss asks the parts."""
        y: Tensor = self.replaced(x)
        own = x.to(self.values.dtype) @ self.values.T
        if self.replaced.bias is not None:
            own = own + self.replaced.bias[self._numbers]
        return y.index_copy(-1, self._numbers, own.to(y.dtype))

    def merged(self, dtype: torch.dtype) -> nn.Module:
        """Return a frozen head with the trained rows in their places, in `dtype`."""
        whole = self.replaced.weight.dequantize(torch.float32)
        bias = self.replaced.bias
        return FrozenLinear.holding(with_rows(whole, self.ids, self.values, dtype), bias)


@torch.no_grad()
def with_rows(
    table: Tensor, ids: Sequence[int], rows: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Return a copy of a table (V, D) with other rows in some places, on its device."""
    copied = table.to(dtype or table.dtype, copy=True)
    numbers = torch.tensor([*ids], dtype=torch.int64, device=copied.device)
    return copied.index_copy_(0, numbers, rows.detach().to(copied))


@torch.no_grad()
def first_rows(
    table: FrozenWeight | Tensor, ids: Sequence[int], fresh: frozenset[int], known: int
) -> Tensor:
    """Return the values that trained rows start from, (k, D), fp32.

    Args:
        table: (V, D), as it is held.
        ids: numbers of the trained rows.
        fresh: those of them that start at the mean; others start as they are.
        known: the mean is that of the rows before this one, which are those of known tokens.
    """
    mean = mean_row(table, known) if fresh else None
    own = _picked(table, ids)
    for place, number in enumerate(ids):
        if number in fresh and mean is not None:
            own[place] = mean
    return own


def mean_row(table: FrozenWeight | Tensor, known: int) -> Tensor:
    """Return the mean of the first rows of a table, fp32, summed in fp64 block by block."""
    total: Tensor | None = None
    for start, block in _blocks(table):
        part = block[: max(0, known - start)].double().sum(0)
        total = part if total is None else total + part
    assert total is not None, "a table has rows"
    return (total / known).float()


def _picked(table: FrozenWeight | Tensor, ids: Sequence[int]) -> Tensor:
    picked: list[Tensor | None] = [None] * len(ids)
    for start, block in _blocks(table):
        for place, number in enumerate(ids):
            if start <= number < start + len(block):
                picked[place] = block[number - start].float()
    return torch.stack([row for row in picked if row is not None])


def _blocks(table: FrozenWeight | Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield a table in blocks of rows after the number of their first: it is never upcast whole."""
    if isinstance(table, SlicedWeight):
        for rows, part in table.unpacked_slices(torch.float32):
            yield rows.start, part
        return
    if isinstance(table, FrozenWeight):
        table = table.values if isinstance(table, PlainWeight) else table.dequantize(torch.float32)
    for start in range(0, len(table), _BLOCK_ROWS):
        yield start, table[start : start + _BLOCK_ROWS].detach()
