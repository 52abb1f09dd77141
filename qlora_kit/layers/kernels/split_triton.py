"""The Triton kernels of `split`, which says what they compute. Imported only where they run."""

# mypy: ignore-errors
# ruff: noqa: N803
# Triton reads the source of these functions: an annotation says what is compiled in, in capitals.

import triton
import triton.language as tl


@triton.jit
def right_factors(a, b, a_parts, b_parts, a_size, b_size, rank, a_blocks, BLOCK: tl.constexpr):
    """Split A in the first `a_blocks` programs and B in the others, stacked as right factors.

    A is stacked as a whole, B row by row.
    """
    program = tl.program_id(0)
    if program < a_blocks:
        _fill_right(a, a_parts, a_size, a_size, program, BLOCK)
    else:
        _fill_right(b, b_parts, b_size, rank, program - a_blocks, BLOCK)


@triton.jit
def left_factor(products, parts, size, rank, factor, BLOCK: tl.constexpr):
    """Add the halves of each row, multiply, split and stack as a left factor."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    before = (at // rank) * rank
    high_product = tl.load(products + at + before, mask=inside)
    low_product = tl.load(products + at + before + rank, mask=inside)
    value = (high_product + low_product) * factor
    high = value.to(tl.bfloat16)
    low = (value - high.to(tl.float32)).to(tl.bfloat16)
    to = parts + at + 2 * before
    tl.store(to, high, mask=inside)
    tl.store(to + rank, low, mask=inside)
    tl.store(to + 2 * rank, high, mask=inside)


@triton.jit
def _fill_right(source, parts, size, row, block, BLOCK: tl.constexpr):
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(source + at, mask=inside)
    high = value.to(tl.bfloat16)
    low = (value - high.to(tl.float32)).to(tl.bfloat16)
    to = parts + at + 2 * row * (at // row)
    tl.store(to, high, mask=inside)
    tl.store(to + row, high, mask=inside)
    tl.store(to + 2 * row, low, mask=inside)
