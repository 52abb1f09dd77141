"""Bad input of every class: one line a fault, exit code 2, nothing written, no hang."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from qlora_kit.cli import main
from qlora_kit.config import RecordOptions
from qlora_kit.data.samples import Samples, load_samples
from qlora_kit.data.shapes import ROLES, Conversation, Pair
from qlora_kit.errors import DataError, InputError
from qlora_kit.time_limit import time_limit

SECONDS_A_CASE = 30
MOST_EXTRA_BYTES = 400_000_000

# Every sample text contains it, and no name does: if an error contains it, a text has leaked.
SECRET = "§"


def _line(**record: Any) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def _chat(*turns: tuple[Any, Any]) -> bytes:
    return _line(messages=[{"role": role, "content": content} for role, content in turns])


def _share(*turns: tuple[Any, Any]) -> bytes:
    return _line(conversations=[{"from": who, "value": text} for who, text in turns])


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    stream = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), stream)
    return stream.getvalue()


GOOD = _line(text="good §")
PACKED = gzip.compress(GOOD * 200)
TABLE = _parquet([{"text": "a §"}] * 50)

# Class: name of the file, its bytes, and the error after the file's name.
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 7\n"
BAD: dict[str, list[tuple[str, bytes, str]]] = {
    "a pointer of Git LFS": [
        (f"a.{suffix}", POINTER, ": a Git LFS pointer to the file; expected the file itself; get")
        for suffix in ("jsonl", "json", "csv", "tsv", "txt", "parquet", "jsonl.gz")
    ],
    "not UTF-8": [
        (
            "a.jsonl",
            GOOD + '{"text": "ü"}'.encode("latin-1"),
            r":2: byte 10 is not UTF-8; expected",
        ),
        ("a.jsonl", GOOD.decode().encode("utf-16"), r":1: byte 0 is not UTF-8; expected UTF-8 te"),
        ("a.json", b'[{"text":\n"\xff"}]', r":2: byte 1 is not UTF-8; expected UTF-8 text; save"),
        ("a.csv", b"text\nx\n\xe4\n", r":3: byte 0 is not UTF-8; expected UTF-8 text; save"),
        ("a.txt", b"a\n\n\xc3", r":3: byte 0 is not UTF-8; expected UTF-8 text; save"),
        ("a.txt", "a §".encode("utf-16-le"), r":1: byte 4 is not UTF-8|: has a NUL; expected"),
        ("a.txt", "words".encode("utf-16-le"), r": has a NUL; expected UTF-8 text, and this is"),
        ("a.tsv", "text\nwords\n".encode("utf-16-be"), r":1: has a NUL; expected UTF-8 text"),
        ("a.jsonl", b"\x80" * 50, r":1: byte 0 is not UTF-8"),
        ("a.jsonl", b'{"text": "\xed\xa0\x80"}', r":1: byte 10 is not UTF-8"),
    ],
    "a key twice": [
        ("a.jsonl", b'{"text": "a", "text": "b"}', r':1: not valid JSON \(key "text" stands twice'),
        (
            "a.jsonl",
            GOOD + b'{"text": "a", "m": {"\xc2\xa7": 1, "\xc2\xa7": 2}}',
            r":2: .*key stands",
        ),
        (
            "a.json",
            b'[{"text": "a", "text": "b"}]',
            r":1: not valid JSON \(key \"text\" stands twi",
        ),
        ("a.csv", b"text,text\na,b\n", r':1: "text" twice; expected a name of its own'),
        ("a.tsv", b"text\t\na\tb\n", r":1: a column without a name"),
    ],
    "no number": [
        ("a.jsonl", b'{"text": "a", "n": NaN}', r":1: not valid JSON \(NaN is not a JSON number\)"),
        ("a.jsonl", b'{"text": Infinity}', r":1: not valid JSON \(Infinity is not a JSON number"),
        ("a.json", b'[{"text": -Infinity}]', r":1: not valid JSON \(-Infinity is not a JSON num"),
        ("a.jsonl", b'{"text": 1e999}', r':1: "text" is a number; expected a string; write'),
        ("a.jsonl", b'{"text": 01}', r":1: not valid JSON"),
    ],
    "a huge integer": [
        (
            "a.jsonl",
            b'{"text": ' + b"9" * 5000 + b"}",
            r":1: not valid JSON \(a number of thousands",
        ),
        ("a.jsonl", GOOD + b'{"n": -' + b"9" * 10**6 + b"}", r":2: not valid JSON \(a number of t"),
        ("a.json", b"[" + b"1" * 4301 + b"]", r":1: not valid JSON \(a number of thousands of dig"),
        (
            "a.jsonl",
            b'{"text": ' + b"9" * 4000 + b"}",
            r':1: "text" is a number; expected a string',
        ),
    ],
    "nesting without end": [
        ("a.jsonl", b"[" * 100_000, r":1: JSON nested too deeply; expected a record of few levels"),
        ("a.jsonl", GOOD + b'{"a":' * 50_000, r":2: JSON nested too deeply; expected"),
        ("a.json", b"[" * 1_000_000, r":1: JSON nested too deeply; expected"),
        ("a.jsonl", _line(text="a", x=json.loads("[" * 500 + "]" * 500)) + b"{", r":2: not valid"),
        (
            "a.jsonl",
            _line(
                conversations=[{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}],
                tools=[{"name": "f", "parameters": json.loads("[" * 500 + "]" * 500)}],
            ),
            r':1: "tools" is nested too deeply; expected 64 levels at most; flatten it',
        ),
    ],
    "half a character": [
        ("a.jsonl", b'{"text": "\\ud800"}', r':1: "text" has half of a surrogate pair; expected'),
        ("a.jsonl", b'{"text": "\\ude00\\ud83d"}', r':1: "text" has half of a surrogate pair'),
        (
            "a.json",
            b'[{"prompt": "\\ud83d", "completion": "a"}]',
            r':1 \(record 1\): "prompt" has h',
        ),
        (
            "a.jsonl",
            b'{"conversations": [{"from": "gpt", "value": "a"}], "tools": "[\\"\\\\ud800\\"]"}',
            r':1: "tools" has half of a surrogate pair; expected whole characters',
        ),
        ("a.jsonl", b'{"\\ud800": 1}', r":1: keys 1 more; expected one of"),
    ],
    "line ends": [
        ("a.jsonl", GOOD.replace(b"\n", b"\r") * 2, r":1: not valid JSON \(Extra data at column"),
        ("a.csv", b"text,n\ra,b\rc,d\r", r":1: not a readable row|:1: "),
        ("a.csv", b'text\n"a \xc2\xa7\n', r":2: not a readable row \(unexpected end of data\)"),
        ("a.jsonl", b'{"text":\n"a"}\n', r":1: not valid JSON \(Expecting value at column 9\)"),
    ],
    "wrong roles": [
        (
            "a.jsonl",
            _chat(("usr", "§"), ("assistant", "§")),
            r':1: turn 1 has role "usr"; expected',
        ),
        ("a.jsonl", _chat(("", "§")), r":1: turn 1 has a role that is no plain name; expected"),
        ("a.jsonl", _chat(("§ §", "§")), r":1: turn 1 has a role that is no plain name; expected"),
        ("a.jsonl", _chat((3, "§")), r":1: turn 1 has a role that is no plain name; expected"),
        ("a.jsonl", _chat(("human", "§")), r':1: turn 1 has role "human"; expected system, user'),
        ("a.jsonl", _share(("bot", "§")), r':1: turn 1 has role "bot"; expected human, user'),
        ("a.jsonl", _chat(("user", "§")), r":1: the last turn is the user's; expected the assist"),
        ("a.jsonl", _chat(("assistant", "§"), ("system", "§")), r":1: the last turn is the system"),
        (
            "a.jsonl",
            _chat(("user", "§"), ("tool", "§")),
            r":1: the last turn is a tool's; expected",
        ),
        ("a.jsonl", _line(messages=["§"]), r':1: turn 1 has no "role" or no "content"; expected'),
    ],
    "empty turns": [
        (
            "a.jsonl",
            _chat(("user", "§"), ("assistant", "")),
            r':1: turn 2: "content" is empty; exp',
        ),
        ("a.jsonl", _chat(("user", " \n"), ("assistant", "§")), r':1: turn 1: "content" is empty;'),
        ("a.jsonl", _chat(("user", None)), r':1: turn 1: "content" is null; expected a string'),
        ("a.jsonl", _chat(("user", [])), r':1: turn 1: "content" is empty; expected text; fill'),
        ("a.jsonl", _share(("human", "§"), ("gpt", "")), r':1: turn 2: "value" is empty; expected'),
        ("a.jsonl", _line(messages=[]), r':1: "messages" is an empty list; expected a list of'),
        ("a.csv", b"question,answer\n\xc2\xa7,\n", r':2: "answer" is empty; expected text; fill'),
        ("a.jsonl", _line(prompt="§", completion="\u3000"), r':1: "completion" is empty; expected'),
    ],
    "missing columns": [
        ("a.jsonl", _line(prompt="§"), r":1: keys prompt; expected one of: messages, "),
        ("a.jsonl", GOOD + _line(txt="§"), r':2: no "text"; expected it as in the text record '),
        ("a.csv", b"prompt\n\xc2\xa7\n", r":2: keys prompt; expected one of"),
        ("a.csv", b"\xc2\xa7 a,\xc2\xa7 b\n1,2\n", r":2: keys 2 more; expected one of"),
        ("a.parquet", _parquet([{"x": 1}]), r" record 1: keys x; expected one of"),
        ("a.jsonl", b"{}\n", r":1: no keys; expected one of"),
        ("a.jsonl", b"3\n", r":1: a number; expected an object with named fields"),
        ("a.json", b'"\xc2\xa7"', r":1 \(record 1\): a string; expected an object with named"),
        ("a.json", b"[[]]", r":1 \(record 1\): a list; expected an object with named"),
        ("a.json", b"null", r":1 \(record 1\): null; expected an object with named"),
    ],
    "wrong kinds": [
        ("a.jsonl", _line(text=3), r':1: "text" is a number; expected a string; write'),
        ("a.jsonl", _line(text=["§"]), r':1: "text" is a list; expected a string; write'),
        ("a.jsonl", _line(text=None), r':1: "text" is null; expected a string; write'),
        ("a.jsonl", _line(messages="§"), r':1: "messages" is a string; expected a list of turns'),
        (
            "a.jsonl",
            _line(instruction="§", output={}),
            r':1: "output" is an object; expected a str',
        ),
        (
            "a.parquet",
            _parquet([{"text": b"\xff"}]),
            r' record 1: "text" is a value; expected a st',
        ),
        ("a.jsonl", _chat(("user", [{"type": "image"}])), r':1: turn 1: a part of type "image"; e'),
    ],
    "mixed shapes": [
        (
            "a.jsonl",
            GOOD + _line(question="§", answer="§"),
            r":2: a record of shape qa; expected t",
        ),
        ("a.jsonl", GOOD * 2 + _chat(("user", "§")), r":3: a record of shape chat; .* in \S+:1; k"),
        (
            "a.json",
            b'[{"text": "a"},\n{"prompt": "", "completion": "a"}]',
            r":2 \(record 2\): a re",
        ),
    ],
    "empty files": [
        *((f"a.{kind}", b"", r": no records; ") for kind in ("jsonl", "json", "csv", "tsv", "txt")),
        ("a.parquet", b"", r": not a readable parquet file; expected"),
        ("a.jsonl.gz", b"", r": no records; expected at least one; add rows"),
        ("a.jsonl", "\ufeff\n\n".encode(), r": no records; "),
        ("a.csv", b"text\n", r": no records; "),
        ("a.parquet", _parquet([{"text": "a"}])[:0] + _parquet([]), r": no records; |: not a read"),
    ],
    "gzip that lies": [
        ("a.jsonl.gz", GOOD, r": not gzip data; expected what \.gz says; take \.gz from the name"),
        ("a.jsonl.gz", PACKED[: len(PACKED) // 2], r": damaged gzip data; expected a file written"),
        ("a.jsonl.gz", PACKED[:-8] + b"\0" * 8, r": damaged gzip data; expected a file written wh"),
        ("a.jsonl.gz", PACKED + b"more", r": damaged gzip data; expected"),
        ("a.jsonl.gz", b"\x1f\x8b\x08" + b"\xff" * 40, r": damaged gzip data; expected"),
        ("a.jsonl", PACKED, r": gzip data; expected \.gz at the end of the name; add it"),
        ("a.parquet.gz", gzip.compress(GOOD), r": not a readable parquet file; expected"),
        ("a.gz", PACKED, r": no suffix; expected one of \.jsonl"),
        (
            "a.jsonl.gz",
            gzip.compress(b"\0" * (65 << 20)),
            r":1: a line of more than 64 MiB; expect",
        ),
    ],
    "parquet that lies": [
        (
            "a.parquet",
            TABLE[: len(TABLE) // 2],
            r": not a readable parquet file; expected one writ",
        ),
        ("a.parquet", TABLE[:-4], r": not a readable parquet file; expected one written whole"),
        ("a.parquet", TABLE[4:], r": not a readable parquet file; expected one written whole"),
        (
            "a.parquet",
            b"PAR1" + b"\xff" * 100 + b"PAR1",
            r": not a readable parquet file; expected",
        ),
        ("a.parquet", GOOD, r": not a readable parquet file; expected one written whole; write it"),
    ],
    "tables that do not add up": [
        ("a.csv", b"text,n\na,1\n\xc2\xa7\n", r":3: 1 fields; expected 2 as in the first line; qu"),
        ("a.csv", b"text\na,\xc2\xa7\n", r":2: 2 fields; expected 1 as in the first line; quote"),
        ("a.tsv", b"text\n\xc2\xa7\tb\n", r":2: 2 fields; expected 1 as in the first line; quote"),
        ("a.csv", b'text\n"a" \xc2\xa7\n', r":2: not a readable row .*; expected quotes in pairs"),
    ],
    "not JSON": [
        ("a.jsonl", GOOD + b'{"text": "\xc2\xa7\n' + GOOD, r":2: not valid JSON \(Unterminated st"),
        ("a.jsonl", b"{'text': '\xc2\xa7'}\n", r":1: not valid JSON \(Expecting property name"),
        ("a.json", GOOD * 2, r": more than one JSON value; expected one list of records; wrap"),
        (
            "a.json",
            b'[{"text": "a"} {"text": "b"}]',
            r":1: not valid JSON \(no comma after a value",
        ),
        ("a.json", b'[{"text": "a"},', r":1: not valid JSON \(Expecting value"),
        ("a.json", b'[{"text": "a"}', r":1: not valid JSON \(no comma after a value"),
        ("a.jsonl", b"[\n" + GOOD + b"]\n", r":1: not valid JSON"),
        ("a.jsonl", b"<html>", r":1: not valid JSON \(Expecting value at column 1\)"),
        ("a.jsonl", b'{"text": "a\tb"}', r":1: not valid JSON \(Invalid control character at"),
    ],
}


def test_there_are_many_classes_of_few_cases() -> None:
    assert len(BAD) >= 12
    assert all(1 <= len(cases) <= 10 for cases in BAD.values())


@pytest.mark.parametrize("command", ["evaluate", "train"])
@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line_a_fault_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    command: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content, message in BAD[kind]:
        path = tmp_path / name
        path.write_bytes(content)
        with time_limit(SECONDS_A_CASE), pytest.raises(SystemExit) as stopped:
            main([command, "--data", name, *(["--output", "run"] if command == "train" else [])])
        out, err = capsys.readouterr()
        assert (stopped.value.code, out) == (2, ""), err
        first, *more = err.splitlines()
        assert re.match(f"error: {re.escape(name)}(?:{message})", first), first
        assert all(line.startswith(f"error: {name}:") for line in more), more
        assert SECRET not in err
        assert [*tmp_path.rglob("*")] == [path], "nothing is created"
        assert path.read_bytes() == content, "nothing is overwritten"
        path.unlink()


def _dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def _loop(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Path.mkdir, "a folder; expected a test file in it, such as test.jsonl; name a file"),
        (os.mkfifo, "not a regular file; expected a data file; save the data in one"),
        (_dangling, "no such file; expected a data file "),
        (_loop, "no such file; expected a data file "),
        (lambda path: path.symlink_to("/dev/zero"), "not a regular file; expected a data file"),
    ],
)
def test_what_is_no_file_is_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Path], None],
    message: str,
) -> None:
    path = tmp_path / "a.jsonl"
    make(path)
    with time_limit(SECONDS_A_CASE), pytest.raises(SystemExit) as stopped:
        main(["evaluate", "--data", str(path)])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path}: {message}")


@pytest.mark.parametrize(
    "name", ["x" * 5000, "x" * 300 + ".jsonl", "a\0b.jsonl", "", "+", "a+b", "/"]
)
def test_names_that_cannot_be_are_one_line(name: str) -> None:
    with pytest.raises(DataError) as caught:
        load_samples(name)
    assert len(caught.value.faults) == 1


def test_what_looks_odd_and_is_not_bad_is_read(tmp_path: Path) -> None:
    odd = {
        "bom.jsonl": ("\ufeff" + json.dumps({"text": "a"})).encode(),
        "crlf.jsonl": b'{"text": "a"}\r\n\r\n',
        "separators.jsonl": json.dumps(
            {"text": "a\u2028b\u2029c\x85d"}, ensure_ascii=False
        ).encode(),
        "long.jsonl": json.dumps({"text": "a" * 16_000_000}).encode(),
        "deep.jsonl": b'{"text": "a", "x": ' + b"[" * 300 + b"]" * 300 + b"}",
        "bom.csv": "\ufefftext\r\na\r\n".encode(),
        "pairs.jsonl": b'{"text": "\\ud83d\\ude00"}',
        "integer.jsonl": b'{"text": "a", "n": ' + b"9" * 4000 + b"}",
        "members.jsonl.gz": gzip.compress(b'{"text": "a"}\n') + gzip.compress(b'{"text": "b"}\n'),
    }
    expected = {
        "separators.jsonl": ["a\u2028b\u2029c\x85d"],
        "long.jsonl": ["a" * 16_000_000],
        "pairs.jsonl": ["😀"],
        "members.jsonl.gz": ["a", "b"],
    }
    for name, content in odd.items():
        (tmp_path / name).write_bytes(content)
        texts = [sample.text for sample in load_samples(tmp_path / name).items]  # type: ignore[union-attr]
        assert texts == expected.get(name, ["a"]), name


# ---------------------------------------------------------------- generated


@dataclass(frozen=True)
class Case:
    """A generated file, and how it is read."""

    name: str
    content: bytes
    options: RecordOptions


_TEXT = st.text(st.characters(exclude_categories=()), max_size=12).map(lambda text: text + SECRET)
_ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), _TEXT, st.just(""), st.just(" "),
    st.lists(_TEXT, max_size=2), st.dictionaries(st.sampled_from(["type", "text", "name"]), _TEXT),
)  # fmt: skip
_ROLE = st.sampled_from([*ROLES, "human", "gpt", "function_call", "observation", "bot", "", 3])
_TURN = st.one_of(
    st.fixed_dictionaries({"role": _ROLE, "content": _TEXT | _ODD}),
    st.fixed_dictionaries({"from": _ROLE, "value": _TEXT | _ODD}),
    st.fixed_dictionaries({"role": st.just("assistant"), "tool_calls": st.lists(_ODD, max_size=2)}),
    _ODD,
)
_GOOD_CHAT = st.lists(
    st.tuples(
        st.fixed_dictionaries({"role": st.just("user"), "content": _TEXT}),
        st.fixed_dictionaries({"role": st.just("assistant"), "content": _TEXT}),
    ),
    min_size=1,
    max_size=2,
).map(lambda rounds: [turn for each in rounds for turn in each])
_TURNS = _GOOD_CHAT | st.lists(_TURN, max_size=4)
_RECORD = st.one_of(
    st.fixed_dictionaries({"text": _TEXT}),
    st.fixed_dictionaries({"messages": _GOOD_CHAT}),
    st.fixed_dictionaries({"prompt": _TEXT, "completion": _TEXT}),
    st.fixed_dictionaries({"instruction": _TEXT, "input": _TEXT, "output": _TEXT}),
    st.fixed_dictionaries({"messages": _TURNS}, optional={"tools": _ODD, "system": _ODD}),
    st.fixed_dictionaries({"conversations": _TURNS}, optional={"tools": _ODD, "system": _ODD}),
    st.fixed_dictionaries({"prompt": _TURNS | _ODD, "completion": _TURNS | _ODD}),
    st.fixed_dictionaries(
        {"instruction": _ODD, "output": _ODD}, optional={"input": _ODD, "history": _ODD}
    ),
    st.fixed_dictionaries({}, optional={"question": _ODD, "answer": _ODD, "text": _ODD}),
    _ODD,
)
_RECORDS = st.lists(_RECORD, max_size=4) | _RECORD.map(lambda record: [record] * 3)
_OPTIONS = st.builds(
    RecordOptions,
    format=st.sampled_from(["auto"] * 8 + ["chat", "sharegpt", "alpaca", "pair", "qa", "text"]),
    columns=st.sampled_from(
        [{}] * 6 + [{"text": "prompt"}, {"prompt": "text", "completion": "messages.x"}]
    ),
    skip_bad_lines=st.booleans(),
)


def _as_lines(records: list[Any]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def _as_json(records: list[Any]) -> bytes:
    return json.dumps(records, indent=1).encode()


def _as_csv(records: list[Any]) -> bytes:
    stream = io.StringIO()
    rows = [record for record in records if isinstance(record, dict)]
    writer = csv.DictWriter(stream, sorted({name for row in rows for name in row}), restval="")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode("utf-8", "surrogatepass")


def _as_text(records: list[Any]) -> bytes:
    return "\n".join(map(str, records)).encode("utf-8", "surrogatepass")


def _as_parquet(records: list[Any]) -> bytes:
    import pyarrow

    try:
        return _parquet([record for record in records if isinstance(record, dict)])
    except (pyarrow.ArrowException, ValueError, TypeError, OverflowError):
        # Values of kinds that no column has together.
        return TABLE


_WRITERS: dict[str, Callable[[list[Any]], bytes]] = {
    ".jsonl": _as_lines,
    ".json": _as_json,
    ".csv": _as_csv,
    ".tsv": lambda records: _as_csv(records).replace(b",", b"\t"),
    ".txt": _as_text,
    ".parquet": _as_parquet,
}
_BITS_OF_FILES = st.sampled_from(
    [b"", b"\0", b"\n", b"\r", b'"', b"{", b"}", b"[", b"]", b",", b"\t", b"\\", b"\xff",
     b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"NaN", b"1e999", b"\\ud800", b'"text":', b"[" * 2000,
     b"9" * 5000, b"\x1f\x8b", b"PAR1", b"null"]
)  # fmt: skip


@st.composite
def _cases(draw: st.DrawFn) -> Case:
    suffix = draw(st.sampled_from([*_WRITERS]))
    content = draw(_RECORDS.map(_WRITERS[suffix]) | st.binary(max_size=60))
    content = draw(_damaged(content))
    if draw(st.booleans()):
        suffix += ".gz"
        content = draw(_damaged(gzip.compress(content, 1)))
    return Case(f"a{suffix}", content, draw(_OPTIONS))


@st.composite
def _damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Cut, overwrite or insert bytes, up to three times; often leave the file unchanged."""
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 1, 2, 3]))):
        start = draw(st.integers(0, len(content)))
        end = draw(st.sampled_from([start, start + 1, start + 20, len(content)]))
        content = content[:start] + draw(_BITS_OF_FILES | st.binary(max_size=4)) + content[end:]
    return content


