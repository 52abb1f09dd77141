"""Causal language modelling: each supervised token is predicted from the tokens before it.

Takes a loaded model (with or without LoRA) and a batch; returns sums over supervised tokens, never
means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora_kit.data.batch import Batch, PackedBatch, collate, collate_packed
from qlora_kit.data.text_rows import SUPERVISED_TOKENS, TextRows
from qlora_kit.layers.head import Head
from qlora_kit.layers.loss import CHUNK_TOKENS, ChunkLoss, TokenScores, score_tokens
from qlora_kit.lora.spec import TASK_TYPE
from qlora_kit.model.architecture import CAUSAL_LM
from qlora_kit.model.segments import run_in_segments
from qlora_kit.tasks.task import Task
from qlora_kit.tasks.tokens import Supervised, TokenObjective, loss_of, perplexity


def supervised_states(model: PreTrainedModel, batch: Batch) -> Supervised:
    """Run the layers on a batch, and pick the hidden states that predict a supervised token.

    The state at position t predicts the label at t + 1. Other states never reach the head, which
    does the larger part of the work of a small model.

    Args:
        model: with or without LoRA.
        batch: on the model's device.
    """
    # There is no mask: it would keep attention from its fast kernels, and a `Batch` needs none.
    inputs = {"input_ids": batch.input_ids, "attention_mask": None, "use_cache": False}
    if isinstance(batch, PackedBatch):
        outputs = run_in_segments(model, batch.segments, **inputs)
    else:
        outputs = model.base_model(**inputs)
    return Supervised.of(model, outputs.last_hidden_state, batch)


def loss_sum(
    model: PreTrainedModel,
    batch: Batch,
    head: Head,
    *,
    loss: ChunkLoss | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """Return the loss of a batch, summed over its supervised tokens by their weights: a scalar.

    Args:
        model: with or without LoRA.
        batch: on the model's device.
        head: formula of the model's logits.
        loss: a custom loss of a chunk of logits and targets; cross-entropy if None.
        chunk_tokens: tokens whose logits exist at one time.
    """
    return loss_of(supervised_states(model, batch), head, loss, chunk_tokens)


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
    states = supervised_states(model, batch)
    return score_tokens(states.hidden, states.targets, head.keeping(states.kept), chunk_tokens)


class CausalObjective(TokenObjective):
    """Causal language modelling on a loaded base."""

    def batch(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """See `Objective`; the batch is padded to a width that suits the device."""
        lay = collate_packed if self.packs else collate
        return lay(rows, self.pad_token_id, self.base.batch_width)

    def stand_in(
        self, rows: int, tokens: int, weight: int | None = None, answer_tokens: int | None = None
    ) -> Batch:
        """See `Objective`; all ids are 0, and all but the first of each row can be targets."""
        count = weight or rows * (tokens - 1)
        positions = torch.zeros(count, dtype=torch.int64, device="cpu")
        weights = self.stand_in_weights(count)
        lengths, sources = (tokens,) * rows, tuple(range(rows))
        if self.packs:
            total = self.base.batch_width(rows * tokens)
            ids = torch.zeros(1, total, dtype=torch.int64, device="cpu")
            segments = (*lengths[:-1], total - tokens * (rows - 1))
            return PackedBatch(ids, ids, lengths, sources, positions, segments, weights=weights)
        ids = torch.zeros(rows, self.base.batch_width(tokens), dtype=torch.int64, device="cpu")
        return Batch(ids, ids, lengths, sources, positions, weights=weights)

    def states(self, batch: Batch) -> Supervised:
        """See `TokenObjective`."""
        return supervised_states(self.base.model, batch.to(self.base.hardware.device))

    def measured(self, batch: Batch) -> TokenScores:
        """See `Objective`."""
        where = batch.to(self.base.hardware.device)
        return scores(self.base.model, where, self.head, self.chunk_tokens)

    def rows_of(self, batch: Batch) -> Tensor:
        """See `TokenObjective`."""
        if isinstance(batch, PackedBatch):
            return batch.place_of_sample
        return batch.positions.cpu() // batch.input_ids.shape[1]


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
    packs=True,
    tells_units=True,
)
