"""The log-probability of each target and the gradient of the logits, in one kernel.

The gradient, softmax − onehot, is written over the logits. Logits may be in 16 bits: they are read
into fp32, where everything is computed, and the gradient is rounded once. A row is read twice,
and the second time it mostly comes from the GPU's cache.

Source: Online normalizer calculation for softmax (arXiv:1805.02867).

Shapes: n tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora_kit.layers.kernels.dialect import constexpr, jit, power_of_two, tl
from qlora_kit.layers.kernels.op import define

_TILE = 8192
_COLUMNS_OF_A_WARP = 512


@jit
def _cross_entropy(
    logits,
    targets,
    logprobs,
    row_stride,
    scale,
    vocabulary: constexpr,
    tile: constexpr,
    with_gradient: constexpr,
):
    """Do one row: its log-probability, and its gradient over its logits."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    target = tl.load(targets + row)
    # Read before any gradient is written: all threads meet in the maxima between the two.
    picked = tl.load(logits + target).to(tl.float32) * scale
    lane = tl.arange(0, tile)
    largest = float("-inf")
    parts = tl.zeros((tile,), tl.float32)
    for start in range(0, vocabulary, tile):
        inside = start + lane < vocabulary
        value = tl.load(logits + start + lane, mask=inside, other=float("-inf")).to(tl.float32)
        value = value * scale
        larger = tl.maximum(largest, tl.max(value, 0))
        parts = parts * tl.exp(largest - larger) + tl.exp(value - larger)
        largest = larger
    total = tl.sum(parts, 0)
    tl.store(logprobs + row, picked - largest - tl.log(total))
    if with_gradient:
        inverse = 1 / total
        for start in range(0, vocabulary, tile):
            column = start + lane
            inside = column < vocabulary
            value = tl.load(logits + column, mask=inside, other=0.0).to(tl.float32) * scale
            grad = tl.exp(value - largest) * inverse - tl.where(column == target, 1.0, 0.0)
            tl.store(logits + column, grad.to(logits.dtype.element_ty), mask=inside)


def _run(logits: Tensor, targets: Tensor, scale: float, gradient: bool) -> Tensor:
    rows, vocabulary = logits.shape
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    tile = min(_TILE, power_of_two(vocabulary))
    if rows:
        _cross_entropy[(rows,)](
            logits, targets.contiguous(), logprobs, logits.stride(0), scale,
            vocabulary, tile, gradient, num_warps=max(tile // _COLUMNS_OF_A_WARP, 1),
        )  # fmt: skip
    return logprobs


def _shapes(logits: Tensor, *rest: Any) -> Tensor:
    return logits.new_empty(len(logits), dtype=torch.float32)


_op = define(
    "target_logprobs(Tensor(a!) logits, Tensor targets, float scale, bool gradient) -> Tensor",
    _run,
    _shapes,
)


def target_logprobs(
    logits: Tensor, targets: Tensor, *, scale: float = 1.0, gradient: bool
) -> Tensor:
    """Return log p(target) of each token (n,), fp32, of the logits times `scale`.

    Args:
        logits: (n, V), each row contiguous. With `gradient` they are overwritten by
            softmax − onehot, which is the gradient of −log p in the logits times `scale`.
        targets: (n,), int64, each in 0 … V−1.
        scale: factor of the logits.
        gradient: whether to write the gradient.
    """
    logprobs: Tensor = _op(logits, targets, scale, gradient)
    return logprobs
