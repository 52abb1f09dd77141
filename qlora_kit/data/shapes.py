"""Recognises what a record is by its keys, and makes it a sample.

Takes `Line`s; returns frozen `Conversation`, `Pair` and `Text` that know where they stand.
Never changes a text, and imports neither torch nor transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from qlora_kit.data.faults import Faults
from qlora_kit.data.read import kind_of, place
from qlora_kit.errors import DataError
from qlora_kit.storage import Line

ROLES = ("system", "user", "assistant")


_SURROGATE = re.compile("[\ud800-\udfff]")


class Shape(StrEnum):
    """What a record is. The order is that of recognition: the first whose keys are there."""

    CHAT = "chat"
    ALPACA = "alpaca"
    PAIR = "pair"
    QA = "qa"
    TEXT = "text"


_KEYS: dict[Shape, tuple[str, ...]] = {
    Shape.CHAT: ("messages",),
    Shape.ALPACA: ("instruction", "output"),
    Shape.PAIR: ("prompt", "completion"),
    Shape.QA: ("question", "answer"),
    Shape.TEXT: ("text",),
}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn; `role` is one of `ROLES`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns for a chat template; the last is the assistant's."""

    messages: tuple[Message, ...]
    place: str


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt and its continuation, used as they are, without a template."""

    prompt: str
    completion: str
    place: str


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text, all of it to be learnt."""

    text: str
    place: str


Sample = Conversation | Pair | Text


def recognise(record: Mapping[str, Any]) -> Shape | None:
    """Return the shape whose keys the record has, or None."""
    return next((shape for shape, keys in _KEYS.items() if record.keys() >= {*keys}), None)


def to_samples(lines: Iterable[Line]) -> tuple[Shape, list[Sample]]:
    """Turn the records of one file into samples.

    Returns:
        The shape they share, that of the first record, and one sample a record, in order.

    Raises:
        DataError: all faults found, one a line; see `Faults`.
    """
    faults = Faults()
    samples: list[Sample] = []
    first: tuple[Shape, str] | None = None
    try:
        for line in lines:
            try:
                shape = _shape_of(line)
                first = first or (shape, place(line))
                _same_shape(shape, place(line), *first)
                samples.append(_CONVERT[shape](line.record, place(line)))
            except DataError as error:
                faults.add(*error.faults)
    except DataError as error:
        # The file cannot be read on from here; what was found before is told as well.
        faults.add(*error.faults)
    faults.raise_if_any()
    if first is None:
        raise DataError("the data: no records; expected at least one; add rows")
    return first[0], samples


def _same_shape(shape: Shape, where: str, first: Shape, first_where: str) -> None:
    if shape is not first:
        raise DataError(
            f"{where}: a record of shape {shape}; expected {first} as in {first_where}; "
            "keep one shape a file"
        )


def _shape_of(line: Line) -> Shape:
    if not isinstance(line.record, dict):
        raise DataError(
            f"{place(line)}: {kind_of(line.record)}; expected an object with named fields; "
            'write the record as {"...": ...}'
        )
    shape = recognise(line.record)
    if shape is None:
        known = ", ".join(" + ".join(keys) for keys in _KEYS.values())
        raise DataError(
            f"{place(line)}: {_describe_keys(line.record)}; expected one of: {known}; "
            "rename the fields"
        )
    return shape


def _describe_keys(record: Mapping[str, Any]) -> str:
    # A table without a header has sample text for keys, so only plain names are repeated.
    names = [key for key in record if key.isidentifier() and len(key) <= 30][:6]
    others = len(record) - len(names)
    shown = ([", ".join(names)] if names else []) + ([f"{others} more"] if others else [])
    return f"keys {' and '.join(shown)}" if shown else "no keys"


# ---------------------------------------------------------------- one converter a shape


def _from_chat(record: Mapping[str, Any], where: str) -> Sample:
    turns = record["messages"]
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if turns == [] else kind_of(turns)
        raise DataError(
            f'{where}: "messages" is {found}; expected a list of turns; '
            "give at least one user and one assistant turn"
        )
    messages = tuple(_message(turn, number, where) for number, turn in enumerate(turns, 1))
    if messages[-1].role != "assistant":
        raise DataError(
            f"{where}: the last turn is the {messages[-1].role}'s; expected the assistant's; "
            "add the answer or remove the turn"
        )
    return Conversation(messages, where)


def _message(turn: Any, number: int, where: str) -> Message:
    if not isinstance(turn, dict) or not turn.keys() >= {"role", "content"}:
        raise DataError(
            f'{where}: turn {number} has no "role" or no "content"; expected both; '
            'write each turn as {"role": ..., "content": ...}'
        )
    role = turn["role"]
    if role not in ROLES:
        plain = isinstance(role, str) and role.isidentifier() and len(role) <= 30
        named = f'role "{role}"' if plain else "a role that is no plain name"
        raise DataError(
            f"{where}: turn {number} has {named}; expected {', '.join(ROLES)}; rename or remove it"
        )
    if role == "assistant":
        return Message(role, _filled(turn, "content", where, f"turn {number}: "))
    return Message(role, _string(turn, "content", where, f"turn {number}: "))


def _from_alpaca(record: Mapping[str, Any], where: str) -> Sample:
    instruction = _string(record, "instruction", where)
    extra = _string(record, "input", where) if record.get("input") is not None else ""
    user = f"{instruction}\n\n{extra}" if extra else instruction
    return Conversation(_turns(record, user, _filled(record, "output", where), where), where)


def _from_qa(record: Mapping[str, Any], where: str) -> Sample:
    user = _string(record, "question", where)
    return Conversation(_turns(record, user, _filled(record, "answer", where), where), where)


def _turns(record: Mapping[str, Any], user: str, answer: str, where: str) -> tuple[Message, ...]:
    system = _string(record, "system", where) if record.get("system") is not None else ""
    opening = (Message("system", system),) if system else ()
    return (*opening, Message("user", user), Message("assistant", answer))


def _from_pair(record: Mapping[str, Any], where: str) -> Sample:
    return Pair(_string(record, "prompt", where), _filled(record, "completion", where), where)


def _from_text(record: Mapping[str, Any], where: str) -> Sample:
    return Text(_filled(record, "text", where), where)


def _string(record: Mapping[str, Any], key: str, where: str, within: str = "") -> str:
    value = record[key]
    if not isinstance(value, str):
        raise DataError(
            f'{where}: {within}"{key}" is {kind_of(value)}; expected a string; '
            "write the text in quotes"
        )
    if not value.isascii() and _SURROGATE.search(value):
        raise DataError(
            f'{where}: {within}"{key}" has half of a surrogate pair; expected whole characters; '
            "write the character itself or both halves"
        )
    return value


def _filled(record: Mapping[str, Any], key: str, where: str, within: str = "") -> str:
    value = _string(record, key, where, within)
    if not value.strip():
        raise DataError(
            f'{where}: {within}"{key}" is empty; expected text to learn; '
            "fill it in or remove the record"
        )
    return value


_CONVERT: dict[Shape, Callable[[Mapping[str, Any], str], Sample]] = {
    Shape.CHAT: _from_chat,
    Shape.ALPACA: _from_alpaca,
    Shape.PAIR: _from_pair,
    Shape.QA: _from_qa,
    Shape.TEXT: _from_text,
}
