"""Saves tensors for backward before the operation that needs them, not after it.

torch packs the saved tensors of an autograd function when its forward is done. Recomputation of a
layer stops as soon as the last tensor of the layer is packed. In the usual order it would compute
the last product only to throw it away. Here a node of their own saves the tensors before the
product, so recomputation stops there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class SavedFirst(NamedTuple):
    """Arguments for the autograd function whose backward needs the saved tensors.

    Attributes:
        token: an empty tensor, to be an argument of the function: so autograd frees the saved
            tensors right after the function's backward, and at no other time.
        node: to be kept in the function's `ctx`; in backward, `node.saved_tensors` are the
            tensors.
    """

    token: Tensor
    node: Any


def save_first(trained: Tensor, *tensors: Tensor | None) -> SavedFirst:
    """Save `tensors` for backward, now.

    Args:
        trained: an input of the function that requires a gradient, if any does; it is not saved,
            and the token is made on its device.
        tensors: the tensors to save. If neither `trained` nor one of them requires a gradient,
            nothing is saved.
    """
    token: Tensor = _Save.apply(trained, *tensors)
    return SavedFirst(token, token.grad_fn)


class _Save(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, trained: Tensor, *tensors: Tensor | None) -> Tensor:
        ctx.count = 1 + len(tensors)
        # The token has no gradient, and no tensor of zeros is made for it.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        return trained.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
        # The backward of the function that took the token ran before, and returned the gradients.
        count: int = ctx.count
        return (None,) * count
