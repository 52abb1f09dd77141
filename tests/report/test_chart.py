"""Curves that stay small, and charts that a page draws itself."""

from __future__ import annotations

import math
import re

import pytest

from qlora_kit.report.chart import COLORS, Chart, Line, chart_of
from qlora_kit.report.curve import MOST_POINTS, Curve, Point


def places(path: str) -> list[Point]:
    """Return the points of a path."""
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](\S+?) (-?[\d.]+)", path)]


# ---------------------------------------------------------------- curves


def test_a_curve_of_few_points_has_each_of_them() -> None:
    curve = Curve()
    for step in range(1, 200):
        curve.add(step, 2.0 * step)
    assert curve.points == [(step, 2.0 * step) for step in range(1, 200)]


@pytest.mark.parametrize("count", [2 * MOST_POINTS, 10_007, 100_000])
def test_a_curve_stays_small_and_keeps_its_ends_and_its_mean(count: int) -> None:
    curve = Curve()
    for step in range(1, count + 1):
        curve.add(step, float(step % 10))
    points = curve.points
    assert MOST_POINTS <= len(points) <= 2 * MOST_POINTS
    assert points[-1][0] == count
    xs = [x for x, _ in points]
    assert xs == sorted(set(xs))
    assert sum(y for _, y in points) / len(points) == pytest.approx(4.5, abs=0.1)


def test_the_largest_of_neighbours_is_kept_where_peaks_count() -> None:
    curve = Curve(max)
    for step in range(5000):
        curve.add(step, 9.0 if step == 1234 else 1.0)
    assert max(y for _, y in curve.points) == 9.0


@pytest.mark.parametrize("y", [math.nan, math.inf, -math.inf, "nan", None, [1], 10**400, 1e16])
def test_what_is_no_figure_is_no_point(y: object) -> None:
    curve = Curve()
    curve.add(1, y)
    curve.add(y, 1)
    assert curve.points == []


# ---------------------------------------------------------------- charts


def chart(*lines: Line, from_zero: bool = True) -> Chart:
    found = chart_of(lines, from_zero=from_zero)
    assert found is not None
    return found


def test_points_lie_where_the_ticks_say() -> None:
    drawn = chart(Line("loss", [(0, 4.0), (50, 1.0), (100, 2.0)]))
    (_, path), = drawn.paths  # fmt: skip
    xs, ys = zip(*places(path), strict=True)
    assert xs == (0, 500, 1000)
    ticks = {tick.text: float(tick.place.rstrip("%")) for tick in drawn.y_ticks}
    assert list(ticks) == ["0", "1", "2", "3", "4"]
    of_value = {4.0: ys[0], 1.0: ys[1], 2.0: ys[2]}
    for text, place in ticks.items():
        if float(text) in of_value:
            assert of_value[float(text)] == pytest.approx(1000 - 10 * place, abs=0.2)
    assert [tick.text for tick in drawn.x_ticks] == ["0", "50", "100"]


def test_a_single_point_is_seen_and_no_point_is_no_chart() -> None:
    (css, path), = chart(Line("one", [(3, 2.0)])).paths  # fmt: skip
    assert css.startswith("dots ")
    assert path.endswith("h0")
    assert chart_of([]) is None
    assert chart_of([Line("none", []), Line("level", [(0, 1.0)], "level")]) is None


def test_one_wild_step_does_not_press_the_others_to_the_floor() -> None:
    points = [(step, 1.0 + step % 3) for step in range(200)]
    drawn = chart(Line("loss", [(-1, 1e9), *points]))
    heights = [1000 - y for _, y in places(drawn.paths[0][1])]
    assert max(heights[1:]) > 800
    assert heights[0] > 1000, "it leaves the chart at the top"
    assert all(math.isfinite(height) and abs(height) <= 2000 for height in heights)


@pytest.mark.parametrize(
    "values", [[0.0, 0.0], [1e-9, 2e-9], [5.0, 5.0], [-3.0, -1.0], [1e14, -1e14], [0.1, 0.30000001]]
)
def test_every_range_has_a_few_ticks_inside(values: list[float]) -> None:
    drawn = chart(Line("y", list(enumerate(values))), from_zero=False)
    for ticks in (drawn.x_ticks, drawn.y_ticks):
        assert 1 <= len(ticks) <= 7
        assert all(0 <= float(tick.place.rstrip("%")) <= 100 for tick in ticks)
        assert len({tick.text for tick in ticks}) == len(ticks), "no text stands twice"


def test_more_lines_than_colours_are_told_apart_by_dashes() -> None:
    lines = [Line(f"run {n}", [(0, n), (1, n + 1)], color=n) for n in range(3 * COLORS)]
    legend = chart(*lines).legend
    assert len({css for css, _ in legend}) == 3 * COLORS
    assert legend[0] == ("line c0", "run 0")
