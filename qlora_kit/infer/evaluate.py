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

from qlora_kit.data.batch import Batch, Row, TokenRows, collate
from qlora_kit.errors import OutOfMemory
from qlora_kit.events import Announce, Notice, silent
from qlora_kit.layers.loss import CHUNK_TOKENS, TokenScores
from qlora_kit.lora.several import PerRow
from qlora_kit.model.head import head_of
from qlora_kit.model.load import Base
from qlora_kit.model.memory import is_out_of_memory, release_memory
from qlora_kit.signals import safe_point
from qlora_kit.step.forward import scores


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
    sums = _measure(base, rows, batch_size, pad_token_id, chunk_tokens, announce, per_row)
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
    sums = _measure(base, rows, batch_size, pad_token_id, chunk_tokens, announce, per_row)
    of_name: dict[str | None, list[int]] = {}
    for row, name in enumerate(per_row.names):
        of_name.setdefault(name, []).append(row)
    by_adapter = {name: sums.of(indices) for name, indices in of_name.items()}
    return MixedEvaluation(sums.of(range(len(rows))), by_adapter)


@dataclass
class _Sums:
    """What was counted of each row; all (rows,), in host memory, fp64.

    Attributes:
        logprobs: sum over the supervised tokens.
        correct: supervised tokens that are the most likely one.
        tokens: supervised tokens.
        batch_size: rows a batch at the end.
    """

    logprobs: Tensor
    correct: Tensor
    tokens: Tensor
    batch_size: int

    def add(self, indices: Sequence[int], batch: Batch, scored: TokenScores) -> None:
        """Count the rows of a batch; `indices` are theirs among all rows."""
        row_of = batch.positions.cpu() // batch.input_ids.shape[1]
        chosen = torch.tensor(indices)
        ones = torch.ones(len(row_of))
        for sums, values in (
            (self.logprobs, scored.logprobs), (self.correct, scored.is_top), (self.tokens, ones),
        ):  # fmt: skip
            weights = values.double().cpu()
            sums[chosen] = torch.bincount(row_of, weights, minlength=len(indices))

    def of(self, rows: Sequence[int]) -> Evaluation:
        """Return the means over some of the rows."""
        chosen = torch.tensor(rows)
        count = int(self.tokens[chosen].sum())
        loss = -float(self.logprobs[chosen].sum()) / count
        accuracy = float(self.correct[chosen].sum()) / count
        return Evaluation(loss, accuracy, count, len(rows), self.batch_size)


def _measure(
    base: Base,
    rows: TokenRows,
    batch_size: int,
    pad_token_id: int,
    chunk_tokens: int,
    announce: Announce,
    per_row: PerRow | None,
) -> _Sums:
    """Run all rows, the model in evaluation mode meanwhile."""
    head, device = head_of(base.model), base.hardware.device
    logprobs, correct, tokens = torch.zeros(3, len(rows), dtype=torch.float64)
    sums = _Sums(logprobs, correct, tokens, batch_size)
    order = _by_length(rows)
    done = 0
    with _in_evaluation(base.model):
        while done < len(order):
            safe_point()
            indices = order[done : done + sums.batch_size]
            batch = collate([rows[i] for i in indices], pad_token_id, base.batch_width)
            if per_row is not None:
                per_row.choose(indices)
            try:
                sums.add(indices, batch, scores(base.model, batch.to(device), head, chunk_tokens))
                fits = True
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                fits = False
            if not fits:
                # Here the error and the tensors its frames held are gone.
                release_memory(device)
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
