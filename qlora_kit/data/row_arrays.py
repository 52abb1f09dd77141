"""Token rows in flat arrays, for what looks at all of them at once.

Takes samples and the rows that were made of them; gives the tokens, the labels and the place of
each row. Never changes a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy
import xxhash

from qlora_kit.data.batch import first_tokens
from qlora_kit.data.encode import CHOSEN_TOKENS, LOSS_WEIGHTS
from qlora_kit.data.samples import Samples
from qlora_kit.data.tokens import Counts, Tokenized


@dataclass(frozen=True)
class Part:
    """Samples, and the token rows made of all of them or of some."""

    samples: Samples
    tokenized: Tokenized


class RowArrays:
    """Token rows in flat arrays: the tokens of row i are `ids[starts[i] : starts[i + 1]]`."""

    def __init__(self, part: Part) -> None:
        rows = part.tokenized.rows
        ids, labels = (rows.column(name).combine_chunks() for name in ("input_ids", "labels"))
        self.starts, self._label_starts = first_tokens(ids), first_tokens(labels)
        self.ids = ids.flatten().to_numpy()
        self.labels = labels.flatten().to_numpy()
        self.uncut_tokens = rows.column("uncut_tokens").to_numpy()
        self.sample_of_row = rows.column("row").to_numpy()
        self.samples = part.samples.items
        self._part = part
        self.dropped = part.tokenized.dropped
        self._rows = rows

    @cached_property
    def supervised(self) -> Any:
        """The positions of all supervised tokens, in order; a row of text has at least one."""
        return numpy.flatnonzero(self._rows.is_supervised())

    def supervised_within(self, span: slice) -> int:
        """Return the number of supervised tokens at some positions."""
        first, last = numpy.searchsorted(self.supervised, [span.start, span.stop])
        return int(last - first)

    def weights_of(self, row: int) -> list[float] | None:
        """Return the factor of the loss of each token of a row; None where all have 1."""
        found: list[float] | None = self._rows[row].get(LOSS_WEIGHTS)
        return found

    def labels_of(self, row: int) -> list[float]:
        """Return the labels of a row that is classified."""
        found: list[float] = self.labels[
            self._label_starts[row] : self._label_starts[row + 1]
        ].tolist()
        return found

    def __len__(self) -> int:
        return len(self.sample_of_row)

    def span(self, row: int) -> slice:
        """Return the positions of a row's tokens."""
        return slice(int(self.starts[row]), int(self.starts[row + 1]))

    def sequences(self, row: int) -> list[tuple[str, slice]]:
        """Return the sequences of a row, each with words for it and its positions.

        A row of a pair of answers has two; any other is one, without words.
        """
        span, chosen = self.span(row), self._rows[row].get(CHOSEN_TOKENS)
        if chosen is None:
            return [("", span)]
        border = span.start + chosen
        return [(", chosen", slice(span.start, border)), (", rejected", slice(border, span.stop))]

    def of_sample(self, index: int) -> range:
        """Return the rows made of a sample."""
        first, last = numpy.searchsorted(self.sample_of_row, [index, index + 1])
        return range(int(first), int(last))

    def place(self, row: int) -> str:
        """Return the place of a row's sample, with the row's number if the sample has several."""
        index = int(self.sample_of_row[row])
        several = len(self.of_sample(index)) > 1
        return self.samples[index].place + (f" (token row {row + 1:,})" if several else "")

    def counts_of(self, sample: int) -> Counts:
        """Return the counts of the source that a sample is of."""
        made = self._part.tokenized
        return (
            made.sources[self._part.samples.part_of(sample)].counts if made.sources else made.counts
        )

    def sample_lengths(self) -> list[tuple[int, int]]:
        """Return each sample's index and its number of tokens before it was cut."""
        names, which = numpy.unique(self.sample_of_row, return_inverse=True)
        longest = numpy.zeros(len(names), dtype=numpy.int64)
        numpy.maximum.at(longest, which, self.uncut_tokens)
        kept = zip(names.tolist(), longest.tolist(), strict=True)
        return [*kept, *self.dropped.items()]


def hash_of_ids(ids: Any) -> bytes:
    """Return a hash of an array of token ids."""
    return xxhash.xxh3_128_digest(ids.tobytes())
