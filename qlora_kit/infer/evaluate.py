"""Measures a model on token rows: its loss, and the other metrics of its task.

Takes a loaded model, with or without an adapter, and token rows; returns an `Evaluation`. As in
training, no logits matrix exists. Never changes the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

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

_Name = TypeVar("_Name", bound=str | None)


@dataclass(frozen=True)
class Evaluation:
    """The result of a measurement.

    Attributes:
        loss: mean over the weight, such as nats per supervised token.
        metrics: the metrics of the task by name, each a mean over the weight.
        weight: number of units measured, which the task chooses: supervised tokens, or rows.
            Where they do not count alike, means are divided by the sum of their weights instead.
        rows: number of rows measured.
        batch_size: rows of a batch at the end; fewer than asked for if memory ran out.
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
    """The result of a measurement in which each row has its own adapter.

    Attributes:
        total: the result on all rows.
        by_adapter: the result on the rows of each adapter that has rows, by the adapter's name;
            None: the base alone.
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
    """Measure `base`, with the adapter it may carry, on the token rows of a task.

    The model is in evaluation mode meanwhile, and afterwards in the mode it was in before. If
    memory runs out, the batch is halved for the rest of the rows.

    Args:
        base: the loaded base.
        rows: token rows.
        batch_size: rows of a batch to begin with.
        pad_token_id: id that fills short rows of a batch; the loss never sees it.
        chunk_tokens: tokens whose logits exist at one time.
        task: the meaning of a row.
        announce: receives a notice when the batch is halved.
        per_row: the adapter of each row, if several adapters are on the base.

    Raises:
        OutOfMemory: even one row does not fit.
        Stopped: a signal came.
    """
    total, _ = evaluate_parts(
        base, rows, {}, batch_size=batch_size, pad_token_id=pad_token_id,
        chunk_tokens=chunk_tokens, task=task, announce=announce, per_row=per_row,
    )  # fmt: skip
    return total


@torch.no_grad()
def evaluate_parts(
    base: Base,
    rows: TokenRows | Sequence[Row],
    parts: Mapping[_Name, Sequence[int]],
    *,
    batch_size: int = 8,
    pad_token_id: int = 0,
    chunk_tokens: int = CHUNK_TOKENS,
    task: Task = CAUSAL,
    announce: Announce = silent,
    per_row: PerRow | None = None,
) -> tuple[Evaluation, dict[_Name, Evaluation]]:
    """Measure token rows; return the result on all rows, and on each part of them by its name.

    Args:
        base: the loaded base.
        rows: token rows.
        parts: the indices of the rows of each part; a part without rows has no result.
        batch_size: rows of a batch to begin with.
        pad_token_id: id that fills short rows of a batch; the loss never sees it.
        chunk_tokens: tokens whose logits exist at one time.
        task: the meaning of a row.
        announce: receives a notice when the batch is halved.
        per_row: the adapter of each row, if several adapters are on the base.

    Raises:
        OutOfMemory: even one row does not fit.
        Stopped: a signal came.
    """
    rows = TokenRows.of(rows)
    objective = task.objective(base, pad_token_id, chunk_tokens, None)
    sums = _measure(objective, rows, batch_size, announce, per_row)
    total = sums.of(range(len(rows)), objective, rows)
    chosen = {name: some for name, some in parts.items() if len(some)}
    return total, {name: sums.of(some, objective, rows) for name, some in chosen.items()}


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
    """Measure token rows in batches of mixed adapters; return the result of each adapter too.

    Args:
        base: the loaded base.
        rows: token rows.
        per_row: the adapter of each row.
        batch_size: rows of a batch to begin with.
        pad_token_id: id that fills short rows of a batch; the loss never sees it.
        chunk_tokens: tokens whose logits exist at one time.
        task: the meaning of a row.
        announce: receives a notice when the batch is halved.

    Raises:
        OutOfMemory: even one row does not fit.
        Stopped: a signal came.
    """
    of_name: dict[str | None, list[int]] = {}
    for row, name in enumerate(per_row.names):
        of_name.setdefault(name, []).append(row)
    total, by_adapter = evaluate_parts(
        base, rows, of_name, batch_size=batch_size, pad_token_id=pad_token_id,
        chunk_tokens=chunk_tokens, task=task, announce=announce, per_row=per_row,
    )  # fmt: skip
    return MixedEvaluation(total, by_adapter)


class _Sums:
    """The sums of each row; every tensor is (rows,), fp64, in host memory.

    Args:
        rows: number of rows.
        batch_size: rows of a batch.
    """

    def __init__(self, rows: int, batch_size: int) -> None:
        self.rows, self.batch_size = rows, batch_size
        self.weight, self.units, self.loss = torch.zeros(3, rows, dtype=torch.float64)
        self.metrics: dict[str, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}

    def add(self, indices: Sequence[int], found: RowSums) -> None:
        """Store the sums of some rows; `indices` are the rows' places among all rows."""
        chosen = torch.tensor(indices)
        self.weight[chosen], self.loss[chosen] = found.weight, found.loss
        self.units[chosen] = found.weight if found.units is None else found.units
        for name, values in found.metrics.items():
            sums = self.metrics.setdefault(name, torch.zeros(self.rows, dtype=torch.float64))
            sums[chosen] = values
        if found.outputs is not None:
            self.outputs.update(zip(indices, found.outputs, strict=True))

    def of(self, some: Sequence[int], objective: Objective, rows: TokenRows) -> Evaluation:
        """Return the means over some of the rows, and their figures."""
        chosen = torch.tensor(some)
        count, weight = int(self.units[chosen].sum()), float(self.weight[chosen].sum())
        loss = float(self.loss[chosen].sum()) / weight
        means = {name: float(sums[chosen].sum()) / weight for name, sums in self.metrics.items()}
        figures: Figures = {}
        if self.outputs:
            outputs = [self.outputs[index] for index in some]
            figures = objective.figures(outputs, [rows[index] for index in some])
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
    """Run all rows in evaluation mode, and return their sums."""
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
    """Return the indices of rows by length: rows of similar length in a batch need less padding."""
    lengths = rows.lengths()
    return sorted(range(len(lengths)), key=lambda i: lengths[i])
