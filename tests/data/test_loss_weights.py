"""Weights of turns and records: read, refused, kept by token, counted and shown."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from data_fixtures import CHATML, QWEN3, chat, make_tokenizer, samples_of
from pyarrow import parquet
from support import run

from qlora_kit.config import RecordOptions, TokenOptions
from qlora_kit.data.batch import LOSS_WEIGHTS, TokenTable
from qlora_kit.data.encode import IGNORED
from qlora_kit.data.samples import Samples, load_samples
from qlora_kit.data.shapes import Pair, loss_weights
from qlora_kit.data.tokens import Tokenized, split_validation, tokenize
from qlora_kit.errors import DataError

ASK = {"role": "user", "content": "ask"}


def answer(text: str, **marks: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **marks}


def load(folder: Path, *records: dict[str, Any], task: str = "causal") -> Samples:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return load_samples(path, options=RecordOptions(), task=task)


def tokenized(samples: Samples, template: str = CHATML, **options: Any) -> Tokenized:
    tokenizer = make_tokenizer(chat_template=template)
    return tokenize(samples, tokenizer, TokenOptions(**options), cache=False)


def learnt(rows: Tokenized, template: str = CHATML) -> list[list[tuple[str, float]]]:
    """Return the runs of each row that are learnt alike, with their weight."""
    tokenizer = make_tokenizer(chat_template=template)
    found = []
    for row in rows.rows:
        weights = row.get(LOSS_WEIGHTS) or [1.0] * len(row["labels"])
        runs: list[tuple[list[int], float]] = []
        before = 0.0
        for label, own in zip(row["labels"], weights, strict=True):
            weight = 0.0 if label == IGNORED else own
            if weight and weight != before:
                runs.append(([], weight))
            if weight:
                runs[-1][0].append(label)
            before = weight
        found.append([(tokenizer.decode(ids), weight) for ids, weight in runs])
    return found


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("marks", "weight"),
    [
        ({"loss_weight": 0.5}, 0.5), ({"weight": 3}, 3.0), ({"loss_weight": 2, "weight": 2.0}, 2.0),
        ({"train": True, "weight": 0.25}, 0.25), ({"training": True}, 1.0),
        ({"loss_weight": True}, 1.0), ({"loss_weight": None}, 1.0), ({}, 1.0),
    ],
)  # fmt: skip
def test_a_turn_has_the_weight_that_its_data_gives(
    tmp_path: Path, marks: dict[str, Any], weight: float
) -> None:
    samples = load(tmp_path, {"messages": [ASK, answer("a", **marks)]})
    assert loss_weights(samples.items[0]) == (1.0, 1.0, weight)


@pytest.mark.parametrize("mark", [{"training": False}, {"loss_weight": 0}, {"weight": False}])
def test_a_weight_of_nothing_leaves_the_turn_out(tmp_path: Path, mark: dict[str, Any]) -> None:
    samples = load(tmp_path, {"messages": [ASK, answer("a", **mark), ASK, answer("b")]})
    assert not samples.is_weighted
    assert learnt(tokenized(samples)) == [[("b<|im_end|>", 1.0)]]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [ASK, answer("a")]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"instruction": "q", "output": "a"},
        {"prompt": "q", "completion": [answer("a")]},
        {"prompt": "q", "completion": "a"},
        {"question": "q", "answer": "a"},
        {"text": "a b c"},
    ],
    ids=lambda record: " ".join(record),
)
@pytest.mark.parametrize("train_on", ["completion", "all"])
def test_a_record_of_any_format_may_have_a_weight(
    tmp_path: Path, record: dict[str, Any], train_on: str
) -> None:
    samples = load(tmp_path, {**record, "loss_weight": 0.5}, record)
    rows = tokenized(samples, train_on=train_on)
    (first, second) = rows.rows
    supervised = [label != IGNORED for label in first["labels"]]
    assert first[LOSS_WEIGHTS] == [0.5 * each for each in supervised]
    assert second[LOSS_WEIGHTS] is None
    assert first["labels"] == second["labels"]
    assert rows.counts.rows_weighted == 1
    assert "; 1 weighted; " in rows.counts.describe()


def test_weights_of_record_and_turn_multiply(tmp_path: Path) -> None:
    turns = [ASK, answer("a", weight=0.5), ASK, answer("b"), ASK, answer("c", weight=3)]
    rows = tokenized(load(tmp_path, {"messages": turns, "loss_weight": 2}))
    assert learnt(rows) == [[("a<|im_end|>", 1.0), ("b<|im_end|>", 2.0), ("c<|im_end|>", 6.0)]]


def test_answers_of_their_own_rows_keep_their_weights(tmp_path: Path) -> None:
    turns = [
        ASK, answer("<think>x</think>\n\na", weight=0.5),
        ASK, answer("<think>y</think>\n\nb", weight=2),
    ]  # fmt: skip
    rows = tokenized(load(tmp_path, {"messages": turns}), QWEN3)
    assert rows.counts.rows_by_turn == 1
    assert [[weight for _, weight in row] for row in learnt(rows, QWEN3)] == [[0.5], [2.0]]


@pytest.mark.parametrize(
    ("suffix", "weights"), [("csv", (2.0, 1.0)), ("tsv", (2.0, 1.0)), ("parquet", (2.0, 1.0))]
)
def test_tables_have_weights_too(tmp_path: Path, suffix: str, weights: tuple[float, ...]) -> None:
    path = tmp_path / f"data.{suffix}"
    comma = {"csv": ",", "tsv": "\t"}.get(suffix)
    if comma:
        lines = [["question", "answer", "loss_weight"], ["q", "a", "2"], ["q", "b", ""]]
        path.write_text("".join(comma.join(line) + "\n" for line in lines))
    else:
        rows = {"question": ["q", "q"], "answer": ["a", "b"], "loss_weight": [2.0, None]}
        parquet.write_table(pyarrow.table(rows), path)
    samples = load_samples(path)
    assert [each.loss_weight for each in samples.items] == [*weights]  # type: ignore[union-attr]


def test_a_column_may_be_the_weight(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a", "quality": {"score": 0.25}}\n')
    options = RecordOptions(columns={"text": "text", "loss_weight": "quality.score"})
    samples = load_samples(path, options=options)
    assert loss_weights(samples.items[0]) == (0.25,)
    assert samples.notices[0].endswith("(text, loss_weight from quality.score)")


def test_what_is_weighted_is_said_once(tmp_path: Path) -> None:
    samples = load(
        tmp_path,
        {"messages": [ASK, answer("a", weight=0.5), ASK, answer("b", weight=2)]},
        {"messages": [ASK, answer("a")], "loss_weight": 0.5},
    )
    assert samples.notices[1:] == (
        f"{tmp_path}/data.jsonl: 1 record and 2 turns are weighted (loss_weight); losses are "
        "divided by the sum of the weights",
    )


# ---------------------------------------------------------------- rows


def test_without_weights_nothing_changes() -> None:
    """The hash is that of a version that knew no weights: its cache and its runs go on."""
    samples = samples_of(chat("q", "z"))
    assert samples.content_hash().startswith("fd7f10e42bb13e57cb2ceb188aba9082ccf523c4")
    rows = tokenized(samples)
    assert rows.rows.table.column_names == ["input_ids", "labels", "row", "uncut_tokens"]
    assert not rows.rows.is_weighted


def test_weights_decide_the_hashes(tmp_path: Path) -> None:
    found = []
    for marks, own in (({}, 1), ({"weight": 0.5}, 1), ({"weight": 2}, 1), ({}, 0.5), ({}, 2)):
        samples = load(tmp_path, {"messages": [ASK, answer("a", **marks)], "loss_weight": own})
        rows = tokenized(samples)
        found.append((rows.fingerprint, rows.rows.content_hash()))
    assert len({fingerprint for fingerprint, _ in found}) == 5
    assert len({content for _, content in found}) == 3
    assert found[1][1] == found[3][1]


@pytest.mark.parametrize("how", ["truncate", "split"])
def test_weights_are_cut_with_their_tokens(how: str) -> None:
    samples = samples_of(Pair("q", "z" * 9, "x:1", loss_weight=0.5), Pair("q", "z", "x:2"))
    rows = tokenized(samples, max_length=8, long_samples=how)
    for row in rows.rows:
        if row["row"] == 0:
            supervised = [label != IGNORED for label in row["labels"]]
            assert row[LOSS_WEIGHTS] == [0.5 * each for each in supervised]
    assert rows.counts.rows_weighted == 1


def test_rows_of_no_weight_are_dropped_and_counted(tmp_path: Path) -> None:
    record = {"prompt": "q", "completion": "a"}
    rows = tokenized(load(tmp_path, {**record, "loss_weight": 0}, record))
    assert (rows.counts.rows_kept, rows.counts.rows_dropped) == (1, 1)
    assert rows.dropped.keys() == {0}
    assert [row["row"] for row in rows.rows] == [1]


def test_held_out_rows_keep_their_weights() -> None:
    items = [Pair("q", "z", f"x:{n}", loss_weight=1 + n % 2) for n in range(240)]
    rest, held = split_validation(tokenized(samples_of(*items)), 0.1, seed=1)
    assert held is not None
    for part in (rest.rows, held.rows):
        assert isinstance(part, TokenTable)
        assert part.is_weighted
        assert {row[LOSS_WEIGHTS] is None for row in part} == {True, False}


# ---------------------------------------------------------------- what is refused

TURN = 'turn 2 has {} for "loss_weight"; expected 0, or a number from 1e-9 to 1e9, by which the'
RECORD = 'the record has {} for "loss_weight"; expected 0, or a number from 1e-9 to 1e9, by which'
BAD: list[tuple[str, str, str]] = [
    ("turn", '{"messages": [U, {"role": "assistant", "content": "a", "loss_weight": -1}]}',
     TURN.format("-1")),
    ("turn", '{"messages": [U, {"role": "assistant", "content": "a", "loss_weight": "2"}]}',
     TURN.format("a string")),
    ("turn", '{"messages": [U, {"role": "assistant", "content": "a", "loss_weight": [2]}]}',
     TURN.format("a list")),
    ("turn", '{"messages": [U, {"role": "assistant", "content": "a", "loss_weight": 1e999}]}',
     r"(not valid JSON|turn 2 has inf for)"),
    ("turn", '{"messages": [U, {"role": "assistant", "content": "a", "loss_weight": NaN}]}',
     r"not valid JSON \(NaN is not a JSON number\)"),
    ("turn", '{"messages": [U, {"role": "assistant", "content": "a", "loss_weight": 1e-30}]}',
     TURN.format("1e-30")),
    ("user", '{"messages": [{"role": "user", "content": "q", "loss_weight": 0.5}, A]}',
     "turn 1 is the user's and has \"loss_weight\" on; expected only answers to be learnt"),
    ("two", '{"messages": [U, {"role": "assistant", "content": "a", "loss_weight": 2, '
     '"weight": 3}]}', 'turn 2 has a "weight" and a "loss_weight" that contradict each other'),
    ("train", '{"messages": [U, {"role": "assistant", "content": "a", "loss_weight": 2, '
     '"training": false}]}', 'turn 2 has a "loss_weight" and a "training" that contradict'),
    ("half", '{"messages": [U, {"role": "assistant", "content": "a", "training": 0.5}]}',
     'turn 2 has 0.5 for "training"; expected 0 or 1, false or true'),
    ("record", '{"messages": [U, A], "loss_weight": -0.5}', RECORD.format("-0.5")),
    ("record", '{"text": "a", "loss_weight": "much"}', RECORD.format("a string")),
    ("record", '{"text": "a", "loss_weight": "nan"}', RECORD.format("nan")),
    ("record", '{"prompt": "q", "completion": "a", "loss_weight": {"a": 1}}',
     RECORD.format("an object")),
    ("record", '{"question": "q", "answer": "a", "loss_weight": 1e12}',
     RECORD.format(r"1000000000000\.0")),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "record", "message"), BAD)
def test_a_weight_that_is_none_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, record: str, message: str
) -> None:
    path = tmp_path / "bad.jsonl"
    user, said = '{"role": "user", "content": "q"}', '{"role": "assistant", "content": "a"}'
    path.write_text(record.replace("U,", f"{user},").replace(" A]", f" {said}]") + "\n")
    code, out, err = run("check", "--data", str(path), capsys=capsys)
    assert (code, out) == (2, ""), err
    assert re.match(f"error: {re.escape(str(path))}:1: (?:{message})", err), err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        ([{"messages": [ASK, answer("a", loss_weight=0)]}], (),
         "no supervised token is left in 1 rows: all have the weight 0"),
        ([{"text": "a b", "loss_weight": 0}] * 2, (),
         "no supervised token is left in 2 rows: all have the weight 0"),
        ([{"messages": [ASK, answer("a", loss_weight=2)]}], ("--train-on", "all"),
         "turn 2 has a loss_weight of its own; expected none with --train-on all"),
        ([{"text": "good", "label": "a", "loss_weight": 2}, {"text": "bad", "label": "b"}],
         ("--task", "classify"), 'a "loss_weight"; expected none beside a label'),
        ([{"tokens": ["a"], "tags": ["O"], "loss_weight": 0.5}], ("--task", "tag"),
         'a "loss_weight"; expected none beside a label'),
    ],
)  # fmt: skip
def test_weights_that_cannot_be_learnt_by_are_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    records: list[dict[str, Any]],
    options: tuple[str, ...],
    message: str,
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    code, _, err = run("check", "--data", str(path), *options, capsys=capsys)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, len(errors)) == (2, 1), err
    assert message in errors[0]


def test_bad_weights_can_be_skipped(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a", "loss_weight": -1}\n{"text": "b c", "loss_weight": 2}\n')
    samples = load_samples(path, options=RecordOptions(skip_bad_lines=True))
    assert (samples.skipped, len(samples.items)) == (1, 1)
    with pytest.raises(DataError, match="the record has -1"):
        load_samples(path)


# ---------------------------------------------------------------- what is shown


def test_check_marks_the_turns_with_their_weight(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [ASK, answer("six", weight=0), ASK, answer("one", weight=0.5), ASK, answer("two")]
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": turns}) + "\n")
    page = tmp_path / "page.html"
    shown = ("--data", str(path), "--chat-template", "vicuna", "--html", str(page))
    code, out, _ = run("check", *shown, capsys=capsys)
    assert code == 0
    assert "ASSISTANT: six</s>USER: ask ASSISTANT:⟦×0.5  one</s>⟧USER: ask ASSISTANT:⟦ two" in out
    html = page.read_text()
    assert re.search(r'<span class="learnt weighted" title="\d+, loss ×0.5">', html)
    assert re.search(r'<span class="learnt" title="\d+">', html)
    assert "Where the line is dashed it is weighted" in html
