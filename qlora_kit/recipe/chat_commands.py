"""What a user can tell a conversation besides what is said to the model: `/undo`, `/adapter`, ….

Takes a `Chat` and a line that begins with a slash; changes the conversation, and returns what to
show. Never prints.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.errors import ConfigError, DataError, OutputError
from qlora_kit.storage import parse_json, read_text, write_text

if TYPE_CHECKING:
    from qlora_kit.data.shapes import Message
    from qlora_kit.infer.chat import Chat

OFF = "off"


class Quit(Exception):  # noqa: N818 - no error
    """The user ends the conversation."""


@dataclass(frozen=True)
class _Command:
    """What follows the name of a command, what it does in words, and the function that does it."""

    takes: str
    text: str
    does: Callable[[Chat, str], str]


def carried_out(chat: Chat, line: str) -> str:
    """Carry out a line such as `/undo`; return what to show.

    Raises:
        ConfigError: there is no such command, or what follows it is not usable.
        Quit: the user ends the conversation.
    """
    name, _, rest = line[1:].partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        meant = f"did you mean /{near[0]}?" if near else "/help lists them;"
        raise ConfigError(
            f"/{name}: no such command; {meant} a text that begins with a slash is written with two"
        )
    return command.does(chat, rest.strip())


def _system(chat: Chat, text: str) -> str:
    if text:
        chat.set_system(None if text == OFF else text)
    return f"system: {chat.system}" if chat.system is not None else "system: nothing"


def _undo(chat: Chat, _: str) -> str:
    if not chat.undo():
        return "nothing to take back"
    return f"took the last turn and its answer back; {_turns(chat)} left"


def _adapter(chat: Chat, name: str) -> str:
    if name:
        chat.use(None if name == OFF else name)
    if not chat.names:
        return "there is no adapter: the base answers"
    shown = [
        f"{each or OFF} (answers)" if each == chat.speaker else each or OFF
        for each in (*chat.names, None)
    ]
    return f"adapter: {', '.join(shown)}"


def _clear(chat: Chat, _: str) -> str:
    chat.clear()
    return "all turns are forgotten" + ("; the system's stays" if chat.system else "")


def _save(chat: Chat, name: str) -> str:
    """Add the conversation to a file of records, one a line."""
    if not name:
        raise ConfigError("/save: no file; expected a name, such as /save talks.jsonl; give one")
    records = records_of(chat)
    if not records:
        raise DataError("/save: no turn has an answer; expected one; say something first")
    path = Path(name).expanduser()
    before = _records_in(path)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_text(path, before + lines)
    return f"saved to {path}, line {before.count(chr(10)) + 1}: `train --data {path}` reads it"


def _records_in(path: Path) -> str:
    """Return the lines of a file that lines are added to; "" if there is none.

    Raises:
        OutputError: it is no file of records, one a line, which must not be changed.
    """
    if path.suffix != ".jsonl":
        raise OutputError(f"/save {path}: expected a file of one record a line; name a .jsonl file")
    if not path.exists():
        return ""
    text = read_text(path)
    try:
        last = parse_json(text.rstrip("\n").split("\n")[-1], str(path)) if text.strip() else {}
    except DataError:
        last = None
    if not isinstance(last, dict):
        raise OutputError(
            f"/save {path}: its last line is no record; expected a file of one JSON object a line; "
            "name another"
        )
    return text if not text or text.endswith("\n") else text + "\n"


def records_of(chat: Chat) -> list[dict[str, object]]:
    """Return the conversation as records of data: one, or one a turn where it has no memory.

    Turns that got no answer are left out.
    """
    system = [m for m in chat.messages if m.role == "system"]
    turns = [m for m in chat.messages if m.role != "system"]
    pairs = [(q, a) for q, a in zip(turns[::2], turns[1::2], strict=True) if a.content.strip()]
    if not pairs:
        return []
    if chat.is_raw:
        return [{"prompt": q.content, "completion": a.content.rstrip()} for q, a in pairs]
    said = [_as_record(m) for pair in pairs for m in pair]
    return [{"messages": [*(_as_record(m) for m in system), *said]}]


def _as_record(message: Message) -> Mapping[str, str]:
    return {"role": message.role, "content": message.content.strip()}


def _help(chat: Chat, _: str) -> str:
    width = max(len(f"/{name} {each.takes}") for name, each in COMMANDS.items())
    lines = [f"{f'/{name} {each.takes}':{width}}  {each.text}" for name, each in COMMANDS.items()]
    return "\n".join([*lines, *_KEYS])


def _quit(chat: Chat, _: str) -> str:
    raise Quit


def _turns(chat: Chat) -> str:
    count = sum(message.role == "user" for message in chat.messages)
    return f"{count} turn" + ("" if count == 1 else "s")


COMMANDS: Mapping[str, _Command] = {
    "system": _Command("[TEXT|off]", "what the model is told first", _system),
    "undo": _Command("", "take the last turn and its answer back", _undo),
    "adapter": _Command("[NAME|off]", "who answers from now on; off: the base alone", _adapter),
    "save": _Command("FILE.jsonl", "add the conversation to a file that `train` reads", _save),
    "clear": _Command("", "forget all turns", _clear),
    "help": _Command("", "this list", _help),
    "quit": _Command("", "end, as Ctrl-D does", _quit),
}
_KEYS = (
    'A line that ends with \\ goes on in the next; so does a text between """ and """.',
    "Ctrl-C stops an answer, and drops a line that is being typed.",
)
