"""What the tasks that predict tokens share: the loss of supervised tokens, and sums by row.

Takes the hidden states that predict tokens, and the tokens; returns sums over them, never means. A
task says which states these are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora_kit.layers.head import Head
from qlora_kit.layers.loss import (
    CHUNK_TOKENS,
    ChunkLoss,
    TokenScores,
    chunked_loss_sum,
    cross_entropy_sum,
)
from qlora_kit.model.head import head_of, kept_by_head
from qlora_kit.model.load import Base
from qlora_kit.tasks.task import Figures, Objective, RowSums

# exp() of a larger number is beyond fp64.
_MOST_EXPONENT = 700


class Supervised(NamedTuple):
    """The supervised tokens of a batch, N in number.

    Attributes:
        hidden: the hidden states that predict them, (N, D).
        targets: their ids, (N,), int64.
        weights: factor of the loss of each, (N,), fp32; None where all have 1.
        kept: mask of the inputs that dropout keeps in LoRA on the head, bool (N, D); else None.
    """

    hidden: Tensor
    targets: Tensor
    weights: Tensor | None = None
    kept: Tensor | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, states: Tensor, batch: _Predicts) -> Supervised:
        """Pick the supervised tokens from all states (B, T, D) that a model gives a batch."""
        hidden = states.flatten(0, 1).index_select(0, batch.positions)
        kept = kept_by_head(model, states)
        kept = None if kept is None else kept.index_select(0, batch.positions)
        return cls(hidden, batch.targets, batch.weights, kept)


class _Predicts(Protocol):
    """A batch that says which of its states predict which tokens."""

    @property
    def positions(self) -> Tensor:
        """Numbers of the states among all, (N,)."""

    @property
    def targets(self) -> Tensor:
        """Ids that they predict, (N,)."""

    @property
    def weights(self) -> Tensor | None:
        """Weights of the tokens, (N,)."""


def loss_of(
    tokens: Supervised,
    head: Head,
    loss: ChunkLoss | None,
    chunk_tokens: int = CHUNK_TOKENS,
    losses: Tensor | None = None,
) -> Tensor:
    """Return the loss summed over tokens by their weights, a scalar.

    Args:
        tokens: the supervised tokens of a batch.
        head: formula of the model's logits.
        loss: a custom loss of a chunk of logits and targets; cross-entropy if None. It sums over a
            chunk by itself, so it cannot be weighted.
        chunk_tokens: tokens whose logits exist at one time.
        losses: (N,) fp64, is filled with what each token adds to the sum, without a custom loss.
    """
    hidden, targets, weights, kept = tokens
    head = head.keeping(kept)
    if loss is None:
        return cross_entropy_sum(hidden, targets, head, chunk_tokens, weights, losses)
    assert weights is None, "refused before the first step"
    return chunked_loss_sum(hidden, targets, head, loss, chunk_tokens)


@dataclass(frozen=True)
class TokenObjective:
    """The prediction of tokens on a loaded base; a task adds its batches, loss and scores.

    Attributes:
        base: the loaded base, with or without an adapter.
        pad_token_id: id that fills short rows of a batch; the loss never sees it.
        chunk_tokens: tokens whose logits exist at one time.
        loss: a custom loss of a chunk of logits and targets; cross-entropy if None.
        packs: whether the samples of a batch lie end to end in one row.
        is_weighted: whether tokens of a stand-in have weights.
    """

    base: Base
    pad_token_id: int = 0
    chunk_tokens: int = CHUNK_TOKENS
    loss: ChunkLoss | None = None
    packs: bool = False
    is_weighted: bool = False

    @property
    def head(self) -> Head:
        """The formula of the model's logits, with what is trained of them just now."""
        return head_of(self.base.model)

    def states(self, batch: Any) -> Supervised:
        """Run the model on a batch; return what predicts its supervised tokens, on its device."""
        raise NotImplementedError

    def rows_of(self, batch: Any) -> Tensor:
        """Return the number of the row of each supervised token, (N,), in host memory."""
        raise NotImplementedError

    def weights_of(self, batch: Any) -> Tensor:
        """Return the weight of each supervised token, (N,), fp64, in host memory."""
        if batch.weights is None:
            return torch.ones(batch.units, dtype=torch.float64, device="cpu")
        weights: Tensor = batch.weights.cpu().double()
        return weights

    def loss_sum(self, batch: Any) -> Tensor:
        """See `Objective`."""
        return loss_of(self.states(batch), self.head, self.loss, self.chunk_tokens)

    def loss_by_unit(self, batch: Any) -> tuple[Tensor, Tensor]:
        """See `TellsUnits`; a unit is a supervised token."""
        tokens = self.states(batch)
        losses = torch.empty(len(tokens.targets), dtype=torch.float64, device=tokens.hidden.device)
        return loss_of(tokens, self.head, None, self.chunk_tokens, losses), losses

    def stand_in_weights(self, tokens: int) -> Tensor | None:
        """Return weights of the tokens of a stand-in; None where they have none."""
        return torch.ones(tokens, device="cpu") if self.is_weighted else None

    def row_sums(self, batch: Any, measured: TokenScores) -> RowSums:
        """See `Objective`."""
        row_of, weights = self.rows_of(batch), self.weights_of(batch)

        def summed(values: Tensor) -> Tensor:
            return torch.bincount(row_of, values.double().cpu(), minlength=len(batch.rows))

        correct = {"token_accuracy": summed(measured.is_top.cpu() * weights)}
        loss = -summed(measured.logprobs.cpu() * weights)
        return RowSums(summed(weights), loss, correct, units=summed(torch.ones(len(row_of))))

    def figures(self, outputs: Sequence[Tensor], rows: Sequence[Mapping[str, Any]]) -> Figures:
        """See `Objective`: all that is measured are sums, and no outputs are kept."""
        return {}


def packing(objective: Objective) -> Objective:
    """Return an objective of a task that packs, with batches whose samples lie end to end."""
    assert isinstance(objective, TokenObjective), "its task says that it packs"
    packs: Objective = replace(objective, packs=True)  # type: ignore[assignment]
    return packs


def weighted(objective: Objective) -> Objective:
    """Return the objective of rows whose tokens have weights: its stand-ins have them too."""
    if not isinstance(objective, TokenObjective):
        return objective
    weighs: Objective = replace(objective, is_weighted=True)  # type: ignore[assignment]
    return weighs


def perplexity(loss: float) -> dict[str, tuple[float, str]]:
    """Return the perplexity exp(loss), with its format; it is infinite if exp overflows."""
    return {"perplexity": (math.exp(loss) if loss < _MOST_EXPONENT else math.inf, ".3f")}
