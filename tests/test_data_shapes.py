"""Recognising: each shape, and every wrong record is one line with place and remedy."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_kit.data.shapes import (
    Conversation,
    Message,
    Pair,
    Shape,
    Text,
    recognise,
    to_samples,
)
from qlora_kit.errors import DataError
from qlora_kit.storage import Line

U, A, S = (lambda text, role=role: Message(role, text) for role in ("user", "assistant", "system"))


def _lines(*records: Any) -> list[Line]:
    return [Line("a.jsonl", number, record) for number, record in enumerate(records, 1)]


def _turns(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize(
    ("record", "shape", "sample"),
    [
        (
            _turns(("system", "s"), ("user", "u"), ("assistant", "a")),
            Shape.CHAT,
            Conversation((S("s"), U("u"), A("a")), "a.jsonl:1"),
        ),
        (
            {"instruction": "i", "input": "x", "output": "o"},
            Shape.ALPACA,
            Conversation((U("i\n\nx"), A("o")), "a.jsonl:1"),
        ),
        (
            {"instruction": "i", "input": None, "output": "o", "system": "s"},
            Shape.ALPACA,
            Conversation((S("s"), U("i"), A("o")), "a.jsonl:1"),
        ),
        (
            {"instruction": "i", "input": "", "output": "o", "id": 3, "system": ""},
            Shape.ALPACA,
            Conversation((U("i"), A("o")), "a.jsonl:1"),
        ),
        ({"prompt": "", "completion": " c "}, Shape.PAIR, Pair("", " c ", "a.jsonl:1")),
        (
            {"question": "q", "answer": "a"},
            Shape.QA,
            Conversation((U("q"), A("a")), "a.jsonl:1"),
        ),
        ({"text": "t", "meta": {}}, Shape.TEXT, Text("t", "a.jsonl:1")),
    ],
)
def test_each_shape(record: dict[str, Any], shape: Shape, sample: Any) -> None:
    assert recognise(record) is shape
    assert to_samples(_lines(record)) == (shape, [sample])


def test_the_first_shape_in_order_wins() -> None:
    keys = ["messages", "instruction", "output", "prompt", "completion", "question", "answer"]
    record = dict.fromkeys([*keys, "text"], "x")
    found = []
    for shape_keys in (keys[:1], keys[1:3], keys[3:5], keys[5:7]):
        found.append(recognise(record))
        for key in shape_keys:
            del record[key]
    assert [*found, recognise(record)] == list(Shape)


FAULTS = [
    (["SECRET"], "a list; expected an object with named fields; write"),
    ("SECRET", "a string; expected an object"),
    ({}, "no keys; expected one of: messages, instruction + output,"),
    ({"foo": 1, "SECRET text as key": 2}, "keys foo and 1 more; expected one of"),
    ({"instruction": "SECRET"}, "keys instruction; expected one of"),
    ({"messages": []}, '"messages" is an empty list; expected a list of turns; give'),
    ({"messages": "SECRET"}, '"messages" is a string; expected a list of turns; give'),
    ({"messages": ["SECRET"]}, 'turn 1 has no "role" or no "content"; expected both; write'),
    (
        _turns(("user", "SECRET"), ("tool", "x"), ("assistant", "a")),
        'turn 2 has role "tool"; expected system, user, assistant; rename or remove it',
    ),
    (_turns(("SECRET role", "x")), "turn 1 has a role that is no plain name; expected system"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "turn 1 has a role that is no plain"),
    (_turns(("user", "SECRET")), "the last turn is the user's; expected the assistant's; add"),
    (
        _turns(("user", "SECRET"), ("assistant", " ")),
        'turn 2: "content" is empty; expected text to learn; fill',
    ),
    (
        {"messages": [{"role": "user", "content": None}]},
        'turn 1: "content" is null; expected a string; write',
    ),
    ({"prompt": 3, "completion": "x"}, '"prompt" is a number; expected a string; write'),
    ({"prompt": "SECRET", "completion": ""}, '"completion" is empty; expected text to learn;'),
    ({"question": "SECRET", "answer": True}, '"answer" is a boolean; expected a string'),
    ({"instruction": "SECRET", "output": "\n"}, '"output" is empty'),
    ({"instruction": "SECRET", "input": {}, "output": "o"}, '"input" is an object; expected'),
    ({"instruction": "SECRET", "output": "o", "system": 1}, '"system" is a number; expected'),
    ({"text": ""}, '"text" is empty'),
]


@pytest.mark.parametrize(("record", "message"), FAULTS)
def test_each_fault_is_one_line(record: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        to_samples(_lines(record))
    (fault,) = caught.value.faults
    assert fault.startswith("a.jsonl:1: " + message)
    assert "SECRET" not in fault
    assert fault.count("; ") >= 2


def test_a_file_has_one_shape_and_both_lines_are_named() -> None:
    records = _lines({"text": "a"}, {"text": "b"}, {"question": "q", "answer": "a"})
    with pytest.raises(DataError) as caught:
        to_samples(records)
    assert caught.value.faults == (
        "a.jsonl:3: a record of shape qa; expected text as in a.jsonl:1; keep one shape a file",
    )


@pytest.mark.parametrize("count", [1, 20, 21, 50])
def test_faults_are_collected(count: int) -> None:
    with pytest.raises(DataError) as caught:
        to_samples(_lines({"text": "good"}, *[{"text": ""}] * count))
    faults = caught.value.faults
    assert len([fault for fault in faults if '"text" is empty' in fault]) == min(count, 20)
    assert faults[20:] == ((f"... and {count - 20} more",) if count > 20 else ())
    assert faults[0].startswith("a.jsonl:2:")


def test_a_file_that_breaks_off_still_tells_what_was_wrong_before() -> None:
    def lines() -> Any:
        yield from _lines({"text": ""})
        raise DataError("a.jsonl:2: not valid JSON; correct it")

    with pytest.raises(DataError) as caught:
        to_samples(lines())
    assert [fault[:11] for fault in caught.value.faults] == ["a.jsonl:1: ", "a.jsonl:2: "]


def test_half_of_a_surrogate_pair_is_refused_before_a_tokenizer_meets_it() -> None:
    line = Line("data.jsonl", 1, {"prompt": "\ud83d", "completion": "b"})
    with pytest.raises(DataError, match=r'data\.jsonl:1: "prompt" has half of a surrogate pair'):
        to_samples([line])