def _check(case: Case, folder: Path) -> None:
    """Check that a file gives usable samples or errors, in time, and is not changed."""
    path = folder / case.name
    path.write_bytes(case.content)
    found = _load(path, case.options)
    event("read" if isinstance(found, Samples) else "refused")
    if isinstance(found, Samples):
        _check_samples(found)
    else:
        _check_faults(found, path)
    assert [*folder.iterdir()] == [path], "nothing is created"
    assert path.read_bytes() == case.content, "nothing is overwritten"
    path.unlink()


def _load(path: Path, options: RecordOptions) -> Samples | InputError:
    try:
        with time_limit(SECONDS_A_CASE):
            return load_samples(path, options=options)
    except InputError as error:
        return error


def _check_faults(error: InputError, path: Path) -> None:
    assert error.exit_code == 2
    assert 1 <= len(error.faults) <= 21
    for fault in error.faults:
        assert "\n" not in fault
        assert SECRET not in fault
        assert len(fault) < 600 + 2 * len(str(path))
        assert "; " in fault or fault.startswith("... and "), fault


def _check_samples(samples: Samples) -> None:
    assert samples.items
    for text in _learnt(samples):
        assert text.strip()
        text.encode()  # a surrogate would not be
    assert all("\n" not in notice and SECRET not in notice for notice in samples.notices)
    assert len(samples.content_hash()) == 64


