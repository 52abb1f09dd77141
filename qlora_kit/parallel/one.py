"""The protocol of the processes of a run, and a run of one process.

Imports no torch: a run of one process learns here that it is alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Protocol, TypeVar

from qlora_kit.errors import EnvironmentFault
from qlora_kit.launched import place

if TYPE_CHECKING:
    from torch import nn

Value = TypeVar("Value")


class Processes(Protocol):
    """The processes of a run. Every one of them makes the same calls in the same order.

    `totals`, `most` and `sum_gradients` are the calls of a step: all processes make them within
    minutes. The others wait for as long as one process may work for all.
    """

    @property
    def rank(self) -> int:
        """The number of this process, counted from 0."""
        ...

    @property
    def count(self) -> int:
        """The number of all processes."""
        ...

    @property
    def is_writer(self) -> bool:
        """Whether this process saves, logs and prints."""
        ...

    @property
    def computes_together(self) -> bool:
        """Whether a forward needs all processes, because each has a part of the base only."""
        ...

    def abandon(self) -> None:
        """Wait for nobody any more: the others wait for this process, which ends by itself."""
        ...

    def computing(self) -> AbstractContextManager[None]:
        """Return a block that computes; what other processes do to it is told as a lost process.

        Raises:
            WorkerLost: another process, whose part of the base is needed, is gone.
        """
        ...

    def totals(self, *values: float) -> tuple[float, ...]:
        """Return the sum of each number over all processes, in fp64."""
        ...

    def most(self, *values: float) -> tuple[float, ...]:
        """Return the largest of each number in any process, so that all decide the same."""
        ...

    def hold_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Take the memory that gradients are summed in, before any is computed."""
        ...

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum the gradients of all processes, in place."""
        ...

    def each(self, work: Callable[[], Value]) -> list[Value]:
        """Return what `work` returns in each process, by rank.

        Raises:
            QloraKitError: `work` raised it in some process; it is raised in all.
            Stopped: the same.
        """
        ...

    def from_writer(self, work: Callable[[], Value]) -> Value:
        """Return what `work` returns in the writer; the others do not call it.

        Raises:
            QloraKitError: `work` raised it; it is raised in all processes.
            Stopped: the same.
        """
        ...

    def in_writer(self, work: Callable[[], Value]) -> Value | None:
        """Wait until the writer has done `work`; return its result there, and None elsewhere.

        Raises:
            QloraKitError: see `from_writer`.
        """
        ...

    def writer_first(self, work: Callable[[], Value]) -> Value:
        """Do `work` in every process, in the writer first: the others find what it has made.

        Raises:
            QloraKitError: see `from_writer`.
        """
        ...

    def part(self) -> None:
        """Wait until all processes have come here, so that each may end without the others."""
        ...

    def after_writer(self, doing: str) -> None:
        """Wait until the writer has come to the end of `doing`, or is gone; no meeting."""
        ...

    def lost(self) -> str | None:
        """Return a line if another process is gone; None if none is, or it was told."""
        ...

    def speaks(self) -> bool:
        """Whether this process is the one that tells the user how the run ended."""
        ...

    def leave(self) -> None:
        """Meet no process any more, and wait until the writer has said its last words."""
        ...


class OneProcess:
    """A process that trains by itself: every sum is its own number, every decision its own."""

    rank = 0
    count = 1
    is_writer = True
    computes_together = False

    def abandon(self) -> None:
        """See `Processes`: nobody waits."""

    def computing(self) -> AbstractContextManager[None]:
        """See `Processes`."""
        return nullcontext()

    def totals(self, *values: float) -> tuple[float, ...]:
        """See `Processes`."""
        return values

    most = totals

    def hold_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """See `Processes`: autograd holds them."""

    sum_gradients = hold_gradients

    def each(self, work: Callable[[], Value]) -> list[Value]:
        """See `Processes`."""
        return [work()]

    def from_writer(self, work: Callable[[], Value]) -> Value:
        """See `Processes`."""
        return work()

    in_writer = from_writer
    writer_first = from_writer

    def part(self) -> None:
        """See `Processes`: there is nothing to wait for."""

    def after_writer(self, doing: str) -> None:
        """See `Processes`."""

    def lost(self) -> str | None:
        """See `Processes`."""
        return None

    def speaks(self) -> bool:
        """See `Processes`."""
        return True

    def leave(self) -> None:
        """See `Processes`."""


_joined: Processes | None = None


def processes_of_this_run() -> Processes:
    """Return the processes that were launched, and meet them at the first call.

    Raises:
        EnvironmentFault: the launcher's environment contradicts itself.
        WorkerLost: not all processes came.
    """
    global _joined
    here = place()
    if here.count == 1:
        return OneProcess()
    if _joined is None:
        # torch's C++ would tell of every connection that a process which has ended leaves behind.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        from qlora_kit.parallel.data_parallel import DataParallel

        _joined = DataParallel(here)
        _joined.join()
    return _joined


def lost_process() -> str | None:
    """Return a line if another process of the run is gone; None if none is, or it was told."""
    return None if _joined is None else _joined.lost()


def speaks() -> bool:
    """Whether this process is the one that tells the user how the run ended.

    Of several processes the first that asks. Before they have met, the writer; and where nobody
    knows which process is the writer, every one.
    """
    if _joined is not None:
        return _joined.speaks()
    try:
        return place().is_writer
    except EnvironmentFault:
        return True


def leave() -> None:
    """Let the other processes know that this one ends, and end after the writer."""
    if _joined is not None:
        _joined.leave()
