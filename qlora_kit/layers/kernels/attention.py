"""Attention that a recomputed layer does not compute a second time, on a CPU.

Recomputation runs a layer again for the tensors of its backward. Of those of attention, only the
output and one number for each query and head are costly. Here the first run keeps them, and the
second run takes them in place of computing them again: the same bits, for as much memory as the
layer's input takes.

torch's function is intercepted inside the two runs, and only where torch would choose its flash
kernel for a CPU. All other attention is computed twice, as without this.

Shapes: B rows, H heads, G heads of keys, T tokens, d the width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from qlora_kit.layers.kernels import serves

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

Kept = list[tuple[Tensor, Tensor]]
"""The outputs (B, H, T, d) of a layer, each with its sums of exponentials as logarithms (B, T, H),
in the order in which they were computed."""


def kept_attention() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return what surrounds the first and the second run of a layer, for torch's `checkpoint`."""
    kept: Kept = []
    return _Attention(kept, is_again=False), _Attention(kept, is_again=True)


class _Attention(TorchFunctionMode):
    """Intercepts torch's attention in one run of a layer."""

    def __init__(self, kept: Kept, *, is_again: bool) -> None:
        super().__init__()
        self._kept, self._is_again = kept, is_again
        self._left: Iterator[tuple[Tensor, Tensor]] = iter(())

    def __enter__(self) -> Any:
        # From the beginning, because a graph that is retained runs its layers again.
        self._left = iter(self._kept if self._is_again else ())
        return super().__enter__()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is F.scaled_dot_product_attention and (call := _call(*args, **(kwargs or {}))):
            return _Flash.apply(*call, next(self._left, None), self._kept)
        return func(*args, **(kwargs or {}))


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor, Tensor, bool, float | None] | None:
    """Return the arguments of the flash kernel, or None where torch would not choose it.

    Args:
        query: (B, H, T, d). The arguments are those of torch's function.
        key: (B, G, T, d).
        value: (B, G, T, d).
        attn_mask: not served.
        dropout_p: not served.
        is_causal: whether a token attends to itself and earlier tokens only.
        scale: factor of the scores; None takes 1 / √d.
        enable_gqa: whether G may be below H.
    """
    is_served = (
        attn_mask is None
        and dropout_p == 0
        and serves("attention", query)
        and query.requires_grad
        and query.ndim == key.ndim == value.ndim == 4
        and query.dtype == key.dtype == value.dtype
        and query.shape[-1] == key.shape[-1] == value.shape[-1]
        and key.shape == value.shape
        and query.shape[0] == key.shape[0]
        and (query.shape[1] == key.shape[1] or (enable_gqa and query.shape[1] % key.shape[1] == 0))
        and all(each.stride(-1) == 1 and each.numel() for each in (query, key, value))
    )
    return (query, key, value, is_causal, scale) if is_served else None


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        is_causal: bool,
        scale: float | None,
        first: tuple[Tensor, Tensor] | None,
        kept: Kept,
    ) -> Tensor:
        ctx.options = is_causal, scale
        if first is None:
            first = _flash(query, key, value, 0.0, is_causal, scale=scale)
            # The output that is returned becomes a part of the graph; this one must not.
            kept.append((first[0].detach(), first[1]))
        out, sums = first
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        is_causal, scale = ctx.options
        of_inputs = _flash_back(grads[0], *ctx.saved_tensors, 0.0, is_causal, scale=scale)
        return *of_inputs, None, None, None, None
