"""`sweep.html`: the page of a sweep, in one file that opens without a network.

Takes what its trials measured, and the rows of their logs; writes the ranked table, a picture of
the figure by each varied option, the curves of all trials, and the command of the best one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.redact import redacted_values
from qlora_kit.report.page import render
from qlora_kit.report.plot import png_of
from qlora_kit.storage import write_text

_MOST_COLOURS = 8
_MOST_PANELS = 6
_FEW_POINTS = 30
_BEST_COLOUR = "black"
# Numbers further apart than this are shown by factors.
_BY_FACTORS_FROM = 10


@dataclass(frozen=True)
class ShownTrial:
    """A trial as the page shows it.

    Attributes:
        label: its number.
        name: the folder of its run.
        values: the values of the options that are varied, as texts.
        state: waiting, running, finished or failed.
        figure: what the trials are ranked by; None where it has none.
        more: other figures, by name.
        fault: why it failed, in one line.
        log_rows: the rows of its log.
    """

    label: str
    name: str
    values: Mapping[str, str]
    state: str
    figure: float | None
    more: Mapping[str, str]
    fault: str | None
    log_rows: Sequence[Mapping[str, Any]]


def write_sweep_page(
    path: Path,
    trials: Sequence[ShownTrial],
    *,
    figure_name: str,
    curve: str,
    notes: Sequence[str],
    command: str | None,
) -> None:
    """Write the page of a sweep.

    Args:
        path: the page.
        trials: the ranked trials, the best first, and then the others.
        figure_name: what the trials are ranked by, in words.
        curve: the key of the log whose values are drawn over the steps.
        notes: what the reader should know of the order.
        command: the command line that trains the best trial alone, if there is one.

    Raises:
        StorageError: the page could not be written.
    """
    trials, notes, command = redacted_values((list(trials), list(notes), command))
    ranked = [each for each in trials if each.figure is not None]
    names = list(trials[0].values) if trials else []
    text = render(
        "sweep.html.jinja",
        title=f"{path.parent.name}: {len(trials)} trials",
        head=table_head(trials, figure_name),
        rows=table_rows(trials),
        failed=[(each.name, each.fault) for each in trials if each.fault],
        by_value=_values_picture(ranked, names, figure_name) if ranked else None,
        curves=_curves_picture(ranked, curve, figure_name) if ranked else None,
        figure_name=figure_name,
        notes=notes,
        command=command,
    )
    write_text(path, text)


def table_head(trials: Sequence[ShownTrial], figure_name: str) -> tuple[str, ...]:
    """Return the head of the ranked table."""
    first = trials[0] if trials else None
    return ("place", "trial", *(first.values if first else ()), figure_name,
            *(first.more if first else ()), "state")  # fmt: skip


def table_rows(trials: Sequence[ShownTrial]) -> list[tuple[Any, ...]]:
    """Return a row for each trial; those without a figure have no place."""
    return [
        (
            rank if each.figure is not None else "",
            each.label,
            *each.values.values(),
            "" if each.figure is None else f"{each.figure:.4f}",
            *each.more.values(),
            each.state,
        )
        for rank, each in enumerate(trials, 1)
    ]


# ---------------------------------------------------------------- pictures


def _values_picture(ranked: Sequence[ShownTrial], names: Sequence[str], figure_name: str) -> bytes:
    """Draw the figure of each trial by each option; trials that are else alike are joined."""
    from matplotlib.figure import Figure

    shown = names[:_MOST_PANELS]
    figure = Figure(figsize=(max(5.0, 4.0 * len(shown)), 4), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, shown, strict=True):
        places, is_number = _places([each.values[name] for each in ranked])
        groups: dict[str, list[ShownTrial]] = {}
        for trial in sorted(ranked, key=lambda each: int(each.label)):
            rest = ", ".join(f"{k}={v}" for k, v in trial.values.items() if k != name)
            groups.setdefault(rest, []).append(trial)
        is_named = len(names) > 1 and 1 < len(groups) <= _MOST_COLOURS
        for rest, group in groups.items():
            group = sorted(group, key=lambda each: places[each.values[name]])
            axes.plot(
                [places[each.values[name]] for each in group], [each.figure for each in group],
                marker="o", markersize=5, linewidth=1, alpha=0.8,
                color=None if is_named else "tab:blue", label=rest if is_named else None,
            )  # fmt: skip
        best = ranked[0]
        axes.plot(
            [places[best.values[name]]], [best.figure], marker="*", markersize=14,
            color=_BEST_COLOUR, linestyle="", zorder=3, label="best",
        )  # fmt: skip
        _set_values(axes, name, places, is_number=is_number)
        axes.legend(fontsize="small")
    panels[0].set_ylabel(figure_name)
    return png_of(figure)


def _places(texts: Sequence[str]) -> tuple[dict[str, float], bool]:
    """Return the place of each value on its axis, and whether it is a number."""
    try:
        numbers = {text: float(text) for text in texts}
    except ValueError:
        numbers = {}
    if numbers and all(map(math.isfinite, numbers.values())):
        return numbers, True
    return {text: float(place) for place, text in enumerate(dict.fromkeys(texts))}, False


def _set_values(axes: Any, name: str, places: Mapping[str, float], *, is_number: bool) -> None:
    """Name an axis, and mark on it the values that were tried."""
    from matplotlib.ticker import NullLocator

    axes.set_xlabel(name)
    axes.grid(alpha=0.25)
    low, high = min(places.values()), max(places.values())
    if is_number and low > 0 and high / low >= _BY_FACTORS_FROM:
        axes.set_xscale("log")
    if len(places) <= _MOST_COLOURS:
        axes.xaxis.set_minor_locator(NullLocator())
        is_long = max(map(len, places)) > _MOST_COLOURS
        axes.set_xticks(list(places.values()), list(places), rotation=20 if is_long else 0)
    elif not is_number:
        axes.set_xticks([])
    if not is_number:
        axes.set_xlim(-0.5, len(places) - 0.5)


def _curves_picture(ranked: Sequence[ShownTrial], curve: str, figure_name: str) -> bytes:
    """Draw what each trial measured while it went; the best one in front."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for rank, trial in reversed([*enumerate(ranked)]):
        points = [
            (row["optimizer_step"], row[curve])
            for row in trial.log_rows
            if isinstance(row.get(curve), int | float)
        ]
        axes.plot(
            [step for step, _ in points], [value for _, value in points],
            marker="." if len(points) < _FEW_POINTS else None,
            color=_BEST_COLOUR if rank == 0 else f"C{rank % 10}" if len(ranked) <= _MOST_COLOURS
            else "tab:gray",
            linewidth=2 if rank == 0 else 1, alpha=1 if rank == 0 else 0.7,
            label=f"trial {trial.label}{', best' * (rank == 0)}"
            if rank == 0 or len(ranked) <= _MOST_COLOURS else None,
        )  # fmt: skip
    axes.set_xlabel("optimiser step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(figure_name)
    axes.grid(alpha=0.25)
    axes.legend(*[part[::-1] for part in axes.get_legend_handles_labels()], fontsize="small")
    return png_of(figure)
