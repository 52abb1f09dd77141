"""Draws the curves of a run over its optimiser steps: `loss.png`, and the memory for its page.

Takes the rows of a log, see `report.log`. Other modules get their empty figures here as well.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_kit.storage import write_bytes

NAME = "loss.png"
# A smoothed point averages about a twentieth of the run, but never more than this many steps.
_SMOOTHED_SHARE = 0.05
_MOST_SMOOTHED = 50
# With fewer points a line without markers shows too little; with one point it shows nothing.
_FEW_POINTS = 30


def draw_loss(rows: Sequence[dict[str, Any]], path: Path, unit: str = "nats per token") -> None:
    """Draw training and validation loss, skipped steps, and the learning rate.

    Args:
        rows: the rows of a log.
        path: the PNG.
        unit: unit of the loss.
    """
    # Rows of skipped steps have a loss too, but no learning rate.
    steps = [row for row in rows if "learning_rate" in row]
    evaluations = [row for row in rows if row.get("eval_loss") is not None]
    figure, axes = new_figure(8, 4.5)
    x = [row["optimizer_step"] for row in steps]
    losses = [row["loss"] for row in steps]
    axes.plot(
        x, losses, color="tab:blue", alpha=0.3, linewidth=1, marker=_point_marker(x),
        label="training, each step",
    )  # fmt: skip
    axes.plot(x, smooth(losses), color="tab:blue", linewidth=1.8, label="training, smoothed")
    if evaluations:
        axes.plot(
            [row["optimizer_step"] for row in evaluations],
            [row["eval_loss"] for row in evaluations],
            color="tab:orange", marker="o", markersize=4, label="validation",
        )  # fmt: skip
    if skipped := [row["optimizer_step"] for row in rows if "rows" in row]:
        axes.plot(
            skipped, [0.0] * len(skipped), color="tab:red", marker="x", linestyle="",
            clip_on=False, label="skipped: not finite",
        )  # fmt: skip
    _by_step(axes)
    axes.set_ylabel(f"loss ({unit})")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    rate = axes.twinx()
    rate.plot(
        x, [row["learning_rate"] for row in steps], color="tab:gray", linestyle=":", linewidth=1
    )
    rate.set_ylabel("learning rate (dotted)")
    rate.set_ylim(bottom=0)
    # Beside the axes: inside, it would hide the end of a loss that does not fall.
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    save_figure(figure, path)


def memory_curve(rows: Sequence[dict[str, Any]], levels: Mapping[str, int]) -> bytes:
    """Return a PNG of the memory after each step.

    Args:
        rows: the rows of a log.
        levels: bytes of horizontal lines, by the name of the line.
    """
    steps = [row for row in rows if "memory_bytes" in row]
    x = [row["optimizer_step"] for row in steps]
    figure, axes = new_figure(8, 3)
    sizes = [row["memory_bytes"] / 1e9 for row in steps]
    axes.plot(x, sizes, color="tab:green", marker=_point_marker(x))
    for (name, level), style in zip(levels.items(), ("--", ":"), strict=False):
        axes.axhline(level / 1e9, color="black", linestyle=style, linewidth=1, label=name)
    if levels:
        axes.legend(loc="lower right")
    _by_step(axes)
    axes.set_ylabel("GB (10⁹ bytes)")
    axes.set_ylim(0, 1.15 * max([*sizes, *(level / 1e9 for level in levels.values())], default=1))
    axes.grid(alpha=0.25)
    return png_of(figure)


# ---------------------------------------------------------------- figures


def new_figure(width: float, height: float, plots: int = 1) -> tuple[Any, Any]:
    """Return an empty matplotlib figure and its axes; of several plots, an array of axes.

    It does not use pyplot, which would choose a backend for the whole process and keep every
    figure.

    Args:
        width: width in inches.
        height: height in inches.
        plots: number of plots, one below the other, over the same x.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(plots, sharex=True)


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as a PNG.

    Raises:
        StorageError: the file could not be written.
    """
    write_bytes(path, png_of(figure))


def png_of(figure: Any) -> bytes:
    """Return a matplotlib figure as a PNG."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120, metadata={"Software": None})
    return picture.getvalue()


def _by_step(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("optimiser step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _point_marker(points: Sequence[int]) -> str | None:
    return "." if len(points) < _FEW_POINTS else None


def smooth(values: Sequence[float]) -> list[float]:
    """Return the exponential moving average, corrected for its start."""
    old = 1 - 1 / min(max(1.0, len(values) * _SMOOTHED_SHARE), _MOST_SMOOTHED)
    smoothed, average = [], 0.0
    for count, value in enumerate(values, 1):
        average = old * average + (1 - old) * value
        smoothed.append(average / (1 - old**count))
    return smoothed
