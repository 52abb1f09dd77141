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
from qlora_kit.model.head import head_of
from qlora_kit.model.load import Base
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
    """

    loss: float
    token_accuracy: float
    supervised_tokens: int
    rows: int

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
) -> Evaluation:
    """Measure `base`, with the adapter it may carry, on token rows.

    The model is put in evaluation mode and left in the mode it was in.
    """
    model, head = base.model, head_of(base.model)
    was_training = model.training
    model.eval()
    total, correct, count = 0.0, 0, 0
    for indices in _by_length(rows, batch_size):
        batch = collate([rows[i] for i in indices], pad_token_id).to(base.hardware.device)
        scored = scores(model, batch, head, chunk_tokens)
        total -= float(scored.logprobs.double().sum())
        correct += int(scored.is_top.sum())
        count += len(scored.logprobs)
    model.train(was_training)
    return Evaluation(total / count, correct / count, count, len(rows))


def _by_length(rows: Sequence[dict[str, Any]], batch_size: int) -> list[list[int]]:
    """Batch rows of similar length: padding is computed for nothing."""
    lengths = row_lengths(rows)
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
