"""Clocks for the work of a device: CUDA events on a GPU, the processor's clock on a CPU."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any, Protocol


class Clock(Protocol):
    """Takes marks between pieces of work."""

    def mark(self) -> None:
        """Mark this point in the work of the device."""
        ...

    def seconds(self) -> list[float]:
        """Wait for the work, return the time from each mark to the next, and forget the marks."""
        ...


def clock_of_this_machine() -> Clock:
    """Return a clock for the GPU if there is one, else for the CPU."""
    import torch

    return GpuClock() if torch.cuda.is_available() else CpuClock()


class GpuClock:
    """Puts events into the queue of the computing stream, so marking does not wait for the GPU."""

    def __init__(self) -> None:
        self._marks: list[Any] = []

    def mark(self) -> None:
        """See `Clock`."""
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def seconds(self) -> list[float]:
        """See `Clock`."""
        import torch

        torch.cuda.synchronize()
        marks, self._marks = self._marks, []
        return [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(marks)]


class CpuClock:
    """Reads the processor's clock: a CPU has done its work when a call returns."""

    def __init__(self) -> None:
        self._marks: list[float] = []

    def mark(self) -> None:
        """See `Clock`."""
        self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """See `Clock`."""
        marks, self._marks = self._marks, []
        return [b - a for a, b in itertools.pairwise(marks)]


def timed(clock: Clock, work: Callable[[], Any]) -> float:
    """Return the seconds that the device takes for a piece of work."""
    clock.mark()
    work()
    clock.mark()
    return clock.seconds()[0]


def matmul_rate(clock: Clock, size: int, dtype: str = "bfloat16", rounds: int = 30) -> float:
    """Return the floating-point operations a second of a product, in the best of the rounds.

    The numbers are random: on a GPU products of zeros run faster than others.

    Args:
        clock: a clock for the device.
        size: rows and columns of the matrices; 8,192 fills a large GPU.
        dtype: the dtype of the matrices.
        rounds: number of products.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = getattr(torch, dtype)
    a, b = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    out = a @ b
    best = min(timed(clock, lambda: torch.mm(a, b, out=out)) for _ in range(rounds))
    return 2 * size**3 / best
