"""Runs a piece of work in its own process, with a time limit; its findings so far are kept.

The process sends each finding as a line of JSON through a pipe of its own. So the printed lines of
a library cannot spoil a finding, and no sent finding is lost when the process is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

Figures = dict[str, Any]
_TAIL_BYTES = 4000
_POLL_SECONDS = 0.2
# From linux/prctl.h.
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Ended:
    """The end of a process.

    Attributes:
        status: "done", "failed: …" or "killed …".
        seconds: the seconds that it ran.
        tail: the end of its printed output.
    """

    status: str
    seconds: float
    tail: str


def merge_into(figures: Figures, more: Mapping[str, Any]) -> None:
    """Add findings to `figures`; a value replaces an earlier value of the same name."""
    for name, value in more.items():
        if isinstance(value, Mapping) and isinstance(figures.get(name), dict):
            merge_into(figures[name], value)
        else:
            figures[name] = dict(value) if isinstance(value, Mapping) else value


def sender(descriptor: int) -> Callable[[Figures], None]:
    """Return the function with which a supervised process sends its findings.

    Args:
        descriptor: the file descriptor that `run` gives to the command.
    """
    stream = os.fdopen(descriptor, "wb")
    _end_with_parent()

    def send(figures: Figures) -> None:
        stream.write(json.dumps(figures).encode() + b"\n")
        stream.flush()

    return send


def _end_with_parent() -> None:
    """Let the system kill this process when its supervisor ends, even by a kill."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def run(
    command: Callable[[int], list[str]],
    environment: Mapping[str, str],
    limit_seconds: float,
    receive: Callable[[Figures], None],
) -> Ended:
    """Run a command until it ends or its time is over; then kill it and all its children.

    Args:
        command: returns the command, given the file descriptor to send findings through.
        environment: environment variables of the process.
        limit_seconds: seconds that the process may take.
        receive: called with each finding as it comes.
    """
    started = time.monotonic()
    reading, writing = os.pipe()
    with tempfile.TemporaryFile() as output, os.fdopen(reading, "rb", buffering=0) as findings:
        try:
            process = subprocess.Popen(
                command(writing), env=dict(environment), stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, pass_fds=(writing,), start_new_session=True,
            )  # fmt: skip
        finally:
            os.close(writing)
        try:
            in_time = _listen(process, findings, started + limit_seconds, receive)
        finally:
            _kill_all(process)
        seconds = time.monotonic() - started
        status = _status(process.returncode) if in_time else f"killed after {limit_seconds:.0f} s"
        return Ended(status, seconds, _tail(output))


def _listen(
    process: subprocess.Popen[bytes],
    findings: BinaryIO,
    deadline: float,
    receive: Callable[[Figures], None],
) -> bool:
    """Receive findings until the process ends; return whether it ended before the deadline."""
    pending = b""
    while True:
        # Polled before reading: if the process has ended, all its findings are in the pipe now.
        has_ended = process.poll() is not None
        while select.select([findings], [], [], 0 if has_ended else _POLL_SECONDS)[0]:
            chunk = findings.read(65536)
            if not chunk:
                # The process closed its end of the pipe, but a child of it may still run.
                if not has_ended:
                    time.sleep(_POLL_SECONDS)
                break
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                receive(json.loads(line))
            if time.monotonic() > deadline:
                break
        if has_ended:
            return True
        if time.monotonic() > deadline:
            return False


def _kill_all(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _status(code: int) -> str:
    if code == 0:
        return "done"
    return f"failed: exit {code}" if code > 0 else f"failed: killed by signal {-code}"


def _tail(output: Any) -> str:
    size = output.seek(0, os.SEEK_END)
    output.seek(max(0, size - _TAIL_BYTES))
    text: str = output.read().decode(errors="replace")
    return text
