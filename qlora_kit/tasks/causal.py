"""Causal language modelling: each supervised token is predicted from the tokens before it.

Takes a loaded model (with or without LoRA) and a batch; returns sums over supervised tokens, never
means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora_kit.data.batch import Batch, collate
from qlora_kit.data.text_rows import SUPERVISED_TOKENS, TextRows
from qlora_kit.layers.head import Head
from qlora_kit.layers.loss import (
    CHUNK_TOKENS,
    ChunkLoss,
    TokenScores,
    chunked_loss_sum,
    cross_entropy_sum,
    score_tokens,
)
from qlora_kit.lora.attach import TASK_TYPE
from qlora_kit.model.architecture import CAUSAL_LM
from qlora_kit.model.head import head_of
from qlora_kit.model.load import Base
from qlora_kit.tasks.task import Figures, RowSums, Task

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


def supervised_states(model: PreTrainedModel, batch: Batch) -> Supervised:
    """Run the layers on a batch, and pick the hidden states that predict a supervised token.

    The state at position t predicts the label at t + 1. Other states never reach the head, which
    does the larger part of the work of a small model.

    Args:
        model: with or without LoRA.
        batch: on the model's device.
    """
    # There is no mask: it would keep attention from its fast kernels, and a `Batch` needs none.
    outputs = model.base_model(input_ids=batch.input_ids, attention_mask=None, use_cache=False)
    hidden = outputs.last_hidden_state.flatten(0, 1).index_select(0, batch.positions)
    return Supervised(hidden, batch.targets)


def loss_sum(
    model: PreTrainedModel,
    batch: Batch,
    head: Head,
    *,
    loss: ChunkLoss | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """Return the loss of a batch, summed over its supervised tokens: a scalar.

    Args:
        model: with or without LoRA.
        batch: on the model's device.
        head: formula of the model's logits.
        loss: a custom loss of a chunk of logits and targets; cross-entropy if None.
        chunk_tokens: tokens whose logits exist at one time.
    """
    hidden, targets = supervised_states(model, batch)
    if loss is None:
        return cross_entropy_sum(hidden, targets, head, chunk_tokens)
    return chunked_loss_sum(hidden, targets, head, loss, chunk_tokens)


@torch.no_grad()
def scores(
    model: PreTrainedModel, batch: Batch, head: Head, chunk_tokens: int = CHUNK_TOKENS
) -> TokenScores:
    """Return log p of every supervised token of a batch, and whether it is the most likely one.

    Args:
        model: with or without LoRA.
        batch: on the model's device.
        head: formula of the model's logits.
        chunk_tokens: tokens whose logits exist at one time.
    """
    hidden, targets = supervised_states(model, batch)
    return score_tokens(hidden, targets, head, chunk_tokens)


@dataclass(frozen=True)
class CausalObjective:
    """Causal language modelling on a loaded base.

    Attributes:
        base: the loaded base, with or without an adapter.
        pad_token_id: id that fills short rows of a batch; the loss never sees it.
        chunk_tokens: tokens whose logits exist at one time.
        loss: a custom loss of a chunk of logits and targets; cross-entropy if None.
    """

    base: Base
    pad_token_id: int = 0
    chunk_tokens: int = CHUNK_TOKENS
    loss: ChunkLoss | None = None

    @cached_property
    def head(self) -> Head:
        """The formula of the model's logits."""
        return head_of(self.base.model)

    def batch(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """See `Objective`; the batch is padded to a width that suits the device."""
        return collate(rows, self.pad_token_id, self.base.batch_width)

    def stand_in(
        self, rows: int, tokens: int, weight: int | None = None, answer_tokens: int | None = None
    ) -> Batch:
        """See `Objective`; all ids are 0, and all but the first of each row can be targets."""
        ids = torch.zeros(rows, self.base.batch_width(tokens), dtype=torch.int64, device="cpu")
        count = weight or rows * (tokens - 1)
        positions = torch.zeros(count, dtype=torch.int64, device="cpu")
        return Batch(ids, ids, (tokens,) * rows, tuple(range(rows)), positions)

    def loss_sum(self, batch: Batch) -> Tensor:
        """See `Objective`."""
        where = batch.to(self.base.hardware.device)
        return loss_sum(
            self.base.model, where, self.head, loss=self.loss, chunk_tokens=self.chunk_tokens
        )

    def measured(self, batch: Batch) -> TokenScores:
        """See `Objective`."""
        where = batch.to(self.base.hardware.device)
        return scores(self.base.model, where, self.head, self.chunk_tokens)

    def row_sums(self, batch: Batch, measured: TokenScores) -> RowSums:
        """See `Objective`."""
        row_of = batch.positions.cpu() // batch.input_ids.shape[1]

        def summed(values: Tensor) -> Tensor:
            return torch.bincount(row_of, values.double().cpu(), minlength=len(batch.rows))

        weight = summed(torch.ones(len(row_of)))
        correct = {"token_accuracy": summed(measured.is_top)}
        return RowSums(weight, -summed(measured.logprobs), correct)

    def figures(self, outputs: Sequence[Tensor], rows: Sequence[Mapping[str, Any]]) -> Figures:
        """See `Objective`: all that is measured are sums, and no outputs are kept."""
        return {}


def perplexity(loss: float) -> dict[str, tuple[float, str]]:
    """Return the perplexity exp(loss), with its format; it is infinite if exp overflows."""
    return {"perplexity": (math.exp(loss) if loss < _MOST_EXPONENT else math.inf, ".3f")}


CAUSAL = Task(
    name="causal",
    loads=CAUSAL_LM,
    peft_type=TASK_TYPE,
    makes=TextRows,
    weighs=SUPERVISED_TOKENS,
    unit="nats per token",
    metrics={"token_accuracy": ".2%"},
    of_loss=perplexity,
    generates=True,
    objective=CausalObjective,
)
