"""Charts of lines that a page draws itself, as SVG: no picture, no script, no second of matplotlib.

Takes lines of points; returns a `Chart` of paths and ticks, which the macro `chart` of
`templates/parts.html.jinja` writes. The paths are stretched to the width of the window, while the
text of the ticks is that of the page, so both are legible on a telephone. Colours are classes of
`templates/page.css`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from qlora_kit.report.curve import Point

COLORS = 8
_DASHES = 3
_SIDE = 1000
"""width and height of the drawing, before it is stretched"""

# The largest values, mostly of the first steps, would press all others to the floor.
_CUT_SHARE = 0.02
_X_TICKS, _Y_TICKS = 4, 5


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        label: its name in the legend; without one it is not listed.
        points: x, an optimiser step, and y, by rising x.
        style: "line"; "faint" for single values behind their mean; "dots" for a line with its
            points; "level" for the y of its one point, over the whole width.
        color: number of its colour; beyond the colours there are, lines are dashed as well.
    """

    label: str
    points: Sequence[Point]
    style: Literal["line", "faint", "dots", "level"] = "line"
    color: int = 0

    @property
    def css(self) -> str:
        """The classes of its colour, and of its dashes where the colours are used up."""
        dashes = f" d{self.color // COLORS % _DASHES}" if self.color >= COLORS else ""
        return f"c{self.color % COLORS}{dashes}"


@dataclass(frozen=True)
class Tick:
    """A mark of an axis: its place in percent, from the left or from below, and its text."""

    place: str
    text: str


@dataclass(frozen=True)
class Chart:
    """A chart, ready to be written.

    Attributes:
        paths: the classes and the path of each line; of its points, where it shows them.
        legend: the classes and the name of each line that has a name.
        x_ticks: marks of the axis below.
        y_ticks: marks of the axis on the left.
        side: width and height of the drawing that the paths are in.
    """

    paths: tuple[tuple[str, str], ...]
    legend: tuple[tuple[str, str], ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    side: int = _SIDE


def chart_of(lines: Sequence[Line], *, from_zero: bool = True) -> Chart | None:
    """Return a chart of lines; None if they have no point.

    Args:
        lines: the lines; those behind come first.
        from_zero: whether the axis of y begins at 0, where no value is below.
    """
    shown = [line for line in lines if line.points]
    curves = [line.points for line in shown if line.style != "level"]
    if not curves:
        return None
    levels = [line.points[0][1] for line in shown if line.style == "level"]
    x_axis = _Axis.over([x for points in curves for x, _ in points])
    values = sorted(y for points in curves for _, y in points)
    values = values[: len(values) - int(len(values) * _CUT_SHARE)]
    y_axis = _Axis.over([*values, *levels, *([0.0] if from_zero else [])], margin=0.05)
    return Chart(
        paths=tuple(path for line in shown for path in _paths(line, x_axis, y_axis)),
        legend=tuple((f"{line.style} {line.css}", line.label) for line in shown if line.label),
        x_ticks=x_axis.ticks(_X_TICKS, least=1.0),  # there is no half of a step
        y_ticks=y_axis.ticks(_Y_TICKS),
    )


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float

    @classmethod
    def over(cls, values: Sequence[float], margin: float = 0.0) -> _Axis:
        """Return an axis with all values on it, and some room where it does not end at 0."""
        low, high = min(values), max(values)
        if low == high:
            half = abs(low) / 2 or 0.5
            return cls(low - half, high + half)
        room = (high - low) * margin
        return cls(low - room if low else low, high + room if high else high)

    def share(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)

    def ticks(self, about: int, least: float = 0.0) -> tuple[Tick, ...]:
        """Return so many round values on the axis, or fewer; no two are closer than `least`."""
        step = _round_step(max(least, (self.high - self.low) / about))
        digits = max(0, -math.floor(math.log10(step)))
        first = math.ceil(self.low / step)
        last = math.floor(self.high / step)
        values = (number * step for number in range(first, last + 1))
        return tuple(Tick(f"{self.share(v):.2%}", _tick_text(v, digits)) for v in values)


def _round_step(least: float) -> float:
    """Return the smallest of 1, 2 and 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * 0.999)


def _tick_text(value: float, digits: int) -> str:
    if abs(value) >= 1e6 or digits > 6:
        return f"{value:.3g}"
    return f"{value:,.{digits}f}"


def _paths(line: Line, x_axis: _Axis, y_axis: _Axis) -> Iterator[tuple[str, str]]:
    """Yield the classes and the path of a line, and of its points where they are shown."""

    def y_of(value: float) -> str:
        # A value far above the axis stays above it, and within the numbers of a browser.
        return f"{_SIDE * (1 - min(max(y_axis.share(value), -1.0), 2.0)):.1f}"

    if line.style == "level":
        yield f"level {line.css}", f"M0 {y_of(line.points[0][1])}H{_SIDE}"
        return
    places = [f"{_SIDE * x_axis.share(x):.1f} {y_of(y)}" for x, y in line.points]
    if len(places) > 1:
        style = "faint" if line.style == "faint" else "line"
        yield f"{style} {line.css}", f"M{'L'.join(places)}"
    if len(places) == 1 or line.style == "dots":
        # A path of no length has round ends, so it is a dot that is not stretched.
        yield f"dots {line.css}", "".join(f"M{place}h0" for place in places)
