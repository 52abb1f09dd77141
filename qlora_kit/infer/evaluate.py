"""Measure a model on token rows: its loss, and what else its task measures.

Takes a loaded model, with or without an adapter; returns an `Evaluation`. No logits matrix
exists, as in training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qlora_kit.data.batch import Row, TokenRows
from qlora_kit.events import Announce, Notice, silent
from qlora_kit.layers.loss import CHUNK_TOKENS
from qlora_kit.lora.several import PerRow
from qlora_kit.model.halving import batches_that_fit
from qlora_kit.model.load import Base
from qlora_kit.tasks.causal import CAUSAL
from qlora_kit.tasks.task import Figures, Objective, RowSums, Task


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        loss: mean over the weight, such as nats per supervised token.
        metrics: the task's, each a mean over the weight, by name.
        weight: what was measured, counted as the task does: supervised tokens, or rows.
        rows: number of rows measured.
        batch_size: rows a batch at the end; fewer than asked for where memory ran out.
        details: tables of the task, such as the figures of each label.
    """

    loss: float
    metrics: Mapping[str, float]
    weight: int
    rows: int
    batch_size: int
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MixedEvaluation:
    """What was measured on rows that each had their own adapter.

    Attributes:
        total: of all rows.
        by_adapter: of the rows of each adapter that has some, by name; None: the base alone.
    """

    total: Evaluation
    by_adapter: Mapping[str | None, Evaluation]


@torch.no_grad()
def evaluate(
    base: Base,
    rows: TokenRows | Sequence[Row],
    *,
    batch_size: int = 8,
    pad_token_id: int = 0,
    chunk_tokens: int = CHUNK_TOKENS,
    task: Task = CAUSAL,
    announce: Announce = silent,
    per_row: PerRow | None = None,
) -> Evaluation:
    """Measure `base`, with the adapter it may carry, on token rows that `task` makes sense of.

    The model is put in evaluation mode and left in the mode it was in. Where memory runs out
    the batch is halved, for the rest of the rows. Where several adapters are on the base,
    `per_row` says which one each row has.

    Raises:
        OutOfMemory: even one row does not fit.
        Stopped: a signal came.
    """
    rows = TokenRows.of(rows)
    objective = task.objective(base, pad_token_id, chunk_tokens, None)
    sums = _measure(objective, rows, batch_size, announce, per_row)
    return sums.of(range(len(rows)), objective, rows)


@torch.no_grad()
def evaluate_mixed(
    base: Base,
    rows: TokenRows | Sequence[Row],
    per_row: PerRow,
    *,
    batch_size: int = 8,
    pad_token_id: int = 0,
    chunk_tokens: int = CHUNK_TOKENS,
    task: Task = CAUSAL,
    announce: Announce = silent,
) -> MixedEvaluation:
    """Measure token rows in mixed batches, as `evaluate` does; tell the adapters apart.

    Raises:
        OutOfMemory: even one row does not fit.
        Stopped: a signal came.
    """
    rows = TokenRows.of(rows)
    objective = task.objective(base, pad_token_id, chunk_tokens, None)
    sums = _measure(objective, rows, batch_size, announce, per_row)
    of_name: dict[str | None, list[int]] = {}
    for row, name in enumerate(per_row.names):
        of_name.setdefault(name, []).append(row)
    by_adapter = {name: sums.of(chosen, objective, rows) for name, chosen in of_name.items()}
    return MixedEvaluation(sums.of(range(len(rows)), objective, rows), by_adapter)


class _Sums:
    """What was counted of each row: (rows,) each, fp64, in host memory.

    Args:
        rows: number of them.
        batch_size: rows a batch.
    """

    def __init__(self, rows: int, batch_size: int) -> None:
        self.rows, self.batch_size = rows, batch_size
        self.weight, self.loss = torch.zeros(2, rows, dtype=torch.float64)
        self.metrics: dict[str, Tensor] = {}
        self.outputs: Tensor | None = None

    def add(self, indices: Sequence[int], found: RowSums) -> None:
        """Take what was measured of some rows; `indices` are theirs among all rows."""
        chosen = torch.tensor(indices)
        self.weight[chosen], self.loss[chosen] = found.weight, found.loss
        for name, values in found.metrics.items():
            sums = self.metrics.setdefault(name, torch.zeros(self.rows, dtype=torch.float64))
            sums[chosen] = values
        if found.outputs is not None:
            if self.outputs is None:
                self.outputs = found.outputs.new_empty(self.rows, *found.outputs.shape[1:])
            self.outputs[chosen] = found.outputs

    def of(self, some: Sequence[int], objective: Objective, rows: TokenRows) -> Evaluation:
        """Return the means over some of the rows, and their figures."""
        chosen = torch.tensor(some)
        count = int(self.weight[chosen].sum())
        loss = float(self.loss[chosen].sum()) / count
        means = {name: float(sums[chosen].sum()) / count for name, sums in self.metrics.items()}
        figures: Figures = {}
        if self.outputs is not None:
            figures = objective.figures(self.outputs[chosen], [rows[index] for index in some])
        numbers = {name: value for name, value in figures.items() if isinstance(value, float)}
        tables = {name: value for name, value in figures.items() if name not in numbers}
        metrics = {**means, **numbers}
        return Evaluation(loss, metrics, count, len(some), self.batch_size, tables)


def _measure(
    objective: Objective,
    rows: TokenRows,
    batch_size: int,
    announce: Announce,
    per_row: PerRow | None,
) -> _Sums:
    """Run all rows, the model in evaluation mode meanwhile."""
    sums, base = _Sums(len(rows), batch_size), objective.base

    def measured(indices: Sequence[int]) -> RowSums:
        batch = objective.batch([rows[index] for index in indices])
        if per_row is not None:
            per_row.choose(indices)
        return objective.row_sums(batch, objective.measured(batch))

    def fewer(most: int) -> None:
        sums.batch_size = most
        announce(Notice(f"out of memory in evaluation: {most} row(s) a batch from here"))

    fitting = batches_that_fit(
        _by_length(rows),
        batch_size,
        measured,
        base.hardware.device,
        line_of=lambda index: _line(len(rows[index]["input_ids"])),
        on_halved=fewer,
    )
    with base.in_evaluation():
        for indices, found in fitting:
            sums.add(indices, found)
    return sums


def _line(tokens: int) -> str:
    return (
        f"out of memory in evaluation on one row of {tokens} tokens; expected it to fit; pass "
        "a smaller --max-length or --loss-chunk-tokens, or fewer --bits"
    )


def _by_length(rows: TokenRows) -> list[int]:
    """Order rows so that those of similar length share a batch: padding is work for nothing."""
    lengths = rows.lengths()
    return sorted(range(len(lengths)), key=lambda i: lengths[i])
