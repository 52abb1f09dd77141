"""Makes one record of a known shape a sample.

Takes the fields of a record and where it stands; returns a frozen sample with the texts as
they are written, or raises one line that says what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qlora_kit.data.faults import kind_of
from qlora_kit.data.messages import read_tools, read_turns
from qlora_kit.data.shapes import Conversation, Message, Pair, Sample, Shape, Text
from qlora_kit.data.text_fields import filled, optional, string
from qlora_kit.errors import DataError

Fields = Mapping[str, Any]


def to_sample(shape: Shape, record: Fields, where: str) -> Sample:
    """Return the sample that a record is.

    Args:
        shape: what the record is; its required fields are there.
        record: its fields.
        where: its place, for the sample and for errors.

    Raises:
        DataError: a field is not what the shape has there.
    """
    return _CONVERT[shape](record, where)


def _from_chat(record: Fields, where: str) -> Sample:
    return _conversation(record, read_turns(record["messages"], "messages", where), where)


def _from_sharegpt(record: Fields, where: str) -> Sample:
    turns = read_turns(record["conversations"], "conversations", where)
    return _conversation(record, turns, where)


def _from_chat_pair(record: Fields, where: str) -> Sample:
    asked = _side(record, "prompt", "user", where)
    answered = _side(record, "completion", "assistant", where)
    return _conversation(record, (*asked, *answered), where)


def _side(record: Fields, key: str, role: str, where: str) -> tuple[Message, ...]:
    if isinstance(record[key], list):
        return read_turns(record[key], key, where)
    return (Message(role, filled(record, key, where)),)


def _from_alpaca(record: Fields, where: str) -> Sample:
    instruction, extra = string(record, "instruction", where), optional(record, "input", where)
    if not instruction.strip() and not extra.strip():
        filled(record, "instruction", where)
    asked = "\n\n".join(text for text in (instruction, extra) if text)
    turns = (*_history(record.get("history"), where), Message("user", asked))
    answer = Message("assistant", filled(record, "output", where))
    return _conversation(record, (*turns, answer), where)


def _history(rounds: Any, where: str) -> list[Message]:
    """Return the turns of earlier rounds, each a question and its answer."""
    messages = []
    for number, each in enumerate([] if rounds is None else _list(rounds, where), 1):
        if not isinstance(each, list) or len(each) != 2:
            raise DataError(
                f'{where}: round {number} of "history" is no pair; expected [question, answer]; '
                "write both"
            )
        for role, text in zip(("user", "assistant"), each, strict=True):
            said = filled({"history": text}, "history", where, f"round {number}: ")
            messages.append(Message(role, said))
    return messages


def _list(value: Any, where: str) -> list[Any]:
    if isinstance(value, list):
        return value
    raise DataError(
        f'{where}: "history" is {kind_of(value)}; expected a list of rounds; write them in [ ]'
    )


def _from_qa(record: Fields, where: str) -> Sample:
    turns = (
        Message("user", filled(record, "question", where)),
        Message("assistant", filled(record, "answer", where)),
    )
    return _conversation(record, turns, where)


def _conversation(record: Fields, turns: tuple[Message, ...], where: str) -> Conversation:
    """Put the system message first, and look at how the turns begin and end."""
    system = optional(record, "system", where)
    if system:
        if turns[0].role == "system":
            raise DataError(
                f'{where}: "system" and a system turn; expected one of them; remove the other'
            )
        turns = (Message("system", system), *turns)
    last = turns[-1]
    if last.role != "assistant":
        article = "a tool's" if last.role == "tool" else f"the {last.role}'s"
        raise DataError(
            f"{where}: the last turn is {article}; expected the assistant's; "
            "add the answer or remove the turn"
        )
    return Conversation(turns, where, read_tools(record.get("tools"), where))


def _from_pair(record: Fields, where: str) -> Sample:
    return Pair(string(record, "prompt", where), filled(record, "completion", where), where)


def _from_text(record: Fields, where: str) -> Sample:
    return Text(filled(record, "text", where), where)


_CONVERT: dict[Shape, Callable[[Fields, str], Sample]] = {
    Shape.CHAT: _from_chat,
    Shape.SHAREGPT: _from_sharegpt,
    Shape.ALPACA: _from_alpaca,
    Shape.CHAT_PAIR: _from_chat_pair,
    Shape.PAIR: _from_pair,
    Shape.QA: _from_qa,
    Shape.TEXT: _from_text,
}
