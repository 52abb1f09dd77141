"""Attention as a GPU computes it, for planning: the memory that it keeps and takes, and no more.

On the device that stands in for a GPU, torch would compute attention by its formula, with a
matrix of T × T. The flash kernel of a GPU keeps only the output and one number a row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen

from qlora_kit.model.hardware import dtype_name
from qlora_kit.plan.ledger import Ledger, Operation


class _Flash(torch.autograd.Function):
    """Allocates what torch's flash attention allocates.

    Source: FlashAttention-2 (arXiv:2307.08691), algorithms 1 and 2; the backward kernel sums
    the gradient of the queries in fp32 and keeps one fp32 number a row besides.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        keys: int,
        ledger: Ledger,
    ) -> Tensor:
        out = torch.empty_like(query)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums, bias)
        ctx.ledger, ctx.flop = ledger, _flop(query, keys)
        _count(ledger, ctx.flop, query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, _, bias = ctx.saved_tensors
        # Five products where forward has two.
        _count(ctx.ledger, 5 * ctx.flop // 2, query, key, value, out, query, key, value)
        delta = query.new_empty(query.shape[:-1], dtype=torch.float32)
        summed = torch.empty_like(query, dtype=torch.float32)
        groups = query.shape[1] // key.shape[1]
        # With grouped heads the kernel computes gradients of K and V for each query head, and sums
        # them over the group afterwards.
        wide = [torch.empty_like(t) for t in (query, query)] if groups > 1 else []
        gradients = tuple(torch.empty_like(t) for t in (query, key, value))
        del delta, summed, wide, out, bias
        return *gradients, None, None, None


def _count(ledger: Ledger, flop: int, *moved: Tensor) -> None:
    if ledger.work is not None:
        ledger.work.flop += flop
        name = dtype_name(moved[0].dtype)
        work = Operation("product", name, flop, sum(each.nbytes for each in moved))
        ledger.work.operations[work] += 1


def _flop(query: Tensor, keys: int) -> int:
    """Return the floating-point operations of the two products of forward.

    The half above the diagonal is not counted.

    Args:
        query: (B, heads, T, d).
        keys: tokens that a query is multiplied with.
    """
    rows, heads, tokens, width = query.shape
    return 2 * rows * heads * tokens * keys * width


def _attention(ledger: Ledger, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    mask, bias = options.get("attn_mask"), None
    if mask is not None:
        # A mask needs the memory-efficient kernel. It keeps as much as the flash kernel does, and
        # the mask in the dtype of the queries.
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
        bias = mask if mask.dtype == query.dtype else query.new_empty(mask.shape)
    out: Tensor = _Flash.apply(query, key, value, bias, key.shape[2], ledger)
    return out


def _attention_of_segments(
    ledger: Ledger,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    key_starts: Tensor,
    longest: int,
    longest_keys: int,
    **options: Any,
) -> Tensor:
    """Plan the attention of a packed row, whose segments count as if all were the longest.

    So they are in a plan, whose rows are of one length.
    """
    one_row = (each.transpose(0, 1).unsqueeze(0) for each in (query, key, value))
    out: Tensor = _Flash.apply(*one_row, None, longest_keys, ledger)
    return out[0].transpose(0, 1)


@contextlib.contextmanager
def planned_attention(ledger: Ledger) -> Iterator[None]:
    """Let every attention in the block be the planned one, with its work counted in `ledger`.

    It replaces torch's own functions: a `TorchFunctionMode` does not see the operations that
    backward recomputes.
    """
    of_torch = F.scaled_dot_product_attention, varlen.varlen_attn
    F.scaled_dot_product_attention = partial(_attention, ledger)
    varlen.varlen_attn = partial(_attention_of_segments, ledger)
    try:
        yield
    finally:
        F.scaled_dot_product_attention, varlen.varlen_attn = of_torch
