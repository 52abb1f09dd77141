"""Products of fp32 matrices with 16-bit ones, on hardware that multiplies 16-bit numbers only.

A GPU multiplies fp32 matrices outside its tensor cores, and needs fp32 copies of 16-bit ones. So an
fp32 matrix is split: v ≈ high + low, with high = bf16(v) and low = bf16(v - high). Both parts are
multiplied on tensor cores, which add up in fp32:
    x vᵀ   ≈ x highᵀ + x lowᵀ                                  x is bf16, and so exact
    u vᵀ   ≈ u_high v_highᵀ + u_low v_highᵀ + u_high v_lowᵀ
The relative error stays within 1e-5: a part of 2⁻¹⁸ is left over by every split, and by the product
of two low parts. fp16 would not do: the low part of a value below 1e-3 is rounded to 6e-8.

Each op here is one launch of a Triton kernel. Without Triton, torch's own operations compute the
same in a few launches more.

Shapes: N tokens, D in, K out, R rank, M layers that see one x.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from qlora_kit.layers.kernels.dialect import IS_INSTALLED, constexpr, jit, power_of_two, tiles, tl
from qlora_kit.layers.kernels.op import define

MOST_LAYERS = 3
"""The most layers whose matrices are split in one launch: queries, keys and values."""

_TILE = 1024
_TILE_ROWS, _TILE_COLUMNS, _TILE_INNER = 64, 128, 64
_LEAST_INNER = 16  # of a product on tensor cores
_SUMMED_TOKENS = 2048


# ---------------------------------------------------------------- kernels


@jit
def _chosen(layer, first, second, third):
    """Return what belongs to one of three layers."""
    found = first
    if layer == 1:
        found = second
    if layer == 2:
        found = third
    return found


@jit
def _split(value, high_to, low_to, inside):
    """Write the two parts of `value`."""
    high = value.to(tl.bfloat16)
    low = (value - high.to(tl.float32)).to(tl.bfloat16)
    tl.store(high_to, high, mask=inside)
    tl.store(low_to, low, mask=inside)


@jit
def _matrices(
    a_first,
    a_second,
    a_third,
    b_first,
    b_second,
    b_third,
    a_parts,
    b_parts,
    a_size,
    b_size_first,
    b_size_second,
    b_size_third,
    rank,
    layers: constexpr,
    tile: constexpr,
):
    """Split a tile of one matrix: A of each layer in turn, then B of each."""
    at = tl.program_id(0) * tile + tl.arange(0, tile)
    matrix = tl.program_id(1)
    if matrix < layers:
        source = _chosen(matrix, a_first, a_second, a_third)
        inside = at < a_size
        to = a_parts + matrix * a_size + at
        _split(tl.load(source + at, mask=inside, other=0.0), to, to + layers * a_size, inside)
    else:
        layer = matrix - layers
        source = _chosen(layer, b_first, b_second, b_third)
        inside = at < _chosen(layer, b_size_first, b_size_second, b_size_third)
        before = b_size_first * (layer > 0) + b_size_second * (layer > 1)
        # A row has its high parts, and then its low parts.
        to = b_parts + 2 * before + at + rank * (at // rank)
        _split(tl.load(source + at, mask=inside, other=0.0), to, to + rank, inside)


@jit
def _left(
    products,
    parts,
    factor,
    size,
    rows,
    rank,
    from_layer,
    from_row,
    from_half,
    to_layer,
    to_row,
    to_half,
    tile: constexpr,
):
    """Add two halves, multiply by a factor and split, for a tile of all numbers."""
    at = tl.program_id(0) * tile + tl.arange(0, tile)
    inside = at < size
    column = at % rank
    row = (at // rank) % rows
    layer = at // (rank * rows)
    source = products + layer * from_layer + row * from_row + column
    value = tl.load(source, mask=inside, other=0.0)
    value = (value + tl.load(source + from_half, mask=inside, other=0.0)) * factor
    to = parts + layer * to_layer + row * to_row + column
    _split(value, to, to + to_half, inside)


@jit
def _add(
    y,
    left,
    right,
    kept,
    rows,
    columns,
    y_row,
    left_row,
    right_row,
    right_column,
    inner: constexpr,
    has_kept: constexpr,
    is_wide: constexpr,
    tile_rows: constexpr,
    tile_columns: constexpr,
    tile_inner: constexpr,
):
    """Add a product of parts to a tile of y. The sum is fp32 and is rounded once."""
    row = tl.program_id(0).to(tl.int64) * tile_rows + tl.arange(0, tile_rows)
    column = tl.program_id(1) * tile_columns + tl.arange(0, tile_columns)
    in_rows, in_columns = (row < rows)[:, None], (column < columns)[None, :]
    total = tl.zeros((tile_rows, tile_columns), tl.float32)
    for start in range(0, inner, tile_inner):
        step = start + tl.arange(0, tile_inner)
        from_left = left + row[:, None] * left_row + step[None, :]
        in_left = in_rows & (step < inner)[None, :]
        left_high = tl.load(from_left, mask=in_left, other=0.0)
        left_low = tl.load(from_left + inner, mask=in_left, other=0.0)
        from_right = right + step[:, None] * right_row + column[None, :] * right_column
        in_right = (step < inner)[:, None] & in_columns
        right_high = tl.load(from_right, mask=in_right, other=0.0)
        right_low = tl.load(from_right + inner * right_row, mask=in_right, other=0.0)
        if is_wide:  # the interpreter cannot multiply bf16
            left_high, left_low = left_high.to(tl.float32), left_low.to(tl.float32)
            right_high, right_low = right_high.to(tl.float32), right_low.to(tl.float32)
        total = tl.dot(left_low, right_high, total)
        total = tl.dot(left_high, right_low, total)
        total = tl.dot(left_high, right_high, total)
    place = y + row[:, None] * y_row + column[None, :]
    inside = in_rows & in_columns
    if has_kept:
        kept += row[:, None] * columns + column[None, :]
        inside = inside & (tl.load(kept, mask=inside, other=0) != 0)
    before = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, (before + total).to(y.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------- ops


def _run_matrices(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    a_parts, b_parts = _empty_matrices(a, b)
    rank = b[0].shape[1]
    if _can_launch(a_parts):
        padded_a, padded_b = ((*each, *[each[0]] * (MOST_LAYERS - len(each))) for each in (a, b))
        largest = max(each.numel() for each in (*a, *b))
        _matrices[(tiles(largest, _TILE), 2 * len(a))](
            *padded_a, *padded_b, a_parts, b_parts, a[0].numel(),
            *(each.numel() for each in padded_b), rank, len(a), _TILE,
        )  # fmt: skip
    else:
        _fill(torch.cat(tuple(a)), a_parts.unflatten(0, (2, -1)))
        _fill(torch.cat(tuple(b)), b_parts.unflatten(1, (2, -1)).movedim(1, 0))
    return a_parts, b_parts


def _empty_matrices(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    rank, width = a[0].shape
    outputs = sum(len(each) for each in b)
    a_parts = a[0].new_empty((2 * len(a) * rank, width), dtype=torch.bfloat16)
    return a_parts, a[0].new_empty((outputs, 2 * rank), dtype=torch.bfloat16)


def _run_left(products: Tensor, factor: float, by_layer: bool) -> Tensor:
    parts = _empty_left(products, factor, by_layer)
    layers, rows, _, rank = products.shape
    shaped = parts.view(layers, rows, 2, rank) if by_layer else _by_layer(parts, layers)
    size = layers * rows * rank
    if not size:
        return parts
    if _can_launch(products):
        from_layer, from_row, from_half, _ = products.stride()
        to_layer, to_row, to_half, _ = shaped.stride()
        _left[(tiles(size, _TILE),)](
            products, parts, float(factor), size, rows, rank, from_layer, from_row, from_half,
            to_layer, to_row, to_half, _TILE,
        )  # fmt: skip
    else:
        _fill(products.sum(2).mul_(factor), shaped.movedim(2, 0))
    return parts


def _empty_left(products: Tensor, factor: float, by_layer: bool) -> Tensor:
    layers, rows, _, rank = products.shape
    shape = (layers, rows, 2 * rank) if by_layer else (rows, 2 * layers * rank)
    return products.new_empty(shape, dtype=torch.bfloat16)


def _run_add(y: Tensor, left: Tensor, right: Tensor, kept: Tensor | None) -> None:
    (rows, columns), inner = y.shape, left.shape[1] // 2
    if not y.numel():
        return
    if _can_launch(y):
        tile_inner = min(max(power_of_two(inner), _LEAST_INNER), _TILE_INNER)
        grid = (tiles(rows, _TILE_ROWS), tiles(columns, _TILE_COLUMNS))
        _add[grid](
            y, left, right, y if kept is None else kept.view(torch.uint8), rows, columns,
            y.stride(0), left.stride(0), *right.stride(), inner, kept is not None,
            _is_interpreted(), _TILE_ROWS, _TILE_COLUMNS, tile_inner,
        )  # fmt: skip
        return
    (high, low), (right_high, right_low) = left.chunk(2, 1), right.chunk(2)
    product = wide_product(low, right_high).add_(wide_product(high, right_low))
    product.add_(wide_product(high, right_high))
    # A sum with an fp32 tensor is computed in fp32 and rounded once.
    y.add_(product if kept is None else product.mul_(kept))


def _no_result(y: Tensor, left: Tensor, right: Tensor, kept: Tensor | None) -> None:
    """Make no tensor: the result lies in `y`."""


_matrices_op = define(
    "lora_matrices(Tensor[] a, Tensor[] b) -> (Tensor, Tensor)", _run_matrices, _empty_matrices
)
_left_op = define(
    "lora_left(Tensor products, float factor, bool by_layer) -> Tensor", _run_left, _empty_left
)
_add_op = define(
    "lora_add(Tensor(a!) y, Tensor left, Tensor right, Tensor? kept) -> ()", _run_add, _no_result
)


@register_flop_formula(torch.ops.qlora_kit.lora_add)
def _flop_of_add(y: Sequence[int], left: Sequence[int], *_: object, **__: object) -> int:
    """Return the operations of three products of parts, given the shapes."""
    rows, columns = y
    return 3 * rows * columns * left[1]


def _fill(value: Tensor, parts: Tensor) -> None:
    """Write the two parts of `value` into `parts`, whose first size is 2."""
    parts[0] = value
    torch.sub(value, parts[0], out=parts[1])


def _by_layer(stacked: Tensor, layers: int) -> Tensor:
    """Return (N, 2 M R) seen as (M, N, 2, R)."""
    return stacked.view(len(stacked), 2, layers, stacked.shape[1] // (2 * layers)).permute(
        2, 0, 1, 3
    )


def _can_launch(tensor: Tensor) -> bool:
    return IS_INSTALLED and (tensor.is_cuda or _is_interpreted())


@cache
def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


# ---------------------------------------------------------------- what layers call


def split_matrices(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Split the A and the B of up to `MOST_LAYERS` layers, in one launch.

    Args:
        a: M of shape (R, D), fp32, contiguous.
        b: M of shape (K, R), fp32, contiguous; K may differ.

    Returns:
        The parts of all A, (2 M R, D): the high parts of all, then the low parts; and those of each
        B, (K, 2 R): each row has its high parts, then its low parts. All are bf16.
    """
    a_parts, b_parts = _matrices_op(a, b)
    return a_parts, b_parts.split([len(each) for each in b])


