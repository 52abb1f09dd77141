"""What is known of a run so far: its progress, its curves and its last figures.

Takes rows of the log, those of an earlier start first; returns tables and charts for the page of a
run that goes on. Holds a bounded number of points and rows, however long the run is.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from qlora_kit.events import RunStarted
from qlora_kit.report.chart import Chart, Line, chart_of
from qlora_kit.report.curve import Curve, is_figure
from qlora_kit.report.memory import size_text
from qlora_kit.report.plot import smooth
from qlora_kit.report.run_page import figure_text
from qlora_kit.report.tables import Rows

_MOST_ROWS = 20


class SoFar:
    """The account of a run that goes on.

    Attributes:
        evaluations: rows of the last evaluations.
        incidents: rows of the last steps that were skipped or taken again.
        checkpoint: the name of the last checkpoint; None before the first.
        step: the last optimiser step.
    """

    def __init__(self) -> None:
        self.evaluations: deque[dict[str, Any]] = deque(maxlen=_MOST_ROWS)
        self.incidents: deque[dict[str, Any]] = deque(maxlen=_MOST_ROWS)
        self.checkpoint: str | None = None
        self.step = 0
        self._losses, self._measured, self._memory = Curve(), Curve(), Curve(max)
        self._last: dict[str, Any] = {}
        self._best: dict[str, Any] = {}
        self._begun: RunStarted | None = None
        self._begun_at = 0.0
        self._tokens, self._seconds = 0, 0.0

    def begin(self, event: RunStarted) -> None:
        """Note the start of the steps; the rows that follow are of this start."""
        self._begun, self._begun_at = event, time.monotonic()
        self.step = event.first_step - 1
        # A run is only resumed from a checkpoint, and that has the name of its step.
        self.checkpoint = f"checkpoint-{self.step}" if self.step else None
        self._tokens, self._seconds = 0, 0.0

    def take(self, row: dict[str, Any]) -> None:
        """Take a row of the log, see `report.log.row_of`."""
        step = row["optimizer_step"]
        if "rows_now" not in row:  # that step is taken again
            self.step = max(self.step, step)
        if "learning_rate" in row:
            self._last = row
            self._losses.add(step, row["loss"])
            self._memory.add(step, row["memory_bytes"] / 1e9)
            self._tokens += row["tokens"]
            self._seconds += row["step_seconds"]
        elif "eval_loss" in row:
            self.evaluations.append(row)
            self._measured.add(step, row["eval_loss"])
            self._best = row if row["is_best"] else self._best
        else:
            self.incidents.append(row)

    # ------------------------------------------------------------ tables

    @property
    def share(self) -> float:
        """The share of all steps that is done; 0 before the steps begin."""
        return self.step / self._begun.total_steps if self._begun else 0.0

    def rows(self, predicted_bytes: int | None, *, goes_on: bool = True) -> Rows:
        """Return progress and last figures.

        Args:
            predicted_bytes: the predicted peak of the same memory that the log has, or None.
            goes_on: whether the run goes on, so that there is a time left.
        """
        return tuple(self._rows(predicted_bytes, goes_on))

    def _rows(self, predicted_bytes: int | None, goes_on: bool) -> Iterator[tuple[str, str]]:
        if self._begun is not None:
            yield "step", self._progress(self._begun)
            yield "time", self._time(self._begun, goes_on)
        if self._last:
            loss = figure_text(self._last["loss"])
            yield "training loss", f"{loss} in step {self._last['optimizer_step']:,}"
        if self.evaluations:
            yield "validation loss", self._validation(self.evaluations[-1])
            yield from _metrics(self.evaluations[-1])
        if self._begun is not None and self._seconds:
            yield "speed", f"{self._tokens / self._seconds:,.0f} tokens/s"
            yield "tokens", f"{self._tokens:,} in this start"
        if self._last:
            beside = f"; predicted peak {size_text(predicted_bytes)}" if predicted_bytes else ""
            yield "memory", f"{size_text(self._last['memory_bytes'])}{beside}"
        yield "checkpoint", self.checkpoint or "none yet"

    def _progress(self, begun: RunStarted) -> str:
        text = f"{self.step:,} of {begun.total_steps:,} ({self.share:.0%})"
        if begun.epochs is not None:
            text += f", epoch {self._last.get('epoch', 0.0):.2f} of {begun.epochs:.2f}"
        return text

    def _time(self, begun: RunStarted, goes_on: bool) -> str:
        passed = time.monotonic() - self._begun_at
        text = f"{span_text(passed)} since this start"
        done = self.step - begun.first_step + 1
        if goes_on and done > 0:
            # Evaluations and checkpoints are in the time that passed, and so in the time left.
            left = passed / done * (begun.total_steps - self.step)
            text += f", about {span_text(left)} left"
        return text

    def _validation(self, last: Mapping[str, Any]) -> str:
        text = f"{figure_text(last['eval_loss'])} after step {last['optimizer_step']:,}"
        best = self._best
        if best and best is not last:
            at = f"step {best['optimizer_step']:,}"
            text += f"; the best checkpoint has {figure_text(best['eval_loss'])}, {at}"
        return f"{text} (best so far)" if best is last else text

    # ------------------------------------------------------------ charts

    def loss_chart(self) -> Chart | None:
        """Return the curves of training and validation loss; None before the first step."""
        points = self._losses.points
        means = smooth([y for _, y in points])
        smoothed = [(x, mean) for (x, _), mean in zip(points, means, strict=True)]
        return chart_of([
            Line("training", points, "faint"),
            Line("training, smoothed", smoothed),
            Line("validation", self._measured.points, "dots", color=1),
        ])  # fmt: skip

    def memory_chart(self, predicted_bytes: int | None) -> Chart | None:
        """Return the curve of the memory in GB, with the predicted peak as a level."""
        lines = [Line("", self._memory.points, color=2)]
        if predicted_bytes is not None:
            lines.append(Line("predicted peak", [(0, predicted_bytes / 1e9)], "level", color=7))
        return chart_of(lines)


def _metrics(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what an evaluation measured beside the loss."""
    for key, value in row.items():
        if key.startswith("eval_") and key != "eval_loss" and is_figure(value):
            yield key.removeprefix("eval_").replace("_", " "), figure_text(value)


def span_text(seconds: float) -> str:
    """Return a span of time for people: "45 s", "3 min 20 s", "2 h 05 min", "3.5 days"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
