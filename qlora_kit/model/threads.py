"""The number of CPU threads that compute: as many as cores are free when a run begins.

OpenMP's threads meet at a barrier after each of the thousands of small operations of a step. Where
another process has the core of one thread, all other threads spin and wait for it. Beside one busy
process, a step on two cores takes up to eight times as long with two threads; with one thread its
time stays the same.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

# The variables by which a user sets the number of threads; they are read when torch is imported.
_SET_BY_USER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# Long enough for the kernel's clock of 10 ms, and short beside the start of a run.
_WATCHED_SECONDS = 0.3
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True)
class Threads:
    """A number of threads, and the reason for it."""

    count: int
    reason: str

    def describe(self) -> str:
        """Return the number with its reason: "1 thread (1 of 2 cores is free)"."""
        return f"{self.count} thread{'s' * (self.count != 1)} ({self.reason})"


def choose_threads(asked: int | None = None, processes: int = 1) -> Threads:
    """Choose the number of threads, and let torch compute with it.

    A number that the user set stays: by the option, or by the variables of OpenMP and MKL.

    Args:
        asked: the number of the option, or of the run that is resumed; None: not given.
        processes: processes of the run on this machine, which share its free cores.
    """
    chosen = _choice(asked, processes)
    torch.set_num_threads(chosen.count)
    return chosen


def _choice(asked: int | None, processes: int) -> Threads:
    if asked is not None:
        return Threads(asked, "as set for this run")
    if set_by := next((name for name in _SET_BY_USER if name in os.environ), None):
        return Threads(torch.get_num_threads(), f"as {set_by} says")
    free, cores = free_cores()
    count = max(1, min(torch.get_num_threads(), free // processes))
    shared = f", for {processes} processes" if processes > 1 else ""
    return Threads(count, f"{free} of {cores} cores {'is' if free == 1 else 'are'} free{shared}")


def free_cores() -> tuple[int, int]:
    """Watch the cores that this process may use, for a moment in which the process is idle.

    Returns:
        The number of free cores, and the number of all cores.
    """
    allowed = _allowed_cores()
    busy = psutil.cpu_percent(_WATCHED_SECONDS, percpu=True)
    idle = sum(1 - busy[core] / 100 for core in allowed if core < len(busy))
    cores = min(len(allowed), _quota(len(allowed)))
    return min(cores, round(idle)), cores


def _allowed_cores() -> list[int]:
    try:
        return psutil.Process().cpu_affinity() or [0]
    except AttributeError:  # macOS knows no affinity
        return list(range(psutil.cpu_count() or 1))


def _quota(cores: int) -> int:
    """Return the number of cores whose time a container may take; `cores` without a limit."""
    try:
        limit, period = _QUOTA.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return cores
    return cores if limit == "max" else max(1, int(limit) // int(period))