def split_products(products: Tensor, layers: int, factor: float) -> Tensor:
    """Add the products of x with high and with low parts, multiply by a factor, and split.

    Args:
        products: (N, 2 M R), fp32: those with the high parts of all A, then with the low parts.
        layers: M.
        factor: multiplies the sums.

    Returns:
        (M, N, 2 R), bf16: for each layer, rows of high parts and then low parts.
    """
    parts: Tensor = _left_op(_by_layer(products, layers), factor, True)
    return parts


def split_gradients(products: Tensor, factor: float) -> Tensor:
    """Add the products of gradients with high and low parts, multiply by a factor, and split.

    Args:
        products: (M, N, 2 R), fp32: for each layer, those with high parts and then low parts.
        factor: multiplies the sums.

    Returns:
        (N, 2 M R), bf16: rows of the high parts of all layers, then the low parts.
    """
    parts: Tensor = _left_op(products.unflatten(2, (2, -1)), factor, False)
    return parts


def add_product(y: Tensor, left: Tensor, right: Tensor, kept: Tensor | None = None) -> None:
    """Add the product of two split matrices to y in place: summed in fp32 and rounded once.

    cuBLAS may round a product to 16 bits before it adds it; this is a kernel of its own instead.

    Args:
        y: (N, K), each row contiguous.
        left: (N, 2 L), bf16, each row contiguous: high parts, then low parts.
        right: (2 L, K), bf16, of any strides: rows of high parts, then rows of low parts.
        kept: bool (N, K), contiguous: the numbers of y that are changed; None: all of them.
    """
    _add_op(y, left, right, kept)


