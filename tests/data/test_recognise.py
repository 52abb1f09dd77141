"""Recognising: each shape, and every wrong record is one line with place and remedy."""

from __future__ import annotations

import itertools
import json
import pickle
from collections.abc import Sequence
from typing import Any

import pytest

from qlora_kit.config import RecordOptions
from qlora_kit.data.read import Record
from qlora_kit.data.recognise import check_columns, recognise, suggest_columns, to_samples
from qlora_kit.data.shapes import FIELDS, ROLES, Conversation, Message, Pair, Shape, Text
from qlora_kit.data.shapes import SHAPES as SHAPES_OF
from qlora_kit.errors import ConfigError, DataError

U, A, S, T = (
    lambda text, role=role: Message(role, text) for role in ("user", "assistant", "system", "tool")
)
WEATHER = {"name": "weather", "description": "now", "parameters": {"type": "object"}}
WEATHER_TOOL = {"type": "function", "function": WEATHER}
CALL = {"name": "weather", "arguments": {"city": "Ulm"}}


def called(text: str = "", **more: Any) -> Message:
    return Message("assistant", text, ({**more, "type": "function", "function": CALL},))


def _records(*contents: Any) -> list[Record]:
    return [Record(f"a.jsonl:{number}", content) for number, content in enumerate(contents, 1)]


def _turns(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _said(*turns: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": text} for who, text in turns], **more}


def _chat(*messages: Message, tools: Sequence[Any] = ()) -> Conversation:
    return Conversation(messages, "a.jsonl:1", tuple(tools))


SHAPES: list[tuple[dict[str, Any], Shape, Any]] = [
    (
        _turns(("system", "s"), ("user", "u"), ("assistant", "a")),
        Shape.CHAT,
        _chat(S("s"), U("u"), A("a")),
    ),
    (
        _turns(
            ("user", [{"type": "text", "text": "u"}, "v", {"type": "text", "text": "w", "n": 1}]),
            ("assistant", [{"type": "text", "text": "a"}]),
        ),
        Shape.CHAT,
        _chat(U("uvw"), A("a")),
    ),
    (
        {**_turns(("user", "u"), ("assistant", "a")), "system": "s", "tools": None},
        Shape.CHAT,
        _chat(S("s"), U("u"), A("a")),
    ),
    (
        {
            "messages": [
                {"role": "user", "content": "u", "tool_calls": None},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {"id": "c1", "function": {**CALL, "arguments": '{"city": "Ulm"}'}}
                    ],
                },
                {"role": "tool", "content": ""},
                {"role": "assistant", "content": "a", "tool_calls": []},
            ],
            "tools": [WEATHER_TOOL],
        },
        Shape.CHAT,
        _chat(U("u"), called(id="c1"), T(""), A("a"), tools=[WEATHER_TOOL]),
    ),
    (
        _said(("human", "u"), ("gpt", "a"), system="s"),
        Shape.SHAREGPT,
        _chat(S("s"), U("u"), A("a")),
    ),
    (
        _said(
            ("system", "s"),
            ("human", "u"),
            ("function_call", json.dumps(CALL)),
            ("observation", "12 C"),
            ("gpt", "a"),
            tools=json.dumps([WEATHER]),
        ),
        Shape.SHAREGPT,
        _chat(S("s"), U("u"), called(), T("12 C"), A("a"), tools=[WEATHER_TOOL]),
    ),
    (
        _said(("user", "u"), ("tool", "t"), ("assistant", "a"), tools="[]"),
        Shape.SHAREGPT,
        _chat(U("u"), T("t"), A("a")),
    ),
    (
        {
            "conversations": [
                {"role": "user", "content": "u"},
                {"role": "assistant", "content": "a"},
            ]
        },
        Shape.SHAREGPT,
        _chat(U("u"), A("a")),
    ),
    (
        {"instruction": "i", "input": "x", "output": "o"},
        Shape.ALPACA,
        _chat(U("i\n\nx"), A("o")),
    ),
    ({"instruction": "", "input": "x", "output": "o"}, Shape.ALPACA, _chat(U("x"), A("o"))),
    (
        {"instruction": "i", "input": None, "output": "o", "system": "s", "history": [["q", "r"]]},
        Shape.ALPACA,
        _chat(S("s"), U("q"), A("r"), U("i"), A("o")),
    ),
    (
        {"instruction": "i", "input": "", "output": "o", "system": "", "history": None},
        Shape.ALPACA,
        _chat(U("i"), A("o")),
    ),
    (
        {"prompt": [{"role": "user", "content": "u"}], "completion": "a"},
        Shape.CHAT_PAIR,
        _chat(U("u"), A("a")),
    ),
    (
        {
            "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
            "completion": [{"role": "assistant", "content": "a"}],
        },
        Shape.CHAT_PAIR,
        _chat(S("s"), U("u"), A("a")),
    ),
    ({"prompt": "", "completion": " c "}, Shape.PAIR, Pair("", " c ", "a.jsonl:1")),
    ({"question": "q", "answer": "a"}, Shape.QA, _chat(U("q"), A("a"))),
    ({"question": "q", "answer": "a", "system": "s"}, Shape.QA, _chat(S("s"), U("q"), A("a"))),
    ({"text": "t\u2028\r", "meta": {}}, Shape.TEXT, Text("t\u2028\r", "a.jsonl:1")),
]


