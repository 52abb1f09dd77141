"""A curve that grows with a run: however many steps the run has, its points stay few.

Takes numbers by step; holds and returns points for a chart, see `report.chart`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any

Point = tuple[float, float]
"""x and y"""

# As many as a wide screen can tell apart; a curve of twice as many is thinned to this number.
MOST_POINTS = 400
_MOST_VALUE = 1e15


class Curve:
    """Points over x; when there are too many, two neighbours become one, again and again.

    Args:
        merge: what becomes of the y of neighbours: their mean, or their largest.
    """

    def __init__(self, merge: Callable[[Iterable[float]], float] = fmean) -> None:
        self._merge = merge
        self._points: list[Point] = []
        self._waiting: list[Point] = []
        self._each = 1

    def add(self, x: Any, y: Any) -> None:
        """Add a point; what is no figure is left out."""
        if not (is_figure(x) and is_figure(y)):
            return
        self._waiting.append((x, y))
        if len(self._waiting) < self._each:
            return
        self._points.append(self._merged(self._waiting))
        self._waiting = []
        if len(self._points) == 2 * MOST_POINTS:
            pairs = zip(self._points[::2], self._points[1::2], strict=True)
            self._points = [self._merged(pair) for pair in pairs]
            self._each *= 2

    @property
    def points(self) -> list[Point]:
        """The points so far, by rising x if they were added so; at most twice `MOST_POINTS`."""
        return [*self._points, self._merged(self._waiting)] if self._waiting else [*self._points]

    def _merged(self, points: Sequence[Point]) -> Point:
        # The last x: so the curve ends at the step that was taken last.
        return points[-1][0], self._merge(y for _, y in points)


def is_figure(value: Any) -> bool:
    """Whether a value of a log can be drawn: a finite number, of no astronomic size."""
    return isinstance(value, int | float) and abs(value) < _MOST_VALUE
