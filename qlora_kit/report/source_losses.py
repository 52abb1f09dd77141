"""The training loss of each of several sources, between two lines that tell it.

Takes the events of steps; returns means over what a loss weighs. Holds two numbers a source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_kit.events import StepFinished

KEY = "source_losses"
"""the name of the means in a row of the log"""
_MOST_NAMED = 4


class SourceLosses:
    """The sums of the losses of each source since they were told last."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, event: StepFinished) -> None:
        """Add the losses of a step."""
        for name, (loss, weight) in event.sources.items():
            losses, weights = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (losses + loss, weights + weight)

    def told(self) -> dict[str, float]:
        """Return the mean of each source that had rows, by its name, and begin again."""
        means = {name: loss / weight for name, (loss, weight) in self._sums.items()}
        self._sums = {}
        return means


def described(means: Mapping[str, float]) -> str:
    """Return the means in words, for the end of a line; of many sources the first few."""
    shown = [f"  {name} {mean:.4f}" for name, mean in [*means.items()][:_MOST_NAMED]]
    more = len(means) - len(shown)
    return "".join([*shown, *([f"  and {more} more"] if more else [])])


def rows_of_sources(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Return the name of each source, and its mean in the first and in the last row that has one.

    Args:
        rows: the rows of a log.
    """
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, mean in row.get(KEY, {}).items():
            found.setdefault(name, []).append(mean)
    return [(name, f"{means[0]:.4f}", f"{means[-1]:.4f}") for name, means in found.items()]
