"""Measure a model on token rows: loss, perplexity, share of tokens it would have chosen.

Takes a loaded model, with or without an adapter; returns an `Evaluation`. No logits matrix
exists, as in training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qlora_kit.data.batch import collate, row_lengths
from qlora_kit.errors import OutOfMemory
from qlora_kit.events import Announce, Notice, silent
from qlora_kit.model.head import head_of
from qlora_kit.model.load import Base
from qlora_kit.model.memory import is_out_of_memory, release_memory
from qlora_kit.signals import safe_point
from qlora_kit.step.forward import scores
from qlora_kit.step.loss import CHUNK_TOKENS


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


@torch.no_grad()
def evaluate(
    base: Base,
    rows: Sequence[dict[str, Any]],
    *,
    batch_size: int = 8,
    pad_token_id: int = 0,
    chunk_tokens: int = CHUNK_TOKENS,
    announce: Announce = silent,
) -> Evaluation:
    """Measure `base`, with the adapter it may carry, on token rows.

    The model is put in evaluation mode and left in the mode it was in. Where memory runs out
    the batch is halved, for the rest of the rows.

    Raises:
        OutOfMemory: even one row does not fit.
        Stopped: a signal came.
    """
    model = base.model
    was_training = model.training
    model.eval()
    try:
        return _measure(base, rows, batch_size, pad_token_id, chunk_tokens, announce)
    finally:
        model.train(was_training)


def _measure(
    base: Base,
    rows: Sequence[dict[str, Any]],
    batch_size: int,
    pad_token_id: int,
    chunk_tokens: int,
    announce: Announce,
) -> Evaluation:
    head, device = head_of(base.model), base.hardware.device
    total, correct, count = 0.0, 0, 0
    order = _by_length(rows)
    done = 0
    while done < len(order):
        safe_point()
        indices = order[done : done + batch_size]
        batch = collate([rows[i] for i in indices], pad_token_id)
        try:
            scored = scores(base.model, batch.to(device), head, chunk_tokens)
            sums = float(scored.logprobs.double().sum()), int(scored.is_top.sum())
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            sums = None
        if sums is None:
            # Here the error and the tensors its frames held are gone.
            release_memory(device)
            batch_size = _halved(len(indices), batch.input_ids.shape[1])
            announce(Notice(f"out of memory in evaluation: {batch_size} row(s) a batch from here"))
            continue
        total, correct = total - sums[0], correct + sums[1]
        count += batch.supervised_tokens
        done += len(indices)
    return Evaluation(total / count, correct / count, count, len(rows), batch_size)


def _halved(rows: int, tokens: int) -> int:
    if rows == 1:
        raise OutOfMemory(
            f"out of memory in evaluation on one row of {tokens} tokens; expected it to fit; pass "
            "a smaller --max-length or --loss-chunk-tokens, or fewer --bits"
        )
    return math.ceil(rows / 2)


def _by_length(rows: Sequence[dict[str, Any]]) -> list[int]:
    """Order rows so that those of similar length share a batch: padding is work for nothing."""
    lengths = row_lengths(rows)
    return sorted(range(len(lengths)), key=lambda i: lengths[i])
