"""Turns one record of a known shape into a sample.

Takes the fields of a record and its place; returns a frozen sample. Its texts are as the record
has them; its turns and tools, whatever form they had, are in the one form that chat templates
read. A fault is raised as one line that names it. Never drops or joins a turn.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from qlora_kit.data.fields import (
    clean,
    filled,
    filled_list,
    is_plain,
    kind_of,
    not_empty,
    optional,
    string,
)
from qlora_kit.data.shapes import (
    ROLES,
    WEIGHT,
    Conversation,
    LabelledImage,
    LabelledText,
    Message,
    Pair,
    Preference,
    Sample,
    Shape,
    TaggedWords,
    Text,
)
from qlora_kit.errors import DataError
from qlora_kit.storage import parse_json

RecordFields = Mapping[str, Any]

_FROM = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "function_call",
    "observation": "tool",
    "tool": "tool",
    "developer": "developer",
}
"""The role of each speaker in ShareGPT; `function_call` is an assistant's turn of one call only."""

_PARTS = ("text", "reasoning", "tool_call")
"""The parts of a content that are read; the last two are LLaMA-Factory's, in assistant turns."""

_DEEPEST = 64
_LONGEST_NUMBER = 24

_LONGEST_LABEL = 200
# In a table a list is a text. Only what is quoted, or a whole number, is an item of one: a label
# such as "[spam]" is a text with brackets.
_ITEM = r"""\s*("[^"]*"|'[^']*'|-?\d+)\s*"""
_LIST = re.compile(rf"\[(?:\s*|{_ITEM}(?:,{_ITEM})*)\]")

_TOOL_KEYS = ("tool_call_id", "name")
_WEIGHT_KEYS = ("weight", WEIGHT)
_LEARNT_KEYS = (*_WEIGHT_KEYS, "train", "training")
# A product of two weights, and a sum over the tokens of a step, stay far from the ends of fp32.
_LEAST_WEIGHT, _MOST_WEIGHT = 1e-9, 1e9
_TURN_KEYS = frozenset({"role", "content", "tool_calls", "from", "value", *_LEARNT_KEYS})


def to_sample(shape: Shape, record: RecordFields, where: str) -> Sample:
    """Return the sample that a record holds.

    Args:
        shape: the shape of the record; the record has the required fields of it.
        record: the fields of the record.
        where: the place of the record, for the sample and for errors.

    Raises:
        DataError: the content of a field does not fit the shape.
    """
    weight = _record_weight(record, where)
    sample = _CONVERT[shape](record, where)
    if weight == 1:
        return sample
    if isinstance(sample, LabelledText | TaggedWords | LabelledImage | Preference):
        raise DataError(
            f'{where}: a "{WEIGHT}"; expected none beside a label: a row of --task classify or tag '
            "counts once; weigh the labels with --class-weights, or remove the field"
        )
    return replace(sample, loss_weight=weight)


def _from_turns(field: str, record: RecordFields, where: str) -> Sample:
    return _conversation(record, read_turns(record[field], field, where), where)


def _from_chat_pair(record: RecordFields, where: str) -> Sample:
    asked = _side(record, "prompt", "user", where)
    answered = _side(record, "completion", "assistant", where)
    return _conversation(record, (*asked, *answered), where)


def _side(record: RecordFields, key: str, role: str, where: str) -> tuple[Message, ...]:
    if isinstance(record[key], list):
        return read_turns(record[key], key, where)
    return (Message(role, filled(record, key, where)),)


def _from_alpaca(record: RecordFields, where: str) -> Sample:
    instruction, extra = string(record, "instruction", where), optional(record, "input", where)
    if not instruction.strip() and not extra.strip():
        not_empty(instruction, "instruction", where)
    asked = "\n\n".join(text for text in (instruction, extra) if text)
    turns = (*_history(record.get("history"), where), Message("user", asked))
    return _answered(record, turns, "output", where)


