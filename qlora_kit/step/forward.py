"""From a batch to the loss of its supervised tokens.

Takes a loaded model (with or without LoRA) and a batch; returns sums, never means: who calls
knows how many tokens the whole optimiser step has.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora_kit.data.batch import Batch
from qlora_kit.layers.head import Head
from qlora_kit.layers.loss import (
    CHUNK_TOKENS,
    ChunkLoss,
    TokenScores,
    chunked_loss_sum,
    cross_entropy_sum,
    score_tokens,
)


class Supervised(NamedTuple):
    """Hidden states and targets of the supervised tokens only: (N, D) and (N,)."""

    hidden: Tensor
    targets: Tensor


def supervised_states(model: PreTrainedModel, batch: Batch) -> Supervised:
    """Run the layers on a batch and pick the states that predict a supervised token.

    The state at position t predicts the label at t + 1. Tokens without a label never reach
    the head, which is the larger part of the work of a small model.
    """
    # No mask: it would keep attention from its fast kernels, and `Batch` needs none.
    outputs = model.base_model(input_ids=batch.input_ids, attention_mask=None, use_cache=False)
    hidden = outputs.last_hidden_state.flatten(0, 1).index_select(0, batch.positions)
    return Supervised(hidden, batch.labels.flatten().index_select(0, batch.positions + 1))


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
        head: formula of its logits.
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
    """Return log p and top-1 agreement of every supervised token of a batch."""
    hidden, targets = supervised_states(model, batch)
    return score_tokens(hidden, targets, head, chunk_tokens)
