"""The rows of each optimiser step, from rows that are all at hand or from a stream.

Takes token rows and the options; yields windows, which are the micro-batches of a step as indices
of the rows that are at hand. The order depends on the seed and the epoch alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

from qlora_kit.config import TrainConfig
from qlora_kit.data.batch import Indices, TokenRows
from qlora_kit.data.mixed_stream import MixedPlace, MixedStream
from qlora_kit.data.mixing import epoch_windows
from qlora_kit.data.stream import StreamedRows, StreamPlace
from qlora_kit.train.checkpoint import Progress, StepPlan

Window = tuple[Indices, ...]


class Windows(Protocol):
    """The windows of a run.

    Attributes:
        in_epoch: token rows of an epoch; None where they are not counted.
        place: of a stream: its place after the window that was yielded last; else None.
    """

    in_epoch: int | None
    place: StreamPlace | MixedPlace | None

    def of_epoch(self, progress: Progress) -> Iterator[Window]:
        """Yield the windows of the current epoch that are still to be done."""
        ...

    def begin_epoch(self, progress: Progress) -> None:
        """Move on to the beginning of the next epoch."""
        ...

    def ends_epoch(self, progress: Progress) -> bool:
        """Return whether every window of the current epoch is done."""
        ...


def windows_of(rows: TokenRows, config: TrainConfig) -> Windows:
    """Return the windows of a run on these rows."""
    if isinstance(rows, StreamedRows | MixedStream):
        return _OfStream(rows, config)
    return _OfRows(rows, config)


def steps_an_epoch(rows: int, config: TrainConfig) -> int:
    """Return the number of optimiser steps of an epoch.

    Args:
        rows: number of token rows.
        config: the batch size and the accumulation.
    """
    micro_batches = math.ceil(rows / config.batch_size)
    return math.ceil(micro_batches / config.gradient_accumulation_steps)


def plan_steps(rows: int | None, config: TrainConfig) -> StepPlan:
    """Return the number of optimiser steps of a run.

    Args:
        rows: number of token rows; None where they are not counted, which needs `max_steps`.
        config: the batch size, the accumulation, and the epochs or steps.
    """
    if rows is None:
        assert config.max_steps is not None, "rows that are not counted need a number of steps"
        return StepPlan(None, config.max_steps)
    per_epoch = steps_an_epoch(rows, config)
    return StepPlan(per_epoch, config.max_steps or math.ceil(config.epochs * per_epoch))


class _OfRows:
    """The windows of rows that are all at hand, see `Windows`."""

    place: StreamPlace | MixedPlace | None = None

    def __init__(self, rows: TokenRows, config: TrainConfig) -> None:
        self._rows, self._config = rows, config
        self.in_epoch: int | None = rows.rows_an_epoch
        self._per_epoch = steps_an_epoch(rows.rows_an_epoch, config)

    def of_epoch(self, progress: Progress) -> Iterator[Window]:
        """See `Windows`."""
        yield from epoch_windows(self._rows, self._config, progress.epoch)[progress.window :]

    def begin_epoch(self, progress: Progress) -> None:
        """See `Windows`."""
        progress.epoch, progress.window = progress.epoch + 1, 0

    def ends_epoch(self, progress: Progress) -> bool:
        """See `Windows`."""
        return progress.window == self._per_epoch


class _OfStream:
    """The windows of a stream, see `Windows`. Their indices are those of the rows it holds.

    Rows of about the same length come into one micro-batch within a window only: so a step has the
    samples that it would have without that, and where it stands is known by the last of them.
    A pass may have fewer windows than were counted; the run then goes on into the next pass.
    """

    def __init__(self, rows: StreamedRows | MixedStream, config: TrainConfig) -> None:
        self._rows: Any = rows  # each takes the places that it gives
        self._config = config
        self.in_epoch: int | None = rows.in_pass
        self.place: StreamPlace | MixedPlace | None = None

    def of_epoch(self, progress: Progress) -> Iterator[Window]:
        """See `Windows`."""
        start = self._rows.start(progress.place)
        if start.is_last:
            return
        size = self._config.batch_size
        rows = size * self._config.gradient_accumulation_steps
        for place in self._rows.windows(progress.epoch, start, rows):
            self.place = place
            order = list(range(len(self._rows)))
            if self._config.group_by_length and size > 1:
                order.sort(key=self._rows.tokens_of)
            yield tuple(tuple(order[at : at + size]) for at in range(0, len(order), size))

    def begin_epoch(self, progress: Progress) -> None:
        """See `Windows`."""
        progress.epoch, progress.window = progress.epoch + 1, 0
        progress.place = self._rows.start(progress.place).next_pass()

    def ends_epoch(self, progress: Progress) -> bool:
        """See `Windows`."""
        return progress.place is not None and progress.place.is_last