@pytest.mark.parametrize(("record", "shape", "sample"), SHAPES)
def test_each_shape_in_every_order_of_its_fields(
    record: dict[str, Any], shape: Shape, sample: Any
) -> None:
    for fields in itertools.permutations(record.items(), len(record)):
        found = to_samples(_records(dict(fields)))
        assert (found.shape, found.samples) == (shape, [sample])


def test_every_shape_is_tried() -> None:
    assert {shape for _, shape, _ in SHAPES} == {*SHAPES_OF["causal"]}
    assert {shape for shapes in SHAPES_OF.values() for shape in shapes} == {*Shape} == {*FIELDS}


@pytest.mark.parametrize(("record", "shape", "sample"), SHAPES)
def test_samples_cross_processes(record: dict[str, Any], shape: Shape, sample: Any) -> None:
    assert pickle.loads(pickle.dumps(sample)) == sample
    assert all(m.role in ROLES for m in getattr(sample, "messages", ()))


def test_the_first_shape_in_order_wins() -> None:
    required = [FIELDS[shape].required for shape in SHAPES_OF["causal"]]
    record: dict[str, Any] = {name: "x" for names in required for name in names}
    record["prompt"] = ["x"]
    found = []
    for names in required:
        found.append(recognise(record))
        if found[-1] is Shape.CHAT_PAIR:
            record["prompt"] = "x"
        else:
            for name in names:
                del record[name]
    assert found == list(SHAPES_OF["causal"])


def test_a_table_gives_every_record_every_column_and_null_is_none() -> None:
    table = {"messages": None, "prompt": None, "completion": None, "text": "t"}
    assert recognise(table) is Shape.TEXT
    assert to_samples(_records(table)).samples == [Text("t", "a.jsonl:1")]


