"""A time limit on a stranger's code that runs in this process: templates, patterns, shapes.

`time_limit` raises `TimeUp` inside its block. It works only in the main thread of a POSIX system,
the only place where running code can be interrupted; elsewhere the block runs without a limit.

Signals belong to the process, so this module has state of its own.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType

_is_listening = False


class TimeUp(BaseException):
    """The block of a `time_limit` took too long.

    It is no `Exception`, because jinja2 swallows exceptions while it folds constants.
    """


class time_limit:  # noqa: N801 - used like a function
    """Raise `TimeUp` in a block that takes longer than `seconds` of wall-clock time.

    It is a class and not a generator, because every rendered sample enters it: that takes 2 µs
    inside `many_limits`, and 8 µs alone. A timer that ran before is put back.

    Args:
        seconds: more than 0.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._around: contextlib.AbstractContextManager[None] | None = None
        self._is_on = False

    def __enter__(self) -> None:
        if not _is_listening:
            self._around = many_limits()
            self._around.__enter__()
        self._is_on = _is_listening and threading.current_thread() is threading.main_thread()
        if self._is_on:
            self._before = signal.setitimer(signal.ITIMER_REAL, self._seconds)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._is_on:
            signal.setitimer(signal.ITIMER_REAL, *self._before)
        if self._around is not None:
            self._around.__exit__(None, None, None)


@contextlib.contextmanager
def many_limits() -> Iterator[None]:
    """Listen to the timer while the block runs, so that each `time_limit` in it is cheap."""
    global _is_listening
    is_main = threading.current_thread() is threading.main_thread()
    if _is_listening or not is_main or not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, _raise)
    _is_listening = True
    try:
        yield
    finally:
        _is_listening = False
        signal.signal(signal.SIGALRM, before)


def _raise(signum: int, frame: FrameType | None) -> None:
    raise TimeUp
