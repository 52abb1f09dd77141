"""What a user types: lines, texts of several lines, and the history of them.

Yields one text a turn, from a terminal with line editing, or from a pipe, where each line is a
text. Knows nothing of models.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from qlora_kit.errors import DataError, EnvironmentFault
from qlora_kit.storage import read_text, write_text

PROMPT, MORE = "> ", ". "
_QUOTES = '"""'
_MOST_HISTORY = 1000


def is_typed() -> bool:
    """Return whether a person types: whether standard input is a terminal."""
    return sys.stdin.isatty()


# ---------------------------------------------------------------- a pipe


def piped_texts() -> Iterator[str]:
    """Yield each line of standard input that is not empty.

    Raises:
        DataError: a line is not UTF-8.
    """
    for number, raw in enumerate(sys.stdin.buffer, 1):
        try:
            text = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise DataError(
                f"standard input:{number}: not UTF-8; expected UTF-8 text; convert it first"
            ) from error
        if text:
            yield text


# ---------------------------------------------------------------- a terminal


def typed_texts(complain: Callable[[str], None]) -> Iterator[str]:
    """Yield each text that is typed, until the end of the input (Ctrl-D).

    A line that ends with a backslash goes on in the next, and so does a text between two `\"\"\"`.
    Ctrl-C drops what is typed so far.

    Args:
        complain: receives a line that the user should read.
    """
    while True:
        try:
            text = _text()
        except KeyboardInterrupt:
            complain("Ctrl-D or /quit ends the conversation")
            continue
        except EOFError:
            return
        try:
            text.encode()
        except UnicodeEncodeError:
            complain("what was typed is not UTF-8; expected UTF-8 text; check the terminal")
            continue
        if text.strip():
            yield text


def _text() -> str:
    line = _line(PROMPT)
    if line.lstrip().startswith(_QUOTES):
        return _quoted(line.lstrip().removeprefix(_QUOTES))
    lines = []
    while line.endswith("\\"):
        lines.append(line[:-1])
        line = _line(MORE)
    return "\n".join([*lines, line])


def _quoted(line: str) -> str:
    lines = []
    while not line.rstrip().endswith(_QUOTES):
        lines.append(line)
        line = _line(MORE)
    return "\n".join([*lines, line.rstrip().removesuffix(_QUOTES)]).strip("\n")


def _line(prompt: str) -> str:
    # Where the answers go elsewhere than to the terminal, the prompts must not be among them.
    return input(prompt if sys.stdout.isatty() else "")


# ---------------------------------------------------------------- history


def history_file() -> Path:
    """Return the file of the lines that were typed in earlier conversations."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "qlora-kit" / "chat_history"


@contextlib.contextmanager
def history_kept(complain: Callable[[str], None]) -> Iterator[None]:
    """Let the arrow keys bring lines back, those of earlier conversations too.

    They are kept in `history_file`, which nobody else may read.

    Args:
        complain: receives the reason why they are not kept, if they are not.
    """
    try:
        import readline
    except ImportError:
        # Without the library there is neither line editing nor history.
        yield
        return
    file = history_file()
    readline.set_auto_history(True)
    with contextlib.suppress(DataError):
        for line in read_text(file).splitlines()[-_MOST_HISTORY:]:
            readline.add_history(line)
    try:
        yield
    finally:
        count = readline.get_current_history_length()
        numbers = range(max(1, count - _MOST_HISTORY + 1), count + 1)
        lines = [readline.get_history_item(number) or "" for number in numbers]
        try:
            _make_private(file.parent)
            write_text(file, "".join(f"{line}\n" for line in lines if line), is_private=True)
        except (OSError, EnvironmentFault, UnicodeEncodeError) as error:
            complain(f"the history of what was typed is not kept: {error}")


def _make_private(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