def _learnt(samples: Samples) -> Iterator[str]:
    for sample in samples.items:
        if isinstance(sample, Conversation):
            assert sample.messages[-1].role == "assistant"
            assert all(message.role in ROLES for message in sample.messages)
            spoken = [message for message in sample.messages if message.role == "assistant"]
            yield from (message.content for message in spoken if not message.tool_calls)
        elif isinstance(sample, Pair):
            yield sample.completion
        else:
            yield sample.text


def _generated(examples: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=examples,
        deadline=timedelta(seconds=SECONDS_A_CASE),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@pytest.fixture(scope="module")
def memory_is_bounded() -> Iterator[None]:
    """Compare the most memory held before and after all cases."""
    _as_parquet([{"text": "a"}])  # pyarrow's own share
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    extra = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert extra < MOST_EXTRA_BYTES


@pytest.mark.usefixtures("memory_is_bounded")
@_generated(800)
@given(case=_cases())
def test_generated_files_are_samples_or_lines_of_fault(
    tmp_path_factory: pytest.TempPathFactory, case: Case
) -> None:
    _check(case, tmp_path_factory.mktemp("case"))


@pytest.mark.slow
@pytest.mark.usefixtures("memory_is_bounded")
@_generated(20_000)
@given(case=_cases())
def test_many_generated_files_are_samples_or_lines_of_fault(
    tmp_path_factory: pytest.TempPathFactory, case: Case
) -> None:
    _check(case, tmp_path_factory.mktemp("case"))
