"""The kernels of LoRA's products by bf16 parts, against fp64.

The interpreter cuts a number to bf16 instead of rounding it, so a high part may be one unit off.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import relative_error
from torch import Tensor

from qlora_kit.layers.kernels import split


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_parts(high: Tensor, low: Tensor, value: Tensor) -> None:
    high, low = high.float(), low.float()
    assert ((high - value).abs() <= 2**-7 * value.abs()).all()
    assert ((high + low - value).abs() <= 2**-14 * value.abs()).all()


def test_the_kernels_run_here() -> None:
    assert split._can_launch(torch.empty(1))


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("rank", [1, 3, 16])
def test_matrices(rank: int, layers: int) -> None:
    a = [random(rank, 123, seed=seed) for seed in range(layers)]
    b = [random(700 * seed + 5, rank, seed=seed) for seed in range(layers)]
    a_parts, b_parts = split.split_matrices(a, b)
    assert_parts(*a_parts.chunk(2), torch.cat(a))
    for parts, value in zip(b_parts, b, strict=True):
        assert_parts(*parts.chunk(2, 1), value)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("rank", [1, 3, 16])
def test_left_factors(rank: int, layers: int) -> None:
    high, low = random(37, layers * rank), random(37, layers * rank, seed=1) * 1e-3
    value = (high + low) * 1.7
    found = split.split_products(torch.cat([high, low], 1), layers, 1.7)
    for parts, own in zip(found, value.chunk(layers, 1), strict=True):
        assert_parts(*parts.chunk(2, 1), own)
    by_layer = zip(high.chunk(layers, 1), low.chunk(layers, 1), strict=True)
    products = torch.stack([torch.cat(pair, 1) for pair in by_layer])
    assert_parts(*split.split_gradients(products, 1.7).chunk(2, 1), value)


def split_evenly(value: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return the parts, which torch rounds, and the numbers that they stand for, in fp64."""
    high = value.bfloat16()
    parts = torch.cat([high, (value - high.float()).bfloat16()], dim)
    one, other = parts.double().chunk(2, dim)
    return parts, one + other


# Rows, columns, length of the sum: one number, part of a tile, tiles and a rest.
SHAPES = [(1, 1, 1), (37, 77, 3), (64, 128, 64), (130, 300, 80)]


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_is_added_and_rounded_once(
    shape: tuple[int, int, int], dtype: torch.dtype, transposed: bool, kept: bool
) -> None:
    rows, columns, inner = shape
    left, wide_left = split_evenly(random(rows, inner), 1)
    right, wide_right = split_evenly(random(inner, columns, seed=1), 0)
    if transposed:
        right = right.T.contiguous().T
    y = (random(rows, columns, seed=2) * 8).to(dtype)
    mask: Any = random(rows, columns, seed=3) > 0 if kept else None
    exact = y.double() + (wide_left @ wide_right) * (1 if mask is None else mask)
    found = y.clone()
    split.add_product(found, left, right, mask)
    assert relative_error(found, exact) <= (1e-5 if dtype == torch.float32 else 2**-11)
    if dtype == torch.float16:
        assert (found != exact.half()).float().mean() < 0.02
    if mask is not None:
        assert torch.equal(found[~mask], y[~mask])


def test_rows_and_columns_beyond_the_parts_stay() -> None:
    """The left factor of a layer is a slice of a wider tensor."""
    whole = torch.zeros(3, 40, 16, dtype=torch.bfloat16)
    left, wide_left = split_evenly(random(40, 8), 1)
    whole[1] = left
    right, wide_right = split_evenly(random(8, 24, seed=1), 0)
    y = torch.zeros(40, 24)
    split.add_product(y, whole[1], right)
    assert relative_error(y, wide_left @ wide_right) <= 1e-5
