"""Collects independent faults of the data, so that one run tells them all.

Takes one line a fault; raises a single `DataError`. Never decides what a fault is.
"""

from __future__ import annotations

from qlora_kit.errors import DataError

MAX_FAULTS_SHOWN = 20


class Faults:
    """Faults found so far; only the first `MAX_FAULTS_SHOWN` are kept, the rest are counted."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.count = 0

    def add(self, *lines: str) -> None:
        """Note faults, one line each."""
        self.lines += lines[: MAX_FAULTS_SHOWN - len(self.lines)]
        self.count += len(lines)

    def raise_if_any(self) -> None:
        """End here if anything was found.

        Raises:
            DataError: with the faults, and "... and N more" where there were too many to show.
        """
        if not self.count:
            return
        hidden = self.count - len(self.lines)
        raise DataError(*self.lines, *([f"... and {hidden} more"] if hidden else []))
