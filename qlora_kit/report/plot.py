"""Draw `loss.png`: training and validation loss, and the learning rate, by optimiser step."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_kit.storage import write_bytes

NAME = "loss.png"
_SMOOTHING = 0.9


def draw_loss(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the rows of a log, see `report.log`."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    # Skipped steps have a loss too, but no learning rate: nothing was learnt.
    steps = [row for row in rows if "learning_rate" in row]
    evaluations = [row for row in rows if row.get("eval_loss") is not None]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    x = [row["optimizer_step"] for row in steps]
    losses = [row["loss"] for row in steps]
    axes.plot(x, losses, color="tab:blue", alpha=0.3, linewidth=1, label="training, each step")
    axes.plot(x, _smooth(losses), color="tab:blue", linewidth=1.8, label="training, smoothed")
    if evaluations:
        axes.plot(
            [row["optimizer_step"] for row in evaluations],
            [row["eval_loss"] for row in evaluations],
            color="tab:orange", marker="o", markersize=4, label="validation",
        )  # fmt: skip
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss (nats per supervised token)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    rate = axes.twinx()
    rate.plot(
        x, [row["learning_rate"] for row in steps], color="tab:gray", linestyle=":", linewidth=1
    )
    rate.set_ylabel("learning rate (dotted)")
    rate.set_ylim(bottom=0)
    axes.legend(loc="upper right")
    save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as a PNG, and let go of it.

    Raises:
        StorageError: it could not be written.
    """
    from matplotlib import pyplot

    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120, metadata={"Software": None})
    pyplot.close(figure)
    write_bytes(path, picture.getvalue())


def _smooth(values: Sequence[float]) -> list[float]:
    """Return the exponential moving average, corrected for its start."""
    smoothed, average = [], 0.0
    for count, value in enumerate(values, 1):
        average = _SMOOTHING * average + (1 - _SMOOTHING) * value
        smoothed.append(average / (1 - _SMOOTHING**count))
    return smoothed
