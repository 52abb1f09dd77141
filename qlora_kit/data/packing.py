"""Packing: the samples of an optimiser step, laid end to end in few full micro-batches.

Takes the micro-batches of a step as indices of rows, and the rows' lengths; returns the same
indices in other micro-batches. The samples of a step stay the same, so packing changes how fast a
step is, and not what it learns from.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from qlora_kit.config import TrainConfig
from qlora_kit.data.batch import Indices, TokenRows
from qlora_kit.data.mixing import epoch_windows
from qlora_kit.data.samples import Samples

# The first steps of a run show well enough how full its micro-batches are.
_STEPS_LOOKED_AT = 50


def packed(
    window: Iterable[Indices], lengths: Sequence[int] | Mapping[int, int], capacity: int
) -> list[Indices]:
    """Return the rows of a window in as few micro-batches as best fit needs.

    The longest row is placed first. Each row goes where the least room is left over. In a
    micro-batch, and among the micro-batches, the rows keep the order that they have in the window.

    Args:
        window: the micro-batches of an optimiser step.
        lengths: tokens of every row of the window, by its index.
        capacity: tokens a micro-batch may have, without padding. A longer row stands alone.

    Returns:
        The micro-batches; together they have the rows of the window.

    Source: best-fit decreasing, in Near-optimal bin packing algorithms (Johnson, 1973).
    """
    rows = [row for indices in window for row in indices]
    by_length = sorted(range(len(rows)), key=lambda place: (-lengths[rows[place]], place))
    bins: list[list[int]] = []
    # (room, bin) of every micro-batch, sorted, so that the smallest room that suffices is found.
    rooms: list[tuple[int, int]] = []
    for place in by_length:
        length = lengths[rows[place]]
        found = bisect.bisect_left(rooms, (length, -1))
        if found == len(rooms):
            bins.append([place])
            bisect.insort(rooms, (max(0, capacity - length), len(bins) - 1))
        else:
            room, chosen = rooms.pop(found)
            bins[chosen].append(place)
            bisect.insort(rooms, (room - length, chosen))
    return [tuple(rows[place] for place in sorted(each)) for each in sorted(bins, key=min)]


@dataclass(frozen=True)
class Fill:
    """How full the micro-batches of some optimiser steps are.

    Attributes:
        steps: number of the steps.
        padded: number of their micro-batches without packing.
        micro_batches: number of their micro-batches with packing.
        tokens: their tokens, without padding.
        capacity: tokens that a micro-batch may have.
    """

    steps: int
    padded: int
    micro_batches: int
    tokens: int
    capacity: int

    @staticmethod
    def of(config: TrainConfig, rows: TokenRows, longest: int | None = None) -> Fill:
        """Return how full the micro-batches of the first steps of a packed run are.

        Args:
            config: the options of the run.
            rows: the training rows, or some of them.
            longest: tokens of the longest row of all; None: the longest of these.
        """
        lengths = rows.lengths()
        capacity = config.batch_size * (longest or max(lengths))
        windows = epoch_windows(rows, config, 0)[:_STEPS_LOOKED_AT]
        micro_batches = sum(len(packed(window, lengths, capacity)) for window in windows)
        tokens = sum(lengths[row] for window in windows for indices in window for row in indices)
        return Fill(len(windows), sum(map(len, windows)), micro_batches, tokens, capacity)

    @property
    def saves(self) -> bool:
        """Whether a packed run has fewer micro-batches."""
        return self.micro_batches < self.padded

    def described(self) -> str:
        """Say it in words, such as "2 micro-batches a step instead of 16, …"."""
        share = self.tokens / (self.micro_batches * self.capacity)
        return (
            f"{self.micro_batches / self.steps:.3g} micro-batches a step instead of "
            f"{self.padded / self.steps:.3g}, of at most {self.capacity:,} tokens, {share:.0%} full"
        )


@dataclass(frozen=True)
class PackedSample:
    """A sample in a packed micro-batch: its place in the data, and its tokens."""

    place: str
    tokens: int


@dataclass(frozen=True)
class PackedStep:
    """The first optimiser step of a packed run, to look at.

    Attributes:
        micro_batches: the samples of each micro-batch, as they lie in its row.
        capacity: tokens that a micro-batch may have.
    """

    micro_batches: tuple[tuple[PackedSample, ...], ...]
    capacity: int

    @staticmethod
    def of(config: TrainConfig, rows: TokenRows, samples: Samples) -> PackedStep:
        """Return the first step of a packed run.

        Args:
            config: the options of the run.
            rows: the training rows.
            samples: the samples that they are made of.
        """
        lengths = rows.lengths()
        capacity = config.batch_size * max(lengths)
        micro_batches = packed(epoch_windows(rows, config, 0)[0], lengths, capacity)

        def sample(row: int) -> PackedSample:
            return PackedSample(samples.items[rows[row]["row"]].place, lengths[row])

        return PackedStep(tuple(tuple(map(sample, each)) for each in micro_batches), capacity)
