"""Measure a model on token rows: loss, perplexity, share of tokens it would have chosen.

Takes a loaded model, with or without an adapter; returns an `Evaluation`. No logits matrix
exists, as in training.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qlora_kit.data.batch import Row, TokenRows
from qlora_kit.errors import OutOfMemory
from qlora_kit.events import Announce, Notice, silent
from qlora_kit.layers.loss import CHUNK_TOKENS
from qlora_kit.lora.several import PerRow
from qlora_kit.model.load import Base
from qlora_kit.model.memory import is_out_of_memory, release_memory
from qlora_kit.signals import safe_point
from qlora_kit.tasks.causal import CAUSAL
from qlora_kit.tasks.task import Objective, RowSums


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        loss: nats per supervised token.
        token_accuracy: share of supervised tokens that are the most likely one.
        supervised_tokens: number measured.
        rows: number of rows measured.
        batch_size: rows a batch at the end; fewer than asked for where memory ran out.
    """

    loss: float
    token_accuracy: float
    supervised_tokens: int
    rows: int
    batch_size: int

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


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
    announce: Announce = silent,
    per_row: PerRow | None = None,
) -> Evaluation:
    """Measure `base`, with the adapter it may carry, on token rows.

    The model is put in evaluation mode and left in the mode it was in. Where memory runs out
    the batch is halved, for the rest of the rows. Where several adapters are on the base,
    `per_row` says which one each row has.

    Raises:
        OutOfMemory: even one row does not fit.
        Stopped: a signal came.
    """
    rows = TokenRows.of(rows)
    objective = CAUSAL.objective(base, pad_token_id, chunk_tokens, None)
    sums = _measure(objective, base, rows, batch_size, announce, per_row)
    return sums.of(range(len(rows)))


@torch.no_grad()
def evaluate_mixed(
    base: Base,
    rows: TokenRows | Sequence[Row],
    per_row: PerRow,
    *,
    batch_size: int = 8,
    pad_token_id: int = 0,
    chunk_tokens: int = CHUNK_TOKENS,
    announce: Announce = silent,
) -> MixedEvaluation:
    """Measure token rows in mixed batches, as `evaluate` does; tell the adapters apart.

    Raises:
        OutOfMemory: even one row does not fit.
        Stopped: a signal came.
    """
    rows = TokenRows.of(rows)
    objective = CAUSAL.objective(base, pad_token_id, chunk_tokens, None)
    sums = _measure(objective, base, rows, batch_size, announce, per_row)
    of_name: dict[str | None, list[int]] = {}
    for row, name in enumerate(per_row.names):
        of_name.setdefault(name, []).append(row)
    by_adapter = {name: sums.of(indices) for name, indices in of_name.items()}
    return MixedEvaluation(sums.of(range(len(rows))), by_adapter)


@dataclass
class _Sums:
    """What was counted of each row; all (rows,), in host memory, fp64.

    Attributes:
        weight: what the other sums are over: supervised tokens.
        loss: summed.
        metrics: sums by name.
        batch_size: rows a batch at the end.
    """

    weight: Tensor
    loss: Tensor
    metrics: dict[str, Tensor]
    batch_size: int

    @classmethod
    def zeros(cls, rows: int, metrics: Sequence[str], batch_size: int) -> _Sums:
        weight, loss, *rest = torch.zeros(2 + len(metrics), rows, dtype=torch.float64)
        return cls(weight, loss, dict(zip(metrics, rest, strict=True)), batch_size)

    def add(self, indices: Sequence[int], found: RowSums) -> None:
        """Take what was measured of some rows; `indices` are theirs among all rows."""
        chosen = torch.tensor(indices)
        self.weight[chosen], self.loss[chosen] = found.weight, found.loss
        for name, values in found.metrics.items():
            self.metrics[name][chosen] = values

    def of(self, rows: Sequence[int]) -> Evaluation:
        """Return the means over some of the rows."""
        chosen = torch.tensor(rows)
        count = int(self.weight[chosen].sum())
        loss = float(self.loss[chosen].sum()) / count
        means = {name: float(sums[chosen].sum()) / count for name, sums in self.metrics.items()}
        return Evaluation(loss, means["token_accuracy"], count, len(rows), self.batch_size)


def _measure(
    objective: Objective,
    base: Base,
    rows: TokenRows,
    batch_size: int,
    announce: Announce,
    per_row: PerRow | None,
) -> _Sums:
    """Run all rows, the model in evaluation mode meanwhile."""
    sums = _Sums.zeros(len(rows), CAUSAL.metrics, batch_size)
    order = _by_length(rows)
    done = 0
    with _in_evaluation(base.model):
        while done < len(order):
            safe_point()
            indices = order[done : done + sums.batch_size]
            batch = objective.batch([rows[i] for i in indices])
            if per_row is not None:
                per_row.choose(indices)
            try:
                sums.add(indices, objective.row_sums(batch, objective.measured(batch)))
                fits = True
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                fits = False
            if not fits:
                # Here the error and the tensors its frames held are gone.
                release_memory(base.hardware.device)
                sums.batch_size = _halved(len(indices), batch.longest)
                announce(
                    Notice(
                        f"out of memory in evaluation: {sums.batch_size} row(s) a batch from here"
                    )
                )
                continue
            done += len(indices)
    return sums


@contextlib.contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _halved(rows: int, tokens: int) -> int:
    if rows == 1:
        raise OutOfMemory(
            f"out of memory in evaluation on one row of {tokens} tokens; expected it to fit; pass "
            "a smaller --max-length or --loss-chunk-tokens, or fewer --bits"
        )
    return math.ceil(rows / 2)


def _by_length(rows: TokenRows) -> list[int]:
    """Order rows so that those of similar length share a batch: padding is work for nothing."""
    lengths = rows.lengths()
    return sorted(range(len(lengths)), key=lambda i: lengths[i])
