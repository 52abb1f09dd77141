"""Token rows, and how they are grouped into padded micro-batches and optimiser steps.

Takes `TokenRows`; returns index lists and `Batch`es. The order depends on seed and epoch alone.
Never drops or repeats a row.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
import xxhash

from qlora_kit.data.encode import CHOSEN_TOKENS, IGNORED, LOSS_WEIGHTS

if TYPE_CHECKING:
    import datasets
    import pyarrow

    from qlora_kit.data.mixing import Mixture

# Rows are sorted by length within windows of this many batches: padding shrinks, and the order
# stays random.
_SORTED_BATCHES = 50

Indices = tuple[int, ...]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class NamedSources:
    """The sources of rows, which lie one source after another.

    Attributes:
        names: a short name of each.
        ends: the index behind the last row of each.
    """

    names: tuple[str, ...]
    ends: tuple[int, ...]


class TokenRows:
    """Token rows by their index, kept in any sequence.

    Args:
        rows: each has `input_ids`, `labels` (the id at the same position, or -100; of a row that
            is classified, see `Labels.target`) and `row`, the index of its source sample. It may
            have `loss_weights`, the factor of each token's loss, or None where all have 1. A row of
            two sequences, one behind the other, has `chosen_tokens`, the tokens of the first.
        mixture: how the rows of several sources make up an epoch; None: every row comes once.
        sources: the sources of the rows, where there are several.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        mixture: Mixture | None = None,
        sources: NamedSources | None = None,
    ) -> None:
        self._rows = rows
        self.mixture = mixture
        self.source_names = sources.names if sources else ()
        self._ends = sources.ends if sources else ()

    @staticmethod
    def of(rows: TokenRows | Sequence[Row]) -> TokenRows:
        """Return as `TokenRows` whatever a user of the API has: those, a list, or a `Dataset`."""
        if isinstance(rows, TokenRows):
            return rows
        if isinstance(rows, Sequence):
            return TokenRows(rows)
        import datasets

        return TokenTable(rows) if isinstance(rows, datasets.Dataset) else TokenRows(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        row: Row = self._rows[index]
        return row

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    @property
    def rows_an_epoch(self) -> int:
        """Number of rows that an epoch has."""
        return len(self) if self.mixture is None else self.mixture.rows

    def source_of(self, index: int) -> int:
        """Return the number of the source that a row is of; 0 where there is one."""
        return bisect_right(self._ends, index)

    def lengths(self) -> list[int]:
        """Return the number of tokens of each row; of two sequences, of the longer."""
        return [_longest(row) for row in self]

    def all_tokens(self) -> list[int]:
        """Return the number of tokens of each row; of two sequences, of both."""
        return [len(row["input_ids"]) for row in self]

    def tokens_of(self, index: int) -> int:
        """Return the number of tokens of a row; of two sequences, of the longer."""
        return _longest(self[index])

    def source_lengths(self) -> list[tuple[int, int]]:
        """Return the tokens of each row's source and of its target, which alone is supervised."""
        targets = [sum(label != IGNORED for label in row["labels"]) for row in self]
        return [(all_ - own, own) for all_, own in zip(self.lengths(), targets, strict=True)]

    def largest_token(self) -> int:
        """Return the largest token id of all rows."""
        return max(int(token) for row in self for token in row["input_ids"])

    def absent(self, tokens: Sequence[int]) -> list[int]:
        """Return which of some token ids are in no row."""
        found = {int(token) for row in self for token in row["input_ids"]}
        return [token for token in tokens if token not in found]

    @property
    def is_weighted(self) -> bool:
        """Whether tokens of some row count more or less than others in a loss."""
        return any(row.get(LOSS_WEIGHTS) is not None for row in self)


class TokenTable(TokenRows):
    """Token rows in a table of `datasets`; its columns are read without building any row.

    Args:
        table: has one more column, `uncut_tokens`: the tokens of the row before `max_length` cut
            it.
        mixture, sources: see `TokenRows`.
    """

    def __init__(
        self,
        table: datasets.Dataset,
        mixture: Mixture | None = None,
        sources: NamedSources | None = None,
    ) -> None:
        super().__init__(table, mixture, sources)
        self.table = table

    def __getitem__(self, index: int | str) -> Any:
        """Return a row by its index, or a column by its name."""
        return self.table[index]

    def select(self, indices: Iterable[int]) -> TokenTable:
        """Return some of the rows."""
        return TokenTable(self.table.select(indices))

    def lengths(self) -> list[int]:
        """Return the number of tokens of each row; of two sequences, of the longer."""
        lengths = self.all_tokens()
        if CHOSEN_TOKENS in self.table.column_names:
            chosen = self.column(CHOSEN_TOKENS).to_pylist()
            return [max(own, tokens - own) for own, tokens in zip(chosen, lengths, strict=True)]
        return lengths

    def all_tokens(self) -> list[int]:
        """Return the number of tokens of each row; of two sequences, of both."""
        import pyarrow.compute

        lengths: list[int] = pyarrow.compute.list_value_length(self.column("input_ids")).to_pylist()
        return lengths

    def tokens_of(self, index: int) -> int:
        """Return the number of tokens of a row; of two sequences, of the longer."""
        return self._lengths[index]

    @cached_property
    def _lengths(self) -> list[int]:
        return self.lengths()

    def source_lengths(self) -> list[tuple[int, int]]:
        """Return the tokens of each row's source and of its target, which alone is supervised."""
        import numpy

        labels = self.column("labels").combine_chunks()
        before = numpy.cumsum(labels.flatten().to_numpy() != IGNORED)
        ends = numpy.concatenate(([0], before))[first_tokens(labels)]
        targets = numpy.diff(ends).tolist()
        return [(all_ - own, own) for all_, own in zip(self.lengths(), targets, strict=True)]

    def largest_token(self) -> int:
        """Return the largest token id of all rows."""
        import pyarrow.compute

        tokens = pyarrow.compute.list_flatten(self.column("input_ids"))
        largest: int = pyarrow.compute.max(tokens).as_py()
        return largest

    def absent(self, tokens: Sequence[int]) -> list[int]:
        """Return which of some token ids are in no row."""
        import pyarrow.compute

        every = pyarrow.compute.list_flatten(self.column("input_ids"))
        return [each for each in tokens if pyarrow.compute.index(every, each).as_py() < 0]

    @property
    def is_weighted(self) -> bool:
        """Whether tokens of some row count more or less than others in a loss."""
        if LOSS_WEIGHTS not in self.table.column_names:
            return False
        column = self.column(LOSS_WEIGHTS)
        return bool(column.null_count < len(column))

    def column(self, name: str) -> pyarrow.ChunkedArray:
        """Return a column by its name, in the pieces that the table stores it in."""
        return self.table.select_columns(name).with_format("arrow")[:][name]

    def is_supervised(self) -> Any:
        """Return for each token of all rows whether a loss is computed for it.

        A row's first token is never predicted, so it is not supervised, whatever its label.

        Returns:
            A numpy array of booleans, (tokens,): row after row.
        """
        labels = self.column("labels").combine_chunks()
        found = labels.flatten().to_numpy() != IGNORED
        found[first_tokens(labels)[:-1]] = False
        return found

    def content_hash(self) -> str:
        """Return a hash of all that a model is given; the source of the rows is not part of it."""
        import pyarrow.compute

        digest = xxhash.xxh3_128()
        for name in ("input_ids", "labels", "token_types", LOSS_WEIGHTS):
            if name not in self.table.column_names:
                continue
            column = self.column(name).combine_chunks()
            lengths = pyarrow.compute.list_value_length(column).fill_null(0)
            digest.update(lengths.to_numpy().tobytes())
            digest.update(column.flatten().to_numpy().tobytes())
        if CHOSEN_TOKENS in self.table.column_names:
            digest.update(self.column(CHOSEN_TOKENS).to_numpy().tobytes())
        return digest.hexdigest()


def _longest(row: Row) -> int:
    """Return the tokens of a row; of two sequences, those of the longer."""
    tokens, first = len(row["input_ids"]), row.get(CHOSEN_TOKENS)
    return tokens if first is None else max(first, tokens - first)


def first_tokens(column: pyarrow.ListArray) -> Any:
    """Return where each row begins in the flattened column, and where the last row ends.

    Args:
        column: lists of tokens, one list a row.

    Returns:
        A numpy array of offsets, (rows + 1,).
    """
    # The offsets of a slice do not begin at 0.
    return column.offsets.to_numpy() - column.offsets[0].as_py()


class PaddedRows:
    """Rows that are padded to one width: what a batch of any task says of their tokens."""

    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest row; the batch may be wider."""
        return max(self.lengths)


@dataclass(frozen=True)
class Batch(PaddedRows):
    """One micro-batch, padded on the right.

    It needs no attention mask: a token of a causal model sees the tokens before it, never the
    padding behind it, and no padding is supervised.
    """

    input_ids: torch.Tensor
    """(B, T) int64, in host memory: the embedding copies them to its own device"""
    labels: torch.Tensor
    """(B, T) int64; the id at the same position, or -100; the loss shifts them by one"""
    lengths: tuple[int, ...]
    """(B,) tokens of each row, without padding"""
    rows: Indices
    """index of the source sample of each row"""
    positions: torch.Tensor
    """(N,) int64; positions in the flattened batch whose next token is supervised"""
    weights: torch.Tensor | None = field(default=None, kw_only=True)
    """(N,) fp32; the factor of the loss of each predicted token; None where all are 1"""

    @property
    def targets(self) -> torch.Tensor:
        """The ids that are predicted at `positions`, (N,) int64."""
        return self.labels.flatten().index_select(0, self.positions + 1)

    @property
    def units(self) -> int:
        """Supervised tokens: labels that are targets after the shift."""
        return len(self.positions)

    @property
    def weight(self) -> float:
        """The sum of their weights: without weights, their number."""
        return total_weight(self.weights, self.units)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on another device; its ids stay in host memory.

        An embedding in host memory would otherwise wait for the device to copy the ids back.
        """
        return replace(
            self,
            labels=self.labels.to(device, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
            weights=None if self.weights is None else self.weights.to(device, non_blocking=True),
        )


def collate(
    rows: Sequence[Row],
    pad_token_id: int,
    width: Callable[[int], int] | None = None,
) -> Batch:
    """Pad rows on the right to the longest of them, or further.

    Args:
        rows: each has `input_ids`, `labels` and `row`, as the rows of `Tokenized.rows` do; and
            `loss_weights` where its tokens do not count alike.
        pad_token_id: fills `input_ids`; no token sees it, so it may be the EOS.
        width: returns T, given the tokens of the longest row, as `Base.batch_width` does; if
            None, T is the number of tokens of the longest row.
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
    positions = predicting_positions(labels)
    starts = range(0, labels.numel(), shape[1])
    weights = weights_at(positions + 1, rows, starts, labels.numel())
    return Batch(input_ids, labels, lengths, sources, positions, weights=weights)


@dataclass(frozen=True)
class PackedBatch(Batch):
    """One micro-batch whose samples lie end to end in one row.

    `lengths` and `rows` have an entry for each sample. `input_ids` and `labels` are (1, T), where T
    may be larger than the sum of the lengths: then the last segment is padding.
    """

    segments: tuple[int, ...]
    """tokens of each sample, and of the padding; together T"""

    @property
    def place_of_sample(self) -> torch.Tensor:
        """The number of the sample of each supervised token, (N,) int64."""
        ends = torch.tensor(self.lengths).cumsum(0)
        return torch.searchsorted(ends, self.positions.cpu(), right=True)


def collate_packed(
    rows: Sequence[Row],
    pad_token_id: int,
    width: Callable[[int], int] | None = None,
) -> PackedBatch:
    """Lay rows end to end in one row.

    Args:
        rows: see `collate`.
        pad_token_id: see `collate`.
        width: returns T, given the tokens of all rows; if None, T is their number.
    """
    lengths = tuple(len(row["input_ids"]) for row in rows)
    tokens = sum(lengths)
    total = tokens if width is None else width(tokens)
    input_ids = torch.full((1, total), pad_token_id, dtype=torch.int64)
    labels = torch.full((1, total), IGNORED, dtype=torch.int64)
    start = 0
    for row, length in zip(rows, lengths, strict=True):
        own = slice(start, start + length)
        input_ids[0, own] = torch.as_tensor(row["input_ids"], dtype=torch.int64)
        labels[0, own] = torch.as_tensor(row["labels"], dtype=torch.int64)
        labels[0, start] = IGNORED  # no token of its sample is before it, to predict it
        start += length
    sources = tuple(int(row["row"]) for row in rows)
    segments = lengths if total == tokens else (*lengths, total - tokens)
    positions = predicting_positions(labels)
    starts = accumulate(lengths[:-1], initial=0)
    weights = weights_at(positions + 1, rows, starts, total)
    return PackedBatch(input_ids, labels, lengths, sources, positions, segments, weights=weights)


def predicting_positions(labels: torch.Tensor) -> torch.Tensor:
    """Return the positions whose next token is supervised.

    They are found on the CPU: on a device, the CPU would have to wait to learn their number.

    Args:
        labels: (B, T) int64, in host memory.

    Returns:
        (N,) int64, positions in the flattened labels.
    """
    predicts = torch.zeros(labels.shape, dtype=torch.bool)
    predicts[:, :-1] = labels[:, 1:] != IGNORED
    return predicts.flatten().nonzero().squeeze(1)


def weights_at(
    positions: torch.Tensor, rows: Sequence[Row], starts: Iterable[int], tokens: int
) -> torch.Tensor | None:
    """Return the weights of tokens, (N,) fp32; None where all of them are 1.

    Args:
        positions: (N,) int64, positions of tokens in the flattened batch.
        rows: the rows of the batch.
        starts: position of the first token of each row.
        tokens: tokens of the batch, padding included.
    """
    if all(row.get(LOSS_WEIGHTS) is None for row in rows):
        return None
    weights = torch.ones(tokens)
    for row, start in zip(rows, starts, strict=True):
        if row.get(LOSS_WEIGHTS) is not None:
            own = torch.as_tensor(row[LOSS_WEIGHTS], dtype=torch.float32)
            weights[start : start + len(own)] = own
    found = weights.index_select(0, positions)
    return None if bool((found == 1).all()) else found


def total_weight(weights: torch.Tensor | None, units: int) -> float:
    """Return the sum of weights, in fp64; where there are none, the number of what is weighed."""
    return units if weights is None else float(weights.sum(dtype=torch.float64))


def largest_batch(lengths: Sequence[int], count: int) -> Indices:
    """Return the indices of the rows that together take the most memory: the longest ones.

    Args:
        lengths: tokens of every row.
        count: number of rows to return; all of them if there are fewer.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return tuple(order[:count])


def widest_batch(lengths: Sequence[tuple[int, int]], count: int) -> Indices:
    """Return the indices of sources and targets that together take the most memory.

    Of two rows or more one has the longest source and one the longest target, to which all others
    are padded.

    Args:
        lengths: tokens of every source and of its target.
        count: number of rows to return; all of them if there are fewer.
    """
    order = largest_batch([sum(each) for each in lengths], len(lengths))
    if count == 1:
        return order[:1]
    widest = (max(order, key=lambda row: lengths[row][side]) for side in (0, 1))
    return tuple(dict.fromkeys((*widest, *order)))[:count]


def epoch_batches(
    rows: TokenRows, batch_size: int, seed: int, epoch: int, *, by_length: bool = True
) -> list[Indices]:
    """Return the row indices of each micro-batch of an epoch; every row once.

    Rows are shuffled by (seed, epoch). By length they are then sorted within windows of 50 batches,
    and the batches are shuffled again.

    Args:
        rows: the rows of the epoch.
        batch_size: rows a micro-batch; one batch of the epoch may have fewer.
        seed: the run's seed.
        epoch: counted from 0.
        by_length: whether rows of about the same length come into one batch.
    """
    source = random.Random(f"order {seed} {epoch}")
    order = list(range(len(rows)))
    source.shuffle(order)
    if batch_size == 1 or not by_length:
        starts = range(0, len(order), batch_size)
        return [tuple(order[start : start + batch_size]) for start in starts]
    lengths = rows.lengths()
    window = batch_size * _SORTED_BATCHES
    batches: list[Indices] = []
    for start in range(0, len(order), window):
        near = sorted(order[start : start + window], key=lengths.__getitem__)
        batches += [tuple(near[i : i + batch_size]) for i in range(0, len(near), batch_size)]
    source.shuffle(batches)
    return batches


def plan_windows(batches: Sequence[Indices], accumulation: int) -> list[tuple[Indices, ...]]:
    """Group micro-batches into optimiser steps; the last step may have fewer.

    Args:
        batches: the micro-batches of an epoch, in order.
        accumulation: micro-batches an optimiser step.
    """
    starts = range(0, len(batches), accumulation)
    return [tuple(batches[start : start + accumulation]) for start in starts]
