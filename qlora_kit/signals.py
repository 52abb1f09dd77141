"""SIGTERM, SIGINT and SIGHUP end the program at the next safe point, so training can be saved.

The first signal raises `Stopped` where the program stands, or, inside `deferred()`, at the next
`safe_point()`. It also gives every signal its default action back, so a second signal ends the
process at once, even inside a long call into C. Everything on the disk is whole even then,
because all writing goes through `storage`.

Signals belong to the process, so this module has state of its own. A program that uses the API
does not call `stop_on_signals`: its signals stay as they are, and `safe_point` does nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType

_HANDLED = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
_NOTE = b"\nstopping at the next safe point; a second signal ends at once\n"


class Stopped(BaseException):
    """A signal asked the program to end. Not an `Exception`: no library may swallow it.

    Args:
        signum: the number of the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum, self.exit_code = signum, 128 + signum

    def __reduce__(self) -> tuple[type[Stopped], tuple[int]]:
        return type(self), (self.signum,)


_received: int | None = None
_deferring = 0
_says_so = True


@contextlib.contextmanager
def stop_on_signals(*, says_so: bool = True) -> Iterator[None]:
    """Handle the signals while the block runs. Only the main thread may call this.

    Args:
        says_so: whether to tell the user that the end must wait; of several processes one does.
    """
    global _received, _says_so
    _received, _says_so = None, says_so
    try:
        with _handled_by(_receive):
            yield
    finally:
        # A program that continues after this block has been told of the signal already.
        _received = None


def _receive(signum: int, frame: FrameType | None) -> None:
    global _received
    _received = signum
    for number in _HANDLED:
        if signal.getsignal(number) is _receive:
            signal.signal(number, signal.SIG_DFL)
    if _deferring:
        if _says_so:
            _say_that_it_waits()
        return
    raise Stopped(signum)


def _say_that_it_waits() -> None:
    with contextlib.suppress(OSError):
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, _NOTE)


@contextlib.contextmanager
def passed_on(to: Callable[[int], bool]) -> Iterator[None]:
    """Pass the signals on to processes that this one has started, while the block runs.

    Args:
        to: sends a signal to them; returns whether there were any. Without them this process ends.
    """

    def receive(signum: int, frame: FrameType | None) -> None:
        if not to(signum):
            raise Stopped(signum)
        _say_that_it_waits()

    with _handled_by(receive):
        yield


@contextlib.contextmanager
def interrupts_to(receive: Callable[[], None]) -> Iterator[None]:
    """Let Ctrl-C call a function, and not end the program, while the block runs.

    The function may raise an error, which then comes from where the program stands.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield
        return
    before = signal.signal(signal.SIGINT, lambda signum, frame: receive())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Give the signals to a handler while the block runs, and afterwards back."""
    # A signal that the parent chose to ignore (nohup, a job in the background) stays ignored.
    handled = [number for number in _HANDLED if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in handled}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def disregard_signals() -> None:
    """Ignore the signals from now on: the program has said why it ends, and ends by itself."""
    for number in _HANDLED:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Let a signal wait for the next `safe_point` while the block runs."""
    global _deferring
    _deferring += 1
    try:
        yield
    finally:
        _deferring -= 1


def received() -> int:
    """Return the number of the signal that has come to this process; 0 if none has."""
    return _received or 0


def safe_point(agreed: Callable[[int], int] = lambda number: number) -> None:
    """End the program here if a signal has come. Call it where no work is half done.

    Args:
        agreed: returns the number of a signal that has come to any process of a run, given that of
            this process, so that all of them stop together; 0 stands for none.

    Raises:
        Stopped: a signal has come.
    """
    if number := agreed(received()):
        raise Stopped(number)
