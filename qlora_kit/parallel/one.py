"""One process: sums are what they are, and it decides and writes alone."""

from __future__ import annotations

from typing import Protocol

from accelerate import PartialState

from qlora_kit.errors import EnvironmentFault


class Processes(Protocol):
    """The processes of a run. Every one of them makes the same calls in the same order."""

    @property
    def is_writer(self) -> bool:
        """Whether this one saves, logs and prints."""
        ...

    def total(self, value: int) -> int:
        """Return the sum of a count over all processes."""
        ...

    def any(self, flag: bool) -> bool:
        """Whether it is so in any of them: what one cannot do, none does."""
        ...


class OneProcess:
    """A process by itself."""

    is_writer = True

    def total(self, value: int) -> int:
        """See `Processes`."""
        return value

    def any(self, flag: bool) -> bool:
        """See `Processes`."""
        return flag


def processes_of_this_run() -> Processes:
    """Return the processes that were launched.

    Raises:
        EnvironmentFault: several were; each would train on its own.
    """
    launched = PartialState().num_processes
    if launched > 1:
        raise EnvironmentFault(
            f"{launched} processes were launched; expected one (data parallel training is not "
            "built yet); start it without torchrun or accelerate launch"
        )
    return OneProcess()
