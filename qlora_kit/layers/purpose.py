"""What memory is for: whoever makes a tensor says so, and one listener may hear it.

`with purpose("loss chunk"):` names what is made inside; `announce(tensor, "layer checkpoints")`
names a tensor that is there. Without a listener both do nothing. The plan listens; nothing that
computes depends on whether anybody does.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import Tensor

from qlora_kit.layers.in_force import InForce

UNPACKED = "dequantised weight"
LOSS_CHUNK = "loss chunk"
LAYER_CHECKPOINTS = "layer checkpoints"


class Listener(Protocol):
    """Hears what memory is for."""

    def purpose(self, name: str) -> AbstractContextManager[None]:
        """Return a block in which what is made is for this."""
        ...

    def claim(self, tensor: Tensor, purpose: str) -> None:
        """Hear what a tensor is for."""
        ...


_NOBODY: AbstractContextManager[None] = nullcontext()
_listener: InForce[Listener] = InForce()


def purpose(name: str) -> AbstractContextManager[None]:
    """Return a block: what is made inside is for this."""
    return _NOBODY if _listener.value is None else _listener.value.purpose(name)


def announce(tensor: Tensor, name: str) -> None:
    """Say what a tensor is for."""
    if _listener.value is not None:
        _listener.value.claim(tensor, name)


def heard_by(listener: Listener) -> AbstractContextManager[None]:
    """Return a block whose purposes one listener hears; after it, whoever did before."""
    return _listener.being(listener)
