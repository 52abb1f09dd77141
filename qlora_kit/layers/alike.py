"""Computations that are alike: in a simulation, one of them stands for all.

A mixture has thousands of experts, and tensors without values take as long to simulate as others.
Where experts have equally many tokens, each makes the same tensors and lets them go before the
next begins. So the memory of one is that of all, and its work counts as often as there are some.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from qlora_kit.layers.in_force import InForce

_times: InForce[int] = InForce()


def standing_for(times: int) -> AbstractContextManager[None]:
    """Return a block whose work stands for that of `times` computations."""
    return _times.being(times)


def times_now() -> int:
    """Return the number of computations that the running block stands for."""
    return 1 if _times.value is None else _times.value
