"""A piece of work in its own process, with a time limit; what it had found by then is kept.

The process sends each finding as a line of JSON through a pipe of its own, so nothing that a
library prints can spoil it, and nothing that was sent is lost when the process is killed.
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
    """How a process ended.

    Attributes:
        status: "done", "failed: …" or "killed …".
        seconds: that it ran.
        tail: the end of what it printed.
    """

    status: str
    seconds: float
    tail: str


def merge_into(figures: Figures, more: Mapping[str, Any]) -> None:
    """Add findings to those there are; a value replaces an earlier one under its name."""
    for name, value in more.items():
        if isinstance(value, Mapping) and isinstance(figures.get(name), dict):
            merge_into(figures[name], value)
        else:
            figures[name] = dict(value) if isinstance(value, Mapping) else value


def sender(descriptor: int) -> Callable[[Figures], None]:
    """Return what sends findings from within a supervised process.

    Args:
        descriptor: as `run` gives it to the command.
    """
    stream = os.fdopen(descriptor, "wb")
    _end_with_parent()

    def send(figures: Figures) -> None:
        stream.write(json.dumps(figures).encode() + b"\n")
        stream.flush()

    return send


def _end_with_parent() -> None:
    """Let the system kill this process when its supervisor is gone, even if that was killed."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def run(
    command: Callable[[int], list[str]],
    environment: Mapping[str, str],
    limit_seconds: float,
    receive: Callable[[Figures], None],
) -> Ended:
    """Run a command until it ends or its time is over; then it and all its children are killed.

    Args:
        command: of the descriptor that findings are to be sent through.
        environment: of the process.
        limit_seconds: that it may take.
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
    """Receive until the process ends; return whether it did before the deadline."""
    pending = b""
    while True:
        # Asked before reading: what it sent before it ended is in the pipe then.
        has_ended = process.poll() is not None
        while select.select([findings], [], [], 0 if has_ended else _POLL_SECONDS)[0]:
            chunk = findings.read(65536)
            if not chunk:
                # It closed its end; a child of it may outlive that.
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
