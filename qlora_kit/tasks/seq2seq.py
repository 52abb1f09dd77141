"""Sequence to sequence: a source is read whole, and each token of its target predicted in turn.

Takes a loaded encoder-decoder and batches of sources and targets; returns sums over the tokens of
the targets, never means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora_kit.data.batch import Indices, Row, total_weight, weights_at
from qlora_kit.data.encode import IGNORED, LOSS_WEIGHTS
from qlora_kit.data.source_rows import SourceAsker, SourceRows, source_tokens
from qlora_kit.data.text_rows import SUPERVISED_TOKENS
from qlora_kit.layers.loss import TokenScores, score_tokens
from qlora_kit.model.encoder_decoder import SEQ2SEQ_LM, target_states
from qlora_kit.tasks.task import Task
from qlora_kit.tasks.tokens import Supervised, TokenObjective, perplexity


@dataclass(frozen=True)
class SourceBatch:
    """One micro-batch of sources and targets, each padded on the right to a width of its own.

    The sources get a mask where one of them is padded, because an encoder would see the padding.
    The targets need none: a decoder sees the tokens before it, and no padding is supervised.
    """

    source_ids: Tensor
    """(B, S) int64, in host memory: the embedding copies them to its own device"""
    mask: Tensor | None
    """(B, S) int64, 1 for a token; None where no source is padded"""
    written_ids: Tensor
    """(B, T) int64, the decoder's input: its start token, and the target without its last"""
    positions: Tensor
    """(N,) int64; positions in the flattened targets that are supervised"""
    targets: Tensor
    """(N,) int64; the ids at these positions"""
    lengths: tuple[tuple[int, int], ...]
    """tokens of each source and of its target, without padding"""
    rows: Indices
    """index of the source sample of each row"""
    weights: Tensor | None = None
    """(N,) fp32; the factor of the loss of each of these tokens; None where all are 1"""

    @property
    def tokens(self) -> int:
        """Tokens without padding, of sources and targets."""
        return sum(map(sum, self.lengths))

    @property
    def longest(self) -> int:
        """Tokens of the longest row, its source and its target together."""
        return max(map(sum, self.lengths))

    @property
    def units(self) -> int:
        """Supervised tokens: those of the targets."""
        return len(self.targets)

    @property
    def weight(self) -> float:
        """The sum of their weights: without weights, their number."""
        return total_weight(self.weights, self.units)

    def to(self, device: torch.device | str) -> SourceBatch:
        """Return the batch on another device; its ids stay in host memory, as those of `Batch`."""
        return replace(
            self,
            mask=None if self.mask is None else self.mask.to(device, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            weights=None if self.weights is None else self.weights.to(device, non_blocking=True),
        )


def collate_sources(
    rows: Sequence[Row],
    pad_token_id: int,
    start_token_id: int,
    width: Callable[[int], int] = lambda tokens: tokens,
) -> SourceBatch:
    """Pad the sources of rows, and their targets, on the right.

    Args:
        rows: as `data.source_rows.SourceRows` makes them.
        pad_token_id: fills the ids of both.
        start_token_id: the first token that the decoder is given.
        width: returns S or T, given the tokens of the longest source or target.
    """
    cuts = [source_tokens(row["labels"]) for row in rows]
    sources = [row["input_ids"][:cut] for row, cut in zip(rows, cuts, strict=True)]
    targets = [row["input_ids"][cut:] for row, cut in zip(rows, cuts, strict=True)]
    source_ids = _padded(sources, width(max(map(len, sources))), pad_token_id)
    wide = width(max(map(len, targets)))
    shifted = [[start_token_id, *list(ids)[:-1]] for ids in targets]
    lengths = torch.tensor([len(ids) for ids in sources]).unsqueeze(1)
    is_padded = int(lengths.min()) < source_ids.shape[1]
    mask = (torch.arange(source_ids.shape[1]) < lengths).long() if is_padded else None
    labels = _padded(targets, wide, IGNORED).flatten()
    positions = (labels != IGNORED).nonzero().squeeze(1)
    written = [_weights_of_target(row, cut) for row, cut in zip(rows, cuts, strict=True)]
    return SourceBatch(
        source_ids,
        mask,
        _padded(shifted, wide, pad_token_id),
        positions,
        labels.index_select(0, positions),
        tuple((len(one), len(other)) for one, other in zip(sources, targets, strict=True)),
        tuple(int(row["row"]) for row in rows),
        weights_at(positions, written, range(0, labels.numel(), wide), labels.numel()),
    )


def _weights_of_target(row: Row, cut: int) -> Row:
    """Return the weights that a row has behind its source."""
    weights = row.get(LOSS_WEIGHTS)
    return {LOSS_WEIGHTS: None if weights is None else weights[cut:]}


def _padded(rows: Sequence[Sequence[int]], width: int, fill: int) -> Tensor:
    """Return rows of ids as one tensor (B, width), padded on the right."""
    padded = torch.full((len(rows), width), fill, dtype=torch.int64)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = torch.as_tensor(row, dtype=torch.int64)
    return padded


def supervised_states(model: PreTrainedModel, batch: SourceBatch) -> Supervised:
    """Run both halves on a batch, and pick the hidden states that predict a token of a target.

    Args:
        model: with or without LoRA.
        batch: on the model's device.
    """
    hidden = target_states(model, batch.source_ids, batch.mask, batch.written_ids)
    return Supervised.of(model, hidden, batch)


class Seq2SeqObjective(TokenObjective):
    """Sequence to sequence on a loaded base."""

    def batch(self, rows: Sequence[Mapping[str, Any]]) -> SourceBatch:
        """See `Objective`; both sides are padded to widths that suit the device."""
        start = self.base.model.config.decoder_start_token_id
        return collate_sources(rows, self.pad_token_id, start, self.base.batch_width)

    def stand_in(
        self, rows: int, tokens: int, weight: int | None = None, answer_tokens: int | None = None
    ) -> SourceBatch:
        """See `Objective`; sources are as padded as they can be, which takes the most."""
        answer_tokens = tokens if answer_tokens is None else answer_tokens
        source, written = (
            torch.zeros(rows, self.base.batch_width(wide), dtype=torch.int64, device="cpu")
            for wide in (tokens, answer_tokens)
        )
        mask = torch.ones_like(source) if rows > 1 or source.shape[1] > tokens else None
        count = weight or rows * answer_tokens
        chosen = torch.zeros(count, dtype=torch.int64, device="cpu")
        lengths = ((tokens, answer_tokens),) * rows
        weights = self.stand_in_weights(count)
        sources = tuple(range(rows))
        return SourceBatch(source, mask, written, chosen, chosen, lengths, sources, weights)

    def states(self, batch: SourceBatch) -> Supervised:
        """See `TokenObjective`."""
        return supervised_states(self.base.model, batch.to(self.base.hardware.device))

    @torch.no_grad()
    def measured(self, batch: SourceBatch) -> TokenScores:
        """See `Objective`."""
        tokens = self.states(batch)
        head = self.head.keeping(tokens.kept)
        return score_tokens(tokens.hidden, tokens.targets, head, self.chunk_tokens)

    def rows_of(self, batch: SourceBatch) -> Tensor:
        """See `TokenObjective`."""
        return batch.positions.cpu() // batch.written_ids.shape[1]


SEQ2SEQ = Task(
    name="seq2seq",
    loads=SEQ2SEQ_LM,
    peft_type="SEQ_2_SEQ_LM",
    makes=SourceRows,
    weighs=SUPERVISED_TOKENS,
    unit="nats per token",
    metrics={"token_accuracy": ".2%"},
    of_loss=perplexity,
    generates=True,
    objective=Seq2SeqObjective,
    asks=SourceAsker,
    has_sources=True,
    tells_units=True,
)
