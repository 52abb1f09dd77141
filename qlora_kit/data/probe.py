"""Renders a stranger's chat template once where it can do no harm, before it is used.

A forked child renders a few short conversations under a limit of time and memory and tells by
its exit status how that went. What a template raises is not judged here: it may refuse these
conversations and fit the user's. Where there is no `os.fork`, nothing is checked.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import psutil

from qlora_kit.errors import ModelError

if sys.platform != "win32":
    import resource

SECONDS = 5
MEMORY_BYTES = 1 << 30
# The longest templates of released models render 25 KB of instructions around short turns.
_MOST_CHARACTERS = 1 << 20
_POLL_SECONDS = 0.0005

_FINISHED, _TOO_LARGE = 0, 3
_TOOL = {"type": "function", "function": {"name": "a", "description": "b", "parameters": {}}}
_CONVERSATIONS: tuple[tuple[list[dict[str, str]], dict[str, Any]], ...] = tuple(
    ([{"role": role, "content": "a b"} for role in roles], options)
    for roles, options in (
        (("user",), {"add_generation_prompt": True}),
        (("user", "assistant"), {}),
        (("system", "user", "assistant", "user", "assistant"), {}),
        (("system", "user", "assistant", "user"), {"add_generation_prompt": True}),
        (("user", "assistant", "tool"), {"add_generation_prompt": True, "tools": [_TOOL]}),
    )
)

_passed: set[str] = set()


def probe_template(tokenizer: Any) -> None:
    """Check that the chat template of a tokenizer ends, and how much memory it takes.

    A template that passed is not probed again in this process.

    Raises:
        ModelError: it took too long or too much memory, or ended the process.
    """
    template = str(tokenizer.chat_template)
    if template in _passed or not hasattr(os, "fork"):
        return
    status = _status_of(lambda: _render_all(tokenizer))
    remedy = "use another model, or a chat template you trust"
    if status == _TOO_LARGE:
        raise ModelError(
            f"{_name(tokenizer)}: the chat template needs more than {MEMORY_BYTES >> 30} GiB, or "
            f"writes over {_MOST_CHARACTERS:,} characters, for a short conversation; expected a "
            f"few lines of text; {remedy}"
        )
    if status != _FINISHED:
        raise ModelError(
            f"{_name(tokenizer)}: the chat template does not finish a short conversation within "
            f"{SECONDS} s; expected a moment; {remedy}"
        )
    _passed.add(template)


def _name(tokenizer: Any) -> str:
    return str(getattr(tokenizer, "name_or_path", "") or "the tokenizer")


def _render_all(tokenizer: Any) -> None:
    for turns, options in _CONVERSATIONS:
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False, **options)
        except MemoryError:
            raise
        except Exception:
            # A template that refuses one conversation must still show what it does with others.
            continue
        if len(text) > _MOST_CHARACTERS:
            raise MemoryError


# ---------------------------------------------------------------- the child


def _status_of(work: Callable[[], None]) -> int | None:
    """Run `work` in a child; return its exit status, or None if it had to be ended."""
    # Python warns of forking a process with threads. The child renders text and ends: it takes
    # no lock of another thread, and if it did, the clock would end it.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _be_the_child(work)
    ended = False
    try:
        status = _wait(child)
        ended = status is not None
    finally:
        if not ended:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
    return status


def _be_the_child(work: Callable[[], None]) -> None:
    status = 1
    try:
        _limit_child()
        work()
        status = _FINISHED
    except MemoryError:
        status = _TOO_LARGE
    finally:
        # Nothing of the parent's is flushed, closed or run at exit.
        os._exit(status)


def _limit_child() -> None:
    # What the parent left to the collector must not be finalised twice.
    gc.disable()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    silence = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silence, stream)
    taken_bytes = psutil.Process().memory_info().vms
    for kind, most in (
        (resource.RLIMIT_AS, taken_bytes + MEMORY_BYTES),
        # Ends the child too where the parent is killed and its clock stands still.
        (resource.RLIMIT_CPU, math.ceil(SECONDS) + 1),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        within = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (within, hard))


def _wait(child: int) -> int | None:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(_POLL_SECONDS)
    return None
