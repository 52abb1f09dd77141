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
from qlora_kit.errors import WorkerLost
from qlora_kit.events import Announce, Notice, silent
from qlora_kit.layers.loss import CHUNK_TOKENS
from qlora_kit.lora.several import PerRow
from qlora_kit.model.halving import batches_that_fit
from qlora_kit.model.load import Base
from qlora_kit.parallel.one import OneProcess, Processes
from qlora_kit.tasks.causal import CAUSAL
from qlora_kit.tasks.task import Figures, Objective, RowSums, Task

_Name = TypeVar("_Name", bound=str | None)
_ALONE = OneProcess()


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
    processes: Processes = _ALONE,
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
        processes: the processes that divide the batches; each has the result on all rows.

    Raises:
        OutOfMemory: even one row does not fit.
        Stopped: a signal came.
    """
    rows = TokenRows.of(rows)
    objective = task.objective(base, pad_token_id, chunk_tokens, None)
    found = processes.each(
        lambda: _measure(objective, rows, batch_size, announce, per_row, processes)
    )
    sums = _Sums.joined(found)
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

    @staticmethod
    def joined(parts: Sequence[_Sums]) -> _Sums:
        """Return the sums of all rows, of which each of `parts` has some."""
        if len(parts) == 1:
            return parts[0]
        whole = _Sums(parts[0].rows, min(part.batch_size for part in parts))
        for part in parts:
            whole.weight += part.weight
            whole.units += part.units
            whole.loss += part.loss
            for name, values in part.metrics.items():
                whole.metrics[name] = whole.metrics.get(name, 0) + values
            whole.outputs.update(part.outputs)
        return whole

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
    processes: Processes,
) -> _Sums:
    """Run the rows of this process in evaluation mode, and return their sums."""
    sums, base = _Sums(len(rows), batch_size), objective.base
    order = _by_length(rows)
    # Whole batches are dealt out, so they are those of one process, and give the same numbers.
    own = [
        row
        for place, row in enumerate(order)
        if place // batch_size % processes.count == processes.rank
    ]

    def measured(indices: Sequence[int]) -> RowSums:
        batch = objective.batch([rows[index] for index in indices])
        if per_row is not None:
            per_row.choose(indices)
        return objective.row_sums(batch, objective.measured(batch))

    def fewer(most: int) -> None:
        if processes.computes_together:
            raise WorkerLost(
                "out of memory in evaluation in one process, while the others wait for its part of "
                "the base; expected each to fit; pass a smaller --eval-batch-size"
            )
        sums.batch_size = most
        announce(Notice(f"out of memory in evaluation: {most} row(s) a batch from here"))

    fitting = batches_that_fit(
        own,
        batch_size,
        measured,
        base.hardware.device,
        line_of=lambda index: _line(rows.tokens_of(index)),
        on_halved=fewer,
    )
    with base.in_evaluation(), processes.computing():
        for indices, found in fitting:
            sums.add(indices, found)
        if processes.computes_together and _has_a_batch_less(len(rows), batch_size, processes):
            measured(order[:1])  # for nothing: the others need this process
    return sums


def _has_a_batch_less(rows: int, batch_size: int, processes: Processes) -> bool:
    """Whether this process has one batch less than the first."""
    left_over = -(-rows // batch_size) % processes.count
    return 0 < left_over <= processes.rank


def _line(tokens: int) -> str:
    return (
        f"out of memory in evaluation on one row of {tokens} tokens; expected it to fit; pass "
        "a smaller --max-length or --loss-chunk-tokens, or fewer --bits"
    )


def _by_length(rows: TokenRows) -> list[int]:
    """Return the indices of rows by length: rows of similar length in a batch need less padding."""
    lengths = rows.lengths()
    return sorted(range(len(lengths)), key=lambda i: lengths[i])
