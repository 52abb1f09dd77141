"""What the stages announce while they run.

A stage receives an `Announce` callable and passes it events; `report/` turns them into a
progress bar, a log and a plot. Stages never print.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """Base of all events."""


@dataclass(frozen=True)
class Notice(Event):
    """Something the user should read once: a choice made for them, a number of rows lost."""

    text: str


@dataclass(frozen=True)
class Facts(Event):
    """A small table the user should see: a title and rows of name and value."""

    title: str
    rows: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Answered(Event):
    """A model continued a prompt; `text` is what it added."""

    text: str


@dataclass(frozen=True)
class RowShown(Event):
    """A row of the data, to be looked at token by token."""

    title: str
    tokens: tuple[tuple[str, bool], ...]
    """text of each, and whether it is supervised"""


@dataclass(frozen=True)
class Closing(Event):
    """The command is done: the files it wrote and the commands to type next."""

    written: tuple[str, ...]
    commands: tuple[str, ...]


@dataclass(frozen=True)
class LoadProgress(Event):
    """The base is being read: `done` of `total` tensors are in place."""

    done: int
    total: int


@dataclass(frozen=True)
class RunStarted(Event):
    """Training is about to begin."""

    first_step: int
    total_steps: int
    epochs: float
    evaluated_step: int = 0
    """the last step whose evaluation counts; a resumed run may have one to repeat"""


@dataclass(frozen=True)
class StepFinished(Event):
    """One optimiser step is done."""

    optimizer_step: int
    epoch: float
    loss: float
    """mean over the supervised tokens of the whole accumulation window, nats per token"""
    learning_rate: float
    grad_norm: float
    """before clipping"""
    supervised_tokens: int
    tokens: int
    """tokens run through the model, padding not counted"""
    step_seconds: float
    memory_bytes: int
    """peak allocated on the device since the run began; on a CPU anonymous, of the process"""


@dataclass(frozen=True)
class StepSkipped(Event):
    """An optimiser step changed no weight, because its numbers are not finite."""

    optimizer_step: int
    epoch: float
    loss: float
    grad_norm: float
    rows: tuple[int, ...]
    """index of the source samples that the numbers came from"""


@dataclass(frozen=True)
class MicroBatchHalved(Event):
    """Memory ran out: fewer rows go through the model at a time, in more passes a step."""

    optimizer_step: int
    rows_asked: int
    rows_now: int


@dataclass(frozen=True)
class Evaluated(Event):
    """The validation rows were measured."""

    optimizer_step: int
    epoch: float
    loss: float
    """nats per supervised token"""
    is_best: bool
    seconds: float


@dataclass(frozen=True)
class CheckpointSaved(Event):
    """A resumable state is on disk."""

    optimizer_step: int
    path: str


@dataclass(frozen=True)
class RunFinished(Event):
    """Training ended; `reason` says why."""

    optimizer_step: int
    reason: str
    seconds: float


Announce = Callable[[Event], None]


def silent(event: Event) -> None:
    """Drop the event: the listener of callers who want none."""


def announce_to(listeners: Iterable[Announce]) -> Announce:
    """Return one listener that passes each event to all of `listeners`, in order."""
    listeners = tuple(listeners)

    def announce(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return announce
