"""What is asked of the engine, and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from qlora_kit.infer.generate import Sampling

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Asked:
    """A request for one answer.

    Attributes:
        ids: token ids of the prompt, at least one.
        sampling: how tokens are chosen; its seed is this request's own.
        tokenizer: turns the answer's ids into text.
        adapter: name of the adapter; None for the base alone.
        ends: ids that end the answer.
        stops: texts that end the answer, which then ends before them.
        seconds: the longest time that the request may take, its wait included.
        model: the name that was asked for, for the log; by default that of the adapter.
    """

    ids: tuple[int, ...]
    sampling: Sampling
    tokenizer: Any
    adapter: str | None = None
    ends: frozenset[int] = frozenset()
    stops: tuple[str, ...] = ()
    seconds: float = float("inf")
    model: str = ""

    @property
    def name(self) -> str:
        """What the log calls the model of the request."""
        return self.model or self.adapter or "base"


@dataclass(frozen=True)
class Piece:
    """Some more text of an answer."""

    text: str


@dataclass(frozen=True)
class Finished:
    """An answer is whole.

    Attributes:
        reason: stop, at an end token or a stop text; length, at the most tokens.
        tokens: tokens that were chosen, the end token included.
        batch: rows of the largest batch that the answer was in.
        seconds: time since the request came.
    """

    reason: FinishReason
    tokens: int
    batch: int
    seconds: float


@dataclass(frozen=True)
class Failed:
    """An answer ends without being whole.

    Attributes:
        status: the status of HTTP that says so.
        reason: one line without text of the request.
    """

    status: int
    reason: str


Heard = Piece | Finished | Failed
Hear = Callable[[Heard], None]


class QueueFull(Exception):  # noqa: N818 - it says what is, and is no fault
    """No more requests are taken for now.

    Args:
        retry_seconds: after so many seconds there may be room.
    """

    def __init__(self, retry_seconds: int) -> None:
        super().__init__(f"too many requests; try again in {retry_seconds} s")
        self.retry_seconds = retry_seconds
