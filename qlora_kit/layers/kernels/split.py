"""Products of fp32 matrices with 16-bit ones, on hardware that multiplies 16-bit numbers only.

A GPU multiplies fp32 matrices outside its tensor cores, and needs fp32 copies of 16-bit ones. So an
fp32 matrix is split: v ≈ high + low, with high = bf16(v) and low = bf16(v - high). Both parts are
multiplied on tensor cores, which add up in fp32:
    x vᵀ   ≈ x highᵀ + x lowᵀ                                  x is bf16, and so exact
    u vᵀ   ≈ u_high v_highᵀ + u_low v_highᵀ + u_high v_lowᵀ    as one product of stacked parts
The relative error stays within 1e-5: a part of 2⁻¹⁸ is left over by every split, and by the product
of two low parts. fp16 would not do: the low part of a value below 1e-3 is rounded to 6e-8.

The right factor v is stacked as (high, high, low), the left factor u as (high, low, high), R wide
each. So the last 2 R of v and the first 2 R of u are (high, low).

The small kernels here are Triton's, one launch each. They are launched directly: the way through
torch's dispatcher would add to the host's time. Fake tensors get the results and no launch. Without
Triton, torch's own operations compute the same in two to four launches.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qlora_kit.private_torch import FakeTensor

_BLOCK = 1024
_MANY = 2**31  # offsets in the kernels are of 32 bits
_SUMMED_TOKENS = 2048


def as_right_factors(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Split A and B, stacked as right factors, in one launch.

    Args:
        a: (R, D), fp32, contiguous.
        b: (K, R), fp32, contiguous.

    Returns:
        A as rows, (3 R, D), and B as columns, (K, 3 R), bf16.
    """
    a_parts = a.new_empty((3 * a.shape[0], a.shape[1]), dtype=torch.bfloat16)
    b_parts = b.new_empty((b.shape[0], 3 * b.shape[1]), dtype=torch.bfloat16)
    if (kernels := _kernels_for(a_parts, b_parts)) is not None:
        blocks = -(-a.numel() // _BLOCK)
        more = -(-b.numel() // _BLOCK)
        kernels.right_factors[(blocks + more,)](
            a, b, a_parts, b_parts, a.numel(), b.numel(), b.shape[1], blocks, BLOCK=_BLOCK
        )
    elif not isinstance(a, FakeTensor):
        _fill_right(a.reshape(1, a.numel()), a_parts.view(1, 3, a.numel()))
        _fill_right(b, b_parts.view(b.shape[0], 3, b.shape[1]))
    return a_parts, b_parts


def as_left_factor(products: Tensor, factor: float) -> Tensor:
    """Add two halves, multiply by a factor, split the result and stack it as a left factor.

    Args:
        products: (N, 2 R), fp32, contiguous: products with a high and with a low part.
        factor: multiplies the sum of the halves.

    Returns:
        (N, 3 R), bf16.
    """
    rows, rank = products.shape[0], products.shape[1] // 2
    parts = products.new_empty((rows, 3 * rank), dtype=torch.bfloat16)
    if (kernels := _kernels_for(parts)) is not None:
        size = rows * rank
        kernels.left_factor[(-(-size // _BLOCK),)](
            products, parts, size, rank, float(factor), BLOCK=_BLOCK
        )
    elif not isinstance(products, FakeTensor):
        value = (products[:, :rank] + products[:, rank:]).mul_(factor)
        _fill_left(value, parts.view(rows, 3, rank))
    return parts


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """Return left right in fp32, of two bf16 matrices, or of as many pairs of them.

    A CPU has no such product. It multiplies fp32 copies, for tests.
    """
    if left.device.type == "cpu":
        return left.float() @ right.float()
    multiply = torch.mm if left.ndim == 2 else torch.bmm
    return multiply(left, right, out_dtype=torch.float32)


def product_over_tokens(left: Tensor, right: Tensor, halves: int) -> Tensor:
    """Return leftᵀ right in fp32, with the halves of one factor added.

    Tensor cores add long sums less exactly than fp32 units do: over 8,192 tokens the error reached
    2e-5 on an H100. So a sum over many tokens is computed in parts, which are added in fp32.

    Args:
        left: (N, I), bf16.
        right: (N, J), bf16.
        halves: the factor whose columns are two halves: 0 for `left`, 1 for `right`.

    Returns:
        (I / 2, J) or (I, J / 2).
    """
    count = _parts_of(len(left))
    first, second = (each.unflatten(0, (count, len(left) // count)) for each in (left, right))
    products = wide_product(first.transpose(1, 2), second)
    total: Tensor = products.unflatten(1 + halves, (2, -1)).sum((0, 1 + halves))
    return total


def _parts_of(tokens: int) -> int:
    """Return the smallest number of equal parts with at most `_SUMMED_TOKENS` tokens each.

    Where there is none that is not much larger than it must be, the tokens stay whole.
    """
    least = max(1, -(-tokens // _SUMMED_TOKENS))
    return next((count for count in range(least, 4 * least) if tokens % count == 0), 1)


def _fill_right(value: Tensor, parts: Tensor) -> None:
    """Write (high, high, low) of `value` (n, L) into `parts` (n, 3, L)."""
    parts[:, :2] = value.unsqueeze(1)
    torch.sub(value, parts[:, 0], out=parts[:, 2])


def _fill_left(value: Tensor, parts: Tensor) -> None:
    """Write (high, low, high) of `value` (n, R) into `parts` (n, 3, R)."""
    parts[:, ::2] = value.unsqueeze(1)
    torch.sub(value, parts[:, 0], out=parts[:, 1])


def _kernels_for(*results: Tensor) -> Any:
    """Return the Triton kernels, or None where they cannot fill these results."""
    first = results[0]
    if isinstance(first, FakeTensor) or not (first.is_cuda or _is_interpreted()):
        return None
    if any(not 0 < each.numel() < _MANY for each in results):
        return None
    return _kernels()


@cache
def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _kernels() -> Any:
    """Import the Triton kernels; None where Triton is missing."""
    try:
        from qlora_kit.layers.kernels import split_triton
    except ImportError:
        return None
    return split_triton
