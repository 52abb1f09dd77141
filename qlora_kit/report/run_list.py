"""Runs beside each other: a table for the terminal, and a page with the curves of all.

Takes `ListedRun` records, whose texts are a stranger's and are escaped by the page. Reads nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from qlora_kit.report.chart import Chart, Line, chart_of
from qlora_kit.report.curve import Point
from qlora_kit.report.memory import difference_text, size_text
from qlora_kit.report.page import RUN_PAGE, render
from qlora_kit.report.plot import smooth

State = Literal["running", "finished", "stopped", "killed"]

# More than these cannot be told apart in one chart.
_MOST_DRAWN = 24
# More than these do not fit beside the figures of a run in a terminal.
_MOST_DIFFERING = 4
# Options with a column of their own, or that hold for one start of a run on one machine.
_NOT_COMPARED = {
    "model", "task", "data", "output", "overwrite", "resume", "allow_change", "profile", "threads",
}  # fmt: skip


@dataclass(frozen=True)
class Best:
    """The figure of a run's best checkpoint: a metric, its value, and whether lower is better."""

    metric: str
    value: float
    falls: bool


@dataclass(frozen=True)
class ListedRun:
    """A run, as it is found in its folder.

    Attributes:
        name: its folder, from the folder that is listed.
        folder: its folder.
        state: "stopped" ended by itself before its last step, "killed" did not.
        settings: its options, as texts.
        written: when the last row of its log was written, seconds since 1970.
        step: the last step of its log; None before the first.
        total_steps: the steps it was to have; None where it does not say.
        best: the figure of its best checkpoint; None before an evaluation.
        last_loss: training loss of the last step; None before the first.
        tokens_per_second: of its steps; None before the first.
        predicted_bytes: the predicted peak of the memory that was measured.
        measured_bytes: the measured peak.
        has_page: whether it has a `report.html`.
        losses: training loss by step.
        evaluations: the metric of its best checkpoint by step.
    """

    name: str
    folder: Path
    state: State
    settings: Mapping[str, str]
    written: float
    step: int | None
    total_steps: int | None
    best: Best | None
    last_loss: float | None
    tokens_per_second: float | None
    predicted_bytes: int | None
    measured_bytes: int | None
    has_page: bool
    losses: Sequence[Point]
    evaluations: Sequence[Point]

    @property
    def task(self) -> str:
        """Its task."""
        return self.settings.get("task", "causal")

    @property
    def metric(self) -> str:
        """The figure that its best checkpoint goes by."""
        return self.settings.get("best_metric", "loss")

    def as_json(self) -> dict[str, Any]:
        """Return the run for programs, without its curves."""
        return {
            "name": self.name,
            "folder": str(self.folder),
            "state": self.state,
            "written": _time(self.written).isoformat(timespec="seconds"),
            "optimizer_step": self.step,
            "total_steps": self.total_steps,
            "best_metric": self.metric,
            "best": self.best.value if self.best else None,
            "last_loss": self.last_loss,
            "tokens_per_second": self.tokens_per_second,
            "predicted_peak_bytes": self.predicted_bytes,
            "measured_peak_bytes": self.measured_bytes,
            "settings": dict(self.settings),
        }


def in_order(runs: Sequence[ListedRun], sort: Literal["time", "best", "name"]) -> list[ListedRun]:
    """Return runs in an order: written last first, the best first, or by name.

    By the best, the runs of a task and a metric stand together: others cannot be compared. Those
    that were never evaluated are last.
    """
    if sort == "name":
        return sorted(runs, key=lambda run: run.name)
    if sort == "time":
        return sorted(runs, key=lambda run: (-run.written, run.name))
    return sorted(runs, key=_rank)


def _rank(run: ListedRun) -> tuple[Any, ...]:
    if run.best is None:
        return (True, run.task, run.metric, 0.0, run.name)
    value = run.best.value if run.best.falls else -run.best.value
    return (False, run.task, run.metric, value, run.name)


def differing(runs: Sequence[ListedRun]) -> tuple[str, ...]:
    """Return the options whose values differ between runs, in the order of the options."""
    values: dict[str, set[str]] = {}
    for run in runs:
        for name, value in run.settings.items():
            values.setdefault(name, set()).add(value)
    return tuple(
        name for name, found in values.items() if len(found) > 1 and name not in _NOT_COMPARED
    )


# ---------------------------------------------------------------- the table

