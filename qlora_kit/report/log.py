"""The log of a run: one JSON line an optimiser step or evaluation, in `trainer_log.jsonl`.

Takes events; appends rows to the log, or reads them back. A row has the fields of its event
(`StepFinished`, `StepSkipped`, `MicroBatchHalved`, `Evaluated`), except that an evaluation's loss
is called `eval_loss`. For numbers that JSON does not have, a row has the texts "nan", "inf" and
"-inf". docs/runs.md describes the fields one by one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qlora_kit.errors import DataError
from qlora_kit.events import (
    CheckpointSaved,
    Evaluated,
    Event,
    MicroBatchHalved,
    RunStarted,
    StepFinished,
    StepSkipped,
)
from qlora_kit.redact import redacted_values
from qlora_kit.report.source_losses import KEY, SourceLosses
from qlora_kit.storage import parse_json, read_lines, storage_errors, sync_file, write_text

NAME = "trainer_log.jsonl"


class Log:
    """Appends a row for every step and evaluation it hears of.

    Args:
        folder: the run's folder.
        every: optimiser steps between step rows; the first step is always logged.
    """

    def __init__(self, folder: Path, every: int = 1) -> None:
        self._path = folder / NAME
        self._every = every
        self._sources = SourceLosses()

    def __call__(self, event: Event) -> None:
        """Hear an event."""
        if isinstance(event, RunStarted):
            self._drop_what_comes_again(event.first_step, event.evaluated_step)
        elif isinstance(event, CheckpointSaved):
            # The rows before a checkpoint must be on the disk if the checkpoint is.
            with storage_errors(self._path):
                sync_file(self._path)
        elif isinstance(event, StepFinished):
            self._sources.add(event)
            if is_logged(event.optimizer_step, self._every):
                self._append(_step_row(event, self._sources.told()))
        elif (row := row_of(event)) is not None:
            self._append(row)

    def _append(self, row: dict[str, Any]) -> None:
        # JSON has no NaN or infinity, so their names are written.
        finite = {key: str(value) if _is_not_finite(value) else value for key, value in row.items()}
        with storage_errors(self._path), self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(redacted_values(finite), allow_nan=False) + "\n")

    def _drop_what_comes_again(self, first_step: int, evaluated_step: int) -> None:
        """Drop the rows that a resumed run is about to write again."""
        if not self._path.is_file():
            return
        rows = [
            row
            for row in read_log(self._path)
            if row["optimizer_step"] <= (evaluated_step if "eval_loss" in row else first_step - 1)
        ]
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in rows))


def row_of(event: Event) -> dict[str, Any] | None:
    """Return the row that the log has of an event; None for an event without a row."""
    if isinstance(event, StepFinished):
        return _step_row(event, {})
    if isinstance(event, Evaluated):
        return _evaluation_row(event)
    if isinstance(event, StepSkipped | MicroBatchHalved):
        return asdict(event)
    return None


def _step_row(event: StepFinished, sources: Mapping[str, float]) -> dict[str, Any]:
    """Return the row of a step; its weight is named after what is weighed.

    Args:
        event: the step.
        sources: the mean loss of each source since the row before, where there are several.
    """
    row = asdict(event)
    del row["weighs"], row["sources"]
    row |= row.pop("metrics")
    if row["loss_weight"] is None:
        del row["loss_weight"]
    if sources:
        row[KEY] = dict(sources)
    return {event.weighs if name == "weight" else name: value for name, value in row.items()}


def _evaluation_row(event: Evaluated) -> dict[str, Any]:
    """Return the row of an evaluation, whose figures have names of their own."""
    row = asdict(event)
    metrics = row.pop("metrics")
    row = {"eval_loss" if name == "loss" else name: value for name, value in row.items()}
    return row | {f"eval_{name}": value for name, value in metrics.items()}


def is_logged(step: int, every: int) -> bool:
    """Whether a step has a row: the first step has, and then every `every`-th."""
    return step == 1 or step % every == 0


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a log; a last line that a kill cut short is left out.

    Raises:
        DataError: a line other than the last is not valid JSON.
    """
    lines = [line for line in read_lines(path) if line.record.strip()]
    rows = []
    for line in lines:
        try:
            rows.append(parse_json(line.record, f"{line.file}:{line.line}"))
        except DataError:
            if line is not lines[-1]:
                raise
    return rows
