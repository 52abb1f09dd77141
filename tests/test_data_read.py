"""Reading: every format, and every file that cannot be read is one line with a remedy."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_kit.data.read import place, read_records
from qlora_kit.data.samples import BUILT_IN, load_samples
from qlora_kit.data.shapes import Pair, Shape
from qlora_kit.errors import DataError, HubError
from qlora_kit.storage import Line

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
    lines = list(read_records(path))
    assert [line.record for line in lines] == RECORDS
    assert {line.file for line in lines} == {str(path)}


def test_plain_text_is_one_record(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("one\r\n\r\ntwo\n".encode("utf-8-sig"))
    assert list(read_records(path)) == [Line(str(path), 1, {"text": "one\n\ntwo"})]


def test_places_count_lines_or_records(tmp_path: Path) -> None:
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_text('\n{"text": "a"}\n\n{"text": "b"}\n')
    assert [place(line) for line in read_records(jsonl)] == [f"{jsonl}:2", f"{jsonl}:4"]
    for name in ("a.json", "a.parquet"):
        path = _write(tmp_path, name)
        assert [place(line) for line in read_records(path)] == [
            f"{path} record 1",
            f"{path} record 2",
        ]


def test_csv_line_numbers_survive_quoted_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,n\n"one\ntwo",1\n\nthree,2\n"four\n\nfive",3\nsix,4\n')
    assert [(line.line, line.record["n"]) for line in read_records(path)] == [
        (2, "1"),
        (5, "2"),
        (6, "3"),
        (9, "4"),
    ]


def test_csv_fields_may_be_long(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "x" * 200_000 + "\n")
    assert len(next(read_records(path)).record["text"]) == 200_000


_CELL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\x00"), min_size=1)


@given(rows=st.lists(st.tuples(_CELL, _CELL), min_size=1, max_size=5))
def test_csv_gives_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]
) -> None:
    stream = io.StringIO()
    csv.writer(stream, quoting=csv.QUOTE_ALL).writerows([("prompt", "completion"), *rows])
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    path.write_bytes(stream.getvalue().encode())
    assert [tuple(line.record.values()) for line in read_records(path)] == rows


BROKEN = [
    ("a.jsonl", '{"text": "SECRET"}\n{"text": }\n', r":2: not valid JSON"),
    ("a.jsonl", "", r": no records; expected at least one; "),
    ("a.jsonl", "\n\n", r": no records; "),
    ("a.json", "", r": no records; "),
    ("a.json", "[]", r": no records; "),
    ("a.json", '{"text": "SECRET"}', r": an object at the top; expected a list of records; wrap"),
    ("a.txt", " \n", r": no records; "),
    ("a.csv", "", r": no records; "),
    ("a.csv", "text\n", r": no records; "),
    ("a.csv", "a,b\n1,2\nSECRET\n", r":3: 1 fields; expected 2 as in the first line; quote"),
    ("a.csv", 'a\nx\n"SECRET\n', r":3: not a readable row \(unexpected end of data\); expected"),
    ("a.csv", "a,a\n1,2\n", r":1: a column without a name or a name twice; expected"),
    ("a.tsv", "a\t\n1\t2\n", r":1: a column without a name"),
    ("a.parquet", "SECRET", r": not a readable parquet file; expected"),
    ("a.xlsx", "SECRET", r': suffix "\.xlsx"; expected one of \.jsonl, \.json, .*; convert'),
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
        cwd=Path(__file__).parent.parent,
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


def test_hub_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = datasets.Dataset.from_list([{"question": "a", "answer": "b"}])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows)
    samples = load_samples("owner/name")
    assert samples.shape is Shape.QA
    assert samples.items[0].place == "owner/name record 1"
    assert samples.source == "owner/name"


def test_a_hub_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(name: str, split: str) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        HubError, match=r"^owner/name: .*\(no route\); expected .*; check name"
    ) as e:
        load_samples("owner/name")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("file", "shape", "count"),
    [
        ("alpaca_en_demo.json", Shape.ALPACA, 999),
        ("identity.json", Shape.ALPACA, 91),
        ("gsm8k/test.jsonl", Shape.QA, 1319),
        ("tinyshakespeare.txt", Shape.TEXT, 1),
    ],
)
def test_real_files(assets: Path, file: str, shape: Shape, count: int) -> None:
    samples = load_samples(assets / "data" / file)
    assert (samples.shape, len(samples.items)) == (shape, count)


def test_real_tables(assets: Path) -> None:
    assert sum(1 for _ in read_records(assets / "data/sst2/train.tsv")) == 6735
    assert sum(1 for _ in read_records(assets / "data/gsm8k/test_chat.parquet")) == 1319
