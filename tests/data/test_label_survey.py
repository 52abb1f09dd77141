"""`check --task classify`: labels, repeats and leaks are counted, and shown with their rows."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from data_fixtures import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from support import run

from qlora_kit.config import TaskOptions, TokenOptions
from qlora_kit.data.label_survey import ClassFigures, RepeatedTexts, ValueFigures
from qlora_kit.data.labelled_rows import LabelledRows
from qlora_kit.data.labels import labels_of
from qlora_kit.data.row_arrays import Part
from qlora_kit.data.samples import Samples
from qlora_kit.data.shapes import LabelledText, Shape
from qlora_kit.data.survey import Survey, survey
from qlora_kit.data.tokens import tokenize
from qlora_kit.report.data_view import data_page, label_rows, summary_rows


def _samples(items: list[tuple[str, Any]], place: str = "a") -> Samples:
    texts = [
        LabelledText(text, f"{place}:{n}", label=label) for n, (text, label) in enumerate(items)
    ]
    return Samples(texts, Shape.CLASSIFY, place)


def _survey(
    items: list[tuple[str, Any]], validation: list[tuple[str, Any]] | None = None, **asked: Any
) -> Survey:
    tokenizer, options = make_tokenizer(), TokenOptions(max_length=40)
    learnt = _samples(items)
    makes = LabelledRows(labels_of(learnt, TaskOptions.model_validate(asked)))

    def part(samples: Samples) -> Part:
        return Part(samples, tokenize(samples, tokenizer, options, makes=makes, cache=False))

    measured = None if validation is None else part(_samples(validation, "v"))
    return survey(part(learnt), measured, tokenizer, options, seed=1, shown_rows=3)


# ---------------------------------------------------------------- figures

ROWS = st.lists(
    st.tuples(st.sampled_from("abcdef"), st.sampled_from("xyz")), min_size=2, max_size=20
)


@given(learnt=ROWS, measured=ROWS)
@settings(deadline=None, max_examples=80)
def test_counts_are_those_that_one_makes_by_hand(
    learnt: list[tuple[str, Any]], measured: list[tuple[str, Any]]
) -> None:
    found = _survey(learnt, measured, labels="x,y,z")
    assert isinstance(found.labels, ClassFigures)
    for each in found.labels.classes:
        assert each.training == sum(label == each.name for _, label in learnt)
        assert each.validation == sum(label == each.name for _, label in measured)
    first: dict[str, str] = {}
    for text, label in learnt:
        first.setdefault(text, label)
    within, across = found.repeats, found.overlap
    assert isinstance(within, RepeatedTexts)
    assert isinstance(across, RepeatedTexts)
    assert (within.of, across.of) == (len(learnt), len(measured))
    assert within.rows == len(learnt) - len(first)
    assert within.contradicting == sum(label != first[text] for text, label in learnt)
    assert across.rows == sum(text in first for text, _ in measured)
    assert across.contradicting == sum(first.get(text, label) != label for text, label in measured)
    for place, earlier in within.contradictions:
        one, other = learnt[int(place[2:])], learnt[int(earlier[2:])]
        assert one[0] == other[0]
        assert one[1] != other[1]
    told = "\n".join(found.warnings())
    assert ("training rows that repeat another, with another label" in told) == bool(
        within.contradicting
    )
    assert ("validation rows that are also trained on:" in told) == bool(across.rows)


def test_an_unbalanced_set_is_told_unless_it_is_weighed() -> None:
    rows: list[tuple[str, Any]] = [(f"text {n}", "rare" if n == 0 else "often") for n in range(11)]
    assert (
        "labels out of balance: the largest, often, has 10 rows, the smallest, rare, has 1 row; "
        "add rows of the rare ones, or pass --class-weights balanced"
    ) in [*_survey(rows).warnings()]
    for items, asked in ((rows, {"class_weights": "balanced"}), (rows[:10], {})):
        assert not any("balance" in text for text in _survey(items, **asked).warnings())
    bars = dict(label_rows(_survey(rows, class_weights="balanced").labels))  # type: ignore[arg-type]
    assert bars["often"].endswith("█ 10 (90.9%, weight 0.55)")
    assert bars["rare"] == "████ 1 (9.1%, weight 5.5)"


def test_values_have_a_range_a_mean_and_a_histogram() -> None:
    rows: list[tuple[str, Any]] = [(f"text {n}", n / 4) for n in range(41)]
    found = _survey(rows, [("v", -1.0), ("w", 3)])
    assert isinstance(found.labels, ValueFigures)
    values = found.labels.training
    assert (values.smallest, values.mean, values.largest) == (0, 5, 10)
    assert sum(each.rows for each in values.histogram) == 41
    for each in values.histogram[:-1]:
        assert each.rows == sum(each.first <= n / 4 < each.last for n in range(41))
    assert ("values", "0 to 10, mean 5; validation -1 to 3, mean 1") in summary_rows(found)
    assert any(text.startswith("validation values beyond those") for text in found.warnings())
    page = data_page(found)
    assert "<h2>Values of the training rows</h2>" in page
    assert "<span>0 to 1</span>" in page
    within = _survey(rows, [("v", 0.0), ("w", 10.0)])
    assert not any("beyond" in text for text in within.warnings())


def test_of_many_labels_the_largest_are_shown() -> None:
    rows = [(f"t {n} {k}", f"name{n:02}") for n in range(30) for k in range(n + 1)]
    found = _survey(rows)
    shown = label_rows(found.labels)  # type: ignore[arg-type]
    assert [name for name, _ in shown] == [*(f"name{n}" for n in range(10, 30)), "10 others"]
    assert shown[-1][1].endswith(" 55 (11.8%)")
    named = found.as_json()["labels"]
    assert [each["name"] for each in named["classes"]] == [f"name{n:02}" for n in range(30)]


def test_a_name_is_shown_in_one_line_and_not_as_mark_up() -> None:
    odd = "<b>\u202e" + "x" * 60
    found = _survey([("one", odd), ("two", "b\n c")])
    names = [name for name, _ in label_rows(found.labels)]  # type: ignore[arg-type]
    assert names == ["<b>\\u{202e}" + "x" * 28 + "…", "b c"]
    page = data_page(found)
    assert "<b>" not in page
    assert "&lt;b&gt;" in page
    assert "\u202e" not in page


# ---------------------------------------------------------------- the command

FILM = [("good film", "pos"), ("bad film", "neg"), ("good film", "pos"), ("bad film", "pos")]


def _write(path: Path, rows: list[tuple[Any, ...]]) -> None:
    lines = ("\t".join(map(str, row)) + "\n" for row in rows)
    path.write_text("sentence\tlabel\n" + "".join(lines))


def test_check_prints_labels_and_rows_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    _write(tmp_path / "a.tsv", FILM)
    _write(tmp_path / "v.tsv", [("bad film", "neg"), ("new film", "neg")])
    code, out, err = run(
        "check", "--task", "classify", "--data", "a.tsv", "--validation", "v.tsv", "--html",
        "page.html", "--rows", "4", capsys=capsys,
    )  # fmt: skip
    assert code == 0, err
    lines = out.splitlines()
    assert "note: labels: one of 2 (neg, pos) each (--label-kind single)" in lines
    for line in (
        "labels of the training rows",
        "neg  " + "█" * 14 + " 1 (25.0%, 2 in validation)",
        "pos  " + "█" * 40 + " 3 (75.0%, 0 in validation)",
        "repeated       2 of 4 texts, 1 of them with another label",
        "in both parts  1 of 2 texts, 0 of them with another label",
        "note: training rows that repeat another: 2, the first a.tsv:4, as a.tsv:2; remove them, "
        "or they count twice",
        "note: training rows that repeat another, with another label: 1, the first a.tsv:5, as "
        "a.tsv:3; correct one of the labels: no model can learn both",
        "note: validation rows that are also trained on: 1, the first v.tsv:2, as a.tsv:3; remove "
        "them, or the validation loss looks better than it is",
    ):
        assert line in lines, line
    shown = [lines[at + 1] for at, line in enumerate(lines) if line.startswith("a.tsv:2: ")]
    assert shown == ["good film"]
    assert any(re.fullmatch(r"a\.tsv:3: \d+ tokens, label neg", line) for line in lines)
    assert not any(word in out for word in ("supervised", "end token", "prompts", "⟦"))
    page = unescape((tmp_path / "page.html").read_text())
    assert re.search(r"<h2>a\.tsv:3: \d+ tokens, label neg</h2>", page)
    assert '<span>pos</span><div><div class="bar" style="width: 100.00%">' in page
    assert "Training rows that repeat another, with another label" in page
    assert "supervised" not in page
    assert {path.name for path in tmp_path.iterdir()} == {"a.tsv", "v.tsv", "page.html"}


def test_figures_for_programs_name_labels_and_no_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.tsv"
    _write(path, [(f"SECRETWORD {n}", "pos" if n % 3 else "not so good") for n in range(9)])
    code, out, err = run(
        "check", "--task", "classify", "--data", str(path), "--json", capsys=capsys
    )
    assert code == 0, err
    assert "SECRETWORD" not in out + err
    assert "not so good" not in err
    found = json.loads(out)
    assert found["labels"] == {
        "kind": "single",
        "classes": [
            {"name": "not so good", "training": 3, "validation": None, "weight": 1.0},
            {"name": "pos", "training": 6, "validation": None, "weight": 1.0},
        ],
    }
    assert (found["training"]["labels"], found["training"]["labels_lost"]) == (9, 0)
    assert (found["repeats"]["rows"], found["repeats"]["contradicting"]) == (0, 0)
    assert not found.keys() & {"ends", "prompts", "supervised_share", "shown"}


def test_labels_of_text_to_be_learnt_are_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "label": "x"}\n')
    code, out, _ = run("check", "--data", str(path), "--json", capsys=capsys)
    assert code == 0
    assert list(json.loads(out)) == [
        "source", "max_length", "training", "validation", "lengths", "longest", "ends", "prompts",
        "repeats", "overlap", "packing", "packed", "supervised_share", "warnings",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "options", "line"),
    [
        ([*FILM[:2]], ("--labels", "pos,neg,mixed"),
         "labels that no row of a.tsv has: 1 (mixed); it is never learnt; add rows of it, or leave "
         "it out of --labels"),
        (FILM, ("--train-on", "all"),
         "--train-on has no effect: a labelled text is given to the model as it is"),
        ([(f"text {n}", "only" if n == 11 else "most") for n in range(400)],
         ("--validation-fraction", "0.9"), "labels all of whose rows are held out: 1 (only); "),
    ],
)  # fmt: skip
def test_what_is_without_effect_or_is_never_learnt_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rows: list[tuple[Any, ...]],
    options: tuple[str, ...],
    line: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    _write(tmp_path / "a.tsv", rows)
    arguments = ("check", "--task", "classify", "--data", "a.tsv", *options)
    code, out, err = run(*arguments, capsys=capsys)
    assert code == 0, err
    assert any(each.startswith(f"note: {line}") for each in out.splitlines()), out


def test_an_unknown_label_of_the_validation_file_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    _write(tmp_path / "a.tsv", FILM)
    _write(tmp_path / "v.tsv", [("x", "pos"), ("y", "odd"), ("z", "odd")])
    code, _, err = run(
        "check", "--task", "classify", "--data", "a.tsv", "--validation", "v.tsv", capsys=capsys
    )
    assert code == 2
    (line,) = [each for each in err.splitlines() if each.startswith("error: ")]
    assert line == (
        "error: v.tsv:3: the label odd that is none of the 2 known ones; expected neg, pos; "
        "correct it, add it to the training data or to --labels, or remove the record (2 records "
        "have such a label)"
    )


# ---------------------------------------------------------------- a real file


def test_sst2_is_read_and_surveyed(assets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = assets / "data" / "sst2"
    code, out, err = run(
        "check", "--task", "classify", "--model", "demo", "--data", str(data / "train.tsv"),
        "--validation", str(data / "test.tsv"), "--max-length", "256", "--json", capsys=capsys,
    )  # fmt: skip
    assert code == 0, err
    lines = err.splitlines()
    assert lines[0] == (
        f"note: {data / 'train.tsv'}: 6,735 classify records (text from sentence, label)"
    )
    assert "note: labels: one of 2 (0, 1) each (--label-kind single)" in lines
    found = json.loads(out)
    assert [(each["training"], each["validation"]) for each in found["labels"]["classes"]] == [
        (2994, 428),
        (3741, 444),
    ]
    raw = (data / "train.tsv").read_text().splitlines()[1:]
    texts = [line.rpartition("\t")[0] for line in raw]
    assert found["repeats"]["rows"] == len(texts) - len({*texts})
    assert (found["training"]["rows_kept"], found["training"]["labels_lost"]) == (6735, 0)
