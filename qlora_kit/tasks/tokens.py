"""What the tasks that predict tokens share: the loss of supervised tokens, and sums by row.

Takes the hidden states that predict tokens, and the tokens; returns sums over them, never means. A
task says which states these are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_kit.layers.head import Head
from qlora_kit.layers.loss import (
    CHUNK_TOKENS,
    ChunkLoss,
    TokenScores,
    chunked_loss_sum,
    cross_entropy_sum,
)
from qlora_kit.model.head import head_of
from qlora_kit.model.load import Base
from qlora_kit.tasks.task import Figures, Objective, RowSums

# exp() of a larger number is beyond fp64.
_MOST_EXPONENT = 700


class Supervised(NamedTuple):
    """The supervised tokens of a batch, N in number.

    Attributes:
        hidden: the hidden states that predict them, (N, D).
        targets: their ids, (N,), int64.
    """

    hidden: Tensor
    targets: Tensor


def loss_of(
    tokens: Supervised, head: Head, loss: ChunkLoss | None, chunk_tokens: int = CHUNK_TOKENS
) -> Tensor:
    """Return the loss summed over tokens, a scalar.

    Args:
        tokens: the supervised tokens of a batch.
        head: formula of the model's logits.
        loss: a custom loss of a chunk of logits and targets; cross-entropy if None.
        chunk_tokens: tokens whose logits exist at one time.
    """
    if loss is None:
        return cross_entropy_sum(*tokens, head, chunk_tokens)
    return chunked_loss_sum(*tokens, head, loss, chunk_tokens)


@dataclass(frozen=True)
class TokenObjective:
    """The prediction of tokens on a loaded base; a task adds its batches, loss and scores.

    Attributes:
        base: the loaded base, with or without an adapter.
        pad_token_id: id that fills short rows of a batch; the loss never sees it.
        chunk_tokens: tokens whose logits exist at one time.
        loss: a custom loss of a chunk of logits and targets; cross-entropy if None.
        packs: whether the samples of a batch lie end to end in one row.
    """

    base: Base
    pad_token_id: int = 0
    chunk_tokens: int = CHUNK_TOKENS
    loss: ChunkLoss | None = None
    packs: bool = False

    @cached_property
    def head(self) -> Head:
        """The formula of the model's logits."""
        return head_of(self.base.model)

    def rows_of(self, batch: Any) -> Tensor:
        """Return the number of the row of each supervised token, (N,), in host memory."""
        raise NotImplementedError

    def row_sums(self, batch: Any, measured: TokenScores) -> RowSums:
        """See `Objective`."""
        row_of = self.rows_of(batch)

        def summed(values: Tensor) -> Tensor:
            return torch.bincount(row_of, values.double().cpu(), minlength=len(batch.rows))

        weight = summed(torch.ones(len(row_of)))
        correct = {"token_accuracy": summed(measured.is_top)}
        return RowSums(weight, -summed(measured.logprobs), correct)

    def figures(self, outputs: Sequence[Tensor], rows: Sequence[Mapping[str, Any]]) -> Figures:
        """See `Objective`: all that is measured are sums, and no outputs are kept."""
        return {}


def packing(objective: Objective) -> Objective:
    """Return an objective of a task that packs, with batches whose samples lie end to end."""
    assert isinstance(objective, TokenObjective), "its task says that it packs"
    packs: Objective = replace(objective, packs=True)  # type: ignore[assignment]
    return packs


def perplexity(loss: float) -> dict[str, tuple[float, str]]:
    """Return the perplexity exp(loss), with its format; it is infinite if exp overflows."""
    return {"perplexity": (math.exp(loss) if loss < _MOST_EXPONENT else math.inf, ".3f")}