HEAD = (
    "run", "state", "model", "task", "steps", "best", "last loss", "peak", "tokens/s", "written",
)  # fmt: skip


def terminal_table(
    runs: Sequence[ListedRun],
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """Return head and rows of the table for a terminal, and the options that found no place in it.

    Options that differ have columns as long as they are few.
    """
    found = differing(runs)
    columns = found[:_MOST_DIFFERING]
    rows = tuple((*_cells(run), *_option_cells(run, columns)) for run in runs)
    return (*HEAD, *columns), rows, found[_MOST_DIFFERING:]


def _cells(run: ListedRun) -> tuple[str, ...]:
    steps = "" if run.step is None else f"{run.step:,}"
    if run.total_steps is not None:
        steps = f"{steps or 0} of {run.total_steps:,}"
    return (
        run.name,
        run.state,
        run.settings.get("model", ""),
        run.task,
        steps,
        "" if run.best is None else f"{_figure(run.best.value)} {run.best.metric}",
        "" if run.last_loss is None else _figure(run.last_loss),
        _peak(run),
        "" if run.tokens_per_second is None else f"{run.tokens_per_second:,.0f}",
        f"{_time(run.written):%Y-%m-%d %H:%M}",
    )


def _figure(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.3g}"


def _option_cells(run: ListedRun, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(run.settings.get(name, "") for name in names)


def _peak(run: ListedRun) -> str:
    if run.measured_bytes is None:
        return f"{size_text(run.predicted_bytes)} predicted" if run.predicted_bytes else ""
    text = size_text(run.measured_bytes)
    if not run.predicted_bytes:
        return text
    return f"{text} ({difference_text(run.measured_bytes, run.predicted_bytes)})"


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds).astimezone()


# ---------------------------------------------------------------- the page


def runs_page(runs: Sequence[ListedRun], title: str, page: Path) -> str:
    """Return the page of some runs: their curves, and a table with links to their own pages.

    Args:
        runs: the runs, in the order they are listed.
        title: the title of the page.
        page: where the page will be; links are relative to it.
    """
    options = differing(runs)
    best = _best_of_each(runs)
    return render(
        "runs.html.jinja",
        title=title,
        charts=_charts(runs),
        head=(*HEAD, "data"),
        options=options,
        rows=[
            {
                "link": _link(run, page),
                "is_best": run in best,
                "cells": (*_cells(run), run.settings.get("data", "")),
                "options": _option_cells(run, options),
            }
            for run in runs
        ],
        most_drawn=_MOST_DRAWN,
        drawn_out=len(runs) > _MOST_DRAWN,
    )


def _best_of_each(runs: Sequence[ListedRun]) -> list[ListedRun]:
    """Return the best run of each task and metric that more than one run was measured by."""
    measured = [run for run in in_order(runs, "best") if run.best is not None]
    groups: dict[tuple[str, str], list[ListedRun]] = {}
    for run in measured:
        groups.setdefault((run.task, run.metric), []).append(run)
    return [group[0] for group in groups.values() if len(group) > 1]


def _link(run: ListedRun, page: Path) -> str | None:
    """Return the address of a run's own page, relative to another page; None if it has none."""
    if not run.has_page:
        return None
    way = os.path.relpath((run.folder / RUN_PAGE).absolute(), page.absolute().parent)
    # The dot: a name with a colon would be read as an address of its own.
    return f"./{quote(Path(way).as_posix())}"


def _charts(runs: Sequence[ListedRun]) -> list[tuple[str, Chart]]:
    """Return a chart of the metric and one of the training loss for each task, with captions."""
    found = []
    drawn = list(enumerate(runs))[:_MOST_DRAWN]
    for task, metric in dict.fromkeys((run.task, run.metric) for run in runs):
        group = [(n, run) for n, run in drawn if (run.task, run.metric) == (task, metric)]
        measured = [Line(run.name, run.evaluations, "dots", color=n) for n, run in group]
        losses = [Line(run.name, _smoothed(run.losses), color=n) for n, run in group]
        of = f"{task}, by optimiser step"
        for caption, lines in (
            (f"{metric.replace('_', ' ')} on the validation rows, {of}", measured),
            (f"training loss, smoothed, {of}", losses),
        ):
            chart = chart_of(lines, from_zero=False)
            if chart is not None:
                found.append((caption, chart))
    return found


def _smoothed(points: Sequence[Point]) -> list[Point]:
    means = smooth([y for _, y in points])
    return [(x, mean) for (x, _), mean in zip(points, means, strict=True)]
