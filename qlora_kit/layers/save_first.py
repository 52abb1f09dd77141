"""Save tensors for backward before the operation that needs them, not after it.

torch packs what an autograd function saves when its forward is done. A recomputed layer stops
as soon as its last tensor is packed: with the usual order it would compute the last product
only to throw it away. Saved first, by a node of their own, the tensors are there before it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class SavedFirst(NamedTuple):
    """What was saved, to be passed on to the function whose backward needs it.

    Attributes:
        token: an empty tensor; an argument of that function, so that autograd frees what was
            saved right after its backward and at no other time.
        node: kept by its `ctx`; `node.saved_tensors` in backward are the tensors.
    """

    token: Tensor
    node: Any


def save_first(like: Tensor, *tensors: Tensor | None) -> SavedFirst:
    """Save `like` and `tensors` for backward, now.

    Args:
        like: the first of them; the token is made on its device.
        tensors: the rest. Where none requires a gradient nothing is saved.
    """
    token: Tensor = _Save.apply(like, *tensors)
    return SavedFirst(token, token.grad_fn)


class _Save(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, like: Tensor, *tensors: Tensor | None) -> Tensor:
        ctx.count = 1 + len(tensors)
        ctx.save_for_backward(like, *tensors)
        return like.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        # Reached after the function that took the token; the gradients are in its hands.
        return tuple(None for _ in range(ctx.count))
