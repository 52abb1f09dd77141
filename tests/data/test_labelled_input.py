"""Labelled data as people bring it: every file form and name is read, every fault is one line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import run

from qlora_kit.config import RecordOptions, TaskOptions
from qlora_kit.data.labels import Labels, labels_of
from qlora_kit.data.samples import Samples, load_samples
from qlora_kit.data.shapes import LabelledText, Shape
from qlora_kit.errors import ConfigError, DataError, InputError

# Stands in every text, never in a name: where it shows in an error, a text has leaked.
SECRET = "§"
ROWS = [("good film §", "pos"), ("bad film §", "neg"), ("fine film, §", "pos")]
TRIPLES = [("a §", "b §", "yes"), ("c §", "d §", "no")]


def _load(path: Path | str, **options: Any) -> Samples:
    return load_samples(path, options=RecordOptions(**options), task="classify")


def _found(samples: Samples) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    for sample in samples.items:
        assert isinstance(sample, LabelledText)
        second = () if sample.second is None else (sample.second,)
        found.append((sample.text, *second, sample.label))
    return found


def _table(rows: list[tuple[Any, ...]], delimiter: str = ",") -> bytes:
    stream = io.StringIO()
    csv.writer(stream, delimiter=delimiter).writerows(rows)
    # As hostile files are: half of a character may stand in them.
    return stream.getvalue().encode("utf-8", "surrogatepass")


def _lines(*records: Any) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    stream = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), stream)
    return stream.getvalue()


def _records(fields: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    return [dict(zip(fields, row, strict=True)) for row in rows]


FORMS: dict[str, Callable[[tuple[str, ...], list[tuple[Any, ...]]], bytes]] = {
    ".csv": lambda fields, rows: _table([fields, *rows]),
    ".tsv": lambda fields, rows: _table([fields, *rows], "\t"),
    ".jsonl": lambda fields, rows: _lines(*_records(fields, rows)),
    ".json": lambda fields, rows: json.dumps(_records(fields, rows)).encode(),
    ".parquet": lambda fields, rows: _parquet(_records(fields, rows)),
}


# ---------------------------------------------------------------- forms and names


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("suffix", FORMS)
def test_every_file_form_gives_the_same_samples(tmp_path: Path, suffix: str, packed: bool) -> None:
    for fields, rows in ((("text", "label"), ROWS), (("text_a", "text_b", "label"), TRIPLES)):
        content = FORMS[suffix](fields, rows)
        path = tmp_path / f"a{suffix}{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(content) if packed else content)
        samples = _load(path)
        assert _found(samples) == rows
        assert samples.shape == ("classify" if len(fields) == 2 else "classify-pair")
        assert len({sample.place for sample in samples.items}) == len(rows)


def test_folders_and_line_aligned_files_are_read(tmp_path: Path) -> None:
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_bytes(FORMS[".tsv"](("sentence", "label"), ROWS))
    assert _found(_load(tmp_path)) == ROWS
    held_out = load_samples(tmp_path, "validation", task="classify")
    assert held_out.notices[0].startswith(f"{tmp_path / 'dev.tsv'}: 3 classify records")
    (tmp_path / "texts.txt").write_text("".join(f"{text}\n" for text, _ in ROWS))
    (tmp_path / "names.txt").write_text("".join(f"{label}\n" for _, label in ROWS))
    assert _found(_load(f"{tmp_path / 'texts.txt'}+{tmp_path / 'names.txt'}")) == ROWS


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (("text", "label"), "text, label"),
        (("sentence", "label"), "text from sentence, label"),
        (("Review", "Sentiment"), "text from Review, label from Sentiment"),
        (("content", "labels"), "text from content, label from labels"),
        (("message", "category"), "text from message, label from category"),
        (("tweet", "class"), "text from tweet, label from class"),
        (("question", "target"), "text from question, label from target"),
        (("text_a", "text_b", "label"), "text_a, text_b, label"),
        (("premise", "hypothesis", "label"), "text_a from premise, text_b from hypothesis, label"),
        (
            ("sentence1", "sentence2", "score"),
            "text_a from sentence1, text_b from sentence2, label from score",
        ),
        (
            ("question1", "question2", "is_duplicate"),
            "text_a from question1, text_b from question2, label from is_duplicate",
        ),
        (("question", "sentence", "label"), "text_a from question, text_b from sentence, label"),
        (
            ("sentence_A", "sentence_B", "label"),
            "text_a from sentence_A, text_b from sentence_B, label",
        ),
    ],
)
def test_common_names_are_known(tmp_path: Path, fields: tuple[str, ...], told: str) -> None:
    rows: list[Any] = TRIPLES if len(fields) == 3 else ROWS
    path = tmp_path / "a.jsonl"
    path.write_bytes(_lines(*({**record, "id": 1} for record in _records(fields, rows))))
    samples = _load(path)
    assert _found(samples) == rows
    assert samples.notices == (
        f"{path}: {len(rows)} {samples.shape} records ({told}); not read: id",
    )


def test_a_fields_own_name_goes_before_others(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(_lines({"sentence": "s", "text": "t", "label_text": "x", "label": 1}))
    assert _found(_load(path)) == [("t", 1)]
    path.write_bytes(_lines({"text": "t", "text_a": "a", "text_b": "b", "label": 1}))
    assert _found(_load(path)) == [("a", "b", 1)]
    # A null counts as missing.
    path.write_bytes(_lines({"label": None, "class": 2, "text": None, "review": "r"}))
    assert _found(_load(path)) == [("r", 2)]


def test_columns_go_before_names(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(_lines({"text": "t", "title": "u", "label": 1, "x": {"stars": 5}}))
    assert _found(_load(path, columns={"label": "x.stars"})) == [("t", 5)]
    assert _found(_load(path, columns={"text": "title"})) == [("u", 1)]
    both = {"text_a": "title", "text_b": "text"}
    samples = _load(path, columns=both)
    assert _found(samples) == [("u", "t", 1)]
    assert samples.shape is Shape.CLASSIFY_PAIR
    assert "text_a from title, text_b from text, label" in samples.notices[0]
    # A column that is one field is not another as well.
    with pytest.raises(
        DataError, match=r"expected one of: text_a \+ text_b \+ label, text \+ label"
    ):
        _load(path, columns={"text_a": "text", "text_b": "label"})


def test_a_task_knows_its_own_shapes_only(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(_lines({"text": "t", "label": 1}))
    as_text = load_samples(path)
    assert as_text.shape is Shape.TEXT
    assert as_text.notices[0].endswith("(text); not read: label")
    assert load_samples(path, task="classify").shape is Shape.CLASSIFY
    assert _load(path, format="classify").shape is Shape.CLASSIFY
    with pytest.raises(ConfigError, match=r"--format classify: no format of --task causal; exp"):
        load_samples(path, options=RecordOptions(format="classify"))
    with pytest.raises(ConfigError, match=r"--format text: no format of --task classify; expec"):
        _load(path, format="text")
    path.write_bytes(_lines({"question": "q", "answer": "a"}))
    with pytest.raises(DataError, match=r"keys question, answer; expected one of: text_a \+ tex"):
        load_samples(path, task="classify")


# ---------------------------------------------------------------- tables without a header


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t"), (".csv", ";")])
def test_a_table_without_a_header_has_the_text_first(
    tmp_path: Path, suffix: str, delimiter: str
) -> None:
    path = tmp_path / f"a{suffix}"
    for rows in (ROWS[:2], TRIPLES):
        path.write_bytes(_table(rows, delimiter))
        samples = _load(path)
        assert _found(samples) == rows
        assert samples.items[0].place == f"{path}:1"
        assert samples.notices[0] == (
            f"{path}: its first line names no known field, and is read as a row: the text first, "
            "the label last; if it is a header, say which column is which with --columns"
        )


def test_a_header_is_one_where_it_names_a_known_field_or_columns_are_given(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(_table([("phrase_x", "label"), *ROWS]))
    with pytest.raises(DataError, match=r":2: keys phrase_x, label; expected one of: "):
        _load(path)
    assert _found(_load(path, columns={"text": "phrase_x"})) == ROWS
    path.write_bytes(_table([("phrase_x", "mood"), *ROWS]))
    assert _found(_load(path, columns={"text": "phrase_x", "label": "mood"})) == ROWS
    # Of more columns nobody can tell which is which.
    path.write_bytes(_table([("a", "b", "c", "d"), ("1", "2", "3", "4")]))
    with pytest.raises(DataError, match=r":2: keys a, b, c, d; expected one of: "):
        _load(path)
    # The same table is text to be learnt, with its header, to another task.
    path.write_bytes(_table([("text", "label"), *ROWS]))
    assert len(load_samples(path).items) == len(ROWS)


# ---------------------------------------------------------------- labels of a record


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("pos", "pos"),
        (" pos ", "pos"),
        ("0", "0"),
        (3, 3),
        (2.5, 2.5),
        (True, "true"),
        (["a", "b"], ("a", "b")),
        ([0, 2], ("0", "2")),
        ([1.0], ("1",)),
        ([], ()),
        ('["a", "b, c"]', ("a", "b, c")),
        ("['a', 'b']", ("a", "b")),
        ("[1, 2]", ("1", "2")),
        ("[]", ()),
        ("[spam]", "[spam]"),
        ("not very good", "not very good"),
    ],
)
def test_a_label_is_read_as_it_is_meant(tmp_path: Path, written: Any, read: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(_lines({"text": "t", "label": written}))
    (sample,) = _load(path).items
    assert isinstance(sample, LabelledText)
    assert (sample.label, type(sample.label)) == (read, type(read))


TWO = [{"text": "a §", "label": "x"}, {"text": "b §", "label": "y"}]

# The bytes of a file, options of `check`, and the error after "error: ".
BAD: list[tuple[str, bytes, tuple[str, ...], str]] = [
    # The records.
    ("a.jsonl", _lines({"text": "§"}), (), r'a.jsonl:1: keys text; expected one of: text_a \+ tex'),
    ("a.jsonl", _lines({"label": 1}), (), r"a.jsonl:1: keys label; expected one of: "),
    ("a.txt", "§\n".encode(), (), r"a.txt:1: keys text; expected one of: "),
    ("a.jsonl", _lines({"text": "§", "label": None}), (),
     r'a.jsonl:1: "label" is null; expected a name or a number; write one, or pass --skip'),
    ("a.csv", "text,label\n§,\n".encode(), (),
     r'a.csv:2: "label" is empty; expected a name of 200 characters at most; correct it'),
    ("a.csv", b"text,label\n,x\n", (), r'a.csv:2: "text" is empty; expected text; fill'),
    ("a.jsonl", _lines({"text": 3, "label": 1}), (), r'a.jsonl:1: "text" is a number; expected a'),
    ("a.jsonl", _lines({"text": "§", "label": {"§": 1}}), (),
     r'a.jsonl:1: "label" is an object; expected a name or a number; write one'),
    ("a.jsonl", _lines({"text": "§", "label": [["§"]]}), (),
     r"a.jsonl:1: a label in its list is a list; expected a name or a number; write one"),
    ("a.jsonl", _lines({"text": "§", "label": [None]}), (),
     r"a.jsonl:1: a label in its list is null; expected a name or a number; write one"),
    ("a.jsonl", _lines({"text": "§", "label": [0, 1, 0, 1]}), (),
     r'a.jsonl:1: the list of labels names "0" twice; expected the name of each label that'),
    ("a.jsonl", _lines({"text": "§", "label": [0.5, 0.1]}), (),
     r"a.jsonl:1: a label in its list is a number with a fraction; expected a name or a numb"),
    ("a.jsonl", _lines({"text": "§", "label": "§" * 300}), (),
     r'a.jsonl:1: "label" has 300 characters; expected a name of 200 characters at most'),
    ("a.jsonl", b'{"text": "a", "label": "\\ud800"}', (), r'a.jsonl:1: "label" has half of a surr'),
    ("a.jsonl", b'{"text": "a", "label": ' + b"9" * 4000 + b"}", (),
     r'a.jsonl:1: "label" is no finite number; expected a label; fill it in, or pass --skip'),
    ("a.parquet", _parquet([{"text": "§", "label": float("nan")}]), (),
     r'a.parquet record 1: "label" is no finite number; expected a label; fill it in'),
    ("a.jsonl", _lines({"text_a": "§", "text_b": "", "label": 1}), (),
     r'a.jsonl:1: "text_b" is empty; expected text; fill it in or remove the record'),
    ("a.jsonl", _lines({"sentence": "§", "label": 1}, {"txt": "§", "label": 0}), (),
     r'a.jsonl:2: no "sentence"; expected it as in the classify record a.jsonl:1; give one'),
    ("a.jsonl", _lines(TWO[0], {"text_a": "§", "text_b": "§", "label": 0}), (),
     r"a.jsonl:2: a record of shape classify-pair; expected classify as in a.jsonl:1; keep one"),
    ("a.csv", "text,label\n§,x,y\n".encode(), (), r"a.csv:2: 3 fields; expected 2 as in the firs"),
    # What the options say.
    ("a.jsonl", _lines(*TWO), ("--format", "chat"),
     r"--format chat: no format of --task classify; expected auto, classify; pass one of these"),
    ("a.jsonl", _lines(*TWO), ("--columns", "prompt=text"),
     r"--columns: no field prompt; expected FIELD=COLUMN with a field of image, label, text"),
    ("a.jsonl", _lines(*TWO), ("--columns", "text=text,text_b=label"),
     r"--columns: no format has text and text_b together; expected the fields of one format"),
    ("a.jsonl", _lines(*TWO), ("--columns", "label=mood"),
     r'a.jsonl:1: no "mood" but keys text, label; expected what --columns names; correct it'),
    ("a.jsonl", _lines(*TWO), ("--long-samples", "split"),
     r"--long-samples split: a label is of a whole text; expected truncate, drop or error with"),
    ("a.jsonl", _lines(*TWO), ("--max-length", "2", "--long-samples", "drop"),
     r"a.jsonl: all 2 rows are too long and left out; expected shorter ones; raise --max-length"),
    ("a.jsonl", _lines(TWO[0], {"text": "b", "label": "y"}),
     ("--max-length", "2", "--long-samples", "error"),
     r"a.jsonl:1: \d tokens; expected at most 2; shorten it, raise --max-length or choose"),
    ("a.jsonl", _lines(*TWO), ("--labels", "x,x"), r"--labels: 'x' twice; expected 10,000 names"),
    ("a.jsonl", _lines(*TWO), ("--class-weights", "z=2"),
     r"--class-weights: no label 'z'; expected labels of the data, as x, y; correct it"),
    # The labels as a whole.
    ("a.jsonl", _lines(*[TWO[0]] * 3), (),
     r"a.jsonl: one label only \(x\) in 3 records; expected two or more to tell apart; add rec"),
    ("a.jsonl", _lines(*[{"text": "§", "label": "§ §"}] * 3), (),
     r"a.jsonl: one label only in 3 records; expected two or more to tell apart; add records"),
    ("a.jsonl", _lines(*[{"text": "§", "label": ["x"]}] * 2), (), r"a.jsonl: one label only \(x"),
    ("a.jsonl", _lines(*[{"text": "§", "label": 1.5}] * 2), (), r"a.jsonl: one label only in 2"),
    ("a.csv", _table([("text", "label"), *(("§", f"n{n}") for n in range(10_001))]), (),
     r"a.csv: 10,001 different labels; expected 10,000 at most; name the right column with"),
    ("a.jsonl", _lines(*TWO), ("--labels", "x,z"),
     r"a.jsonl:2: the label y that is none of the 2 known ones; expected x, z; correct it, add"),
    ("a.jsonl", _lines(TWO[0], {"text": "§", "label": "§!"}), ("--labels", "x,z"),
     r"a.jsonl:2: a label that is none of the 2 known ones; expected x, z; correct it, add it"),
    ("a.jsonl", _lines(*({"text": "§", "label": n} for n in (0, 1, 2))), ("--labels", "no,yes"),
     r"a.jsonl:3: the label 2 that is none of the 2 known ones; expected no, yes; correct it"),
    ("a.jsonl", _lines({"text": "§", "label": 0.5}, {"text": "§", "label": 1}),
     ("--label-kind", "single"),
     r"a.jsonl:1: the label is a number with a fraction; expected a name or a whole number with"),
    ("a.jsonl", _lines(TWO[0], {"text": "§", "label": ["x", "y"]}), (),
     r"a.jsonl:1: the label is no list; expected one as in a.jsonl:2; write one in \[ \], or p"),
    ("a.jsonl", _lines(TWO[0], {"text": "§", "label": ["x", "y"]}), ("--label-kind", "single"),
     r"a.jsonl:2: the label is a list; expected one name with --label-kind single; write one"),
    ("a.jsonl", _lines(*TWO), ("--label-kind", "regression"),
     r"a.jsonl:1: the label is no number; expected one with --label-kind regression; correct it"),
    ("a.csv", "text,label\n§,0.5\n§,nan\n".encode(), (),
     r"a.csv:3: the label is no finite number among numbers; expected one as in the other rec"),
    ("a.csv", "text,label\n§,0.5\n§,NaN\n".encode(), ("--label-kind", "regression"),
     r"a.csv:3: the label is no finite number; expected one with --label-kind regression; corr"),
    ("a.csv", "text,label\n§,0.5\n§,1\n".encode(), ("--label-kind", "regression", "--labels", "a"),
     r"--labels: the label is a number to predict, without classes; expected neither names nor"),
    ("a.csv", "text,label\n§,0.5\n§,1\n".encode(), ("--class-weights", "balanced"),
     r"--class-weights: the label is a number to predict, without classes; expected neither"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "options", "message"), BAD, ids=range(len(BAD)))
def test_bad_labelled_data_is_one_line_and_nothing_is_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: bytes,
    options: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content)
    code, out, err = run(
        "check", "--task", "classify", "--model", "demo", "--data", name, "--json", *options,
        capsys=capsys,
    )  # fmt: skip
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, out) == (2, ""), err
    assert len(errors) == 1, errors
    assert re.match(f"error: {message}", errors[0]), errors[0]
    assert errors[0].count("; ") >= 2, "found; expected; what to do"
    assert SECRET not in err
    assert [*tmp_path.rglob("*")] == [tmp_path / name], "nothing is created"
    assert (tmp_path / name).read_bytes() == content


def test_without_data_there_are_no_labels(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run("check", "--task", "classify", capsys=capsys)
    assert (code, out) == (2, "")
    assert err == (
        "error: --data: none is given, and the built-in sample data has no labels; expected "
        "labelled texts for --task classify; pass --data FILE\n"
    )


def test_faulty_records_are_told_together_or_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(_lines(TWO[0], {"text": "§", "label": None}, {"text": "", "label": 1}, TWO[1]))
    with pytest.raises(DataError) as caught:
        _load(path)
    assert [fault.partition(";")[0] for fault in caught.value.faults] == [
        f'{path}:2: "label" is null',
        f'{path}:3: "text" is empty',
    ]
    samples = _load(path, skip_bad_lines=True)
    assert (len(samples.items), samples.skipped) == (2, 2)


# ---------------------------------------------------------------- generated

_TEXT = st.text(st.characters(exclude_categories=()), max_size=8).map(lambda text: text + SECRET)
_LABEL = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), _TEXT,
    st.sampled_from(["", "a", "b", "1", "1.5", "nan", "[]", "['a']", "1e999", "-inf", "a|b"]),
    st.sampled_from(["[" * 2000, "9" * 5000]),
    st.lists(st.integers(0, 3) | _TEXT | st.none(), max_size=3), st.just({}),
)  # fmt: skip
_ODD_TEXT = _TEXT | st.none() | st.integers() | st.just("")
_RECORD = st.one_of(
    st.fixed_dictionaries({"text": _TEXT, "label": _LABEL}),
    st.fixed_dictionaries({"premise": _TEXT, "hypothesis": _ODD_TEXT, "label": _LABEL}),
    st.fixed_dictionaries({}, optional={"sentence": _ODD_TEXT, "class": _LABEL, "x": _LABEL}),
)
_OPTIONS = st.builds(
    TaskOptions,
    label_kind=st.sampled_from(["auto", "auto", "single", "multi", "regression"]),
    labels=st.sampled_from([(), (), ("a", "b"), ("0", "1", "2")]),
    class_weights=st.sampled_from([{}, "balanced", {"a": 2.0}]),
)


@given(
    records=st.lists(_RECORD, min_size=1, max_size=5), options=_OPTIONS, skip=st.booleans(),
    is_table=st.booleans(), header=st.sampled_from([[], [("text", "label")]]),
)  # fmt: skip
@settings(deadline=None, max_examples=400)
def test_generated_labels_are_understood_or_lines_of_fault(
    tmp_path_factory: pytest.TempPathFactory,
    records: list[dict[str, Any]],
    options: TaskOptions,
    skip: bool,
    is_table: bool,
    header: list[tuple[str, ...]],
) -> None:
    path = tmp_path_factory.mktemp("case") / ("a.csv" if is_table else "a.jsonl")
    rows = [tuple(map(str, record.values())) for record in records]
    path.write_bytes(_table([*header, *rows]) if is_table else _lines(*records))
    found = _understood(path, options, skip)
    if isinstance(found, InputError):
        assert all("\n" not in fault and SECRET not in fault for fault in found.faults)
        assert all("; " in fault or fault.startswith("... and ") for fault in found.faults)
        return
    samples, labels = found
    assert SECRET not in labels.describe()
    assert all(SECRET not in notice for notice in samples.notices)
    for sample in samples.items:
        assert isinstance(sample, LabelledText)
        target = labels.target(sample)
        if labels.kind == "regression":
            assert len(target) == 1
        else:
            assert all(0 <= place < labels.outputs for place in target)
            assert labels.kind == "multi" or len(target) == 1
    assert len(labels.weights) == len(labels.names)
    assert all(weight > 0 for weight in labels.weights)


def _understood(
    path: Path, options: TaskOptions, skip: bool
) -> tuple[Samples, Labels] | InputError:
    try:
        samples = _load(path, skip_bad_lines=skip)
        return samples, labels_of(samples, options)
    except InputError as error:
        return error
