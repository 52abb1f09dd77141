"""Questions with several right answers: the first is learnt, the others are kept for measuring."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_kit.config import RecordOptions
from qlora_kit.data.samples import Samples, load_samples
from qlora_kit.errors import DataError


def load(folder: Path, *records: Any, columns: dict[str, str] | None = None) -> Samples:
    file = folder / "a.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return load_samples(file, options=RecordOptions(columns=columns or {}))


def test_the_first_of_several_answers_is_learnt(tmp_path: Path) -> None:
    several = {"question": "one?", "answer": ["1", "one", "1", "uno"]}
    (sample,) = load(tmp_path, several).items
    assert [turn.content for turn in sample.messages] == ["one?", "1"]
    assert sample.also_right == ("one", "uno")
    (alone,) = load(tmp_path, {"question": "one?", "answer": ["1"]}).items
    assert alone.also_right == ()


def test_what_is_only_accepted_is_no_other_data(tmp_path: Path) -> None:
    plain = load(tmp_path, {"question": "one?", "answer": "1"}).content_hash()
    assert load(tmp_path, {"question": "one?", "answer": ["1", "one"]}).content_hash() == plain
    assert load(tmp_path, {"question": "one?", "answer": ["one", "1"]}).content_hash() != plain


def test_how_many_have_several_is_told(tmp_path: Path) -> None:
    records = [{"question": "?", "answer": each} for each in ("a", ["a", "b"], ["a"], ["c", "d"])]
    notices = load(tmp_path, *records).notices
    told = [text for text in notices if "several answers" in text]
    assert told == [
        f"{tmp_path}/a.jsonl: 2 of 4 records have several answers; the first is learnt, and "
        "measuring accepts each"
    ]
    assert not any("several answers" in text for text in load(tmp_path, records[0]).notices)


def test_records_of_squad_are_named_by_columns(tmp_path: Path) -> None:
    record = {
        "id": "5",
        "title": "t",
        "context": "Denver won.",
        "question": "Who won?",
        "answers": {"text": ["Denver", "Denver won", "Denver"], "answer_start": [0, 0, 0]},
    }
    columns = {"instruction": "question", "input": "context", "output": "answers.text"}
    asked = ",".join(f"{field}={column}" for field, column in columns.items())
    with pytest.raises(DataError, match=f"or pass --columns {asked}$"):
        load(tmp_path, record)
    (sample,) = load(tmp_path, record, columns=columns).items
    assert [turn.content for turn in sample.messages] == ["Who won?\n\nDenver won.", "Denver"]
    assert sample.also_right == ("Denver won",)


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ([], r'a.jsonl:1: "answer" is an empty list; expected one text or more; fill it in or '),
        ([""], r'a.jsonl:1: text 1: "answer" is empty; expected text'),
        (["a", None], r'a.jsonl:1: text 2: "answer" is null; expected a string'),
        (["a", ["b"]], r'a.jsonl:1: text 2: "answer" is a list; expected a string'),
        (["a", "\ud800"], r'a.jsonl:1: text 2: "answer" has half of a surrogate pair'),
        ({"text": "a"}, r'a.jsonl:1: "answer" is an object; expected a string'),
    ],
)
def test_a_list_that_holds_no_answers_is_one_line(tmp_path: Path, answer: Any, fault: str) -> None:
    with pytest.raises(DataError, match=fault):
        load(tmp_path, {"question": "one?", "answer": answer})
