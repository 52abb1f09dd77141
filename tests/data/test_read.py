"""Reading: every format, and every file that cannot be read is one line with a remedy."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import PROJECT

from qlora_kit.data.read import Record, read_aligned, read_records
from qlora_kit.data.samples import BUILT_IN, load_samples
from qlora_kit.data.shapes import Pair, Shape
from qlora_kit.errors import DataError

RECORDS = [
    {"prompt": "a\nb", "completion": 'say "hi", ok'},
    {"prompt": "", "completion": "ü\u2028"},
]


def _write(folder: Path, name: str) -> Path:
    path = folder / name
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, RECORDS)) + "\n\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(RECORDS, indent=1))
    elif path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    else:
        delimiter = "," if path.suffix == ".csv" else "\t"
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ["prompt", "completion"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(RECORDS)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "A.CSV"])
def test_each_format_gives_the_same_records(tmp_path: Path, name: str) -> None:
    if name == "A.CSV":
        path = _write(tmp_path, "a.csv").rename(tmp_path / name)
    else:
        path = _write(tmp_path, name)
    records = list(read_records(path))
    assert [record.content for record in records] == RECORDS
    assert all(record.place.startswith(str(path)) for record in records)


def test_plain_text_is_one_record(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("one\r\n\r\ntwo\n".encode("utf-8-sig"))
    assert list(read_records(path)) == [Record(f"{path}:1", {"text": "one\n\ntwo"})]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.txt"])
def test_each_format_may_be_gzipped(tmp_path: Path, name: str) -> None:
    path = _write(tmp_path, name)
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    plain = [record.content for record in read_records(path)]
    assert [record.content for record in read_records(packed)] == plain
    assert next(read_records(packed)).place.startswith(str(packed))


def test_places_name_the_line_where_there_is_one(tmp_path: Path) -> None:
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_text('\n{"text": "a"}\n\n{"text": "b"}\n')
    assert _places(jsonl) == [f"{jsonl}:2", f"{jsonl}:4"]
    parquet = _write(tmp_path, "a.parquet")
    assert _places(parquet) == [f"{parquet} record 1", f"{parquet} record 2"]
    json_file = tmp_path / "a.json"
    json_file.write_text('\n[{"n":\n1}, {"n": 2},\n\n {"n": "3\\n"}\n]\n')
    expected = ("2 (record 1)", "3 (record 2)", "5 (record 3)")
    assert _places(json_file) == [f"{json_file}:{each}" for each in expected]


def _places(path: Path) -> list[str]:
    return [record.place for record in read_records(path)]


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@given(values=st.lists(_JSON, min_size=1, max_size=5), indent=st.none() | st.integers(0, 2))
def test_json_lists_give_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], indent: int | None
) -> None:
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_bytes(json.dumps(values, indent=indent).encode())
    assert [record.content for record in read_records(path)] == values


def test_one_object_is_one_record(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('\n{"text": "a"}')
    assert list(read_records(path)) == [Record(f"{path}:2 (record 1)", {"text": "a"})]


def test_a_bad_line_stands_in_its_place_and_the_next_ones_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 1}\n{"n": }\n{"n": "\xff"}\n{"n": 4}\n')
    one, two, three, four = (record.content for record in read_records(path))
    assert (one, four) == ({"n": 1}, {"n": 4})
    assert "a.jsonl:2: not valid JSON" in str(two)
    assert "a.jsonl:3: byte 7 is not UTF-8" in str(three)
    table = tmp_path / "a.csv"
    table.write_text("a,b\n1,2\n3\n5,6\n")
    good, bad, last = (record.content for record in read_records(table))
    assert (good, last) == ({"a": "1", "b": "2"}, {"a": "5", "b": "6"})
    assert isinstance(bad, DataError)


def test_line_aligned_files_are_pairs(tmp_path: Path) -> None:
    one, other = tmp_path / "train.en", tmp_path / "train.de.gz"
    one.write_bytes("\ufeffa dog\r\ntwo\u2028dogs\n".encode())
    other.write_bytes(gzip.compress(b"ein Hund\nzwei Hunde"))
    assert list(read_aligned(one, other)) == [
        Record(f"{one}:1", {"question": "a dog", "answer": "ein Hund"}),
        Record(f"{one}:2", {"question": "two\u2028dogs", "answer": "zwei Hunde"}),
    ]
    other.write_bytes(gzip.compress(b"ein Hund\n"))
    for first, second, counts in ((one, other, (2, 1)), (other, one, (1, 2))):
        with pytest.raises(DataError) as caught:
            list(read_aligned(first, second))
        assert str(caught.value) == (
            f"{first}: {counts[0]} lines, and {counts[1]} in {second}; expected line-aligned "
            "files; align them, one sample a line"
        )


def test_csv_line_numbers_survive_quoted_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,n\n"one\ntwo",1\n\nthree,2\n"four\n\nfive",3\nsix,4\n')
    assert [(record.place, record.content["n"]) for record in read_records(path)] == [
        (f"{path}:2", "1"),
        (f"{path}:5", "2"),
        (f"{path}:6", "3"),
        (f"{path}:9", "4"),
    ]


def test_csv_fields_may_be_long(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "x" * 200_000 + "\n")
    assert len(next(read_records(path)).content["text"]) == 200_000


_CELL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\x00"), min_size=1)


@given(rows=st.lists(st.tuples(_CELL, _CELL), min_size=1, max_size=5))
def test_csv_gives_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]
) -> None:
    stream = io.StringIO()
    csv.writer(stream, quoting=csv.QUOTE_ALL).writerows([("prompt", "completion"), *rows])
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    path.write_bytes(stream.getvalue().encode())
    assert [tuple(record.content.values()) for record in read_records(path)] == rows


BROKEN = [
    ("a.jsonl", "", r": no records; expected at least one; "),
    ("a.jsonl", "\n\n", r": no records; "),
    ("a.json", "", r": no records; "),
    ("a.json", "[]", r": no records; "),
    ("a.json", "[ \n] \n", r": no records; "),
    ("a.json", '{"text": "SECRET"}\n{"text": "b"}', r": more than one JSON value; .* \.jsonl if"),
    ("a.json", '[{"text": "SECRET"}\n\n{"text": "b"}]', r":3: not valid JSON \(no comma after"),
    ("a.json", '[{"text": "SECRET"}] []', r": not valid JSON \(more after the list\); expected"),
    ("a.json", '[{"text": "SECRET"},\n]', r":2: not valid JSON \(Expecting value at column 1\)"),
    ("a.json", '[{"text": "SECRET"},\n{"text": "S', r":2: not valid JSON \(Unterminated string"),
    ("a.json", '[1,\n\n{"a": 1, "a": 2}]', r':3: not valid JSON \(key "a" stands twice\); '),
    (
        "a.json",
        '[1,\n{"SECRET a": 1, "SECRET a": 2}]',
        r":2: not valid JSON \(key stands twice\); ",
    ),
    ("a.json", "[" * 100_000, r":1: JSON nested too deeply; expected"),
    ("a.json", "[1, " + "9" * 5000 + "]", r":1: not valid JSON \(a number of thousands of digits"),
    ("a.txt", " \n", r": no records; "),
    ("a.txt", "S\0E\0", r": has a NUL; expected UTF-8 text, and this is UTF-16"),
    ("a.csv", "", r": no records; "),
    ("a.csv", "text\n", r": no records; "),
    ("a.csv", "text\nS\0\n", r":2: has a NUL; expected UTF-8"),
    ("a.csv", 'a\nx\n"SECRET\n', r":3: not a readable row \(unexpected end of data\); expected"),
    ("a.csv", "a,a\n1,2\n", r':1: "a" twice; expected a name of its own for every column; '),
    ("a.tsv", "a\t\n1\t2\n", r":1: a column without a name"),
    ("a.parquet", "SECRET", r": not a readable parquet file; expected"),
    ("a.parquet", "", r": not a readable parquet file; expected"),
    ("a.xlsx", "SECRET", r': suffix "\.xlsx"; expected one of \.jsonl, \.json, .*; convert'),
    ("a.xlsx.gz", "SECRET", r': suffix "\.xlsx"; expected one of '),
    ("a.jsonl.gz", '{"text": "SECRET"}', r": not gzip data; expected what \.gz says; take"),
    ("data", "SECRET", r": no suffix; expected one of "),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN)
def test_a_file_that_cannot_be_read_is_one_line(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=re.escape(str(path)) + message) as caught:
        list(read_records(path))
    assert "SECRET" not in str(caught.value)
    assert len(caught.value.faults) == 1
    assert "\n" not in str(caught.value)


def test_gzip_that_lies_is_told(tmp_path: Path) -> None:
    packed = gzip.compress(b'{"text": "a"}\n' * 1000)
    path = tmp_path / "a.jsonl.gz"
    for damaged in (packed[: len(packed) // 2], packed[:-6] + b"\0" + packed[-5:], packed + b"x"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="damaged gzip data; expected a file written whole;"):
            list(read_records(path))
    unnamed = tmp_path / "a.jsonl"
    unnamed.write_bytes(packed)
    with pytest.raises(DataError, match=r"a\.jsonl: gzip data; expected \.gz at the end"):
        list(read_records(unnamed))


def test_what_unpacks_without_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_kit.storage.reading.MOST_LINE_BYTES", 2**16)
    monkeypatch.setattr("qlora_kit.storage.reading.MOST_WHOLE_BYTES", 2**16)
    for name, found in (("a.jsonl", "MiB; expected one record a line"), ("a.txt", "in one doc")):
        path = tmp_path / f"{name}.gz"
        path.write_bytes(gzip.compress(b" " * 2**17))
        with pytest.raises(DataError, match=found):
            list(read_records(path))


def test_a_line_of_16_mb_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "word " * (16 * 2**20 // 5)}) + '\n{"text": "b"}\n')
    long, short = read_records(path)
    assert len(long.content["text"]) > 16_000_000
    assert short.content == {"text": "b"}


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="not a regular file; expected"):
        list(read_records(tmp_path / "a.jsonl"))


def test_a_parquet_with_a_column_twice_is_refused(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.Table.from_arrays([pyarrow.array(["x"])] * 2, names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r'a\.parquet: "text" twice; expected'):
        list(read_records(tmp_path / "a.parquet"))


def test_missing_files_and_folders_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"b\.jsonl: no such file; expected a data file .*; check"):
        list(read_records(tmp_path / "b.jsonl"))
    with pytest.raises(DataError, match=r"a folder; expected one data file .*; name a file in it"):
        list(read_records(tmp_path))


def test_reading_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, qlora_kit.data.samples; "
        "print({'torch', 'transformers', 'datasets', 'pyarrow'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        cwd=PROJECT,
    )  # fmt: skip
    assert done.stdout.strip() == "set()"


# ---------------------------------------------------------------- load_samples


def test_samples_of_a_file(tmp_path: Path) -> None:
    path = _write(tmp_path, "a.jsonl")
    samples = load_samples(str(path))
    assert samples.shape is Shape.PAIR
    assert samples.items[0] == Pair("a\nb", 'say "hi", ok', f"{path}:1")
    assert samples.first(1).items == samples.items[:1]
    assert samples.first(None).items == samples.items


def test_the_hash_is_of_the_content_not_of_the_place(tmp_path: Path) -> None:
    one, two = (load_samples(_write(tmp_path, name)) for name in ("a.jsonl", "b.csv"))
    assert one.content_hash() == two.content_hash()
    assert one.content_hash() != one.first(1).content_hash()


@pytest.mark.parametrize("split", ["train", "test"])
def test_built_in_samples(split: Any) -> None:
    if not BUILT_IN[split].exists():
        pytest.skip("the built-in samples are not generated yet")
    samples = load_samples(None, split)
    assert samples.shape is Shape.PAIR
    assert len(samples.items) > 20


@pytest.mark.parametrize("name", ["folder/missing.jsonl", "missing", "/no/such", "a/b/c", "./a/b"])
def test_a_missing_file_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_samples(name)


@pytest.mark.parametrize(
    "header", ["prompt;completion", '"prompt";"completion"', "\n\nprompt;completion"]
)
def test_a_table_with_semicolons_is_read(tmp_path: Path, header: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f'{header}\nhow much, please;"1,50; no more"\n')
    (record,) = read_records(path)
    assert record.content == {"prompt": "how much, please", "completion": "1,50; no more"}


def test_a_comma_in_the_header_goes_before_semicolons(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion\na;b,c\n")
    (record,) = read_records(path)
    assert record.content == {"prompt": "a;b", "completion": "c"}