FAULTS = [
    (["SECRET"], "a list; expected an object with named fields; write"),
    ("SECRET", "a string; expected an object"),
    ({}, "no keys; expected one of: messages, conversations, instruction + output, prompt +"),
    ({"foo": 1, "SECRET text as key": 2}, "keys foo and 1 more; expected one of"),
    ({"instruction": "SECRET"}, "keys instruction; expected one of"),
    ({"messages": []}, '"messages" is an empty list; expected a list of turns; give'),
    ({"messages": "SECRET"}, '"messages" is a string; expected a list of turns; give'),
    ({"messages": None}, '"messages" is null; expected a list of turns; give'),
    ({"messages": ["SECRET"]}, 'turn 1 has no "role" or no "content"; expected both; write'),
    ({"messages": [{"role": "user"}]}, 'turn 1 has no "role" or no "content"; expected both'),
    (_said((None, "SECRET")), 'turn 1 has no "role" or no "content"; expected both'),
    (
        _turns(("user", "SECRET"), ("critic", "x"), ("assistant", "a")),
        'turn 2 has role "critic"; expected system, user, assistant, tool, developer; rename',
    ),
    (_said(("human", "SECRET"), ("bot", "x")), 'turn 2 has role "bot"; expected human, user, gpt'),
    (_turns(("SECRET role", "x")), "turn 1 has a role that is no plain name; expected system"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "turn 1 has a role that is no plain"),
    (_turns(("user", "SECRET")), "the last turn is the user's; expected the assistant's; add"),
    (_turns(("user", "SECRET"), ("tool", "t")), "the last turn is a tool's; expected the"),
    (_turns(("user", "SECRET"), ("assistant", " ")), 'turn 2: "content" is empty; expected text;'),
    (_turns(("user", ""), ("assistant", "a")), 'turn 1: "content" is empty; expected text; fill'),
    (_said(("human", "SECRET"), ("gpt", "")), 'turn 2: "value" is empty; expected text; fill'),
    (_turns(("user", None)), 'turn 1: "content" is null; expected a string; write'),
    (
        _turns(("user", [{"type": "image_url", "image_url": "SECRET"}])),
        'turn 1: a part of type "image_url"; expected {"type": "text", "text": ...}; remove',
    ),
    (_turns(("user", [3])), "turn 1: a part that is no text; expected"),
    (_turns(("user", [{"text": 3}])), 'turn 1: "text" is a number; expected a string'),
    (
        {**_turns(("system", "SECRET"), ("assistant", "a")), "system": "SECRET"},
        '"system" and a system turn; expected one of them; remove the other',
    ),
    (
        {"messages": [{"role": "user", "content": "SECRET", "tool_calls": [CALL]}]},
        "turn 1 calls a tool as user; expected only an assistant to; correct",
    ),
    (
        {"messages": [{"role": "assistant", "content": "", "tool_calls": "SECRET"}]},
        "turn 1: tool calls are a string; expected a list; write",
    ),
    (
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"SECRET": 1}]}]},
        'turn 1 calls a tool without its "name"; expected name and arguments; write',
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}]},
        "turn 1 calls a tool with a list for arguments; expected an object; write",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "SEC"}]}]},
        "turn 1: the arguments of a call: not valid JSON (Expecting value at column 1); expected",
    ),
    (
        _said(("function_call", "SECRET"), ("gpt", "a")),
        "turn 1: the call: not valid JSON (Expecting value at column 1); expected it whole;",
    ),
    (
        _said(("function_call", '{"name": "f", "arguments": {"a": "\\ud800"}}'), ("gpt", "a")),
        "turn 1: the call has half of a surrogate pair; expected whole characters;",
    ),
    (
        _said(("human", "u"), ("gpt", "SECRET"), tools="SECRET"),
        '"tools": not valid JSON (Expecting value at column 1); expected it whole;',
    ),
    (
        _said(("human", "u"), ("gpt", "SECRET"), tools=[{"description": "SECRET"}]),
        'a tool without a "name"; expected a JSON schema of it; write',
    ),
    (
        _said(("human", "u"), ("gpt", "a"), tools='[{"name": ' + "[" * 80 + "]" * 80 + "}]"),
        '"tools" is nested too deeply; expected 64 levels at most; flatten it',
    ),
    ({"prompt": 3, "completion": "x"}, '"prompt" is a number; expected a string; write'),
    ({"prompt": "SECRET", "completion": ""}, '"completion" is empty; expected text; fill'),
    ({"prompt": ["SECRET"], "completion": "a"}, 'turn 1 has no "role" or no "content"; expected'),
    ({"question": "SECRET", "answer": True}, '"answer" is a boolean; expected a string'),
    ({"question": " ", "answer": "SECRET"}, '"question" is empty; expected text; fill'),
    ({"instruction": "SECRET", "output": "\n"}, '"output" is empty'),
    ({"instruction": " ", "input": "", "output": "SECRET"}, '"instruction" is empty; expected'),
    ({"instruction": "SECRET", "input": {}, "output": "o"}, '"input" is an object; expected'),
    ({"instruction": "SECRET", "output": "o", "system": 1}, '"system" is a number; expected'),
    ({"instruction": "i", "output": "o", "history": "SECRET"}, '"history" is a string; expected a'),
    (
        {"instruction": "i", "output": "o", "history": [["SECRET"]]},
        'round 1 of "history" is no pair; expected [question, answer]; write both',
    ),
    (
        {"instruction": "i", "output": "o", "history": [["SECRET", 3]]},
        'round 1: "history" is a number; expected a string; write',
    ),
    ({"text": ""}, '"text" is empty'),
    ({"text": "\ud83d"}, '"text" has half of a surrogate pair; expected whole characters; write'),
]


