"""Rotary positions of queries and keys, in one kernel for both.

x ↦ x ∘ cos + rotate_half(x) ∘ sin, where rotate_half maps the halves (x₁, x₂) to (−x₂, x₁). It is
computed in fp32 and rounded once. If cos and sin are narrower than a head, the rest of the head
is copied.

Source: RoFormer (arXiv:2104.09864); the halves as in Llama.

Shapes: B rows, T tokens, H heads, d the width of a head, r ≤ d its rotated part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora_kit.layers.kernels.dialect import constexpr, jit, power_of_two, tiles, tl
from qlora_kit.layers.kernels.op import define

_TILE_HEADS = 16


@jit
def _turn(
    x,
    out,
    x_head,
    out_head,
    cos,
    sin,
    first_head,
    count: constexpr,
    heads: constexpr,
    rotated: constexpr,
    half_tile: constexpr,
    width: constexpr,
    rest_tile: constexpr,
    back: constexpr,
):
    """Turn `heads` heads of one token, of which `count` exist, from `first_head` on."""
    half: constexpr = rotated // 2
    head = first_head + tl.arange(0, heads)[:, None]
    column = tl.arange(0, half_tile)
    inside = column < half
    cos_1 = tl.load(cos + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    cos_2 = tl.load(cos + half + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_1 = tl.load(sin + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_2 = tl.load(sin + half + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    known = (head < count) & inside[None, :]
    source = x + head * x_head + column[None, :]
    first = tl.load(source, mask=known, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=known, other=0.0).to(tl.float32)
    if back:
        # The transposed map.
        turned_1 = first * cos_1 + second * sin_2
        turned_2 = second * cos_2 - first * sin_1
    else:
        turned_1 = first * cos_1 - second * sin_1
        turned_2 = second * cos_2 + first * sin_2
    target = out + head * out_head + column[None, :]
    tl.store(target, turned_1.to(out.dtype.element_ty), mask=known)
    tl.store(target + half, turned_2.to(out.dtype.element_ty), mask=known)
    if width > rotated:
        place = rotated + tl.arange(0, rest_tile)[None, :]
        kept = (head < count) & (place < width)
        same = tl.load(x + head * x_head + place, mask=kept, other=0.0)
        tl.store(out + head * out_head + place, same, mask=kept)


@jit
def _rotate(
    q,
    k,
    q_out,
    k_out,
    cos,
    sin,
    tokens,
    q_row,
    q_head,
    q_token,
    k_row,
    k_head,
    k_token,
    q_out_row,
    q_out_head,
    q_out_token,
    k_out_row,
    k_out_head,
    k_out_token,
    cos_row,
    cos_token,
    sin_row,
    sin_token,
    q_heads: constexpr,
    k_heads: constexpr,
    heads: constexpr,
    rotated: constexpr,
    half_tile: constexpr,
    width: constexpr,
    rest_tile: constexpr,
    back: constexpr,
):
    """Turn a tile of the heads of one token: first come the tiles of q, then those of k."""
    place = tl.program_id(0).to(tl.int64)
    row, token = place // tokens, place % tokens
    cos += row * cos_row + token * cos_token
    sin += row * sin_row + token * sin_token
    tile = tl.program_id(1)
    q_tiles: constexpr = (q_heads + heads - 1) // heads
    if tile < q_tiles:
        _turn(
            q + row * q_row + token * q_token, q_out + row * q_out_row + token * q_out_token,
            q_head, q_out_head, cos, sin, tile * heads,
            q_heads, heads, rotated, half_tile, width, rest_tile, back,
        )  # fmt: skip
    else:
        _turn(
            k + row * k_row + token * k_token, k_out + row * k_out_row + token * k_out_token,
            k_head, k_out_head, cos, sin, (tile - q_tiles) * heads,
            k_heads, heads, rotated, half_tile, width, rest_tile, back,
        )  # fmt: skip


def _run(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    rows, q_heads, tokens, width = q.shape
    k_heads, rotated = k.shape[1], cos.shape[-1]
    heads = min(_TILE_HEADS, power_of_two(max(q_heads, k_heads)))
    grid = (rows * tokens, tiles(q_heads, heads) + tiles(k_heads, heads))
    one_row = cos.shape[0] == 1
    _rotate[grid](
        q, k, q_out, k_out, cos, sin, tokens,
        *q.stride()[:3], *k.stride()[:3], *q_out.stride()[:3], *k_out.stride()[:3],
        0 if one_row else cos.stride(0), cos.stride(1),
        0 if one_row else sin.stride(0), sin.stride(1),
        q_heads, k_heads, heads, rotated, power_of_two(rotated // 2), width,
        power_of_two(width - rotated), back,
    )  # fmt: skip
    return q_out, k_out


def _shapes(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k)


_op = define(
    "rotate(Tensor q, Tensor k, Tensor cos, Tensor sin, bool back) -> (Tensor, Tensor)",
    _run,
    _shapes,
)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        q_out, k_out = _op(q, k, cos, sin, False)
        return q_out, k_out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_q, grad_k = _op(*grads, *ctx.saved_tensors, True)
        return grad_q, grad_k, None, None


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return queries and keys turned by their positions; differentiable in both.

    Args:
        q: (B, H, T, d), with any strides.
        k: (B, H of keys, T, d), in the dtype of q, with any strides.
        cos: (B, T, r) or (1, T, r), r even, of any floating dtype.
        sin: likewise.

    Returns:
        New tensors with the shapes, dtypes and layouts of q and k.
    """
    turned: tuple[Tensor, Tensor] = _Rotate.apply(q, k, cos, sin)
    return turned
