"""Token rows of several streams, mixed by weights.

Takes a `StreamedRows` for each source, and the weights; gives the rows of one optimiser step after
another. Which source gives the next row follows from the rows taken of each so far, so where a run
stands is the place in every source, its `MixedPlace`: from there the same rows come again, bit for
bit.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qlora_kit.data.batch import NamedSources, Row, TokenRows
from qlora_kit.data.stream import StreamedRows, StreamPlace


@dataclass(frozen=True)
class SourcePlace:
    """A place in one of several sources, between two of its rows.

    Attributes:
        passes: number of passes that are done.
        place: the place in the current pass.
        taken: rows taken of all passes.
    """

    passes: int = 0
    place: StreamPlace = field(default_factory=StreamPlace)
    taken: int = 0


@dataclass(frozen=True)
class MixedPlace:
    """A place in a mixed stream, between two optimiser steps.

    Attributes:
        sources: the place in each source.
        rows_of_epoch: rows taken in the current epoch.
        is_last: whether no row of the epoch is left.
    """

    sources: tuple[SourcePlace, ...]
    rows_of_epoch: int = 0
    is_last: bool = False

    def next_pass(self) -> MixedPlace:
        """Return the beginning of the next epoch, in which every source goes on."""
        return MixedPlace(self.sources)

    @property
    def counts(self) -> Mapping[str, int]:
        """What became of the samples of all sources, by the names of `Counts`."""
        counts: Counter[str] = Counter()
        for each in self.sources:
            counts.update(each.place.counts)
        return counts


class MixedStream(TokenRows):
    """The token rows of several streams. At any time it holds the rows of one optimiser step.

    The next row is of the source with the smallest (rows taken + 1/2) / weight, of several the
    first: that is the order of `Mixture.order`. A source whose rows are used up begins again, with
    the order of its next pass.

    Where rows are counted, an epoch has that many. Else it ends where the number of passes of some
    source exceeds those of all others: as in a mixture of rows at hand, with the first source that
    has been seen once.

    Args:
        parts: the rows of each source.
        weights: of each source, in any unit.
        names: a short name of each source.
        longest: see `StreamedRows`.
        in_pass: token rows of an epoch; None unless they were counted.
        check: called with every row that is to be learnt.

    Attributes:
        parts: see above.
        in_pass: see above.
    """

    def __init__(
        self,
        parts: Sequence[StreamedRows],
        weights: Sequence[float],
        names: Sequence[str],
        *,
        longest: Sequence[Row],
        in_pass: int | None = None,
        check: Callable[[Row], None] = lambda row: None,
    ) -> None:
        super().__init__(longest, sources=NamedSources((*names,), ()))
        self.parts, self.in_pass = parts, in_pass
        self._weights, self._check = weights, check
        self._of: Sequence[int] = [0] * len(longest)

    def source_of(self, index: int) -> int:
        """Return the number of the source that a row is of."""
        return self._of[index]

    def start(self, place: Any) -> MixedPlace:
        """Return the place to go on from; that of another kind of data is the beginning."""
        if isinstance(place, MixedPlace) and len(place.sources) == len(self.parts):
            return place
        return MixedPlace((SourcePlace(),) * len(self.parts))

    def windows(self, epoch: int, start: MixedPlace, size: int) -> Iterator[MixedPlace]:
        """Hold the rows of one optimiser step after another; yield the place after each.

        Args:
            epoch: not used: every source knows how many passes are done.
            start: place to begin at.
            size: rows of a step; the last step of the epoch may have fewer.

        Raises:
            DataError, WorkerLost: see `StreamedRows.windows`.
        """
        places, before = [*start.sources], max(each.passes for each in start.sources)
        endless = self._endless(places, size)
        held: list[Row] = []
        of: list[int] = []
        taken, is_last = start.rows_of_epoch, False
        while not is_last:
            source = self._next_source(places)
            row, places[source] = next(endless[source])
            self._check(row)
            held.append(row)
            of.append(source)
            taken += 1
            if self.in_pass is None:
                is_last = places[source].passes > before
            else:
                is_last = taken >= self.in_pass
            if is_last or len(held) == size:
                self._rows, self._of = held, of
                yield MixedPlace((*places,), taken, is_last)
                held, of = [], []

    def close(self) -> None:
        """End the processes that tokenise."""
        for part in self.parts:
            part.close()

    def _next_source(self, places: Sequence[SourcePlace]) -> int:
        return min(
            range(len(places)),
            key=lambda source: (places[source].taken + 0.5) / self._weights[source],
        )

    def _endless(
        self, places: Sequence[SourcePlace], size: int
    ) -> list[Iterator[tuple[Row, SourcePlace]]]:
        """Return the rows of each source from its place on, pass after pass.

        Args:
            places: where to begin.
            size: rows of a step, of which a source needs its share ahead.
        """
        total = math.fsum(self._weights)
        return [
            _pass_after_pass(part, place, math.ceil(size * weight / total))
            for part, place, weight in zip(self.parts, places, self._weights, strict=True)
        ]


def _pass_after_pass(
    part: StreamedRows, at: SourcePlace, size: int
) -> Iterator[tuple[Row, SourcePlace]]:
    """Yield the rows of a source without end, each with the place after it.

    Args:
        part: the rows of the source.
        at: where to begin.
        size: its rows of an optimiser step.

    Raises:
        DataError: see `StreamedRows.windows`.
    """
    while True:
        counts = Counter(at.place.counts)
        rows = part.rows_from(at.passes, at.place, counts, size)
        last = next(rows, None)
        if last is None and at.place == at.place.next_pass():
            raise part.is_empty(counts)
        for following in rows:
            assert last is not None
            row, place = last
            at = replace(at, place=place, taken=at.taken + 1)
            yield row, at
            last = following
        # What became of samples behind the last row belongs to the pass as well.
        at = SourcePlace(at.passes + 1, StreamPlace(counts=dict(counts)), at.taken)
        if last is not None:
            at = replace(at, taken=at.taken + 1)
            yield last[0], at
