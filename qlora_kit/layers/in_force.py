"""A value that is in force while a block runs.

Code inside the block asks for the value; no function on the way has to pass it on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class InForce(Generic[T]):
    """Holds the value of the innermost block that runs.

    Attributes:
        value: the value in force; None outside of all blocks.
    """

    def __init__(self) -> None:
        self.value: T | None = None

    @contextlib.contextmanager
    def being(self, value: T) -> Iterator[None]:
        """Put `value` in force while the block runs; then restore the value before it."""
        before, self.value = self.value, value
        try:
            yield
        finally:
            self.value = before
