"""The place of this process among those that a launcher started, read from the environment.

torchrun sets these variables, and so does every launcher that follows it. Imports no torch, and
never talks to another process: `parallel/` does.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from dataclasses import dataclass
from types import FrameType

from qlora_kit.errors import EnvironmentFault

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# Set by `--devices`, whose launcher says itself what a signal does.
BY_DEVICES = "QLORA_KIT_BY_DEVICES"
# prctl's number of the signal that a process gets when its parent ends (man 2 prctl).
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Place:
    """The place of a process.

    Attributes:
        rank: its number among all processes, counted from 0.
        count: number of all processes.
        local_rank: its number among those of its machine, which is the number of its GPU.
        on_machine: number of the processes of its machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    on_machine: int = 1

    @property
    def is_writer(self) -> bool:
        """Whether this process saves, logs and prints."""
        return self.rank == 0


def place() -> Place:
    """Return the place of this process; one process alone has the first place of one.

    Raises:
        EnvironmentFault: the variables contradict each other.
    """
    if "WORLD_SIZE" not in os.environ:
        return Place()
    found = {name: os.environ[name] for name in _NAMES if name in os.environ}
    if found["WORLD_SIZE"] == "1":
        return Place()
    if not all(value.isdecimal() for value in found.values()) or "RANK" not in found:
        said = ", ".join(f"{name}={value}" for name, value in found.items())
        raise EnvironmentFault(
            f"the environment has {said}; expected the numbers {', '.join(_NAMES)} of a launcher; "
            "start with --devices N or torchrun, or unset WORLD_SIZE"
        )
    rank, count = int(found["RANK"]), int(found["WORLD_SIZE"])
    local_rank = int(found.get("LOCAL_RANK", rank))
    return Place(rank, count, local_rank, int(found.get("LOCAL_WORLD_SIZE", count)))


def is_by_devices() -> bool:
    """Whether `--devices` started this process."""
    return BY_DEVICES in os.environ


def end_with_launcher() -> None:
    """Let this process stop, and save, when the launcher of `--devices` is killed.

    Elsewhere than on Linux such processes go on to the end of their run.
    """
    if not is_by_devices() or not sys.platform.startswith("linux"):
        return
    # Linux sends it for each thread of the launcher that ends before the last, and a second SIGTERM
    # would end this process without saving. So it is a signal of its own, and heard once.
    signal.signal(signal.SIGUSR1, _stop_once)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGUSR1)
    if os.environ[BY_DEVICES] != str(os.getppid()):
        os.kill(os.getpid(), signal.SIGTERM)


def _stop_once(signum: int, frame: FrameType | None) -> None:
    signal.signal(signum, signal.SIG_IGN)
    os.kill(os.getpid(), signal.SIGTERM)