@pytest.mark.parametrize(("record", "message"), FAULTS)
def test_each_fault_is_one_line(record: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        to_samples(_records(record))
    (fault,) = caught.value.faults
    assert fault.startswith("a.jsonl:1: " + message)
    assert "SECRET" not in fault
    assert fault.count("; ") >= 2


# ---------------------------------------------------------------- one source, one shape


def test_a_file_has_one_shape_and_both_lines_are_named() -> None:
    records = _records({"text": "a"}, {"text": "b"}, {"question": "q", "answer": "a"})
    with pytest.raises(DataError) as caught:
        to_samples(records)
    assert caught.value.faults == (
        "a.jsonl:3: a record of shape qa; expected text as in a.jsonl:1; keep one shape a file, "
        "or say which with --format",
    )
    mixed = _records(
        {"prompt": "p", "completion": "c"},
        {"prompt": [{"role": "user", "content": "p"}], "completion": "c"},
    )
    with pytest.raises(
        DataError, match=r":2: a record of shape chat-pair; .* pair as in a\.jsonl:1"
    ):
        to_samples(mixed)


def test_a_missing_field_is_measured_by_the_first_record() -> None:
    whole = {"instruction": "i", "output": "o"}
    with pytest.raises(DataError) as caught:
        to_samples(_records(whole, {"instruction": "i"}, whole, {"input": "o"}))
    assert caught.value.faults == (
        'a.jsonl:2: no "output"; expected it as in the alpaca record a.jsonl:1; give one, or pass '
        "--skip-bad-lines",
        'a.jsonl:4: no "instruction"; expected it as in the alpaca record a.jsonl:1; give one, or '
        "pass --skip-bad-lines",
    )


@pytest.mark.parametrize("count", [1, 20, 21, 50])
def test_faults_are_collected(count: int) -> None:
    with pytest.raises(DataError) as caught:
        to_samples(_records({"text": "good"}, *[{"text": ""}] * count))
    faults = caught.value.faults
    assert len([fault for fault in faults if '"text" is empty' in fault]) == min(count, 20)
    assert faults[20:] == ((f"... and {count - 20} more",) if count > 20 else ())
    assert faults[0].startswith("a.jsonl:2:")


def test_a_source_of_no_known_shape_is_one_line_not_one_for_every_record() -> None:
    with pytest.raises(DataError) as caught:
        to_samples(_records(*[{"sentence": "SECRET", "label": "1"}] * 30))
    (fault,) = caught.value.faults
    assert fault.startswith("a.jsonl:1: keys sentence, label; expected one of: messages, ")
    assert fault.endswith("rename the fields, or pass --columns question=sentence,answer=label")


def test_unreadable_records_are_collected_with_the_others() -> None:
    unreadable = DataError("a.jsonl:1: not valid JSON; correct it")
    with pytest.raises(DataError) as caught:
        to_samples(
            [Record("a.jsonl:1", unreadable), *_records(None, {"text": "t"}, {"text": 1})[1:]]
        )
    assert [fault[:10] for fault in caught.value.faults] == ["a.jsonl:1:", "a.jsonl:3:"]


def test_a_file_that_breaks_off_still_tells_what_was_wrong_before() -> None:
    def records() -> Any:
        yield from _records({"text": ""})
        raise DataError("a.jsonl:2: not valid JSON; correct it")

    for skip, places in ((False, ["a.jsonl:1: ", "a.jsonl:2: "]), (True, ["a.jsonl:2: "])):
        with pytest.raises(DataError) as caught:
            to_samples(records(), RecordOptions(skip_bad_lines=skip))
        assert [fault[:11] for fault in caught.value.faults] == places


# ---------------------------------------------------------------- options


def test_bad_records_are_skipped_and_counted() -> None:
    contents = [None, {"text": "a"}, {"text": ""}, {"x": 1}, DataError("bad"), {"text": "b"}]
    found = to_samples(_records(*contents), RecordOptions(skip_bad_lines=True))
    assert [sample.text for sample in found.samples] == ["a", "b"]  # type: ignore[union-attr]
    assert found.skipped == 4
    assert found.first_skipped.startswith("a.jsonl:1: null; expected an object")
    with pytest.raises(DataError, match=r"no usable record; .* the first: a\.jsonl:1: null;"):
        to_samples(_records(None, None), RecordOptions(skip_bad_lines=True))


def test_a_format_that_is_given_goes_before_what_the_fields_say() -> None:
    both = {"question": "q", "answer": "a", "text": "t"}
    assert to_samples(_records(both)).shape is Shape.QA
    found = to_samples(_records(both, {"text": "u"}), RecordOptions(format="text"))
    assert found.samples == [Text("t", "a.jsonl:1"), Text("u", "a.jsonl:2")]
    pair = {"prompt": "p", "completion": "c"}
    found = to_samples(_records(pair), RecordOptions(format="chat-pair"))
    assert found.samples == [_chat(U("p"), A("c"))]
    with pytest.raises(DataError, match=r"expected instruction \+ output of --format alpaca; ren"):
        to_samples(_records(pair), RecordOptions(format="alpaca"))


def test_columns_name_fields_and_what_is_deeper() -> None:
    record = {"query": "q", "extra": {"a.b": 1, "answer": "a"}, "a.b": "dotted", "text": "t"}
    options = RecordOptions.model_validate({"columns": "prompt=query,completion=extra.answer"})
    found = to_samples(_records(record), options)
    assert found.samples == [Pair("q", "a", "a.jsonl:1")]
    assert (found.fields, found.unread) == (("prompt", "completion"), ("a.b", "text"))
    dotted = to_samples(_records(record), RecordOptions(columns={"text": "a.b"}))
    assert dotted.samples == [Text("dotted", "a.jsonl:1")]
    with pytest.raises(DataError) as caught:
        to_samples(_records(record), RecordOptions(columns={"text": "extra.missing"}))
    assert str(caught.value) == (
        'a.jsonl:1: no "extra.missing" but keys query, extra, a.b, text; expected what --columns '
        "names; correct it, or pass --skip-bad-lines"
    )


def test_columns_that_no_shape_has_are_refused() -> None:
    check_columns({"prompt": "a", "completion": "b"})
    with pytest.raises(ConfigError, match=r"--columns: no field promt; expected FIELD=COLUMN"):
        check_columns({"promt": "a"})
    with pytest.raises(ConfigError, match=r"--columns: no format has text and answer together"):
        check_columns({"text": "a", "answer": "b"})
    with pytest.raises(ValueError, match="expected field=column, several separated by commas"):
        RecordOptions.model_validate({"columns": "prompt"})


@pytest.mark.parametrize(
    ("record", "suggestion"),
    [
        ({"sentence": "a", "label": "1"}, "question=sentence,answer=label"),
        ({"label": "1", "sentence": "a"}, "question=sentence,answer=label"),
        ({"prompt": [{}], "more": {"answer": "a"}}, "prompt=prompt,completion=more.answer"),
        ({"a": {"b": {"body": "a"}}}, "text=a.b.body"),
        ({"a": {"b": {"c": {"body": "a"}}}}, ""),
        ({"SECRET x": "a", "answer": "a"}, ""),
        ({"question": 3, "answer": 4}, ""),
        # A column with a part of the question must not be dropped without a notice.
        (
            {"instruction": "q", "context": "c", "response": "a", "category": "x"},
            "instruction=instruction,input=context,output=response",
        ),
        (
            {"context": "c", "query": "q", "response": "a"},
            "instruction=query,input=context,output=response",
        ),
        (
            {"instruction": "q", "input": "c", "response": "a"},
            "instruction=instruction,input=input,output=response",
        ),
        ({"input": "q", "response": "a"}, "question=input,answer=response"),
    ],
)
def test_columns_are_suggested_where_names_tell(record: Any, suggestion: str) -> None:
    assert suggest_columns(record) == suggestion


def test_what_is_suggested_is_recognised() -> None:
    dolly = {"instruction": "q", "context": "c", "response": "a"}
    for record in ({"sentence": "a", "label": "1"}, {"x": {"story": "t"}}, dolly):
        options = RecordOptions.model_validate({"columns": suggest_columns(record)})
        found = to_samples(_records(record), options)
        assert len(found.samples) == 1
        assert not found.unread


# ---------------------------------------------------------------- what is told


def test_fields_that_are_not_read_are_told() -> None:
    turn = {"role": "assistant", "content": "a", "tone": 0, "name": None}
    record = {"id": 3, "messages": [{"role": "user", "content": "u"}, turn], "n": None}
    assert to_samples(_records(record)).unread == ("id", "messages.tone")


@pytest.mark.parametrize("unused", [["x"], [None], [1, {"role": "user", "tone": 0}], [["x"]]])
def test_a_field_that_is_of_no_use_may_hold_anything(unused: list[Any]) -> None:
    found = to_samples(_records({"question": "q", "answer": "a", "prompt": unused}))
    assert found.shape is Shape.QA
    assert {"prompt"} <= {*found.unread} <= {"prompt", "prompt.tone"}


def test_placeholders_are_counted() -> None:
    found = to_samples(
        _records(
            {"text": "I am {{name}} of {{ author }}"},
            {"text": "{name} {{}} {{a b}} }}name{{"},
            {"text": "{{name}}"},
        )
    )
    assert (found.with_placeholder, found.placeholders) == (2, ("name", "author"))
