"""Unpacks a weight in 4 bits with one kernel: double quantisation and code book in one pass.

bitsandbytes takes three kernels: one for the constants, one to add their offset, one for the
weights. This one computes the same numbers in the same order, so it returns the same bits.

Source: QLoRA (arXiv:2305.14314), section 3: NF4 and double quantisation.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from bitsandbytes.functional import get_4bit_type
from torch import Tensor

from qlora_kit.layers.kernels.dialect import constexpr, jit, tiles, tl
from qlora_kit.layers.kernels.op import define

_TILE_BYTES = 2048


@jit
def _unpack(
    out,
    codes,
    book,
    absmax,
    scale,
    constants,
    offset,
    size,
    packed_size,
    half: constexpr,
    blocks: constexpr,
    blocks_of_scale: constexpr,
    double_quant: constexpr,
):
    """Unpack a tile of `blocks` blocks of `half` bytes; there are `size` weights."""
    block = tl.program_id(0).to(tl.int64) * blocks + tl.arange(0, blocks)
    known = block * half < packed_size
    if double_quant:
        place = tl.load(absmax + block, mask=known, other=0).to(tl.int32)
        factor = tl.load(constants + place)
        factor = factor * tl.load(scale + block // blocks_of_scale, mask=known, other=0.0)
        factor = factor + tl.load(offset)
    else:
        factor = tl.load(absmax + block, mask=known, other=0.0)
    byte = block[:, None] * half + tl.arange(0, half)[None, :]
    pair = tl.load(codes + byte, mask=byte < packed_size, other=0).to(tl.int32)
    first = tl.load(book + (pair >> 4)) * factor[:, None]
    second = tl.load(book + (pair & 15)) * factor[:, None]
    values = tl.interleave(first, second)
    place_out = block[:, None] * (2 * half) + tl.arange(0, 2 * half)[None, :]
    tl.store(out + place_out, values.to(out.dtype.element_ty), mask=place_out < size)


@functools.cache
def _code_book(quant_type: str, device: torch.device) -> Tensor:
    book: Tensor = get_4bit_type(quant_type, device=device)
    return book


def _run(
    codes: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_code: Tensor | None,
    absmax_offset: Tensor | None,
    shape: Sequence[int],
    block_size: int,
    constants_block_size: int,
    quant_type: str,
    dtype: torch.dtype,
) -> Tensor:
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    book = _code_book(quant_type, codes.device)
    double_quant = absmax_scale is not None
    # Without double quantisation the kernel reads none of the three.
    scale, constants, offset = (
        (absmax_scale, absmax_code, absmax_offset) if double_quant else (absmax, absmax, absmax)
    )
    size, half = out.numel(), block_size // 2
    blocks = max(_TILE_BYTES // half, 1)
    grid = (tiles(size, blocks * block_size),)
    # bitsandbytes adds the offset in a kernel of its own: product and sum are each rounded.
    _unpack[grid](
        out, codes, book, absmax, scale, constants, offset, size, tiles(size, 2),
        half, blocks, constants_block_size, double_quant, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def _shapes(codes: Tensor, *rest: Any) -> Tensor:
    shape, dtype = rest[4], rest[8]
    return codes.new_empty(shape, dtype=dtype)


_op = define(
    "unpack_4bit(Tensor codes, Tensor absmax, Tensor? absmax_scale, Tensor? absmax_code, "
    "Tensor? absmax_offset, SymInt[] shape, int block_size, int constants_block_size, "
    "str quant_type, ScalarType dtype) -> Tensor",
    _run,
    _shapes,
)


def unpack_4bit(
    codes: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_code: Tensor | None,
    absmax_offset: Tensor | None,
    shape: tuple[int, int],
    block_size: int,
    constants_block_size: int,
    quant_type: str,
    dtype: torch.dtype,
) -> Tensor:
    """Return the weight (K, D): value in the code book · absmax, in fp32 and rounded once.

    With double quantisation, absmax is itself absmax_code[absmax] · absmax_scale + absmax_offset.

    Args:
        codes: ⌈K · D / 2⌉ bytes, two weights a byte, the first in the high half.
        absmax: one for each block of weights; uint8 with double quantisation, else fp32.
        absmax_scale: one for each block of absmax, fp32; None without double quantisation.
        absmax_code: (256,), fp32; likewise.
        absmax_offset: a scalar, fp32; likewise.
        shape: (K, D).
        block_size: weights that share one absmax, a power of two.
        constants_block_size: absmax values that share one absmax_scale.
        quant_type: "nf4" or "fp4".
        dtype: dtype of the result.
    """
    weight: Tensor = _op(
        codes, absmax, absmax_scale, absmax_code, absmax_offset, shape, block_size,
        constants_block_size, quant_type, dtype,
    )  # fmt: skip
    return weight
