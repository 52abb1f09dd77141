"""The nearest values of a code book, found on a CPU.

A search among the bounds between the values of a book takes branches that no CPU foresees: 30 ns a
weight. Here a table of fine cells knows for each cell the one bound that may lie in it, and the
codes on either side, so a weight takes two look-ups and a comparison, 5 ns.

Shapes: N blocks, S weights in a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

# An odd number, so that zero, which is a bound of fp4, is in the middle of a cell.
_CELLS = 4095
# Weights at a time: with what is made of them they fit the cache of a core.
_CHUNK = 1 << 17


def nearest_codes(values: Tensor, constants: Tensor, book: Tensor) -> Tensor:
    """Return the index in the book of the value nearest to each value / constant; (N, S), uint8.

    What is beyond the book has its last value, and what is midway between two values the lower one.

    Args:
        values: (N, S), fp32.
        constants: (N,), fp32, at least zero; zero stands for 1e-38.
        book: (B,), fp32, values from -1 to 1 in any order, of which no three are within 1 / 2000.
    """
    bounds, codes_of = _tables(book)
    inverse = constants.clamp(min=1e-38).reciprocal().unsqueeze(1)
    codes = torch.empty(values.shape, dtype=torch.uint8)
    step = max(1, _CHUNK // values.shape[1])
    for first in range(0, len(values), step):
        chunk = slice(first, min(first + step, len(values)))
        scaled = (values[chunk] * inverse[chunk]).clamp_(-1, 1).view(-1)
        cells = ((scaled + 1) * (_CELLS / 2)).int().clamp_(0, _CELLS - 1)
        is_above = scaled > bounds.index_select(0, cells)
        found = codes_of.index_select(0, cells.mul_(2).add_(is_above))
        codes[chunk] = found.view(codes[chunk].shape)
    return codes


def _tables(book: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bound that is in a cell or follows it, and the codes before and after that bound.

    Shapes: (cells,), fp32, and (2 · cells,), uint8.
    """
    ordered, order = book.sort(stable=True)
    middles = (ordered[1:] + ordered[:-1]) / 2
    begins = torch.arange(_CELLS) * (2 / _CELLS) - 1
    below = torch.bucketize(begins, middles)
    last = len(book) - 1
    bounds = torch.cat([middles, middles.new_full((1,), torch.inf)])[below]
    codes = torch.stack([order[below], order[(below + 1).clamp(max=last)]], 1)
    return bounds, codes.view(-1).to(torch.uint8)
