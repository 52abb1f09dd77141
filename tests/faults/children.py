"""Children forked from a process that has torch loaded: started, killed, waited for.

A fork takes milliseconds, while a fresh interpreter takes seconds to import torch; so hundreds of
processes can be killed in minutes. The parent must never have computed with more than one thread:
a lock that another thread held at the fork would never be released.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# A child that hangs is a broken promise too; the longest run takes a few seconds.
_MOST_SECONDS = 120.0
_HUNG = 124
_CRASHED = 99


@dataclass(frozen=True)
class Ended:
    """The end of a child.

    Attributes:
        code: its exit code; 128 + n if it died of signal n.
        errors: its standard error.
        output: its standard output.
    """

    code: int
    errors: str
    output: str

    @property
    def error_lines(self) -> list[str]:
        """The lines a user sees as errors; a traceback shows as one too."""
        starts = ("error: ", "Traceback")
        return [line for line in self.errors.splitlines() if line.startswith(starts)]


@dataclass(frozen=True)
class Child:
    """A running child, with the files that it writes to."""

    pid: int
    streams: Path

    def send(self, signum: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signum)

    def wait(self, seconds: float = _MOST_SECONDS) -> Ended:
        """Wait for the child's end; kill it if it hangs."""
        hung = not self.ends_within(seconds)
        if hung:
            self.send(signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        code = _HUNG if hung else 128 - code if code < 0 else code
        texts = [self.streams.with_suffix(kind) for kind in (".err", ".out")]
        errors, output = (path.read_text(encoding="utf-8", errors="replace") for path in texts)
        return Ended(code, errors, output)

    def ends_within(self, seconds: float) -> bool:
        """Return whether the child ends in time; it is not reaped yet."""
        descriptor = os.pidfd_open(self.pid)
        try:
            return bool(select.select([descriptor], [], [], seconds)[0])
        finally:
            os.close(descriptor)


def start(action: Callable[[], Any], streams: Path) -> Child:
    """Fork a child that does `action`; its output goes to the files `streams`.out and .err."""
    streams.parent.mkdir(parents=True, exist_ok=True)
    for kind in (".out", ".err"):
        streams.with_suffix(kind).write_bytes(b"")
    pid = _fork()
    if pid:
        return Child(pid, streams)
    code = _CRASHED
    try:
        _redirect(streams)
        _default_signals()
        action()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _fork() -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        # From 3.12 on, Python warns of threads; here, the libraries' threads are idle.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _redirect(streams: Path) -> None:
    for descriptor, kind in ((1, ".out"), (2, ".err")):
        file = os.open(streams.with_suffix(kind), os.O_WRONLY | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    # The terminal of a run asks `sys.stdout` what it is.
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115


def _default_signals() -> None:
    # A job in the background is born with SIGINT ignored, and the kit would respect that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def finish(action: Callable[[], Any], streams: Path) -> Ended:
    """Do `action` in a child and wait for it."""
    return start(action, streams).wait()


def spread(
    case: Callable[[Item], Result], items: Sequence[Item], folder: Path, workers: int | None = None
) -> list[Result]:
    """Return `case` of each item, computed in as many children as there are CPUs.

    Raises:
        RuntimeError: a worker crashed, which is a defect of the harness and not of the kit.
    """
    count = min(len(items), workers or len(os.sched_getaffinity(0)))
    folder.mkdir(parents=True, exist_ok=True)

    def work(number: int) -> None:
        results = [case(item) for item in items[number::count]]
        (folder / f"worker-{number}.pickle").write_bytes(pickle.dumps(results))

    children = [
        start(lambda number=number: work(number), folder / f"worker-{number}")
        for number in range(count)
    ]
    ends = [child.wait(seconds=3600) for child in children]
    if wrong := [end.errors for end in ends if end.code]:
        raise RuntimeError(f"a worker crashed:\n{wrong[0]}")
    results: list[Any] = [None] * len(items)
    for number in range(count):
        results[number::count] = pickle.loads((folder / f"worker-{number}.pickle").read_bytes())
    return results
