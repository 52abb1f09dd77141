"""The protocol of the processes of a run, and a run of one process, which is all there is yet."""

from __future__ import annotations

from typing import Protocol

from accelerate import PartialState

from qlora_kit.errors import EnvironmentFault


class Processes(Protocol):
    """The processes of a run. Every one of them makes the same calls in the same order."""

    @property
    def is_writer(self) -> bool:
        """Whether this process saves, logs and prints."""
        ...

    def total(self, value: float) -> float:
        """Return the sum of a number over all processes."""
        ...

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is set in any process, so that all of them decide the same."""
        ...


class OneProcess:
    """A process that trains by itself: every sum is its own number, every decision its own."""

    is_writer = True

    def total(self, value: float) -> float:
        """See `Processes`."""
        return value

    def any(self, flag: bool) -> bool:
        """See `Processes`."""
        return flag


def processes_of_this_run() -> Processes:
    """Return the processes that were launched.

    Raises:
        EnvironmentFault: several processes were launched; each would train on its own.
    """
    launched = PartialState().num_processes
    if launched > 1:
        raise EnvironmentFault(
            f"{launched} processes were launched; expected one (data parallel training is not "
            "built yet); start it without torchrun or accelerate launch"
        )
    return OneProcess()
