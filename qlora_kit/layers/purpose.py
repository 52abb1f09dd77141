"""What memory is for: whoever makes a tensor says so, and one listener may hear it.

`with purpose("loss chunk"):` names what is made inside; `announce(tensor, "layer checkpoints")`
names a tensor that is there. Without a listener both do nothing. The plan listens; nothing that
computes depends on whether anybody does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

UNPACKED = "dequantised weight"
LOSS_CHUNK = "loss chunk"
LAYER_CHECKPOINTS = "layer checkpoints"


class Listener(Protocol):
    """Hears what memory is for."""

    def purpose(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Return a block in which what is made is for this."""
        ...

    def claim(self, tensor: Tensor, purpose: str) -> None:
        """Hear what a tensor is for."""
        ...


_NOBODY: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
_listener: Listener | None = None


def purpose(name: str) -> contextlib.AbstractContextManager[None]:
    """Return a block: what is made inside is for this."""
    return _NOBODY if _listener is None else _listener.purpose(name)


def announce(tensor: Tensor, name: str) -> None:
    """Say what a tensor is for."""
    if _listener is not None:
        _listener.claim(tensor, name)


@contextlib.contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """Let one listener hear all purposes while the block runs; then whoever did before."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before
