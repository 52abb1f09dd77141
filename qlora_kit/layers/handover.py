"""A result that one layer computes for another, which will be called with the same x.

Layers that multiply one x compute together when the first of them is called, see `layers.lora`. A
`Handover` keeps the result of another layer until that layer is called. It never gives the result
to a call that would compute anything else, and never keeps it longer than its x is alive: so
nothing is left where a computation ends early, as a recomputation does, or one without memory.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from qlora_kit.private_torch import version_of


class Handover:
    """At most one result, for the next call of a layer."""

    def __init__(self) -> None:
        self._x: weakref.ref[Tensor] | None = None
        self._moment: tuple[object, ...] = ()
        self._result: list[Tensor] = []

    def put(self, result: Tensor, x: Tensor, *parameters: Tensor) -> None:
        """Keep a result that was computed of `x` and of `parameters` just now.

        The graph of the result must not hold `x` itself, only tensors that share its memory: else
        each would keep the other alive.
        """
        kept = self._result = [result]
        self._x = weakref.ref(x, lambda _: kept.clear())
        self._moment = _moment(x, *parameters)

    def take(self, x: Tensor, *parameters: Tensor) -> Tensor | None:
        """Return the result, if it is that of these very tensors as they are; keep it no longer."""
        if self._x is None:
            return None
        is_same = self._x() is x and self._moment == _moment(x, *parameters)
        result, self._result, self._x = self._result, [], None
        return result.pop() if is_same and result else None


def _moment(*tensors: Tensor) -> tuple[object, ...]:
    """Return what changes if the tensors change in place, or the recording of gradients."""
    return torch.is_grad_enabled(), *map(version_of, tensors)
