"""Attention as a GPU computes it, for planning: what it keeps and takes, and no more.

On the device that stands in for a GPU torch would compute attention by its formula, with a
matrix of T × T. The flash kernel that a GPU takes keeps the output and one number a row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor


class _Flash(torch.autograd.Function):
    """Allocates what torch's flash attention allocates.

    Source: FlashAttention-2 (arXiv:2307.08691), algorithms 1 and 2; the backward kernel sums
    the gradient of the queries in fp32 and keeps one fp32 number a row besides.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        query, key, value, out, _ = ctx.saved_tensors
        delta = query.new_empty(query.shape[:-1], dtype=torch.float32)
        summed = torch.empty_like(query, dtype=torch.float32)
        groups = query.shape[1] // key.shape[1]
        # With grouped heads each query head gets its own, summed over the group afterwards.
        wide = [torch.empty_like(t) for t in (query, query)] if groups > 1 else []
        gradients = tuple(torch.empty_like(t) for t in (query, key, value))
        del delta, summed, wide, out
        return gradients


def _attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    if options.get("attn_mask") is not None:
        # The memory-efficient kernel, which takes a mask, keeps as much as the flash kernel.
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    out: Tensor = _Flash.apply(query, key, value)
    return out


@contextlib.contextmanager
def planned_attention() -> Iterator[None]:
    """Let every attention in the block be the planned one."""
    with mock.patch.object(F, "scaled_dot_product_attention", _attention):
        yield
