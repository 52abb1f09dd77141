"""The purpose of memory: code that makes a tensor names its purpose, and one listener may hear it.

`with purpose("loss chunk"):` gives a purpose to the tensors made inside the block;
`announce(tensor, "layer checkpoints")` gives one to an existing tensor. Without a listener both do
nothing. The plan listens. No computation depends on whether there is a listener.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import Tensor

from qlora_kit.layers.in_force import InForce

EXPERTS = "experts"
UNPACKED = "dequantised weight"
GATHERED = "gathered weights"
HEAD = "head"
MERGED = "merged weights"
LOSS_CHUNK = "loss chunk"
LAYER_CHECKPOINTS = "layer checkpoints"


class Listener(Protocol):
    """Hears the purposes of memory."""

    def purpose(self, name: str) -> AbstractContextManager[None]:
        """Return a block; the tensors made inside it have the purpose `name`."""
        ...

    def claim(self, tensor: Tensor, purpose: str) -> None:
        """Hear the purpose of an existing tensor."""
        ...


_NOBODY: AbstractContextManager[None] = nullcontext()
_listener: InForce[Listener] = InForce()


def purpose(name: str) -> AbstractContextManager[None]:
    """Return a block; the tensors made inside it have the purpose `name`."""
    return _NOBODY if _listener.value is None else _listener.value.purpose(name)


def announce(tensor: Tensor, name: str) -> None:
    """Give an existing tensor the purpose `name`."""
    if _listener.value is not None:
        _listener.value.claim(tensor, name)


def heard_by(listener: Listener) -> AbstractContextManager[None]:
    """Return a block whose purposes `listener` hears; after it the former listener hears again."""
    return _listener.being(listener)
