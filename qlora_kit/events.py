"""The events that stages announce while they run.

A stage takes an `Announce` callable and passes events to it; `report/` turns the events into a
progress bar, a log and a plot. Stages never print.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Event:
    """Base of all events."""


@dataclass(frozen=True)
class Notice(Event):
    """A line that the user should read once: a choice made for them, a number of lost rows."""

    text: str


@dataclass(frozen=True)
class LogLine(Event):
    """A line of the log of a command that goes on until it is stopped."""

    text: str


@dataclass(frozen=True)
class Facts(Event):
    """A small table the user should see: a title and rows of name and value."""

    title: str
    rows: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Table(Event):
    """A table the user should see, of more than a name and a value a row."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Answered(Event):
    """A model continued a prompt; `text` is the continuation."""

    text: str


@dataclass(frozen=True)
class AnswerPart(Event):
    """A part of an answer, told while it comes."""

    text: str


@dataclass(frozen=True)
class AnswerEnded(Event):
    """An answer that was told in parts has ended."""

    ended: str
    """why: end token, length, context, or stopped"""
    prompt_tokens: int
    kept_tokens: int
    """tokens of the prompt that were not computed again"""
    new_tokens: int
    first_seconds: float
    """time to the first token"""
    seconds: float


@dataclass(frozen=True)
class Told(Event):
    """What the user asked of a conversation, and not of the model, is answered in lines."""

    text: str


@dataclass(frozen=True)
class RowShown(Event):
    """A row of the data is shown token by token."""

    title: str
    tokens: tuple[tuple[str, float], ...]
    """the text of each token, and the factor of its loss: 0 where it is not supervised"""


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
    epochs: float | None
    """epochs of all steps; None where the rows of one are not known"""
    evaluated_step: int = 0
    """the last step whose evaluation counts; a resumed run may repeat a later one"""


@dataclass(frozen=True)
class StepFinished(Event):
    """One optimiser step is done."""

    optimizer_step: int
    epoch: float
    loss: float
    """mean over the weight of the whole accumulation window, such as nats per supervised token"""
    learning_rate: float
    grad_norm: float
    """before clipping"""
    weight: int
    """number of what the loss is a mean over, in the whole window"""
    tokens: int
    """tokens run through the model, padding not counted"""
    step_seconds: float
    memory_bytes: int
    """on a GPU the peak of allocated bytes since the run began; on a CPU the anonymous memory"""
    weighs: str = "supervised_tokens"
    """the name of the weight in logs"""
    loss_weight: float | None = None
    """the sum of weights that the loss is divided by; None where all count alike"""
    sources: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """of each of several sources in the step: its summed loss, and the weight to divide it by"""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """what else was measured of the window, by name"""


@dataclass(frozen=True)
class StepSkipped(Event):
    """An optimiser step changed no weight, because its loss or gradient is not finite."""

    optimizer_step: int
    epoch: float
    loss: float
    grad_norm: float
    rows: tuple[int, ...]
    """indices of the source samples that these numbers came from"""


@dataclass(frozen=True)
class MicroBatchHalved(Event):
    """Memory ran out; from now on fewer rows go through the model at a time, in more passes."""

    optimizer_step: int
    rows_asked: int
    rows_now: int


@dataclass(frozen=True)
class Evaluated(Event):
    """The validation rows were measured."""

    optimizer_step: int
    epoch: float
    loss: float
    """mean over the weight, such as nats per supervised token"""
    is_best: bool
    seconds: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    """what else was measured, by name"""


@dataclass(frozen=True)
class CheckpointSaved(Event):
    """A resumable state is on disk."""

    optimizer_step: int
    path: str


@dataclass(frozen=True)
class RunFinished(Event):
    """Training has ended; `reason` says why."""

    optimizer_step: int
    reason: str
    seconds: float


Announce = Callable[[Event], None]


def silent(event: Event) -> None:
    """Drop the event; for callers who want no events."""


def announce_to(listeners: Iterable[Announce]) -> Announce:
    """Return one listener that passes each event to all of `listeners`, in order."""
    listeners = tuple(listeners)

    def announce(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return announce
