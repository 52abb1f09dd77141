"""A value in force while a block runs, for code that the block reaches without passing it on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class InForce(Generic[T]):
    """Holds the value of the innermost block, or None outside of all.

    Attributes:
        value: what is in force now.
    """

    def __init__(self) -> None:
        self.value: T | None = None

    @contextlib.contextmanager
    def being(self, value: T) -> Iterator[None]:
        """Let this value be in force while the block runs; then the one before it."""
        before, self.value = self.value, value
        try:
            yield
        finally:
            self.value = before
