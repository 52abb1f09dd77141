"""Mixing: the rows of several sources in an epoch, by weights, and the steps of any epoch.

Takes the number of rows of each source and its weight; returns the order of the rows. The order
depends on seed and epoch alone, so a resumed run needs no state of it. Reads no row.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy

from qlora_kit.config import TrainConfig
from qlora_kit.data.batch import Indices, TokenRows, epoch_batches, plan_windows


@dataclass(frozen=True)
class Mixture:
    """How the rows of several sources make up an epoch, by weights.

    An epoch ends when the first source has been seen once; of the others it has the rows that
    their weights ask for. The next epoch goes on where this one ended, and a source that is used
    up is shuffled anew. So of a source no row comes again before all of its rows have come.

    Attributes:
        sizes: rows of each source; they lie one source after another.
        weights: of each source, in any unit.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of each source in the rows that are seen, 0 to 1."""
        largest = max(self.weights)
        relative = [weight / largest for weight in self.weights]
        return tuple(weight / sum(relative) for weight in relative)

    @cached_property
    def rows_of_sources(self) -> tuple[int, ...]:
        """Rows of each source in an epoch, rounded; 0 where an epoch is too short for a source."""
        pairs = [*zip(self.sizes, self.shares, strict=True)]
        rows = min(size / share if share else float("inf") for size, share in pairs)
        return tuple(min(size, round(share * rows)) for size, share in pairs)

    @property
    def rows(self) -> int:
        """Rows of an epoch."""
        return sum(self.rows_of_sources)

    def order(self, seed: int, epoch: int) -> list[int]:
        """Return the rows of an epoch, so that each stretch of them has the sources' shares.

        The k-th of the n rows that a source has in an epoch stands at the place (k + 1/2) / n of
        the epoch. So a stretch has the number of its rows that its share asks for, give or take
        one for each source.

        Args:
            seed: the run's seed.
            epoch: counted from 0.
        """
        sources = range(len(self.sizes))
        places = [(numpy.arange(count) + 0.5) / count for count in self.rows_of_sources]
        rows = numpy.concatenate([self._drawn(source, seed, epoch) for source in sources])
        found: list[int] = rows[numpy.argsort(numpy.concatenate(places), kind="stable")].tolist()
        return found

    def _drawn(self, source: int, seed: int, epoch: int) -> Any:
        """Return the rows of a source in an epoch: a part of one of its passes, or of two."""
        size, count = self.sizes[source], self.rows_of_sources[source]
        begin = sum(self.sizes[:source])
        number, start = divmod(epoch * count, size)
        drawn = _one_pass(f"mix {seed} {source} {number}", size)[start : start + count]
        if len(drawn) < count:
            more = _one_pass(f"mix {seed} {source} {number + 1}", size)[: count - len(drawn)]
            drawn = numpy.concatenate([drawn, more])
        return drawn + begin


# An epoch may have a few rows of a large source, and the next has the rows after them.
@lru_cache(maxsize=8)
def _one_pass(name: str, size: int) -> Any:
    """Return all rows of a source, shuffled: numpy int64, (size,)."""
    rows = list(range(size))
    random.Random(name).shuffle(rows)
    return numpy.array(rows)


def epoch_windows(rows: TokenRows, config: TrainConfig, epoch: int) -> list[tuple[Indices, ...]]:
    """Return the optimiser steps of an epoch, each as the row indices of its micro-batches.

    Rows that are mixed by weights are divided into steps first, and only the rows of a step are
    grouped by length: every step has the shares of the sources.

    Args:
        rows: the training rows.
        config: the size of a micro-batch, the micro-batches of a step, the seed.
        epoch: counted from 0.
    """
    if rows.mixture is not None:
        batches = _mixed_batches(rows, config, rows.mixture.order(config.seed, epoch))
    else:
        batches = epoch_batches(
            rows, config.batch_size, config.seed, epoch, by_length=config.group_by_length
        )
    return plan_windows(batches, config.gradient_accumulation_steps)


def _mixed_batches(rows: TokenRows, config: TrainConfig, order: Sequence[int]) -> list[Indices]:
    size = config.batch_size
    step = size * config.gradient_accumulation_steps
    lengths = rows.lengths() if config.group_by_length and size > 1 else None
    batches: list[Indices] = []
    for start in range(0, len(order), step):
        window = order[start : start + step]
        if lengths is not None:
            window = sorted(window, key=lengths.__getitem__)
        batches += [tuple(window[i : i + size]) for i in range(0, len(window), size)]
    return batches
