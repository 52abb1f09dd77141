"""The chat template that a tokenizer is used with: its own, a built-in one, or one from a file.

Takes a tokenizer and the value of `--chat-template`; sets the tokenizer's `chat_template`, so
the template is saved with the adapter and generation uses the same one. A template is a
stranger's program: before it is used, a forked child renders a few short conversations with it,
under a limit of time and memory, where it can do no harm. Never renders a sample.
"""

from __future__ import annotations

import contextlib
import difflib
import gc
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from qlora_kit.data.chat_text import ChatWriter, special_tokens, wants_bos
from qlora_kit.data.shapes import Message
from qlora_kit.errors import ConfigError, DataError, ModelError
from qlora_kit.time_limit import TimeUp, time_limit

if sys.platform != "win32":
    import resource

FOR_BASE_MODELS = "alpaca"
"""the built-in template of a tokenizer that has none"""

_FOLDER = Path(__file__).parent / "chat_templates"
# Stands before a built-in template where rows begin with a BOS token.
_BOS = "{{- bos_token -}}"
# The tokens that each built-in template writes. A tokenizer that lacks one of them would spell it
# in several tokens, and no answer would end.
_NEEDS: dict[str, tuple[str, ...]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "llama-3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
_MOST_OF_AN_END = 40
# The longest templates of released models are 20 KB long.
_MOST_BYTES = 1 << 20
_SECONDS_TO_COMPILE = 5.0

PROBE_SECONDS = 5
PROBE_BYTES = 1 << 30
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


@cache
def built_in_templates() -> dict[str, str]:
    """Return the built-in templates by name, without a BOS token."""
    return {path.stem: path.read_text("utf-8") for path in sorted(_FOLDER.glob("*.jinja"))}


def choose_template(tokenizer: Any, asked: str | None = None) -> None:
    """Set the chat template that a tokenizer is used with.

    Args:
        tokenizer: transformers' tokenizer.
        asked: a built-in name or a Jinja file; if None, a tokenizer keeps its own template, and
            a tokenizer without one is given `FOR_BASE_MODELS`.

    Raises:
        ConfigError: there is no such name or file, the file is no template, or the tokenizer
            lacks a special token of the built-in template.
        ModelError: the template takes too long or too much memory, see `probe_template`.
    """
    if asked is None and not tokenizer.chat_template:
        asked = FOR_BASE_MODELS
    if asked in built_in_templates():
        tokenizer.chat_template = _built_in_template(asked, tokenizer)
    elif asked is not None:
        tokenizer.chat_template = _read(asked)
    if not _is_built_in(tokenizer.chat_template):
        probe_template(tokenizer)
    if asked is not None:
        _check_syntax(tokenizer, asked)


def spelled_out_end(tokenizer: Any) -> str | None:
    """Return the text that the chat template ends an answer with, where it holds no special token.

    A model learns such an end letter by letter.

    Returns:
        At most `_MOST_OF_AN_END` characters of it; None where the template ends an answer with a
        special token, or with nothing.
    """
    answer = "a1b2"
    turns = (Message("user", "a"), Message("assistant", answer))
    try:
        text = ChatWriter(tokenizer).write(turns, "a short conversation")
    except DataError:
        return None
    end = text.rpartition(answer)[2].strip()
    if not end or any(token in end for token in special_tokens(tokenizer)):
        return None
    return end[:_MOST_OF_AN_END]


def _built_in_template(name: str, tokenizer: Any) -> str:
    known = tokenizer.get_vocab()
    missing = [token for token in _NEEDS.get(name, ()) if token not in known]
    if missing:
        fitting = [name for name in built_in_templates() if {*_NEEDS.get(name, ())} <= {*known}]
        raise ConfigError(
            f"--chat-template {name}: the tokenizer has no token {', '.join(missing)}; expected "
            f"one made for this template; pass {', '.join(fitting)} or a file"
        )
    return (_BOS if wants_bos(tokenizer) else "") + built_in_templates()[name]


def _is_built_in(template: Any) -> bool:
    return str(template).removeprefix(_BOS) in built_in_templates().values()


def _read(asked: str) -> str:
    path = Path(asked)
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ConfigError(
                f"--chat-template {asked}: {path.stat().st_size:,} bytes; expected a Jinja "
                f"template of at most {_MOST_BYTES:,}; name another file"
            )
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"--chat-template {asked}: not UTF-8 text; expected a Jinja template; save it as UTF-8"
        ) from error
    except OSError as error:
        names = [*built_in_templates()]
        near = difflib.get_close_matches(asked, names, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(
            f"--chat-template {asked}: {reason}; expected a Jinja file or one of "
            f"{', '.join(names)}{meant}"
        ) from error
    if not text.strip():
        raise ConfigError(f"--chat-template {asked}: empty; expected a Jinja template; fill it in")
    return text


def _check_syntax(tokenizer: Any, asked: str) -> None:
    """Compile the template once, so that the error for a slip in it names the line."""
    import jinja2

    try:
        with time_limit(_SECONDS_TO_COMPILE):
            tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        reason = str(error.message).splitlines()[0][:200]
        raise ConfigError(
            f"--chat-template {asked}: line {error.lineno}: {reason}; expected a Jinja "
            "template; correct it"
        ) from error
    except (TimeUp, Exception):
        # The template may still suit the user's own turns, which are judged when they are rendered.
        return


# ---------------------------------------------------------------- the probe


def probe_template(tokenizer: Any) -> None:
    """Check that a tokenizer's chat template finishes, and within a limit of memory.

    A template that passed is not probed again in this process.

    Raises:
        ModelError: the template took too long or too much memory, or ended its process.
    """
    template = str(tokenizer.chat_template)
    if template in _passed or not hasattr(os, "fork"):
        return
    status = _status_of(lambda: _render_all(tokenizer))
    remedy = "use another model, or a chat template you trust"
    if status == _TOO_LARGE:
        raise ModelError(
            f"{_name(tokenizer)}: the chat template needs more than {PROBE_BYTES >> 30} GiB, or "
            f"writes over {_MOST_CHARACTERS:,} characters, for a short conversation; expected a "
            f"few lines of text; {remedy}"
        )
    if status != _FINISHED:
        raise ModelError(
            f"{_name(tokenizer)}: the chat template does not finish a short conversation within "
            f"{PROBE_SECONDS} s; expected a moment; {remedy}"
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
            # A template that refuses one conversation is still tried with the others.
            continue
        if len(text) > _MOST_CHARACTERS:
            raise MemoryError


# ---------------------------------------------------------------- its child


def _status_of(work: Callable[[], None]) -> int | None:
    """Run `work` in a child; return its exit status, or None if the time limit ended it."""
    # Python warns of forking a process with threads. The child renders text and ends: it takes
    # no lock of another thread, and if it did, the time limit would end it.
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
        # The child must not flush or close the parent's files, nor run its exit handlers.
        os._exit(status)


def _limit_child() -> None:
    # Objects that the parent left to the collector must not be finalised twice.
    gc.disable()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    silence = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silence, stream)
    taken_bytes = psutil.Process().memory_info().vms
    for kind, most in (
        (resource.RLIMIT_AS, taken_bytes + PROBE_BYTES),
        # Ends the child even where the parent, which watches the time, has been killed.
        (resource.RLIMIT_CPU, math.ceil(PROBE_SECONDS) + 1),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        within = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (within, hard))


def _wait(child: int) -> int | None:
    end = time.monotonic() + PROBE_SECONDS
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(_POLL_SECONDS)
    return None
