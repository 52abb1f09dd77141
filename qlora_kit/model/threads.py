"""How many CPU threads compute: as many as cores are free when a run begins.

OpenMP's threads meet at a barrier after each of the thousands of small operations of a step. Where
another process has the core of one of them, all others wait, spinning: beside one busy process a
step on two cores takes up to eight times as long with two threads; with one its time stays.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

# What a user says it with; both are read when torch is imported.
_SET_BY_USER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# Long enough for the kernel's clock of 10 ms, short beside the start of a run.
_WATCHED_SECONDS = 0.3
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True)
class Threads:
    """How many threads, and why."""

    count: int
    reason: str

    def describe(self) -> str:
        """Return such as "1 thread (1 of 2 cores is free)"."""
        return f"{self.count} thread{'s' * (self.count != 1)} ({self.reason})"


def choose_threads(asked: int | None = None) -> Threads:
    """Choose the number of threads, and let torch compute with it.

    What the user set stays: the option, or the variables that OpenMP and MKL read.

    Args:
        asked: the option, or what a run that goes on has had; None: not given.
    """
    chosen = _choice(asked)
    torch.set_num_threads(chosen.count)
    return chosen


def _choice(asked: int | None) -> Threads:
    if asked is not None:
        return Threads(asked, "as set for this run")
    if set_by := next((name for name in _SET_BY_USER if name in os.environ), None):
        return Threads(torch.get_num_threads(), f"as {set_by} says")
    free, cores = free_cores()
    count = max(1, min(torch.get_num_threads(), free))
    return Threads(count, f"{free} of {cores} cores {'is' if free == 1 else 'are'} free")


def free_cores() -> tuple[int, int]:
    """Watch the cores that this process may use, for a moment in which it does nothing.

    Returns:
        How many are free, and how many there are.
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
    """Return how many cores' time a container may take, all `cores` where nothing limits it."""
    try:
        limit, period = _QUOTA.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return cores
    return cores if limit == "max" else max(1, int(limit) // int(period))