def _history(rounds: Any, where: str) -> list[Message]:
    """Return the turns of earlier rounds, each a question and its answer."""
    if rounds is None:
        return []
    if not isinstance(rounds, list):
        raise DataError(
            f'{where}: "history" is {kind_of(rounds)}; expected a list of rounds; write them in [ ]'
        )
    messages = []
    for number, each in enumerate(rounds, 1):
        if not isinstance(each, list) or len(each) != 2:
            raise DataError(
                f'{where}: round {number} of "history" is no pair; expected [question, answer]; '
                "write both"
            )
        for role, text in zip(("user", "assistant"), each, strict=True):
            said = filled({"history": text}, "history", f"{where}: round {number}")
            messages.append(Message(role, said))
    return messages


def _from_qa(record: RecordFields, where: str) -> Sample:
    asked = Message("user", filled(record, "question", where))
    return _answered(record, (asked,), "answer", where)


def _answered(
    record: RecordFields, asked: tuple[Message, ...], key: str, where: str
) -> Conversation:
    """Put the answer behind the turns that ask; of several right answers the first is learnt."""
    answer, *others = filled_list(record, key, where)
    conversation = _conversation(record, (*asked, Message("assistant", answer)), where)
    return replace(conversation, also_right=tuple(others))


def _conversation(record: RecordFields, turns: tuple[Message, ...], where: str) -> Conversation:
    """Put the system message first, and check how the turns begin and end."""
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


def _from_pair(record: RecordFields, where: str) -> Sample:
    return Pair(string(record, "prompt", where), filled(record, "completion", where), where)


def _from_text(record: RecordFields, where: str) -> Sample:
    return Text(filled(record, "text", where), where)


def _from_labelled(record: RecordFields, where: str) -> Sample:
    return LabelledText(filled(record, "text", where), where, label=_label(record, where))


def _from_labelled_pair(record: RecordFields, where: str) -> Sample:
    text, second = (filled(record, key, where) for key in ("text_a", "text_b"))
    return LabelledText(text, where, second, _label(record, where))


def _from_tagged(record: RecordFields, where: str) -> Sample:
    words, tags = (_listed(record, key, where) for key in ("tokens", "tags"))
    if len(words) != len(tags):
        raise DataError(
            f"{where}: {len(words):,} tokens and {len(tags):,} tags; expected a tag for each "
            "token; correct the record, or pass --skip-bad-lines"
        )
    for number, word in enumerate(words, 1):
        filled({"tokens": word}, "tokens", f"{where}: word {number:,}")
    named = (_label_name(tag, where, f"tag {number:,}") for number, tag in enumerate(tags, 1))
    return TaggedWords(tuple(words), tuple(named), where)


def _from_image(record: RecordFields, where: str) -> Sample:
    return LabelledImage(filled(record, "image", where), where, _label(record, where))


def _listed(record: RecordFields, key: str, where: str) -> list[Any]:
    """Return the words or tags of a record: a list, or a text with spaces between them."""
    value = record[key]
    if isinstance(value, str):
        value = _list_in(value)
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else kind_of(value)
        raise DataError(
            f'{where}: "{key}" is {found}; expected a list with an item for each word; write one, '
            "or pass --skip-bad-lines"
        )
    return value


def _list_in(text: str) -> list[Any]:
    """Return the items of a list that a table holds as a text, or the words of a plain text."""
    if text.lstrip().startswith("["):
        with contextlib.suppress(DataError):
            parsed = parse_json(text, "")
            if isinstance(parsed, list):
                return parsed
        if _LIST.fullmatch(text.strip()):
            return _items_in(text)
    return text.split()


def _items_in(text: str) -> list[str]:
    return [item.strip("'\"") for item in re.findall(_ITEM, text)]


_CONVERT: dict[Shape, Callable[[RecordFields, str], Sample]] = {
    Shape.CHAT: partial(_from_turns, "messages"),
    Shape.SHAREGPT: partial(_from_turns, "conversations"),
    Shape.ALPACA: _from_alpaca,
    Shape.CHAT_PAIR: _from_chat_pair,
    Shape.PAIR: _from_pair,
    Shape.QA: _from_qa,
    Shape.TEXT: _from_text,
    Shape.CLASSIFY_PAIR: _from_labelled_pair,
    Shape.CLASSIFY: _from_labelled,
    Shape.TAG: _from_tagged,
    Shape.IMAGE: _from_image,
}