def wide_product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Return left right in fp32, of two bf16 matrices, or of as many pairs of them.

    A CPU has no such product. It multiplies fp32 copies, for tests.

    Args:
        left: (N, I) or (B, N, I).
        right: (I, J) or (B, I, J).
        out: the result is written there, if given: contiguous.
    """
    if left.device.type == "cpu":
        result: Tensor = torch.matmul(left.float(), right.float(), out=out)
        return result
    multiply = torch.mm if left.ndim == 2 else torch.bmm
    product: Tensor = multiply(left, right, out_dtype=torch.float32, out=out)
    return product


def gradient_of_a(grad_inner: Tensor, x: Tensor) -> Tensor:
    """Return the gradients of all A, (M R, D), fp32.

    Tensor cores add long sums less exactly than fp32 units do: over 8,192 tokens the error reached
    2e-5 on an H100. So a sum over many tokens is computed in parts, which are added in fp32.

    Args:
        grad_inner: (N, 2 M R), bf16: high parts, then low parts.
        x: (N, D), bf16.
    """
    left, right = _in_parts(grad_inner), _in_parts(x)
    products = wide_product(left.transpose(1, 2), right)
    total: Tensor = products.unflatten(1, (2, -1)).sum((0, 1))
    return total


def gradients_of_b(grads_y: Sequence[Tensor], h: Tensor) -> Sequence[Tensor]:
    """Return the gradient of the B of each layer, (K, R), fp32, each contiguous.

    Args:
        grads_y: (N, K) of each layer, bf16.
        h: (M, N, 2 R), bf16: for each layer, high parts and then low parts.
    """
    outputs = [grad_y.shape[1] for grad_y in grads_y]
    if _parts_of(h.shape[1]) > 1:
        pairs = zip(grads_y, h, strict=True)
        return [_summed_over_parts(grad_y, of_layer) for grad_y, of_layer in pairs]
    # The halves of all layers are added in one launch.
    products = h.new_empty((sum(outputs), h.shape[2]), dtype=torch.float32)
    for grad_y, of_layer, out in zip(grads_y, h, products.split(outputs), strict=True):
        wide_product(grad_y.T, of_layer, out=out)
    grads: Tensor = products.unflatten(1, (2, -1)).sum(1)
    of_layers: Sequence[Tensor] = grads.split(outputs)
    return of_layers


def _summed_over_parts(grad_y: Tensor, h: Tensor) -> Tensor:
    products = wide_product(_in_parts(grad_y).transpose(1, 2), _in_parts(h))
    total: Tensor = products.unflatten(2, (2, -1)).sum((0, 2))
    return total


def _in_parts(rows: Tensor) -> Tensor:
    """Return (N, J) seen as (parts, N / parts, J)."""
    count = _parts_of(len(rows))
    return rows.view(count, len(rows) // count, rows.shape[1])


def _parts_of(tokens: int) -> int:
    """Return the smallest number of equal parts with at most `_SUMMED_TOKENS` tokens each.

    Where there is none that is not much larger than it must be, the tokens stay whole.
    """
    least = max(1, -(-tokens // _SUMMED_TOKENS))
    return next((count for count in range(least, 4 * least) if tokens % count == 0), 1)
