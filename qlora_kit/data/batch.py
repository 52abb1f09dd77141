"""Groups token rows into padded micro-batches, and micro-batches into optimiser steps.

Takes rows with `input_ids`, `labels` and `row`; returns index lists and `Batch`es. The order
is a function of seed and epoch alone; never drops or repeats a row.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from qlora_kit.data.encode import IGNORED

# Rows are sorted by length within so many batches: padding shrinks, order stays random.
_SORTED_BATCHES = 50

Indices = tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """One micro-batch, padded on the right.

    It needs no attention mask: a token of a causal model sees what is before it, never the padding
    behind, and no padding is supervised.
    """

    input_ids: torch.Tensor
    """(B, T) int64, in host memory: the embedding fetches them to where it is"""
    labels: torch.Tensor
    """(B, T) int64; the id at the same position, or -100; the loss shifts them by one"""
    lengths: tuple[int, ...]
    """(B,) tokens of each row, without padding"""
    rows: Indices
    """index of the source sample of each row"""
    positions: torch.Tensor
    """(N,) int64; where in the flattened batch a token is followed by a supervised one"""

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest row; the batch may be wider."""
        return max(self.lengths)

    @property
    def weight(self) -> int:
        """Supervised tokens: labels that are targets after the shift."""
        return len(self.positions)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on another device, but for its ids.

        Of an embedding in host memory the device would have to be waited for to give them back.
        """
        return replace(
            self,
            labels=self.labels.to(device, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
        )


def collate(
    rows: Sequence[Mapping[str, Any]],
    pad_token_id: int,
    width: Callable[[int], int] | None = None,
) -> Batch:
    """Pad rows on the right to the longest of them, or further.

    Args:
        rows: with `input_ids`, `labels` and `row`, as `Tokenized.rows` has them.
        pad_token_id: what fills `input_ids`; no token sees it, so it may be the EOS.
        width: returns T for the tokens of the longest row, as `Base.batch_width` does; these
            tokens themselves if None.
    """
    lengths = tuple(len(row["input_ids"]) for row in rows)
    longest = max(lengths)
    shape = (len(rows), longest if width is None else width(longest))
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        input_ids[index, :length] = torch.as_tensor(row["input_ids"], dtype=torch.int64)
        labels[index, :length] = torch.as_tensor(row["labels"], dtype=torch.int64)
    sources = tuple(int(row["row"]) for row in rows)
    return Batch(input_ids, labels, lengths, sources, predicting_positions(labels))


def predicting_positions(labels: torch.Tensor) -> torch.Tensor:
    """Return where in the flattened labels (B, T) a token is followed by a supervised one.

    Found on the CPU: a device would have to be waited for to know how many there are.
    """
    predicts = torch.zeros(labels.shape, dtype=torch.bool)
    predicts[:, :-1] = labels[:, 1:] != IGNORED
    return predicts.flatten().nonzero().squeeze(1)


def row_lengths(rows: Any) -> list[int]:
    """Return the number of tokens of each row, of a `datasets.Dataset` or a sequence of rows."""
    if hasattr(rows, "with_format"):
        import pyarrow.compute

        column = rows.select_columns("input_ids").with_format("arrow")[:]["input_ids"]
        lengths: list[int] = pyarrow.compute.list_value_length(column).to_pylist()
        return lengths
    return [len(row["input_ids"]) for row in rows]


def largest_batch(lengths: Sequence[int], count: int) -> Indices:
    """Return the indices of so many rows, given the tokens of all, that take the most memory."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return tuple(order[:count])


def largest_token(rows: Any) -> int:
    """Return the largest token id of a `datasets.Dataset` or a sequence of rows."""
    if hasattr(rows, "with_format"):
        import pyarrow.compute

        column = rows.select_columns("input_ids").with_format("arrow")[:]["input_ids"]
        largest: int = pyarrow.compute.max(pyarrow.compute.list_flatten(column)).as_py()
        return largest
    return max(int(token) for row in rows for token in row["input_ids"])


def epoch_batches(tokenized_rows: Any, batch_size: int, seed: int, epoch: int) -> list[Indices]:
    """Return the row indices of each micro-batch of an epoch; every row once.

    Rows are shuffled by (seed, epoch), sorted by length within windows of 50 batches, and the
    batches are shuffled again.

    Args:
        tokenized_rows: `Tokenized.rows`, or any sequence of rows with `input_ids`.
        batch_size: rows a micro-batch; one batch of the epoch may have fewer.
        seed: of the run.
        epoch: counted from 0.
    """
    source = random.Random(f"order {seed} {epoch}")
    order = list(range(len(tokenized_rows)))
    source.shuffle(order)
    if batch_size == 1:
        return [(index,) for index in order]
    lengths = row_lengths(tokenized_rows)
    window = batch_size * _SORTED_BATCHES
    batches: list[Indices] = []
    for start in range(0, len(order), window):
        near = sorted(order[start : start + window], key=lengths.__getitem__)
        batches += [tuple(near[i : i + batch_size]) for i in range(0, len(near), batch_size)]
    source.shuffle(batches)
    return batches


def plan_windows(batches: Sequence[Indices], accumulation: int) -> list[tuple[Indices, ...]]:
    """Group micro-batches into optimiser steps; the last may have fewer.

    Args:
        batches: the micro-batches of an epoch, in order.
        accumulation: micro-batches an optimiser step.
    """
    starts = range(0, len(batches), accumulation)
    return [tuple(batches[start : start + accumulation]) for start in starts]