# ---------------------------------------------------------------- labels


def _label(record: RecordFields, where: str) -> str | float | tuple[str, ...]:
    """Return the label of a record: a name, a number, or the names in a list."""
    value = record["label"]
    if isinstance(value, str) and _LIST.fullmatch(value.strip()):
        value = _items_in(value)
    if isinstance(value, list):
        names = tuple(_label_name(item, where, "a label in its list") for item in value)
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            named = f'"{twice}"' if is_plain(twice) or twice.isdecimal() else "a label"
            raise DataError(
                f"{where}: the list of labels names {named} twice; expected the name of each label "
                'that applies, once; write it as ["a", "b"]'
            )
        return names
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _label_number(value, where)
    return _label_name(value, where, '"label"')


def _label_number(value: float, where: str) -> float:
    try:
        is_finite = math.isfinite(value)
    except OverflowError:
        is_finite = False
    if not is_finite:
        raise DataError(
            f'{where}: "label" is no finite number; expected a label; fill it in, or pass '
            "--skip-bad-lines"
        )
    return value


def _label_name(value: Any, where: str, what: str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return str(int(_label_number(value, where)))
    if not isinstance(value, str):
        found = "a number with a fraction" if isinstance(value, float) else kind_of(value)
        raise DataError(
            f"{where}: {what} is {found}; expected a name or a number; write one, or pass "
            "--skip-bad-lines"
        )
    name = clean(value, f"{where}: {what}").strip()
    if not name or len(name) > _LONGEST_LABEL:
        found = f"has {len(name):,} characters" if name else "is empty"
        raise DataError(
            f"{where}: {what} {found}; expected a name of {_LONGEST_LABEL} characters at most; "
            "correct it, or pass --skip-bad-lines"
        )
    return name


# ---------------------------------------------------------------- turns


def read_turns(turns: Any, field: str, where: str) -> tuple[Message, ...]:
    """Return the messages of a list of turns.

    Args:
        turns: a list of objects, each with `role` and `content`, or with `from` and `value`.
        field: the name of the field that holds the list, for errors.
        where: the place of the record, for errors.

    Raises:
        DataError: `turns` is no such list, a role is unknown, or a turn is empty.
    """
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if turns == [] else kind_of(turns)
        raise DataError(
            f'{where}: "{field}" is {found}; expected a list of turns; '
            "give at least one user and one assistant turn"
        )
    return tuple(_message(turn, f"{where}: turn {n}") for n, turn in enumerate(turns, 1))


def unread_keys(turn: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys of a turn that are not read."""
    is_tool = "tool" in (turn.get("role"), _FROM.get(str(turn.get("from"))))
    for name in turn.keys() - _TURN_KEYS:
        if turn[name] is not None and not (is_tool and name in _TOOL_KEYS):
            yield name


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        turn = {}
    # A table gives every turn every column, so a null stands for a missing field.
    if turn.get("from") is not None and "value" in turn:
        message = _from_value(turn, where)
    elif turn.get("role") is not None and ("content" in turn or turn.get("tool_calls")):
        message = _from_content(turn, where)
    else:
        raise DataError(
            f'{where} has no "role" or no "content"; expected both; '
            'write each turn as {"role": ..., "content": ...} or {"from": ..., "value": ...}'
        )
    if message.role == "tool":
        answers, name = (optional(turn, key, where) for key in _TOOL_KEYS)
        message = replace(message, tool_call_id=answers, name=name)
    return _asked_for(message, turn, where)


def _asked_for(message: Message, turn: Mapping[str, Any], where: str) -> Message:
    """Return the message with the data's marks of whether to learn it, and by which weight."""
    given = {key: turn[key] for key in _LEARNT_KEYS if turn.get(key) is not None}
    weights = {key: _weight(given[key], key, where) for key in _WEIGHT_KEYS if key in given}
    said = {
        key: bool(weights[key]) if key in weights else _is_on(value, key, where)
        for key, value in given.items()
    }
    if True in said.values() and message.role != "assistant":
        key = next(key for key, is_on in said.items() if is_on)
        raise DataError(
            f'{where} is the {message.role}\'s and has "{key}" on; expected only answers to be '
            f'learnt; remove the "{key}"'
        )
    if len({*said.values()}) > 1 or len({*weights.values()}) > 1:
        named = " and ".join(f'a "{key}"' for key in said)
        raise DataError(
            f"{where} has {named} that contradict each other; expected one of them; remove the "
            "other"
        )
    if False in said.values():
        return replace(message, is_learnt=False)
    return replace(message, loss_weight=next(iter(weights.values()), 1.0))


def _is_on(value: Any, key: str, where: str) -> bool:
    # To Python 1.0 and true equal 1.
    if value in (0, 1):
        return bool(value)
    raise DataError(
        f'{where} has {_shown(value)} for "{key}"; expected 0 or 1, false or true: a turn is '
        "learnt or it is not; correct it"
    )


def _weight(value: Any, key: str, where: str) -> float:
    """Return a weight: 0, or a number that a loss can be multiplied by; true is 1, false is 0."""
    if isinstance(value, int | float) and (not value or _LEAST_WEIGHT <= value <= _MOST_WEIGHT):
        return float(value)
    raise DataError(
        f'{where} has {_shown(value)} for "{key}"; expected 0, or a number from 1e-9 to 1e9, by '
        "which the loss of its tokens is multiplied; correct it"
    )


def _shown(value: Any) -> str:
    """Return a number as it is, or the kind of another value."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # A number may have thousands of digits.
    return str(value)[:_LONGEST_NUMBER] if is_number else kind_of(value)


def _record_weight(record: RecordFields, where: str) -> float:
    """Return the weight of a whole record. In a table it is a text, and an empty one is missing."""
    value = record.get(WEIGHT)
    if isinstance(value, str):
        if not value.strip():
            return 1.0
        with contextlib.suppress(ValueError):
            value = float(value)
    return 1.0 if value is None else _weight(value, WEIGHT, f"{where}: the record")


def _from_value(turn: Mapping[str, Any], where: str) -> Message:
    role = _role(turn["from"], _FROM, where)
    if role == "function_call":
        return Message("assistant", "", _calls_in(filled(turn, "value", where), where))
    return _spoken(_FROM[role], turn, "value", where)


def _from_content(turn: Mapping[str, Any], where: str) -> Message:
    role, calls = _role(turn["role"], ROLES, where), turn.get("tool_calls")
    if not calls:
        return _spoken(role, turn, "content", where)
    if role != "assistant":
        raise _not_the_assistants(where, "calls a tool", role, "the call")
    said = (
        _Content("") if turn.get("content") is None else _read_content(role, turn, "content", where)
    )
    return Message(role, said.text, (*said.calls, *_each(calls, _call, where)))


def _not_the_assistants(turn: str, does: str, role: str, what: str) -> DataError:
    return DataError(
        f"{turn} {does} as {role}; expected only an assistant to; correct its role or remove {what}"
    )


def _role(role: Any, known: Sequence[str] | Mapping[str, str], where: str) -> str:
    if isinstance(role, str) and role in known:
        return role
    named = f'role "{role}"' if is_plain(role) else "a role that is no plain name"
    raise DataError(f"{where} has {named}; expected {', '.join(known)}; rename or remove it")


def _spoken(role: str, turn: Mapping[str, Any], key: str, where: str) -> Message:
    """Return a turn whose content stands under `key`."""
    said = _read_content(role, turn, key, where)
    if role in ("user", "assistant") and not said.calls:
        not_empty(said.text, key, where)
    return Message(role, said.text, said.calls)


# ---------------------------------------------------------------- parts


class _Content(NamedTuple):
    """The text of a content, and the tools that the content calls."""

    text: str
    calls: tuple[Mapping[str, Any], ...] = ()


def _read_content(role: str, turn: Mapping[str, Any], key: str, where: str) -> _Content:
    """Return the content under `key`, which is a string or a list of parts."""
    content = turn[key]
    if not isinstance(content, list):
        return _Content(string(turn, key, where))
    said = [_content_of_part(part, role, where) for part in content]
    return _Content("".join(each.text for each in said), sum((each.calls for each in said), ()))


def _content_of_part(part: Any, role: str, where: str) -> _Content:
    if isinstance(part, str):
        return _Content(clean(part, f"{where}: a part"))
    kind = part.get("type", "text") if isinstance(part, dict) else None
    key = "text" if kind is not None and part.get("text") is not None else "value"
    if kind not in _PARTS or key not in part:
        named = f'a part of type "{kind}"' if is_plain(kind) else "a part that is no text"
        raise DataError(
            f'{where}: {named}; expected {{"type": "text", "text": ...}}; '
            "remove the record: only text is trained"
        )
    if kind == "text":
        return _Content(string(part, key, where))
    if role != "assistant":
        does, what = (
            ("calls a tool", "the call") if kind == "tool_call" else ("reasons", "that part")
        )
        raise _not_the_assistants(where, does, role, what)
    if kind == "tool_call":
        return _Content("", _calls_in(part[key], where))
    # Reasoning models write it in this form, and their templates look for it in an answer.
    return _Content(f"<think>\n{string(part, key, where)}\n</think>\n\n")


# ---------------------------------------------------------------- tools


def read_tools(value: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    """Return the tools that a conversation may call.

    Args:
        value: a list of tools, the same as JSON text, or nothing.
        where: the place of the record, for errors.

    Raises:
        DataError: `value` is none of these, or a tool has no name.
    """
    if value is None or value == "" or value == []:
        return ()
    return _each(_many(value, f'{where}: "tools"'), _tool, where)


def _calls_in(value: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    return _each(_many(value, f"{where}: the call"), _call, where)


def _many(value: Any, what: str) -> list[Any]:
    """Return a value as a list of objects; a text is parsed as JSON first."""
    if isinstance(value, str):
        value = _parsed(value, what)
    return value if isinstance(value, list) else [value]


def _parsed(text: str, what: str) -> Any:
    value = parse_json(clean(text, what), what)
    # Half a character can be written as an escape; the check of the JSON text does not see it.
    _check_texts(value, what)
    return value


def _check_texts(value: Any, what: str) -> None:
    """Check every text of a JSON value, and the depth of the value."""
    level = [value]
    for _ in range(_DEEPEST):
        for each in level:
            for text in each if isinstance(each, dict) else [each]:
                if isinstance(text, str):
                    clean(text, what)
        level = [inner for each in level for inner in _inside(each)]
        if not level:
            return
    raise DataError(f"{what} is nested too deeply; expected {_DEEPEST} levels at most; flatten it")


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _each(
    values: Any, convert: Callable[[Any, str], Mapping[str, Any]], where: str
) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(values, list):
        raise DataError(
            f"{where}: tool calls are {kind_of(values)}; expected a list; write them in [ ]"
        )
    return tuple(convert(value, where) for value in values)


def _tool(tool: Any, where: str) -> Mapping[str, Any]:
    inner = _function_of(tool)
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise DataError(
            f'{where}: a tool without a "name"; expected a JSON schema of it; write it as '
            '{"name": ..., "description": ..., "parameters": ...}'
        )
    _check_texts(inner, f'{where}: "tools"')
    return {"type": "function", "function": inner}


def _call(call: Any, where: str) -> Mapping[str, Any]:
    inner = _function_of(call)
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise DataError(
            f'{where} calls a tool without its "name"; expected name and arguments; write the '
            'call as {"name": ..., "arguments": {...}}'
        )
    arguments = inner.get("arguments")
    if isinstance(arguments, str):
        arguments = _parsed(arguments, f"{where}: the arguments of a call") if arguments else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise DataError(
            f"{where} calls a tool with {kind_of(arguments)} for arguments; expected an object; "
            'write them as {"name": value}'
        )
    _check_texts(inner, f"{where}: a call")
    made = {"type": "function", "function": {"name": inner["name"], "arguments": arguments}}
    return {"id": call["id"], **made} if isinstance(call.get("id"), str) else made


def _function_of(value: Any) -> Any:
    """Return the value under "function", or the value itself where it has no such key."""
    return value.get("function", value) if isinstance(value, dict) else value
